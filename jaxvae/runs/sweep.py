"""Sweeps: models that are trained together, for every learning rate, beta and seed.

    sweep.json       the configuration of every model
    metrics.jsonl    a line per epoch: means and standard deviations over the models, and the
                     metrics of each model
    seed-0/, ...     a run directory for every model, as if it had been trained alone

Like a run, a sweep can be killed at any instant: the models resume from the last step of which
all have an intact checkpoint. A model that diverges gets a diverged.json in its directory, and the
training of the others continues.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvae.data import Dataset
from jaxvae.devices.convolution import backend, in_blocks
from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, replicated
from jaxvae.errors import InputError, TrainingFailed, shown
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.models.vae import Params
from jaxvae.runs import config as run_config
from jaxvae.runs import directory, loop
from jaxvae.runs.callbacks import Callback
from jaxvae.runs.checkpoints import (
    metadata,
    newest_intact,
    open_checkpoints,
    restore,
    steps_of,
    write,
)
from jaxvae.runs.config import RunConfig, as_flag, own_components, run_keys, updated
from jaxvae.runs.data import describe, train_conditions
from jaxvae.runs.divergence import DIVERGED, DivergenceCheck
from jaxvae.runs.files import (
    append_metrics,
    disk_errors,
    locked,
    read_json,
    read_metrics,
    truncate_history,
    version,
    write_json,
)
from jaxvae.storage import refuse_links
from jaxvae.training.pipeline import Advance, Epoch
from jaxvae.training.state import TrainState
from jaxvae.training.step import Metrics, shuffle, train_steps

_IMAGES_PER_DISPATCH = 8192  # summed over the models; the progress bar moves once per dispatch
_MOST = 10_000  # models: each has its own directory and open files
_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)


def configured(
    flags: Mapping[str, Any], seeds: int = 1, base: RunConfig | None = None
) -> dict[str, RunConfig]:
    """Return the configurations of a new sweep: every combination of values with every seed.

    Args:
      flags: as for `jaxvae.runs.config.configured`, but `learning_rate` and `beta` are lists.
      seeds: number of seeds, counted up from the seed in `flags`.
      base: the configuration of the other fields; by default the defaults.

    Returns:
      The configurations by the names of the models, at least one.

    Raises:
      InputError: an unknown field, a wrong value, too many models, or several learning rates or
        betas that an optimizer or objective of the user's own would not use.
    """
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}: expected at least 1")
    several = ("learning_rate", "beta")
    base = run_config.configured({n: x for n, x in flags.items() if n not in several}, base)
    choices = {name: flags.get(name, [getattr(base.train, name)]) for name in several}
    own_rate = isinstance(base.train.optimizer, optax.GradientTransformation)
    own_loss = not hasattr(base.train.objective, "across_batch")
    for name, part, own in (
        ("learning_rate", "optimizer", own_rate),
        ("beta", "objective", own_loss),
    ):
        if own and len(choices[name]) > 1:
            raise InputError(
                f"{as_flag(name)} has several values, but the {part} is your own, which does not "
                f"use it: expected one; leave {as_flag(name)} out"
            )
    for name, values in choices.items():
        if len(set(values)) < len(values):
            raise InputError(f"{as_flag(name)} has a repeated value: expected each value once")
    count = seeds * math.prod(map(len, choices.values()))
    if count > _MOST:
        raise InputError(
            f"--seeds {shown(seeds)} with these values of --learning-rate and --beta gives "
            f"{shown(count)} models: expected at most {_MOST:,}"
        )
    choices["seed"] = range(base.seed, base.seed + seeds)
    models = {}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        parts = [n for n in choices if n == "seed" or len(choices[n]) > 1]
        name = "_".join(f"{as_flag(n).strip('-')}-{chosen[n]}" for n in parts)
        models[name] = run_config.configured({**flags, **chosen}, base)
    return models


def resumed(run_dir: Path, flags: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the configurations of a resumed sweep.

    Args:
      run_dir: the directory of the sweep.
      flags: fields that were given, by name.

    Returns:
      The configurations by the names of the models.

    Raises:
      InputError: a field that is not in `MAY_CHANGE` differs from the recorded one.
    """
    for name in ("seeds", "seed", "learning_rate", "beta"):
        if name in flags:
            raise InputError(
                f"{as_flag(name)} cannot change when a sweep is resumed ({run_dir}): leave it out"
            )
    own = own_components(flags)
    recorded = read_json(run_dir / "sweep.json", partial(_models, own=own))
    return {
        name: updated(config, flags, run_dir, caller="sweep") for name, config in recorded.items()
    }


def _models(content: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the configurations in sweep.json; raise InputError if they are not a sweep."""
    if not content:
        raise InputError("it holds no models: expected the configuration of each by its name")
    for name in content:
        if not _NAME.fullmatch(name):  # it names a subdirectory: no path may leave the sweep
            raise InputError(
                f"a model has the name {shown(name)}: expected letters, digits, '.', '_', '+' and "
                "'-', as in seed-0"
            )
    models = {name: RunConfig.from_dict(config, **own) for name, config in content.items()}
    alike = {
        (config.model, replace(config.train, learning_rate=1.0, beta=1.0))
        for config in models.values()
    }
    if len(alike) > 1:
        raise InputError("its models differ in more than seed, learning_rate and beta")
    return models


def start(
    run_dir: Path,
    models: Mapping[str, RunConfig],
    data: Dataset,
    *,
    resume: bool,
    new_data: bool = False,
) -> dict[str, RunConfig]:
    """Make the directories of a sweep and its models, or prepare them to be resumed.

    Args:
      run_dir: the directory of the sweep.
      models: the configurations by the names of the models.
      data: the data set.
      resume: whether the sweep is resumed.
      new_data: as for `jaxvae.runs.directory.start`.

    Returns:
      The configurations with the shape of the images and a record of the data.

    Raises:
      InputError: as for `jaxvae.runs.directory.start`, or the training images are not in memory.
    """
    if not isinstance(data.train_images, np.ndarray):
        raise InputError(
            f"{next(iter(models.values())).data} is read from disk image by image, but a sweep "
            "needs the images in memory: train one model at a time"
        )
    record = describe(data)
    lost = diverged(run_dir, models) if resume else []
    fitted = {
        name: directory.with_data(
            run_dir / name, config, data, record, resume=resume, new_data=new_data
        )
        for name, config in models.items()
        if name not in lost
    }
    if not resume:
        for place in (run_dir, *(run_dir / name for name in fitted)):
            directory.expect_no_run(place)
        directory.check_first_step(next(iter(fitted.values())), data, len(fitted))
    else:
        for name, config in fitted.items():
            directory.expect_same_config(run_dir / name, config)
    refuse_links(*(run_dir / name for name in fitted))
    directory.make_directory(run_dir)
    with locked(run_dir):
        if not resume:  # again, as another training may have started there meanwhile
            directory.expect_no_run(run_dir)
        all_of_them = {name: fitted.get(name, config) for name, config in models.items()}
        recorded = {name: config.to_dict() for name, config in all_of_them.items()}
        write_json(run_dir / "sweep.json", {"jaxvae": version(), **recorded})
        for name, config in fitted.items():
            directory.write_config(run_dir / name, config, new=not resume)
    return all_of_them


def train(
    run_dir: Path,
    models: Mapping[str, RunConfig],
    data: Dataset,
    *,
    callbacks: Iterable[Callback] = (),
) -> TrainState:
    """Train all models together, from their last common checkpoint to the last epoch.

    Every epoch ends with test metrics, a line in each metrics.jsonl, and a checkpoint of each
    model. A model that diverges is reported by a warning of the category `jaxvae.errors.Diverged`.

    Args:
      run_dir: the directory of the sweep, prepared by `start`.
      models: as returned by `start`; they differ in seed, learning rate and beta.
      data: the data set, from `load_run_data`.
      callbacks: callbacks of the training loop; their metrics are means over the models.

    Returns:
      The states after the last epoch, stacked: every array has a first axis [models]. Models that
      have diverged are left out.

    Raises:
      InputError: as for `jaxvae.runs.loop.train`.
      TrainingFailed: all models have diverged, or the directory cannot be written.
      Preempted: as for `jaxvae.runs.loop.train`.
    """
    lost = diverged(run_dir, models)
    models = {name: config for name, config in models.items() if name not in lost}
    if not models:
        raise TrainingFailed(
            f"all models of {run_dir} have diverged, see {DIVERGED} in their directories: train "
            "again with a lower --learning-rate or with --clip-norm 1"
        )
    with ExitStack() as stack:
        many = _ManyModels(run_dir, models, data, stack)
        states = jax.device_put(loop.run_epochs(many, callbacks), jax.local_devices()[0])
        left = np.array([i for i in range(len(models)) if i not in many.divergence.diverged])
    return jax.tree.map(lambda x: x[left], states) if many.divergence.diverged else states


class _ManyModels:
    """The models of a sweep, distributed over the devices of this process."""

    def __init__(
        self, run_dir: Path, models: Mapping[str, RunConfig], data: Dataset, stack: ExitStack
    ) -> None:
        self.run_dir: Path | None = run_dir
        self._run_dir = run_dir
        self.data, self.models = data, len(models)
        self.configs: Mapping[str, RunConfig] = models
        self._folders = [run_dir / name for name in models]
        self._configs = list(models.values())
        self.config = self._configs[0]
        devices = devices_for(len(models), least=1)
        own, all_see = jax.P(AXIS), jax.P()
        specs = (own, own, all_see, all_see, all_see)
        take_steps = data_parallel(_take_steps, devices, (0,), in_specs=specs, out_specs=own)
        self._measure = data_parallel(_measure, devices, in_specs=specs[:4], out_specs=own)
        model = self.config.model
        images, labels, self._test_set = jax.device_put(
            (
                data.train_images,
                data.conditions(model, "train"),
                (data.test_images, data.conditions(model, "test")),
            ),
            replicated(devices),
        )
        shared = self.config.train
        hyper = {
            "learning_rate": jnp.array([config.train.learning_rate for config in self._configs]),
            "beta": jnp.array([config.train.beta for config in self._configs]),
        }
        if isinstance(shared.optimizer, optax.GradientTransformation):  # has its own learning rate
            del hyper["learning_rate"]
        if not hasattr(shared.objective, "across_batch"):  # a plain function, without beta
            del hyper["beta"]
        if self.config.labelled:  # each has labels of its own, drawn by its seed
            hyper["labels"] = jnp.array(
                [train_conditions(data, config) for config in self._configs]
            )
        train_keys, test_keys = map(jnp.stack, zip(*map(run_keys, self._configs), strict=True))
        for folder in (run_dir, *self._folders):
            stack.enter_context(locked(folder))
        saved = _common_step(self._folders)
        self._checkpoints = [
            stack.enter_context(open_checkpoints(folder)) for folder in self._folders
        ]
        # A kill may have left models ahead of the others, and Orbax writes no earlier steps.
        for checkpoints in self._checkpoints:
            for step in checkpoints.all_steps():
                if saved is None or step > saved:
                    checkpoints.delete(step)
        self.begun: tuple[loop.Sums, float] = ({}, 0.0)
        if saved is None:
            ones = [directory.first_state(key, self.config, data) for key in train_keys]
        else:
            own_ones = run_config.components(self.config)
            ones = [restore(folder, saved, **own_ones) for folder in self._folders]
            begun = [metadata(folder, saved)["begun"] for folder in self._folders]
            sums = {
                name: np.array([own.get(name, 0.0) for own, _ in begun]) for name in begun[0][0]
            }
            self.begun = sums, begun[0][1]
        states = _stacked([replace(state, config=shared) for state in ones])
        one_part_each = jax.NamedSharding(devices, jax.P(AXIS))
        self.state, hyper, self._test_keys = jax.device_put(
            (states, hyper, test_keys), one_part_each
        )
        steps = len(images) // shared.batch_size
        self.epoch_of = _pipeline(take_steps, hyper, (images, labels))

        def batches(start: TrainState, model: int) -> jax.Array:
            return shuffle(start, len(images), train_conditions(data, self._configs[model]))

        self.divergence = DivergenceCheck(run_dir, batches, steps, tuple(models))
        with disk_errors(run_dir):
            for folder in (run_dir, *self._folders):
                truncate_history(folder, loop.step_of(self.state) // steps)

    def params(self, state: TrainState) -> Params:
        return state.eval_params

    def measure(self, params: Params) -> dict[str, Any]:
        return jax.device_get(self._measure(params, self._test_keys, *self._test_set))

    def record(
        self, about: dict[str, Any], train: loop.Sums, test: loop.Sums, seconds: float
    ) -> dict[str, Any]:
        splits = _each(train, self.divergence), _each(test, self.divergence)
        ours = {i: {"train": one, "test": splits[1][i]} for i, one in splits[0].items()}
        record = {
            **about,
            **_moments(list(ours.values())),
            "seconds": seconds,
            "models": {self.divergence.models[i]: line for i, line in ours.items()},
        }
        with disk_errors(self._run_dir):
            append_metrics(self._run_dir, record)
            for i, line in ours.items():
                append_metrics(self._folders[i], {**about, **line, "seconds": seconds})
        return record

    def save(self, state: TrainState, test: loop.Sums, begun: tuple[loop.Sums, float]) -> None:
        # All models are moved to the host before they are sliced: slicing a sharded array is a
        # program that synchronises the devices, and hundreds of them in flight can deadlock.
        numbers = jax.device_get(replace(state, key=jax.random.key_data(state.key)))
        sums = _each(begun[0], self.divergence)
        for i, metrics in _each(test, self.divergence).items():
            one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), numbers)
            key, config = jax.random.wrap_key_data(one.key), self._configs[i].train
            write(self._checkpoints[i], replace(one, key=key, config=config), metrics,
                  (sums[i], begun[1]))  # fmt: skip


def diverged(run_dir: Path, models: Iterable[str]) -> list[str]:
    """Return the names of the models that have diverged."""
    return [name for name in models if (run_dir / name / DIVERGED).is_file()]


def _common_step(folders: list[Path]) -> int | None:
    """Return the last step of which every model has an intact checkpoint, or None.

    Raises InputError if only some models have checkpoints.
    """
    newest = [newest_intact(folder) for folder in folders]
    found = [step for step in newest if step is not None]
    if len(found) < len(folders) and not any(len(steps_of(folder)) > 1 for folder in folders):
        return None  # killed while the first checkpoints were written
    step = min(found, default=None)
    for folder in folders:
        if step not in steps_of(folder):
            raise InputError(
                f"{folder} holds no checkpoint of step {step}, the last of the other models: "
                "restore it from a copy, or start again in another directory"
            )
    return step


def results(run_dir: Path, models: Mapping[str, RunConfig]) -> Iterator[str]:
    """Summarise a sweep, for display.

    Args:
      run_dir: the directory of the sweep.
      models: as returned by `start`.

    Yields:
      A line for every learning rate and beta, with mean and standard deviation of the test ELBO
      over the seeds, and a line for every model that has diverged, which is left out of the means.
    """
    lost = diverged(run_dir, models)
    groups: dict[tuple[float, float], list[float]] = {}
    for name, config in models.items():
        if name not in lost:
            group = groups.setdefault((config.train.learning_rate, config.train.beta), [])
            group += [line["test"]["elbo"] for line in read_metrics(run_dir / name)[-1:]]
    for (rate, beta), elbos in groups.items():
        several = len(elbos) > 1
        spread = f" ± {np.std(elbos, ddof=1):.2f} over {len(elbos)} seeds" if several else ""
        found = f"{np.mean(elbos):.2f}{spread}" if elbos else "unknown (metrics.jsonl is missing)"
        yield f"learning rate {rate:g}, beta {beta:g}: test ELBO {found}"
    for name in lost:
        yield f"{name} has diverged and was left out: see {run_dir / name / DIVERGED}"


def _pipeline(
    take_steps: Callable[..., tuple[TrainState, Metrics]],
    hyper: dict[str, jax.Array],
    examples: tuple[jax.Array, jax.Array | None],
) -> Epoch:
    """Return the dispatches of an epoch of all models, like `training.pipeline` for one model."""
    n = len(examples[0])
    labels, axis = (hyper["labels"], 0) if "labels" in hyper else (examples[1], None)
    of_each = jax.vmap(lambda state, labels: shuffle(state, n, labels), (0, axis))

    def epoch(start: TrainState, first: int) -> Iterator[tuple[int, Advance]]:
        batches = of_each(start, labels)
        models, steps, batch_size = batches.shape
        at_once = max(1, _IMAGES_PER_DISPATCH // (models * batch_size))

        def advance(states: TrainState, first: int, last: int) -> tuple[TrainState, Metrics]:
            return take_steps(states, (batches, hyper), examples, first, last)

        for begin in range(first, steps, at_once):
            end = min(begin + at_once, steps)
            yield end - begin, partial(advance, first=begin, last=end)

    return epoch


# Each device trains its own models; there is no communication between them.


def _take_steps(
    states: TrainState, own: Any, examples: Any, first: Any, last: Any, *, axis_name: str
) -> Any:
    images, labels = examples

    def one(model: Any) -> tuple[TrainState, Metrics]:
        state, (batches, own) = model
        return train_steps(state, images, batches, first, last, **{"labels": labels} | own)

    return _for_each(one, (states, own))


def _measure(
    params: Params, keys: jax.Array, images: jax.Array, labels: Any, *, axis_name: str
) -> Metrics:
    def one(model: tuple[Params, jax.Array]) -> Metrics:
        params, key = model
        return evaluate(params, key, images, labels)

    return _for_each(one, (params, keys))


def _for_each(f: Callable[[Any], Any], models: Any) -> Any:
    """Map f over the models: by vmap, but on a CPU one at a time, which uses the cache better."""
    size = 1 if backend() == "cpu" else len(jax.tree.leaves(models)[0])
    return in_blocks(jax.vmap(f), models, size)


def _stacked(states: list[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _each(values: Mapping[str, Any], divergence: DivergenceCheck) -> dict[int, dict[str, float]]:
    """Return the values of every model by its position, without those that have diverged."""
    left = [i for i in range(len(divergence.models)) if i not in divergence.diverged]
    return {i: {name: float(x[i]) for name, x in values.items()} for i in left}


def _moments(models: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return means, and with several models standard deviations `train_sd` and `test_sd`."""
    splits = {
        split: {name: [one[split][name] for one in models] for name in metrics}
        for split, metrics in models[0].items()
    }
    means = {split: {k: float(np.mean(x)) for k, x in v.items()} for split, v in splits.items()}
    if len(models) < 2:
        return means
    sds = {
        f"{split}_sd": {k: float(np.std(x, ddof=1)) for k, x in v.items()}
        for split, v in splits.items()
    }
    return means | sds
