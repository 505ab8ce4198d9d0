"""The training loop of runs and sweeps, and the training of a single model."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxvae.data import Dataset
from jaxvae.devices.processes import all_agree, is_first, preemption
from jaxvae.devices.sharding import data_parallel, devices_for, fsdp_specs, gather, shard
from jaxvae.errors import Preempted
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.models.vae import Params
from jaxvae.objectives import example_keys
from jaxvae.runs.callbacks import Callback, EarlyStopping, Training
from jaxvae.runs.checkpoints import metadata, newest_intact, open_checkpoints, restore, write
from jaxvae.runs.config import RunConfig, components, run_keys
from jaxvae.runs.data import train_conditions
from jaxvae.runs.directory import first_state
from jaxvae.runs.divergence import DivergenceCheck
from jaxvae.runs.files import (
    append_metrics,
    disk_errors,
    locked,
    read_metrics,
    resume_command,
    truncate_history,
)
from jaxvae.training.pipeline import Epoch, epoch_pipeline
from jaxvae.training.state import TrainState
from jaxvae.training.step import Metrics, shuffle

Sums = Mapping[str, Any]  # sums of metrics over the steps of an epoch; in a sweep [models]


class Trained(Protocol):
    """What the epoch loop trains: a single model, or the models of a sweep.

    Attributes:
      run_dir: the run directory, or None.
      config: configuration of the run; in a sweep, of the first model.
      data: the data set.
      state: the initial state; in a sweep, those of all models, stacked.
      begun: sums of the metrics and seconds of an epoch that was interrupted.
      models: number of models.
      configs: the configuration of each model of a sweep by its name, or of the model "".
      epoch_of: the dispatches of an epoch.
      divergence: check for NaN and infinity.
    """

    run_dir: Path | None
    config: RunConfig
    data: Dataset
    state: TrainState
    begun: tuple[Sums, float]
    models: int
    configs: Mapping[str, RunConfig]
    epoch_of: Epoch
    divergence: DivergenceCheck

    def params(self, state: TrainState) -> Params:
        """Return the parameters for evaluation, on the first device of this process."""

    def measure(self, params: Params) -> dict[str, Any]:
        """Return the test metrics: numbers, or in a sweep arrays [models]."""

    def record(
        self, about: dict[str, Any], train: Sums, test: Sums, seconds: float
    ) -> dict[str, Any]:
        """Append the epoch to metrics.jsonl, and return the line of the run or sweep."""

    def save(self, state: TrainState, test: Sums, begun: tuple[Sums, float]) -> None:
        """Write a checkpoint."""


def run_epochs(trained: Trained, callbacks: Iterable[Callback] = ()) -> TrainState:
    """Train to the last epoch: the training loop of runs and sweeps.

    Every epoch ends with test metrics, a line in metrics.jsonl, callbacks and a checkpoint.

    Args:
      trained: the model or models.
      callbacks: callbacks of the training loop.

    Returns:
      The state after the last epoch.

    Raises:
      TrainingFailed: a loss or a parameter is NaN or infinite, or the directory cannot be written.
      Preempted: SIGTERM or Ctrl-C stopped the training, which was saved.
    """
    config, state, divergence = trained.config.train, trained.state, trained.divergence
    totals, seconds = trained.begun
    steps = len(trained.data.train_images) // config.batch_size
    done, first = divmod(step_of(state), steps)
    history = read_metrics(trained.run_dir) if trained.run_dir else []
    images = len(trained.data.train_images) * trained.models
    training = Training(
        trained.config,
        trained.data,
        config.epochs,
        images,
        step_of(state),
        done,
        history,
        trained.params(state),
        trained.run_dir,
        trained.configs,
    )
    own = [EarlyStopping(config.patience)] if config.patience else []
    active = [*callbacks, *own] if is_first() else []
    with (
        _run_callbacks(active, training) as (is_over, ended),
        preemption(step_of(state)) as should_stop,
    ):
        for epoch in range(done + 1, config.epochs + 1) if all_agree(not is_over) else ():
            began = time.perf_counter() - seconds
            sums = dict(totals)
            start = replace(state, step=state.step - first)
            for count, advance in trained.epoch_of(start, first):
                state, metrics = advance(state)
                divergence.check_losses(state, count, metrics.pop("finite"))
                means = {}
                for name, value in jax.device_get(metrics).items():
                    value = divergence.mask_diverged(value)
                    sums[name] = sums.get(name, 0.0) + value
                    means[name] = float(np.nanmean(value)) / count
                for callback in active:
                    callback.dispatch(count * config.batch_size * trained.models, means)
                if should_stop(step_of(state)):
                    break
            step = step_of(state)
            if step < epoch * steps:
                divergence.check_finite(state, {})
                trained.save(state, {}, (sums, time.perf_counter() - began))
                raise Preempted(stop_message(trained.run_dir, step))
            params = trained.params(state)
            test = trained.measure(params)
            divergence.check_finite(state, test)
            train = {name: total / steps for name, total in sums.items()}
            # The line is written before the checkpoint: a kill in between leaves an extra line,
            # which the resumed run removes, but never a missing one.
            about = {"epoch": epoch, "step": step}
            record = trained.record(about, train, test, round(time.perf_counter() - began, 3))
            with _writing(trained.run_dir):
                stops = [callback.epoch(record, params) for callback in active]
            trained.save(state, test, ({}, 0.0))
            if not all_agree(not any(stops)):
                break
            if epoch < config.epochs and should_stop(step):
                raise Preempted(stop_message(trained.run_dir, step))
            first, totals, seconds = 0, {}, 0.0
        ended(trained.params(state))
    return state


@contextmanager
def _run_callbacks(
    active: Sequence[Callback], training: Training
) -> Iterator[tuple[bool, Callable[[Params], None]]]:
    """Start callbacks, and call their `end` however the training ends.

    Yields:
      Whether a callback ends the training before its first step, and a function that takes the
      last parameters.
    """
    last: list[Params] = []
    with ExitStack() as stack:
        is_over = False
        for callback in active:
            with _writing(training.run_dir):
                is_over |= bool(callback.start(training))
            stack.callback(_end, callback, last)
        yield is_over, last.append


def _writing(run_dir: Path | None) -> AbstractContextManager[None]:
    return disk_errors(run_dir) if run_dir else nullcontext()


def _end(callback: Callback, last: list[Params]) -> None:
    callback.end(last[0] if last else None)


def train(
    run_dir: Path | None,
    config: RunConfig,
    data: Dataset,
    *,
    callbacks: Iterable[Callback] = (),
) -> TrainState:
    """Train a single model to its last epoch, from the newest intact checkpoint if there is one.

    Args:
      run_dir: the run directory, prepared by `directory.start`; None: nothing is written.
      config: the configuration of the run, from `directory.start` or `directory.with_shape`.
      data: the data set, from `load_run_data`.
      callbacks: callbacks of the training loop.

    Returns:
      The state after the last epoch.

    Raises:
      InputError: another training has locked the directory, or all its checkpoints are damaged.
      TrainingFailed: as for `run_epochs`.
      Preempted: as for `run_epochs`.
    """
    with locked(run_dir) if run_dir and is_first() else nullcontext(), ExitStack() as stack:
        one = _OneModel(run_dir, config, data, stack)
        return gather(run_epochs(one, callbacks), one.mesh)


class _OneModel:
    """A single model, on all devices of all processes."""

    models = 1

    def __init__(
        self, run_dir: Path | None, config: RunConfig, data: Dataset, stack: ExitStack
    ) -> None:
        train_key, test_key = run_keys(config)
        self.run_dir, self.config, self.data = run_dir, config, data
        self.configs: Mapping[str, RunConfig] = {"": config}
        self.mesh = devices_for(config.train.batch_size)
        images, labels = data.train_images, train_conditions(data, config)
        steps = len(images) // config.train.batch_size
        self.measure = evaluator(config, data, test_key)
        self.divergence = DivergenceCheck(
            run_dir, lambda start, _: shuffle(start, len(images), labels), steps
        )
        saved = newest_intact(run_dir) if run_dir else None
        self._checkpoints = stack.enter_context(open_checkpoints(run_dir)) if run_dir else None
        self.begun: tuple[Sums, float] = ({}, 0.0)
        if saved is None or run_dir is None:
            self.state = shard(first_state(train_key, config, data), self.mesh, config.fsdp)
        else:
            state = restore(run_dir, saved, mesh=self.mesh, fsdp=config.fsdp, **components(config))
            self.state = replace(state, config=config.train)
            self.begun = metadata(run_dir, saved)["begun"]
        specs = fsdp_specs(self.state, self.mesh) if config.fsdp else jax.P()
        self.epoch_of = epoch_pipeline(
            images, labels, config.train, self.mesh, specs, workers=config.workers
        )
        if run_dir and is_first():
            with disk_errors(run_dir):
                truncate_history(run_dir, int(self.state.step) // steps)

    def params(self, state: TrainState) -> Params:
        return gather(state.eval_params, self.mesh)

    def record(
        self, about: dict[str, Any], train: Sums, test: Sums, seconds: float
    ) -> dict[str, Any]:
        numbers = {name: float(value) for name, value in train.items()}
        record = {**about, "train": numbers, "test": dict(test), "seconds": seconds}
        if self.run_dir and is_first():
            with disk_errors(self.run_dir):
                append_metrics(self.run_dir, record)
        return record

    def save(self, state: TrainState, test: Sums, begun: tuple[Sums, float]) -> None:
        if self._checkpoints is not None:
            write(self._checkpoints, state, test, begun)


def stop_message(run_dir: Path | None, step: int) -> str:
    """Return the message for a training that SIGTERM or Ctrl-C stopped."""
    if run_dir is None:
        return f"stopped after step {step}"
    return f"stopped and saved after step {step}; resume with: {resume_command(run_dir)}"


def evaluator(
    config: RunConfig, data: Dataset, key: jax.Array
) -> Callable[[Params], dict[str, float]]:
    """Return a function from parameters to the test metrics: means over all test images.

    Args:
      config: the configuration of the run.
      data: the data set.
      key: PRNG key of the posterior samples.

    Returns:
      The function.
    """
    images, labels = data.test_images, data.conditions(config.model, "test")
    count, shared = len(images), len(images) - len(images) % jax.process_count()
    examples = (example_keys(key, count), images, labels)
    # Images left over after equal shares are evaluated by every process.
    parts: list[tuple[int, Callable[[Params], Metrics]]] = []
    if shared:
        mesh = devices_for(shared)
        ours = shard(jax.tree.map(lambda x: x[:shared], examples), mesh)
        on_all = data_parallel(evaluate, mesh)
        parts.append((shared, lambda params: on_all(shard(params, mesh), *ours)))
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


def step_of(state: TrainState) -> int:
    """Return the number of steps of a state; stacked models have all taken the same number."""
    return int(np.ravel(state.step)[0])
