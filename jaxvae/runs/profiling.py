"""A trace of JAX's profiler."""

from collections.abc import Mapping

import jax

from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.callbacks import Callback, Training


class Profiler(Callback):
    """Traces the second dispatch of steps into RUN_DIR/profile.

    The first one compiles. Of a training that has no second, what follows the first is traced.
    """

    def start(self, training: Training) -> None:
        """Trace nothing yet."""
        if training.run_dir is None:
            raise InputError("the profiler's trace lies in the run directory: expected a run_dir")
        self._folder, self._dispatches = training.run_dir / "profile", 0

    def dispatch(self, images: int, metrics: Mapping[str, float]) -> None:
        """Start the trace after the first dispatch, stop it after the second."""
        self._dispatches += 1
        if self._dispatches == 1:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the calls of Python would fill the trace
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
        elif self._dispatches == 2:
            jax.profiler.stop_trace()

    def end(self, params: Params | None) -> None:
        """Stop the trace, where it is still running."""
        if self._dispatches == 1:
            jax.profiler.stop_trace()
