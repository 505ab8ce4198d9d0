"""Training in one call from Python."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvae.data import Dataset, as_dataset
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.runs import directory, loop
from jaxvae.runs.callbacks import Callback, expect_callbacks
from jaxvae.runs.config import RunConfig, components, configured, read_config, updated
from jaxvae.runs.data import load_run_data, prepared, takes_missing
from jaxvae.runs.files import IN_PYTHON, read_metrics
from jaxvae.runs.progress import Progress
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState
from jaxvae.validation import expect_config


class FitResult(NamedTuple):
    """The result of `fit`.

    Attributes:
      params: the parameters of the model: their moving average, if there is one.
      state: the training state after the last epoch.
      history: a dict for each epoch, as in metrics.jsonl: `epoch`, `step`, `train` and `test`
        metrics in nats per image, `seconds`.
    """

    params: Params
    state: TrainState
    history: list[dict[str, Any]]


def fit(
    data: str | Dataset | tuple[Any, ...] | np.ndarray,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
) -> FitResult:
    """Train a model, with a progress display on a terminal or in a notebook.

    With a run directory, the same call resumes a training that was killed or interrupted. It may
    then have other `epochs`, `patience`, `learning_rate`, `schedule`, `clip_norm` and `skip_norm`,
    as `jaxvae train --resume`; config.json records the changes.

    Args:
      data: a name or path, as for `jaxvae.load_data`; a `jaxvae.data.Dataset`; a pair
        (train images, test images) or ((train images, train labels), (test images, test labels)),
        as `jaxvae.load_data` returns them, where labels are classes [N], or covariates
        [N, covariates] on which the model is conditional; or an array of images, of which every
        tenth is held out as a test image. Images are uint8 or floats in [0, 1], of shape
        [N, height, width, channels] or [N, height, width]; other examples are numbers of shape
        [N, features], or [N, ...] of more than four axes. In place of an array, any source with
        `__len__` and `__getitem__`, such as a data set of Hugging Face, PyTorch or Grain.
      model: the architecture, by default the notebook's; its `image_shape` and
        `num_covariates` are taken from the data.
      train: the training configuration, by default that of `jaxvae train`.
      seed: seed of all random numbers.
      run_dir: directory for configuration, metrics and checkpoints; None: nothing is written.
      callbacks: callbacks of the training loop.
      progress: whether to show a progress bar and a line for each epoch.

    Returns:
      The parameters, the last state and the metrics of every epoch.

    Raises:
      InputError: wrong data, or a run directory that holds another run.
      TrainingFailed: a loss or a parameter became NaN or infinite, or the directory cannot be
        written.
      Preempted: SIGTERM or Ctrl-C stopped the training, which was saved to the run directory, if
        there is one.
    """
    model, train = model or ModelConfig(), train or TrainConfig()
    expect_config("model", model, ModelConfig)
    expect_config("train", train, TrainConfig)
    callbacks = expect_callbacks(callbacks)
    config = RunConfig(data=IN_PYTHON, seed=seed, model=model, train=train)
    folder = None if run_dir is None else Path(run_dir)
    history = _History()
    shown = [Progress()] if progress else []
    with shown[0].preparing() if progress else nullcontext():
        if isinstance(data, str):
            config = configured({"data": data}, config)
            dataset = load_run_data(config, config.data)
        else:
            dataset = prepared(as_dataset(data, missing=takes_missing(config)), config)
        if folder is None:
            config = directory.with_shape(config, dataset)
        else:
            resume = (folder / "config.json").exists()
            if resume:
                own = components(config)
                flags = {**vars(model), **vars(train), "seed": seed}
                del flags["image_shape"], flags["num_covariates"]  # taken from the data
                recorded = read_config(folder, to_train=True, **own)
                config = replace(updated(recorded, flags, folder, caller="fit"), data=config.data)
            config = directory.start(folder, config, dataset, resume=resume)
        state = loop.train(folder, config, dataset, callbacks=[*shown, *callbacks, history])
    records = history.records if folder is None else read_metrics(folder)
    return FitResult(state.eval_params, state, records)


class _History(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        self.records.append(record)
