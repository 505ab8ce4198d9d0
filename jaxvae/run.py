"""A run is a directory: what it was told, what it measured, what it learned and what it drew.

    config.json      what it was told
    metrics.jsonl    a line per epoch: epoch, step, train and test metrics, seconds
    checkpoints/     the latest epoch and the best one
    figures/         what `jaxvae figures` draws

It can be killed at any instant: an epoch counts once its checkpoint is whole, and a resumed run
repeats what came after the last one that is.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvae.checkpoint import open_checkpoints, restore, write
from jaxvae.config import ModelConfig, TrainConfig, _Config
from jaxvae.data import Dataset, load_dataset
from jaxvae.errors import InputError
from jaxvae.evaluation import evaluate
from jaxvae.objectives import negative_elbo
from jaxvae.progress import Progress
from jaxvae.training import Objective, TrainState, create_train_state, shuffle, train_steps

_IMAGES_PER_DISPATCH = 1024  # between two movements of the progress bar


@dataclass(frozen=True)
class RunConfig(_Config):
    """What a run is told: its data, its seed, its model and how it is trained."""

    data: str = "mnist-5k"
    data_dir: str | None = None
    manual_dir: str | None = None
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed!r}: expected a whole number from 0 to 2**32 - 1")
        for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, kind.from_dict(getattr(self, name)))


def load_run_data(config: RunConfig) -> Dataset:
    """The data set that a run was told to use."""
    return load_dataset(config.data, data_dir=config.data_dir, manual_dir=config.manual_dir)


def start(run_dir: Path, config: RunConfig) -> None:
    """Make a new run directory. Raises InputError if there is a run in it already."""
    if (run_dir / "config.json").exists():
        raise InputError(
            f"{run_dir} already holds a run: go on with it (--resume), or choose another --run-dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(run_dir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}") from None


def read_config(run_dir: Path) -> RunConfig:
    """What a run was told. Raises InputError if the directory is not a run."""
    try:
        return RunConfig.from_dict(json.loads((run_dir / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run_dir} is not a run directory: expected one made by `jaxvae train`, "
            "with a config.json"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, InputError, TypeError) as error:
        raise InputError(f"{run_dir / 'config.json'} is damaged: {error}") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The measurements of every finished epoch, in order."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    # A line without its end was cut off by a kill.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(
    run_dir: Path,
    config: RunConfig,
    data: Dataset,
    *,
    objective: Objective = negative_elbo,
    progress: Progress | None = None,
) -> TrainState:
    """Train from the run's last whole checkpoint, or from the start, to its last epoch.

    Every epoch ends with the test metrics, a line in metrics.jsonl and a checkpoint.

    Args:
      run_dir: made by `start`.
      config: what it was told; its `train.epochs` may have grown since.
      data: as `load_run_data` gives it.
      objective: what to minimise; by default the negative ELBO.
      progress: where to show how it goes.
    Returns:
      The state after the last epoch.
    Raises:
      InputError: fewer training images than one batch.
    """
    progress = progress or Progress(quiet=True)
    train_images, test_images = jax.device_put((data.train_images, data.test_images))
    train_key, test_key = jax.random.split(jax.random.key(config.seed))
    with open_checkpoints(run_dir) as checkpoints:
        if checkpoints.latest_step() is None:
            state = create_train_state(train_key, config.model, config.train)
        else:
            state = replace(restore(run_dir), config=config.train)
        batches_per_epoch = len(shuffle(state, len(train_images)))
        done = int(state.step) // batches_per_epoch
        history = read_metrics(run_dir)[:done]
        _write_whole(run_dir / "metrics.jsonl", "".join(map(_line, history)))
        for epoch in range(done + 1, config.train.epochs + 1):
            began = time.perf_counter()
            with progress.epoch(epoch, config.train.epochs, len(train_images)) as shown:
                state, metrics = _train_one_epoch(state, train_images, objective, shown)
                test = evaluate(state.params, test_key, test_images)
                record = {
                    "epoch": epoch,
                    "step": int(state.step),
                    "train": metrics,
                    "test": {name: float(value) for name, value in test.items()},
                    "seconds": round(time.perf_counter() - began, 3),
                }
                shown.finish(record)
            # The line before the checkpoint: a kill in between leaves a line too many, which
            # the resumed run takes back, and never one too few.
            _append(run_dir / "metrics.jsonl", _line(record))
            write(checkpoints, state, record["test"])
    return state


def _train_one_epoch(
    state: TrainState, images: jax.Array, objective: Objective, shown: Any
) -> tuple[TrainState, dict[str, float]]:
    batches = shuffle(state, len(images))
    steps, batch_size = batches.shape
    at_once = max(1, _IMAGES_PER_DISPATCH // batch_size)
    totals: dict[str, float] = {}
    for first in range(0, steps, at_once):
        last = min(first + at_once, steps)
        state, sums = train_steps(state, images, batches, first, last, objective=objective)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        shown.advance((last - first) * batch_size, elbo=float(sums["elbo"]) / (last - first))
    return state, {name: total / steps for name, total in totals.items()}


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
