"""Numbers that go wrong end a training before anything of it is saved."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.devices.processes import is_first
from jaxvae.errors import InputError, TrainingFailed
from jaxvae.runs.checkpoints import steps_of
from jaxvae.runs.files import write_json
from jaxvae.training.state import TrainState
from jaxvae.training.step import shuffle

_SHOWN = 8  # of the images of a batch; diverged.json has all of them


@dataclass(frozen=True)
class Watch:
    """Looks at what a training comes to.

    run_dir: of the run, or of the sweep.
    images, steps: of an epoch.
    models: the names of those that are stacked in the state, if they are.
    """

    run_dir: Path
    images: int
    steps: int
    models: tuple[str, ...] = ()

    def expect_losses(self, state: TrainState, count: int, finite: Any) -> None:
        """Raises TrainingFailed unless every loss of a dispatch was finite.

        The message names the step, and diverged.json all the images of its batch.

        Args:
          state: after the dispatch.
          count: how many steps it took.
          finite: how many of them came before the first that was not, as of `train_steps`.
        """
        finite = np.ravel(finite)
        if (finite == count).all():
            return
        model = int(np.argmin(finite))
        taken = int(np.ravel(state.step)[0]) - count + int(finite[model])
        epoch, batch = divmod(taken, self.steps)
        one = jax.tree.map(lambda x: x[model], state) if self.models else state
        at_start = replace(one, step=jnp.full_like(one.step, epoch * self.steps))
        rows = np.asarray(shuffle(at_start, self.images))[batch].tolist()
        record = {"step": taken + 1, "epoch": epoch + 1, "batch": batch + 1, "images": rows}
        if self.models:
            record["model"] = self.models[model]
        if is_first():
            with suppress(InputError):  # a disk that is full as well
                write_json(self.run_dir / "diverged.json", record)
        shown = ", ".join(map(str, rows[:_SHOWN])) + ", ..." * (len(rows) > _SHOWN)
        raise TrainingFailed(
            f"the loss {self._of(model)}is NaN or infinite at step {taken + 1} (epoch {epoch + 1}, "
            f"batch {batch + 1}: training images {shown}; all in "
            f"{self.run_dir / 'diverged.json'}); {self._advice(model)}"
        )

    def expect_numbers(self, state: TrainState, measured: Mapping[str, Any]) -> None:
        """Raises TrainingFailed unless all that is to be saved after a step is finite."""
        good = {name: np.isfinite(np.ravel(x)) for name, x in measured.items()}
        good["parameters"] = np.ravel(_finite((state.params, state.opt_state), bool(self.models)))
        name, bad = next(((n, ~g) for n, g in good.items() if not g.all()), ("", np.zeros(1)))
        if name:
            model = int(np.argmax(bad))
            what = "a parameter" if name == "parameters" else f"the test {name}"
            raise TrainingFailed(
                f"{what} {self._of(model)}is NaN or infinite after step "
                f"{int(np.ravel(state.step)[0])}; {self._advice(model)}"
            )

    def _of(self, model: int) -> str:
        return f"of {self.models[model]} " if self.models else ""

    def _advice(self, model: int) -> str:
        saved = steps_of(self.run_dir / self.models[model] if self.models else self.run_dir)
        good = f"the last good checkpoint is that of step {saved[-1]}" if saved else "none is saved"
        return (
            f"{good}, in {self.run_dir}; train anew with a lower --learning-rate, with "
            "--clip-norm 1, or without these images"
        )


def _finite(tree: Any, stacked: bool) -> jax.Array:
    """Whether all numbers of a tree are finite, for each model of those that are stacked."""

    def all_of(x: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(x), axis=tuple(range(int(stacked), x.ndim)))

    return jax.tree.reduce(jnp.logical_and, jax.tree.map(all_of, tree))
