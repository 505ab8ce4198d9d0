"""A run is a directory: what it was told, what it measured, what it learned and what it drew.

    config.json      what it was told
    metrics.jsonl    a line per epoch: epoch, step, train and test metrics, seconds
    checkpoints/     the last two epochs and the best one
    manifolds/       frames of the film among them, an epoch each
    figures/         what `jaxvae figures` draws
    evaluation.json  what `jaxvae evaluate` measured last
    tensorboard/     and profile/, where they were asked for: `jaxvae.runs.tensorboard`
    .lock            held by the training that is in it
    diverged.json    where the loss became NaN or infinite, if it did

It can be killed at any instant: an epoch counts once its checkpoint is whole, and a resumed run
repeats what came after the last one that is.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import jax

from jaxvae.data import Dataset
from jaxvae.devices.processes import is_first, memory, wait_for_all
from jaxvae.errors import InputError
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.runs.checkpoints import (
    load,
    metadata,
    newest_intact,
    steps_of,
)
from jaxvae.runs.config import MAY_CHANGE, DataRecord, RunConfig, components
from jaxvae.runs.data import describe, difference, model_inputs
from jaxvae.runs.files import (
    locked,
    read_metrics,
    version,
    write_json,
)
from jaxvae.storage import expect_utf8
from jaxvae.training.state import TrainState, create_train_state, state_of
from jaxvae.training.step import Metrics, train_step


def start(
    run_dir: Path, config: RunConfig, data: Dataset, *, resume: bool, new_data: bool = False
) -> RunConfig:
    """Make a run directory, or prepare one to go on.

    Returns the configuration with the shape of the images and a record of the data in it. Raises
    InputError if there is a run in the directory already and it is not to go on, if the data are
    not those of the run or fewer than one batch, if a conditional model has no labels for them or
    wrong ones, if the run to start from has another model, if model and objective do not go
    together, or if the newest checkpoint is of another run than config.json says.

    new_data: a run goes on with another data set, of as many batches per epoch, which is recorded.
    """
    config = with_data(run_dir, config, data, describe(data), resume=resume, new_data=new_data)
    if resume:
        expect_same_config(run_dir, config)
    else:
        expect_no_run(run_dir)
        check_first_step(config, data)
    wait_for_all("nobody refuses the run")
    if is_first():
        write_config(run_dir, config)
    wait_for_all("the run directory is there")
    return config


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write config.json, unless another training is in the directory, and make the directory."""
    make_directory(run_dir)
    with locked(run_dir):
        write_json(run_dir / "config.json", {"jaxvae": version(), **config.to_dict()})


def make_directory(run_dir: Path) -> None:
    expect_utf8(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}") from None


def expect_same_config(run_dir: Path, config: RunConfig) -> None:
    """Raises InputError if the newest checkpoint was trained with another configuration."""
    step = newest_intact(run_dir)
    if step is None:
        # A kill can leave the line of the first epoch before its checkpoint.
        if any(line["epoch"] > 1 for line in read_metrics(run_dir)):
            raise InputError(
                f"{run_dir} has lost its checkpoints, of which metrics.jsonl tells: put them back "
                "from a copy, or start anew in another directory"
            )
        return
    saved = metadata(run_dir, step)
    own = components(config)
    for part, name in ((config.model, "model"), (config.train, "train")):
        mine = {n: x for n, x in own.items() if n in part._registries}
        ours, theirs = part.to_dict(), type(part).from_dict(saved[name], **mine).to_dict()
        for name, value in ours.items():
            if value != theirs[name] and name not in MAY_CHANGE:
                raise InputError(
                    f"{run_dir / 'config.json'} says {name} {value}, but the checkpoint of step "
                    f"{step} was trained with {theirs[name]}: put config.json right"
                )


def with_data(
    run_dir: Path,
    config: RunConfig,
    data: Dataset,
    record: DataRecord,
    *,
    resume: bool,
    new_data: bool = False,
) -> RunConfig:
    """Return the configuration with the shape of the images and `record`, as of `describe`.

    Raises:
      InputError: as of `start`.
    """
    before = config.model.image_shape
    config = _with_shape(config, data)
    if resume and config.model.image_shape != before:
        raise InputError(
            f"{config.data} has images of shape {config.model.image_shape}, "
            f"but {run_dir} was started with {before}"
        )
    seen = _seen(run_dir, config, record, new_data=new_data) if resume else (record,)
    _expect_a_batch(config, data)
    return replace(config, data_seen=seen)


def with_shape(config: RunConfig, data: Dataset) -> RunConfig:
    """Return the configuration of a training without a directory, with the shape of the images.

    Raises:
      InputError: labels that a conditional model cannot take, or fewer images than one batch.
    """
    config = _with_shape(config, data)
    _expect_a_batch(config, data)
    return config


def _with_shape(config: RunConfig, data: Dataset) -> RunConfig:
    height, width, channels = data.train_images.shape[1:]
    model = replace(config.model, image_shape=(height, width, channels))
    for split in ("train", "test") if model.num_classes else ():
        labels = getattr(data, f"{split}_labels")
        if labels is None or not 0 <= labels.min() <= labels.max() < model.num_classes:
            has = f"no {split} labels"
            if labels is not None:
                has = f"{split} labels from {labels.min()} to {labels.max()}"
            raise InputError(
                f"{config.data} has {has}: expected classes from 0 to {model.num_classes - 1}, "
                f"as num_classes is {model.num_classes}"
            )
    return replace(config, model=model)


def _expect_a_batch(config: RunConfig, data: Dataset) -> None:
    if config.train.batch_size > len(data.train_images):
        raise InputError(
            f"batch_size is {config.train.batch_size}: expected at most the number of "
            f"training images, {len(data.train_images)}"
        )


def _seen(
    run_dir: Path, config: RunConfig, record: DataRecord, *, new_data: bool
) -> tuple[DataRecord, ...]:
    """Return the data sets of a run that goes on with this one, or raise InputError.

    A run without a record, of an older version, is known by its number of batches per epoch.
    """
    batches, before = record.train_images // config.train.batch_size, None
    found = f"{config.data} is not the data set that {run_dir} was trained on"
    if config.data_seen:
        last = config.data_seen[-1]
        how = difference(record, last)
        if how is None:
            return config.data_seen
        found, before = f"{found}: {how}", last.train_images // config.train.batch_size
    elif history := read_metrics(run_dir):
        before = history[0]["step"] // history[0]["epoch"]  # the first lines may be lost
    remedy = "name the former data set with --data"
    if before in (None, batches):
        if new_data or not config.data_seen:
            step = max(steps_of(run_dir), default=0) if config.data_seen else 0
            earlier = [one for one in config.data_seen if one.step < step]
            return (*earlier, replace(record, step=step))
        remedy += ", take this one with --new-data"
    else:
        found += f", {batches} batches per epoch instead of {before}, which a run cannot change"
    raise InputError(
        f"{found}; {remedy}, or start a new run from this model with "
        f"--start-from {shlex.quote(str(run_dir))}"
    )


def check_first_step(config: RunConfig, data: Dataset, models: int = 1) -> None:
    """Raises InputError if a new run could not take its first step; computes nothing.

    models: how many of the kind are trained at once.
    """
    first_params(config)
    images, labels = model_inputs(data.train_images, data.train_labels, config.model)
    batch = slice(config.train.batch_size)

    def step(images: jax.Array, labels: jax.Array | None) -> tuple[TrainState, Metrics]:
        state = create_train_state(jax.random.key(0), config.model, config.train)
        return train_step(state, images, labels)

    state, _ = jax.eval_shape(step, images[batch], None if labels is None else labels[batch])
    needed = models * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    there = memory()
    if there is not None and needed > there:
        who = "the model needs" if models == 1 else f"{models:,} models need"
        raise InputError(
            f"{who} {needed / 1e9:,.0f} GB for parameters and the optimizer's state: "
            f"expected at most the {there / 1e9:,.0f} GB of memory that this machine has"
        )


def first_state(key: jax.Array, config: RunConfig) -> TrainState:
    """The state that a run begins with.

    Raises InputError if the run to start from has another model.
    """
    state = create_train_state(key, config.model, config.train)
    params = first_params(config)
    if params is None:
        return state
    return state_of(params, state.key, config.train)


def first_params(config: RunConfig) -> Params | None:
    """The parameters of the run to start from, if any; raises InputError as of `first_state`."""
    if config.start_from is None:
        return None
    own = {n: x for n, x in components(config).items() if n in ModelConfig._registries}
    params = load(config.start_from, **own)
    if params.config != config.model:
        was, now = params.config.to_dict(), config.model.to_dict()
        name = next(name for name in now if was[name] != now[name])
        raise InputError(
            f"{config.start_from} has a model with {name} {was[name]}: "
            f"expected {now[name]}, as the run that starts from it"
        )
    return params


def expect_no_run(run_dir: Path) -> None:
    """Raises InputError if there is a run, or a sweep, in the directory already."""
    if any((run_dir / name).exists() for name in ("config.json", "sweep.json")):
        raise InputError(
            f"{run_dir} already holds a run: go on with it (--resume), or choose another --run-dir"
        )
    for name in ("checkpoints", "manifolds"):  # of which a training deletes the older ones
        if (run_dir / name).is_symlink() or any((run_dir / name).glob("*")):
            raise InputError(
                f"{run_dir / name} is there already, of something else than a run: choose another "
                "--run-dir"
            )
