"""Callbacks of the training loop: the `Callback` protocol, early stopping, animation frames."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxvae.data import Dataset
from jaxvae.errors import InputError, shown
from jaxvae.models.vae import Params
from jaxvae.runs.config import RunConfig

_METHODS = ("start", "dispatch", "epoch", "end")


@dataclass(frozen=True)
class Training:
    """What a callback receives when training starts.

    Attributes:
      config: configuration of the run; in a sweep, of the first model.
      data: the data set.
      epochs: total number of epochs.
      images: training images per epoch, summed over the models of a sweep.
      step: steps that were taken before; 0 unless the run is resumed.
      done: number of finished epochs.
      history: the lines of metrics.jsonl of the finished epochs; lost lines are missing.
      params: the parameters at the start; in a sweep, those of all models, stacked.
      run_dir: the run directory, or None.
      configs: the configuration of each model of a sweep, by its name, which is also that of its
        subfolder; of a single model, which has the name "".
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
    configs: Mapping[str, RunConfig] = field(default_factory=dict)


class Callback:
    """Base class of callbacks; each method does nothing unless it is overridden.

    With several processes, only the first process calls callbacks.
    """

    def start(self, training: Training) -> bool | None:
        """Run before the first step.

        Args:
          training: the training that starts.

        Returns:
          True to end the training before its first step.
        """

    def dispatch(self, images: int, metrics: Mapping[str, float]) -> None:
        """Run after a dispatch, which is one or more steps.

        Args:
          images: number of images in these steps.
          metrics: `loss`, `elbo`, `log_likelihood` and `kl`: means over these images, in nats per
            image.
        """

    def epoch(self, record: dict[str, Any], params: Params) -> bool | None:
        """Run after every epoch, before its checkpoint.

        After a crash an epoch may be reported twice.

        Args:
          record: the line of the epoch in metrics.jsonl.
          params: the parameters used for evaluation; in a sweep, those of all models, stacked.
            Their buffers are donated to the next step: copy what you keep.

        Returns:
          True to end the training after the checkpoint of this epoch.
        """

    def end(self, params: Params | None) -> None:
        """Run when the training ends.

        Args:
          params: the last parameters; None if an error or a signal ended the training.
        """


def expect_callbacks(callbacks: Iterable[Any]) -> list[Callback]:
    """Return callbacks as a list.

    Args:
      callbacks: objects with the methods of `Callback`.

    Returns:
      The callbacks.

    Raises:
      InputError: an object lacks a method of `Callback`.
    """
    callbacks = list(callbacks)
    for one in callbacks:
        if inspect.isclass(one) or not all(callable(getattr(one, n, None)) for n in _METHODS):
            raise InputError(
                f"callback is {shown(one)}: expected an object with the methods "
                f"{', '.join(_METHODS)}; subclass `jaxvae.Callback`"
            )
    return callbacks


@dataclass
class EarlyStopping(Callback):
    """End the training when the test ELBO stops improving.

    Attributes:
      patience: epochs without a better test ELBO after which training ends.
    """

    patience: int

    def start(self, training: Training) -> bool:
        """Read the finished epochs; return whether training has already ended."""
        self._elbos = {record["epoch"]: record["test"]["elbo"] for record in training.history}
        return self._is_over(training.done)

    def epoch(self, record: dict[str, Any], params: Params) -> bool:
        """Return whether the best epoch was `patience` epochs ago."""
        self._elbos[record["epoch"]] = record["test"]["elbo"]
        return self._is_over(record["epoch"])

    def _is_over(self, epoch: int) -> bool:
        if not self._elbos:
            return False
        best = max(self._elbos, key=self._elbos.__getitem__)
        return epoch - best >= self.patience


class AnimationFrames(Callback):
    """Write the frames of figures/manifold.gif to RUN_DIR/manifolds."""

    def start(self, training: Training) -> None:
        """Write the frame of the untrained model."""
        if training.run_dir is None:
            raise InputError(
                "animation frames are written to the run directory: expected a run_dir"
            )
        self._run_dir = training.run_dir
        if not training.step:
            self.epoch({"epoch": 0}, training.params)

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        """Write the frame of an epoch, if the animation shows this epoch."""
        from jaxvae.figures.animation import keep_frame  # imports matplotlib, which is slow

        keep_frame(self._run_dir, record, params)
