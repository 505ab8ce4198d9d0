"""Numbers that go wrong end a training before anything of it is saved.

Of many models that are trained at once, they end that of one: the others are trained on.
"""

import warnings
from collections.abc import Mapping
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
from jaxvae.training.step import shuffle

DIVERGED = "diverged.json"
_SHOWN = 8  # of the images of a batch; diverged.json has all of them


@dataclass(frozen=True)
class DivergenceCheck:
    """Looks at what a training comes to.

    run_dir: of the run, or of the sweep; None: nothing is written.
    images, steps: of an epoch.
    models: the names of those that are stacked in the state, if they are.
    diverged: the positions in `models` of those that have diverged.
    """

    run_dir: Path | None
    images: int
    steps: int
    models: tuple[str, ...] = ()
    diverged: set[int] = field(default_factory=set)

    def check_losses(self, state: TrainState, count: int, finite: Any) -> None:
        """Raises TrainingFailed unless every loss of a dispatch was finite.

        The message names the step, and diverged.json all the images of its batch. Where one of
        many models has diverged, a warning of the category `jaxvae.errors.Diverged` has the
        message; TrainingFailed is raised when none is left.

        Args:
          state: after the dispatch.
          count: how many steps it took.
          finite: how many of them came before the first that was not, as of `train_steps`.
        """
        finite = np.ravel(finite)
        for model in map(int, np.flatnonzero(finite < count)):
            if model in self.diverged:
                continue
            taken = int(np.ravel(state.step)[0]) - count + int(finite[model])
            epoch, batch = divmod(taken, self.steps)
            one = state
            if self.models:
                # Moved first: a slice of what several devices share has them wait for each other.
                ours = jax.device_put(state, jax.local_devices()[0])
                one = jax.tree.map(lambda x, i=model: x[i], ours)
            at_start = replace(one, step=jnp.full_like(one.step, epoch * self.steps))
            rows = np.asarray(shuffle(at_start, self.images))[batch].tolist()
            shown = ", ".join(map(str, rows[:_SHOWN])) + ", ..." * (len(rows) > _SHOWN)
            self._fail(
                model,
                {"step": taken + 1, "epoch": epoch + 1, "batch": batch + 1, "images": rows},
                f"the loss {self._of(model)}is NaN or infinite at step {taken + 1} "
                f"(epoch {epoch + 1}, batch {batch + 1}: "
                f"training images {shown}{self._where(model)})",
            )

    def check_finite(self, state: TrainState, measured: Mapping[str, Any]) -> None:
        """Raises as `check_losses` unless all that is to be saved after a step is finite."""
        good = {f"the test {name}": np.isfinite(np.ravel(x)) for name, x in measured.items()}
        parameters = (state.params, state.opt_state)
        good["a parameter"] = np.ravel(_finite(parameters, bool(self.models)))
        step = int(np.ravel(state.step)[0])
        for what, is_good in good.items():
            for model in map(int, np.flatnonzero(~is_good)):
                if model not in self.diverged:
                    self._fail(
                        model,
                        {"step": step, "not_finite": what},
                        f"{what} {self._of(model)}is NaN or infinite after step {step}",
                    )

    def mask_diverged(self, values: Any) -> Any:
        """A metric as float64, with NaN for the models that have diverged."""
        values = np.array(values, np.float64)
        if self.diverged:
            values[list(self.diverged)] = np.nan
        return values

    def _fail(self, model: int, record: dict[str, Any], message: str) -> None:
        if self.models:
            record["model"] = self.models[model]
        folder = self._folder(model)
        if folder is not None and is_first():
            with suppress(InputError):  # a disk that is full as well
                write_json(folder / DIVERGED, record)
        message = f"{message}; {self._advice(model)}"
        if not self.models:
            raise TrainingFailed(message)
        self.diverged.add(model)
        if len(self.diverged) == len(self.models):
            raise TrainingFailed(f"{message}; none of the models is left")
        warnings.warn(f"{message}; the other models are trained on", Diverged, stacklevel=2)

    def _folder(self, model: int) -> Path | None:
        return self.run_dir / self.models[model] if self.run_dir and self.models else self.run_dir

    def _where(self, model: int) -> str:
        folder = self._folder(model)
        return f"; all in {folder / DIVERGED}" if folder else ""

    def _of(self, model: int) -> str:
        return f"of {self.models[model]} " if self.models else ""

    def _advice(self, model: int) -> str:
        folder = self._folder(model)
        saved = steps_of(folder) if folder else []
        good = f"the last good checkpoint is that of step {saved[-1]}" if saved else "none is saved"
        where = f", in {folder}" if folder else ""
        return (
            f"{good}{where}; train anew with a lower --learning-rate, with "
            "--clip-norm 1, or without these images"
        )


# One program: where devices hold parts of the parameters they wait for each other in it, and
# two such programs at once could keep the threads from each other that they wait for.
@partial(jax.jit, static_argnames="stacked")
def _finite(tree: Any, stacked: bool) -> jax.Array:
    """Whether all numbers of a tree are finite, for each model of those that are stacked."""

    def all_of(x: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(x), axis=tuple(range(int(stacked), x.ndim)))

    return jax.tree.reduce(jnp.logical_and, jax.tree.map(all_of, tree))
