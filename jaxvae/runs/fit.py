"""Training from Python in one call."""

from collections.abc import Iterable
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
from jaxvae.runs.data import IN_PYTHON, load_run_data, with_binarization
from jaxvae.runs.files import read_metrics
from jaxvae.runs.progress import Progress
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState
from jaxvae.validation import expect_config


class FitResult(NamedTuple):
    """What a training returns.

    Attributes:
      params: the model's parameters: their moving average, where there is one.
      state: the state after the last epoch.
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
    """Train a model, and show how it goes on a terminal or in a notebook.

    With a run directory, a training that was killed or interrupted is resumed by the same call.

    Args:
      data: a name or path, as of `jaxvae.load_data`; a `jaxvae.data.Dataset`; a pair of training
        and test images; or an array of images, of which every tenth is held out. Images are uint8
        or floats in [0, 1], [N, height, width, channels] or [N, height, width].
      model: the architecture, by default the notebook's; its `image_shape` is taken from the data.
      train: how it is trained; by default for ten epochs.
      seed: of every random number.
      run_dir: where to keep configuration, metrics and checkpoints; None: nowhere.
      callbacks: what follows the training.
      progress: whether to show a bar, and a line for each epoch.

    Returns:
      The parameters, the last state and the metrics of every epoch.

    Raises:
      InputError: wrong data, or a run directory that holds another run.
      TrainingFailed: a loss or a parameter became NaN or infinite, or the directory cannot be
        written.
      Preempted: told to stop by SIGTERM or Ctrl-C, and saved, where there is a run directory.
    """
    model, train = model or ModelConfig(), train or TrainConfig()
    expect_config("model", model, ModelConfig)
    expect_config("train", train, TrainConfig)
    callbacks = expect_callbacks(callbacks)
    config = RunConfig(data=IN_PYTHON, seed=seed, model=model, train=train)
    if isinstance(data, str):
        config = configured({"data": data}, config)
    found = load_run_data(config, config.data) if isinstance(data, str) else as_dataset(data)
    if not isinstance(data, str):
        found = with_binarization(found, config)
    folder = None if run_dir is None else Path(run_dir)
    history = _History()
    shown = [Progress()] if progress else []
    if folder is None:
        config = directory.with_shape(config, found)
    else:
        resume = (folder / "config.json").exists()
        if resume:
            own = components(config)
            flags = {**vars(model), **vars(train), "seed": seed}
            del flags["image_shape"]
            recorded = read_config(folder, to_train=True, **own)
            config = replace(updated(recorded, flags, folder), data=config.data)
        config = directory.start(folder, config, found, resume=resume)
    state = loop.train(folder, config, found, callbacks=[*shown, *callbacks, history])
    records = history.records if folder is None else read_metrics(folder)
    return FitResult(state.eval_params, state, records)


class _History(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def epoch(self, record: dict[str, Any], params: Params) -> None:
        self.records.append(record)
