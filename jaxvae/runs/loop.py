"""The training loop of a run."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxvae.data import Dataset
from jaxvae.devices.processes import is_first, preemption
from jaxvae.devices.sharding import devices_for, divided, lay_out, share, whole
from jaxvae.errors import Preempted
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.models.vae import Params
from jaxvae.objectives import example_keys
from jaxvae.runs.checkpoints import (
    newest_whole,
    open_checkpoints,
    restore,
    told,
    write,
)
from jaxvae.runs.config import RunConfig, run_keys
from jaxvae.runs.data import model_inputs
from jaxvae.runs.directory import first_state
from jaxvae.runs.divergence import Watch
from jaxvae.runs.files import (
    append_history,
    on_disk,
    owned,
    read_metrics,
    write_history,
)
from jaxvae.runs.progress import Progress, Shown
from jaxvae.training.pipeline import Epoch, feed
from jaxvae.training.step import (
    Metrics,
    Objective,
    TrainState,
)

Watcher = Callable[[dict[str, Any], Params], None]


def train(
    run_dir: Path,
    config: RunConfig,
    data: Dataset,
    *,
    objective: Objective | None = None,
    progress: Progress | None = None,
    watchers: Sequence[Watcher] = (),
) -> TrainState:
    """Train from the run's last whole checkpoint, or from the start, to its last epoch.

    Every epoch ends with the test metrics, a line in metrics.jsonl and a checkpoint.

    Args:
      run_dir: made by `start`.
      config: what it was told; its `train.epochs` may have grown since.
      data: as `load_run_data` gives it.
      objective: what to minimise; by default that of `train_step`.
      progress: where to show how it goes.
      watchers: functions of each epoch's line in metrics.jsonl and its parameters, called before
        there is a checkpoint of them: what a kill cuts off, they are told again. Before training,
        they are told of epoch 0, which has no metrics. The parameters' memory is taken back
        afterwards. Only the first process calls them.
    Returns:
      The state after the last epoch.
    Raises:
      InputError: fewer training images than one batch; another training is in the directory; it
        has checkpoints, but none that is whole.
      TrainingFailed: a loss or a parameter is NaN or infinite, or the directory cannot be written.
      Preempted: told to stop by SIGTERM or Ctrl-C, and saved.
    """
    with owned(run_dir) if is_first() else nullcontext():
        shown = progress or Progress(Console(quiet=True))
        return _train(run_dir, config, data, objective, shown, watchers)


def _train(
    run_dir: Path,
    config: RunConfig,
    data: Dataset,
    objective: Objective | None,
    progress: Progress,
    watchers: Sequence[Watcher],
) -> TrainState:
    train_key, test_key = run_keys(config)
    mesh = devices_for(config.train.batch_size)
    images, labels = model_inputs(data.train_images, data.train_labels, config.model)
    epochs, steps = config.train.epochs, len(images) // config.train.batch_size
    measure = _measuring(config, data, test_key)
    saved = newest_whole(run_dir)
    with open_checkpoints(run_dir) as checkpoints:
        if saved is None:
            state = lay_out(first_state(train_key, config), mesh, config.divide)
            totals, seconds = dict[str, Any](), 0.0
            _tell(watchers, run_dir, {"epoch": 0, "step": 0}, whole(state.params, mesh))
        else:
            network = config.model.own_network
            state = restore(run_dir, saved, network, mesh=mesh, divide=config.divide)
            state = replace(state, config=config.train)
            totals, seconds = told(run_dir, saved).get("begun", ({}, 0.0))
        epoch_of = feed(
            images,
            labels,
            config.train,
            mesh,
            divided(state, mesh) if config.divide else jax.P(),
            objective=objective,
            workers=config.workers,
        )
        done, first = divmod(int(state.step), steps)
        watch = Watch(run_dir, len(images), steps)
        if is_first():
            with on_disk(run_dir):
                write_history(run_dir, read_metrics(run_dir)[:done])
        with (
            preemption(int(state.step)) as is_to_stop,
            progress.training(epochs, len(images), done) as shown,
        ):
            for epoch in range(done + 1, epochs + 1):
                began = time.perf_counter() - seconds
                state, totals = train_one_epoch(
                    epoch_of, state, first, totals, shown, is_to_stop, watch
                )
                if int(state.step) < epoch * steps:
                    seconds = time.perf_counter() - began
                    watch.expect_numbers(state, {})
                    write(checkpoints, state, {}, (totals, seconds))
                    raise Preempted(stopped(run_dir, int(state.step)))
                params = whole(state.params, mesh)
                record: dict[str, Any] = {
                    "epoch": epoch,
                    "step": int(state.step),
                    "train": {name: total / steps for name, total in totals.items()},
                    "test": measure(params),
                    "seconds": round(time.perf_counter() - began, 3),
                }
                watch.expect_numbers(state, record["test"])
                # The line before the checkpoint: a kill in between leaves a line too many,
                # which the resumed run takes back, and never one too few.
                if is_first():
                    with on_disk(run_dir):
                        append_history(run_dir, record)
                _tell(watchers, run_dir, record, params)
                write(checkpoints, state, record["test"])
                shown.finish_epoch(record)
                if epoch < epochs and is_to_stop(epoch * steps):
                    raise Preempted(stopped(run_dir, int(state.step)))
                first, totals, seconds = 0, {}, 0.0
    return whole(state, mesh)


def _tell(
    watchers: Sequence[Watcher], run_dir: Path, record: dict[str, Any], params: Params
) -> None:
    with on_disk(run_dir):
        for watch in watchers if is_first() else ():
            watch(record, params)


def stopped(run_dir: Path, step: int) -> str:
    """What to tell who has sent a SIGTERM, or pressed Ctrl-C."""
    return (
        f"told to stop, and saved after step {step}; "
        f"go on with: jaxvae train --resume --run-dir {run_dir}"
    )


def _measuring(
    config: RunConfig, data: Dataset, key: jax.Array
) -> Callable[[Params], dict[str, float]]:
    """What measures parameters of this process on the test images: means over all of them."""
    images, labels = model_inputs(data.test_images, data.test_labels, config.model)
    count, shared = len(images), len(images) - len(images) % jax.process_count()
    examples = (example_keys(key, count), images, labels)
    # What cannot be dealt out in equal numbers, every process measures by itself.
    parts: list[tuple[int, Callable[[Params], Metrics]]] = []
    if shared:
        mesh = devices_for(shared)
        ours = lay_out(jax.tree.map(lambda x: x[:shared], examples), mesh)
        on_all = share(evaluate, mesh)
        parts.append((shared, lambda params: on_all(lay_out(params, mesh), *ours)))
    if shared < count:
        rest = jax.tree.map(lambda x: x[shared:], examples)
        parts.append((count - shared, lambda params: evaluate(params, *rest)))

    def measure(params: Params) -> dict[str, float]:
        means: dict[str, float] = {}
        for number, part in parts:
            for name, value in part(params).items():
                means[name] = means.get(name, 0.0) + float(value) * (number / count)
        return means

    return measure


def train_one_epoch(
    epoch_of: Epoch,
    state: TrainState,
    first: int,
    totals: Mapping[str, Any],
    shown: Shown,
    is_to_stop: Callable[[int], bool],
    watch: Watch,
) -> tuple[TrainState, dict[str, Any]]:
    """The rest of an epoch of which `first` steps have been taken, unless it is to stop before.

    Returns the state, and the sums over all steps so far of the metrics, of which `totals` are
    those of the first. The state may be those of many models, stacked, and so are the sums then.
    """
    sums = dict(totals)
    start = replace(state, step=state.step - first)
    images = state.config.batch_size * state.step.size
    for count, advance in epoch_of(start, first):
        state, metrics = advance(state)
        watch.expect_losses(state, count, metrics.pop("finite"))
        for name, value in jax.device_get(metrics).items():
            sums[name] = sums.get(name, 0.0) + np.float64(value)
        shown.advance(count * images, elbo=float(np.mean(metrics["elbo"])) / count)
        if is_to_stop(step_of(state)):
            break
    return state, sums


def step_of(state: TrainState) -> int:
    """How many steps a state, or each of those that are stacked in one, has taken."""
    return int(np.ravel(state.step)[0])
