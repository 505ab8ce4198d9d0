"""Many models trained at once, in one program: every learning rate and beta with every seed.

    sweep.json       the configuration of every model
    metrics.jsonl    a line per epoch: means over the models, standard deviations, each model's
    seed-0/, ...     a run directory for every model, as if it had been trained alone

Like a run, it can be killed at any instant: the models go on from the last step of which all
have a whole checkpoint.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxvae.data import Dataset
from jaxvae.devices.convolution import backend, in_blocks
from jaxvae.devices.processes import preemption
from jaxvae.devices.sharding import AXIS, devices_for, everywhere, share
from jaxvae.errors import InputError, Preempted
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.models.vae import Params
from jaxvae.runs import config as run_config
from jaxvae.runs import directory, loop
from jaxvae.runs.checkpoints import newest_whole, open_checkpoints, restore, steps_of, told, write
from jaxvae.runs.config import RunConfig, as_flag, going_on, run_keys
from jaxvae.runs.data import model_inputs
from jaxvae.runs.divergence import Watch
from jaxvae.runs.files import (
    append_history,
    on_disk,
    owned,
    read_json,
    read_metrics,
    version,
    write_history,
    write_json,
)
from jaxvae.runs.progress import Progress
from jaxvae.training.pipeline import Advance, Epoch
from jaxvae.training.step import Metrics, TrainState, shuffle, train_steps

_IMAGES_PER_DISPATCH = 8192  # of all models, between two movements of the progress bar

Values = dict[str, np.ndarray]  # of a metric: [models]


def configured(flags: Mapping[str, Any], seeds: int = 1) -> dict[str, RunConfig]:
    """The models of a new sweep by name, at least one: every combination times every seed.

    Args:
      flags: as of `configured`, but `learning_rate` and `beta` are lists of values.
      seeds: how many, from the one in `flags` on.
    """
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}: expected at least 1")
    several = ("learning_rate", "beta")
    base = run_config.configured(
        {name: value for name, value in flags.items() if name not in several}
    )
    choices = {name: flags.get(name, [getattr(base.train, name)]) for name in several}
    for name, values in choices.items():
        if len(set(values)) < len(values):
            raise InputError(f"{as_flag(name)} has a value twice: expected each value once")
    choices["seed"] = range(base.seed, base.seed + seeds)
    models = {}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        parts = [n for n in choices if n == "seed" or len(choices[n]) > 1]
        name = "_".join(f"{as_flag(n).strip('-')}-{chosen[n]}" for n in parts)
        models[name] = run_config.configured({**flags, **chosen})
    return models


def resumed(run_dir: Path, flags: Mapping[str, Any]) -> dict[str, RunConfig]:
    """The models of a sweep that goes on.

    Raises InputError if the flags ask for other models than the recorded ones; where the data
    lie and for how many epochs to train may change.
    """
    for name in ("seeds", "seed", "learning_rate", "beta"):
        if name in flags:
            raise InputError(
                f"{as_flag(name)} was settled when {run_dir} was started: leave it out"
            )
    recorded = read_json(run_dir / "sweep.json", lambda models: {
        name: RunConfig.from_dict(config, flags.get("network"))
        for name, config in dict(models).items()
    })  # fmt: skip
    return {name: going_on(config, flags, run_dir) for name, config in recorded.items()}


def start(
    run_dir: Path, models: Mapping[str, RunConfig], data: Dataset, *, resume: bool
) -> dict[str, RunConfig]:
    """Make the directory of a sweep and those of its models, or prepare them to go on.

    Returns and raises what `directory.start` does, for every model.
    """
    fitted = {name: directory.fitted(run_dir, models[name], data, resume=resume) for name in models}
    if not resume:
        for place in (run_dir, *(run_dir / name for name in fitted)):
            directory.refuse_another(place)
        directory.try_out(next(iter(fitted.values())), data)
    else:
        for name, config in fitted.items():
            directory.expect_the_same(run_dir / name, config)
    directory.make_directory(run_dir)
    with owned(run_dir):
        recorded = {name: config.to_dict() for name, config in fitted.items()}
        write_json(run_dir / "sweep.json", {"jaxvae": version(), **recorded})
        for name, config in fitted.items():
            directory.write_config(run_dir / name, config)
    return fitted


def train(
    run_dir: Path,
    models: Mapping[str, RunConfig],
    data: Dataset,
    *,
    progress: Progress | None = None,
) -> TrainState:
    """Train every model at once, from their last common checkpoint to their last epoch.

    Every epoch ends with each model's test metrics, a line in each metrics.jsonl, and a
    checkpoint of each model.

    Args:
      run_dir: made by `start`.
      models: as `start` returned them; they differ in seed, learning rate and beta.
      data: as `load_run_data` gives it.
      progress: where to show how it goes.
    Returns:
      The models' states after the last epoch, stacked: every array has a first axis [models].
    Raises:
      InputError, TrainingFailed, Preempted: as of `loop.train`.
    """
    progress = progress or Progress(Console(quiet=True))
    devices = devices_for(len(models), least=1)
    own, all_see = jax.P(AXIS), jax.P()
    specs = (own, own, all_see, all_see, all_see)
    take_steps = share(_take_steps, devices, (0,), in_specs=specs, out_specs=own)
    measure = share(_measure, devices, in_specs=specs[:4], out_specs=own)
    model = next(iter(models.values())).model
    train, test_set = jax.device_put(
        (
            model_inputs(data.train_images, data.train_labels, model),
            model_inputs(data.test_images, data.test_labels, model),
        ),
        everywhere(devices),
    )
    folders = [run_dir / name for name in models]
    configs = list(models.values())
    shared = configs[0].train
    hyper = {
        "learning_rate": jnp.array([config.train.learning_rate for config in configs]),
        "beta": jnp.array([config.train.beta for config in configs]),
    }
    train_keys, test_keys = map(jnp.stack, zip(*map(run_keys, configs), strict=True))
    with ExitStack() as stack:
        for folder in (run_dir, *folders):
            stack.enter_context(owned(folder))
        saved = _common_step(folders)
        checkpoints = [stack.enter_context(open_checkpoints(folder)) for folder in folders]
        totals, seconds = Values(), 0.0
        if saved is None:
            ones = [directory.first_state(key, configs[0]) for key in train_keys]
        else:
            ones = [restore(folder, saved, model.own_network) for folder in folders]
            begun = [told(folder, saved).get("begun", ({}, 0.0)) for folder in folders]
            totals = {name: np.array([own[name] for own, _ in begun]) for name in begun[0][0]}
            seconds = begun[0][1]
        states = _stacked([replace(state, config=shared) for state in ones])
        one_part_each = jax.NamedSharding(devices, jax.P(AXIS))
        states, hyper, test_keys = jax.device_put((states, hyper, test_keys), one_part_each)
        epochs, images = shared.epochs, len(data.train_images)
        steps = images // shared.batch_size
        done, first = divmod(loop.step_of(states), steps)
        epoch_of = _feed(take_steps, hyper, train)
        watch = Watch(run_dir, images, steps, tuple(models))
        with on_disk(run_dir):
            for folder in (run_dir, *folders):
                write_history(folder, read_metrics(folder)[:done])
        with (
            preemption(loop.step_of(states)) as is_to_stop,
            progress.training(epochs, images * len(models), done) as shown,
        ):
            for epoch in range(done + 1, epochs + 1):
                began = time.perf_counter() - seconds
                states, totals = loop.train_one_epoch(
                    epoch_of, states, first, totals, shown, is_to_stop, watch
                )
                step = loop.step_of(states)
                if step < epoch * steps:
                    seconds = time.perf_counter() - began
                    watch.expect_numbers(states, {})
                    begun = [(sums, seconds) for sums in _each(totals, len(models))]
                    _save(checkpoints, configs, states, [{} for _ in models], begun)
                    raise Preempted(loop.stopped(run_dir, step))
                metrics = {name: total / steps for name, total in totals.items()}
                test = jax.device_get(measure(states.params, test_keys, *test_set))
                watch.expect_numbers(states, test)
                splits = _each(metrics, len(models)), _each(test, len(models))
                ours = [{"train": a, "test": b} for a, b in zip(*splits, strict=True)]
                about = {"epoch": epoch, "step": step}
                seconds = round(time.perf_counter() - began, 3)
                record = {
                    **about,
                    **_moments({"train": metrics, "test": test}),
                    "seconds": seconds,
                    "models": dict(zip(models, ours, strict=True)),
                }
                with on_disk(run_dir):
                    append_history(run_dir, record)
                    for folder, line in zip(folders, ours, strict=True):
                        append_history(folder, {**about, **line, "seconds": seconds})
                _save(checkpoints, configs, states, [line["test"] for line in ours])
                shown.finish_epoch(record)
                if epoch < epochs and is_to_stop(step):
                    raise Preempted(loop.stopped(run_dir, step))
                first, totals, seconds = 0, {}, 0.0
    return jax.device_put(states, jax.local_devices()[0])


def _common_step(folders: list[Path]) -> int | None:
    """The last step of which every model has a whole checkpoint, if they have any.

    Raises InputError if only some have.
    """
    newest = [newest_whole(folder) for folder in folders]
    found = [step for step in newest if step is not None]
    if len(found) < len(folders) and not any(len(steps_of(folder)) > 1 for folder in folders):
        return None  # killed while the first ones were written
    step = min(found, default=None)
    for folder in folders:
        if step not in steps_of(folder):
            raise InputError(
                f"{folder} holds no checkpoint of step {step}, the last that the other models "
                "have: put it back from a copy, or start anew in another directory"
            )
    return step


def results(run_dir: Path, models: Mapping[str, RunConfig]) -> Iterator[str]:
    """A line for every learning rate and beta: mean and standard deviation over its seeds."""
    last = read_metrics(run_dir)[-1]["models"]
    groups: dict[tuple[float, float], list[float]] = {}
    for name, config in models.items():
        group = groups.setdefault((config.train.learning_rate, config.train.beta), [])
        group.append(last[name]["test"]["elbo"])
    for (rate, beta), elbos in groups.items():
        spread = f" ± {np.std(elbos, ddof=1):.2f} over {len(elbos)} seeds" * (len(elbos) > 1)
        yield f"learning rate {rate:g}, beta {beta:g}: test ELBO {np.mean(elbos):.2f}{spread}"


def _feed(
    take_steps: Callable[..., tuple[TrainState, Metrics]],
    hyper: dict[str, jax.Array],
    examples: tuple[jax.Array, jax.Array | None],
) -> Epoch:
    """The dispatches of an epoch of all models, as `training.pipeline` gives those of one."""

    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = jax.vmap(partial(shuffle, num_images=len(examples[0])))(start)
        models, steps, batch_size = batches.shape
        at_once = max(1, _IMAGES_PER_DISPATCH // (models * batch_size))

        def advance(states: TrainState, first: int, last: int) -> tuple[TrainState, Metrics]:
            return take_steps(states, (batches, hyper), examples, first, last)

        for begin in range(first, steps, at_once):
            end = min(begin + at_once, steps)
            yield end - begin, partial(advance, first=begin, last=end)

    return epoch


def _save(
    checkpoints: list[Any],
    configs: list[RunConfig],
    states: TrainState,
    measured: list[dict[str, float]],
    begun: list[tuple[dict[str, float], float]] | None = None,
) -> None:
    """Write a checkpoint of every model."""
    begun = begun or [({}, 0.0)] * len(configs)
    for i, (manager, config) in enumerate(zip(checkpoints, configs, strict=True)):
        state = replace(_unstacked(states, i), config=config.train)
        write(manager, state, measured[i], begun[i])


# The devices of the axis take their own models each and tell each other nothing.


def _take_steps(
    states: TrainState, own: Any, examples: Any, first: Any, last: Any, *, axis_name: str
) -> Any:
    images, labels = examples

    def one(model: Any) -> tuple[TrainState, Metrics]:
        state, (batches, hyper) = model
        return train_steps(state, images, batches, first, last, labels, **hyper)

    return _for_each(one, (states, own))


def _measure(
    params: Params, keys: jax.Array, images: jax.Array, labels: Any, *, axis_name: str
) -> Metrics:
    return _for_each(lambda model: evaluate(*model, images, labels), (params, keys))


def _for_each(f: Callable[[Any], Any], models: Any) -> Any:
    """f of every model: all at once, but on a CPU one by one, to keep what f needs in cache."""
    size = 1 if backend() == "cpu" else len(jax.tree.leaves(models)[0])
    return in_blocks(jax.vmap(f), models, size)


def _stacked(states: list[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _unstacked(states: TrainState, i: int) -> TrainState:
    return jax.tree.map(lambda x: x[i], states)


def _each(values: Values, models: int) -> list[dict[str, float]]:
    """Every model's own."""
    return [{name: float(x[i]) for name, x in values.items()} for i in range(models)]


def _moments(splits: Mapping[str, Values]) -> dict[str, dict[str, float]]:
    """Means over the models, and standard deviations as `train_sd` and `test_sd`."""
    means = {split: {k: float(np.mean(x)) for k, x in v.items()} for split, v in splits.items()}
    sds = {
        f"{split}_sd": {k: float(np.std(x, ddof=1)) for k, x in v.items()}
        for split, v in splits.items()
    }
    return means | sds
