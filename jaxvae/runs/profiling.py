"""Profiling of training with JAX's profiler."""

from collections.abc import Mapping

import jax

from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.callbacks import Callback, Training


class Profiler(Callback):
    """Write a profiler trace of the second dispatch to RUN_DIR/profile.

    The first dispatch compiles. If there is no second one, the trace covers the rest of the
    training.
    """

    def start(self, training: Training) -> None:
        """Check that there is a run directory."""
        if training.run_dir is None:
            raise InputError(
                "the profiler trace is written to the run directory: expected a run_dir"
            )
        self._folder, self._dispatches = training.run_dir / "profile", 0

    def dispatch(self, images: int, metrics: Mapping[str, float]) -> None:
        """Start the trace after the first dispatch and stop it after the second."""
        self._dispatches += 1
        if self._dispatches == 1:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would fill the trace
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
        elif self._dispatches == 2:
            jax.profiler.stop_trace()

    def end(self, params: Params | None) -> None:
        """Stop the trace if it is still running."""
        if self._dispatches == 1:
            jax.profiler.stop_trace()
