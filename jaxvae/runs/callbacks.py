"""What may follow a training: the `Callback` protocol, and early stopping."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.config import RunConfig
from jaxvae.validation import shown

_METHODS = ("start", "dispatch", "epoch", "end")


@dataclass(frozen=True)
class Training:
    """A training that starts, as callbacks are told of it.

    Attributes:
      config: the run's; of many models, the first one's.
      data: what it is trained on.
      epochs: how many it has in all.
      images: how many an epoch has, over all models.
      step: how many steps were taken before, where it is resumed.
      done: how many epochs are over.
      history: their lines of metrics.jsonl, as far as the file has them.
      params: the parameters at the start; of many models, stacked.
      run_dir: its directory, if it has one.
    """

    config: RunConfig
    data: Dataset
    epochs: int
    images: int
    step: int
    done: int
    history: Sequence[dict[str, Any]]
    params: Params
    run_dir: Path | None


class Callback:
    """Follows a training; each method does nothing unless it is overridden.

    Of several processes, only the first one calls callbacks.
    """

    def start(self, training: Training) -> bool | None:
        """Called before the first step.

        Returns:
          True where the training is over already, and no step is to be taken.
        """

    def dispatch(self, images: int, metrics: Mapping[str, float]) -> None:
        """Called after some steps that were dispatched together.

        Args:
          images: how many images they took.
          metrics: `loss`, `elbo`, `log_likelihood`, `kl`: means over them, nats per image.
        """

    def epoch(self, record: dict[str, Any], params: Params) -> bool | None:
        """Called after every epoch, before its checkpoint: after a crash it may be called twice.

        Args:
          record: the epoch's line of metrics.jsonl.
          params: the parameters to evaluate with; of many models, stacked. Their memory is taken
            back afterwards: copy what is to be kept.

        Returns:
          True to end the training once this epoch is saved.
        """

    def end(self, params: Params | None) -> None:
        """Called when the training is over.

        Args:
          params: the last parameters; None where an error or a signal ended the training.
        """


def expect_callbacks(callbacks: Iterable[Any]) -> list[Callback]:
    """Return callbacks as a list.

    Raises:
      InputError: one has not the methods of a `Callback`.
    """
    callbacks = list(callbacks)
    for one in callbacks:
        if inspect.isclass(one) or not all(callable(getattr(one, n, None)) for n in _METHODS):
            raise InputError(
                f"callback is {shown(one)}: expected an object with the methods "
                f"{', '.join(_METHODS)}, as of `jaxvae.Callback`"
            )
    return callbacks


@dataclass
class EarlyStopping(Callback):
    """Ends a training whose test ELBO does not improve any more.

    Attributes:
      patience: epochs without a better test ELBO after which it ends.
    """

    patience: int

    def start(self, training: Training) -> bool:
        """Take up the epochs that are over; return whether they ended the training."""
        self._elbos = {record["epoch"]: record["test"]["elbo"] for record in training.history}
        return self._is_over(training.done)

    def epoch(self, record: dict[str, Any], params: Params) -> bool:
        """Return whether the best epoch is `patience` epochs ago."""
        self._elbos[record["epoch"]] = record["test"]["elbo"]
        return self._is_over(record["epoch"])

    def _is_over(self, epoch: int) -> bool:
        if not self._elbos:
            return False
        best = max(self._elbos, key=self._elbos.__getitem__)
        return epoch - best >= self.patience


class AnimationFrames(Callback):
    """Keeps the frames of figures/manifold.gif, in RUN_DIR/manifolds."""

    def start(self, training: Training) -> None:
        """Keep the frame of the untrained model."""
        if training.run_dir is None:
            raise InputError("the frames lie in the run directory: expected a run_dir")
        self._run_dir = training.run_dir
        if not training.step:
            self.epoch({"epoch": 0}, training.params)

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        """Keep the frame of an epoch, if it is one to keep."""
        from jaxvae.figures.animation import keep_frame  # matplotlib, only where it is drawn

        keep_frame(self._run_dir, record, params)
