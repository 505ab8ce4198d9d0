"""Detection of divergence: training ends before a NaN or infinity is saved.

In a sweep only the model that diverged ends; the training of the others continues.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.devices.processes import is_first
from jaxvae.errors import Diverged, InputError, TrainingFailed
from jaxvae.runs.checkpoints import steps_of
from jaxvae.runs.files import write_json
from jaxvae.training.state import TrainState

DIVERGED = "diverged.json"
_SHOWN = 8  # images of a batch in a message; diverged.json lists all of them


@dataclass(frozen=True)
class DivergenceCheck:
    """Check that losses, parameters and metrics are finite.

    Attributes:
      run_dir: directory of the run or of the sweep; None: nothing is written.
      batches: the batches of an epoch, as indices of training images, from the state at its start
        and the position of the model in `models`.
      steps: steps per epoch.
      models: names of the models stacked in the state; empty for a single model.
      diverged: positions in `models` of the models that have diverged.
    """

    run_dir: Path | None
    batches: Callable[[TrainState, int], jax.Array]
    steps: int
    models: tuple[str, ...] = ()
    diverged: set[int] = field(default_factory=set)

    def check_losses(self, state: TrainState, count: int, finite: Any) -> None:
        """Check that every loss of a dispatch was finite.

        The message names the step, and diverged.json lists all images of its batch. In a sweep a
        warning of the category `jaxvae.errors.Diverged` has the message, as long as another model
        is left.

        Args:
          state: training state after the dispatch.
          count: number of steps of the dispatch.
          finite: number of steps before the first loss that was not finite, from `train_steps`.

        Raises:
          TrainingFailed: a loss is NaN or infinite, in a sweep for every model.
        """
        finite = np.ravel(finite)
        for model in map(int, np.flatnonzero(finite < count)):
            if model in self.diverged:
                continue
            taken = int(np.ravel(state.step)[0]) - count + int(finite[model])
            epoch, batch = divmod(taken, self.steps)
            one = state
            if self.models:
                # Moved to one device first: slicing a sharded array synchronises all devices.
                local = jax.device_put(state, jax.local_devices()[0])
                one = jax.tree.map(lambda x, i=model: x[i], local)
            at_start = replace(one, step=jnp.full_like(one.step, epoch * self.steps))
            rows = np.asarray(self.batches(at_start, model))[batch].tolist()
            shown = ", ".join(map(str, rows[:_SHOWN])) + ", ..." * (len(rows) > _SHOWN)
            self._fail(
                model,
                {"step": taken + 1, "epoch": epoch + 1, "batch": batch + 1, "images": rows},
                f"the loss {self._of(model)}is NaN or infinite at step {taken + 1} "
                f"(epoch {epoch + 1}, batch {batch + 1}: "
                f"training images {shown}{self._where(model)})",
            )

    def check_finite(self, state: TrainState, measured: Mapping[str, Any]) -> None:
        """Check that everything that is saved after a step is finite.

        If it is, a single run has no diverged.json of an earlier attempt any more.

        Args:
          state: training state to be saved.
          measured: test metrics to be saved.

        Raises:
          TrainingFailed: a parameter, the optimizer's state or a metric is NaN or infinite, in a
            sweep for every model.
        """
        finite = {f"the test {name}": np.isfinite(np.ravel(x)) for name, x in measured.items()}
        parameters = (state.params, state.opt_state)
        finite["a parameter"] = np.ravel(_finite(parameters, bool(self.models)))
        step = int(np.ravel(state.step)[0])
        for what, is_finite in finite.items():
            for model in map(int, np.flatnonzero(~is_finite)):
                if model not in self.diverged:
                    self._fail(
                        model,
                        {"step": step, "not_finite": what},
                        f"{what} {self._of(model)}is NaN or infinite after step {step}",
                    )
        if self.run_dir and not self.models and is_first():
            with suppress(OSError):
                (self.run_dir / DIVERGED).unlink(missing_ok=True)

    def mask_diverged(self, values: Any) -> Any:
        """Return a metric as float64, with NaN for the models that have diverged."""
        values = np.array(values, np.float64)
        if self.diverged:
            values[list(self.diverged)] = np.nan
        return values

    def _fail(self, model: int, record: dict[str, Any], message: str) -> None:
        if self.models:
            record["model"] = self.models[model]
        folder = self._folder(model)
        if folder is not None and is_first():
            with suppress(InputError):  # the disk may be full
                write_json(folder / DIVERGED, record)
        message = f"{message}; {self._advice(model)}"
        if not self.models:
            raise TrainingFailed(message)
        self.diverged.add(model)
        if len(self.diverged) == len(self.models):
            raise TrainingFailed(f"{message}; all models have diverged")
        warnings.warn(f"{message}; the other models continue", Diverged, stacklevel=2)

    def _folder(self, model: int) -> Path | None:
        return self.run_dir / self.models[model] if self.run_dir and self.models else self.run_dir

    def _where(self, model: int) -> str:
        folder = self._folder(model)
        return f"; all are listed in {folder / DIVERGED}" if folder else ""

    def _of(self, model: int) -> str:
        return f"of {self.models[model]} " if self.models else ""

    def _advice(self, model: int) -> str:
        folder = self._folder(model)
        saved = steps_of(folder) if folder else []
        where = f" in {folder}" if folder else ""
        last, again = "no checkpoint was saved", "train again"
        if saved:
            last = f"the last good checkpoint is step {saved[-1]}"
            again = again if self.models else "resume"
        return (
            f"{last}{where}; {again} with a lower --learning-rate or with --clip-norm 1, or train "
            "without these images"
        )


# One jitted program, not one for each array: programs over sharded arrays synchronise the devices,
# and several of them in flight at once can deadlock on the CPU's thread pool.
@partial(jax.jit, static_argnames="stacked")
def _finite(tree: Any, stacked: bool) -> jax.Array:
    """Return whether all numbers of a tree are finite; [models] if models are stacked in it."""

    def all_of(x: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(x), axis=tuple(range(int(stacked), x.ndim)))

    return jax.tree.reduce(jnp.logical_and, jax.tree.map(all_of, tree))
