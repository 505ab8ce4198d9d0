"""A run is a directory: what it was told, what it measured, what it learned and what it drew.

    config.json      what it was told
    metrics.jsonl    a line per epoch: epoch, step, train and test metrics, seconds
    checkpoints/     the last two epochs and the best one
    manifolds/       frames of the film among them, an epoch each
    figures/         what `jaxvae figures` draws
    evaluation.json  what `jaxvae evaluate` measured last
    tensorboard/     and profile/, where they were asked for: `jaxvae.runs.tensorboard`
    .lock            held by the training that is in it
    diverged.json    where the loss was no number any more, if it came to that

It can be killed at any instant: an epoch counts once its checkpoint is whole, and a resumed run
repeats what came after the last one that is.
"""

from dataclasses import replace
from pathlib import Path

import jax

from jaxvae.config import ModelConfig, TrainConfig
from jaxvae.data import Dataset
from jaxvae.devices.processes import is_first, memory, wait_for_all
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.checkpoints import (
    load,
    newest_whole,
    told,
)
from jaxvae.runs.config import RunConfig
from jaxvae.runs.data import model_inputs
from jaxvae.runs.files import (
    owned,
    read_metrics,
    version,
    write_json,
)
from jaxvae.training.step import (
    Metrics,
    TrainState,
    create_train_state,
    optimizer,
    train_step,
)


def start(run_dir: Path, config: RunConfig, data: Dataset, *, resume: bool) -> RunConfig:
    """Make a run directory, or prepare one to go on.

    Returns the configuration with the shape of the images in it. Raises InputError if there is
    a run in the directory already and it is not to go on, if the images are not those of the
    run or fewer than one batch, if a conditional model has no labels for them or wrong ones, if
    the run to start from has another model, if model and objective do not go together, or if
    the newest checkpoint is of another run than config.json says.
    """
    config = fitted(run_dir, config, data, resume=resume)
    if resume:
        expect_the_same(run_dir, config)
    else:
        refuse_another(run_dir)
        try_out(config, data)
    wait_for_all("nobody refuses the run")
    if is_first():
        write_config(run_dir, config)
    wait_for_all("the run directory is there")
    return config


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write config.json, unless another training is in the directory, and make the directory."""
    make_directory(run_dir)
    with owned(run_dir):
        write_json(run_dir / "config.json", {"jaxvae": version(), **config.to_dict()})


def make_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}") from None


def expect_the_same(run_dir: Path, config: RunConfig) -> None:
    """Raises InputError if the newest checkpoint was trained with another configuration."""
    step = newest_whole(run_dir)
    if step is None:
        if len(read_metrics(run_dir)) > 1:  # a kill can leave one line before its checkpoint
            raise InputError(
                f"{run_dir} has lost its checkpoints, of which metrics.jsonl tells: put them back "
                "from a copy, or start anew in another directory"
            )
        return
    saved = told(run_dir, step)
    for ours, theirs in (
        (
            config.model.to_dict(),
            ModelConfig.from_dict(saved["model"], config.model.own_network).to_dict(),
        ),
        (config.train.to_dict(), TrainConfig.from_dict(saved["train"]).to_dict()),
    ):
        for name, value in ours.items():
            if value != theirs[name] and name != "epochs":
                raise InputError(
                    f"{run_dir / 'config.json'} says {name} {value}, but the checkpoint of step "
                    f"{step} was trained with {theirs[name]}: put config.json right"
                )


def fitted(run_dir: Path, config: RunConfig, data: Dataset, *, resume: bool) -> RunConfig:
    """The configuration with the shape of the images in it, or InputError as of `start`."""
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
    if resume and model != config.model:
        raise InputError(
            f"{config.data} has images of shape {model.image_shape}, "
            f"but {run_dir} was started with {config.model.image_shape}"
        )
    if config.train.batch_size > len(data.train_images):
        raise InputError(
            f"batch_size is {config.train.batch_size}: expected at most the number of "
            f"training images, {len(data.train_images)}"
        )
    return replace(config, model=model)


def try_out(config: RunConfig, data: Dataset) -> None:
    """Raises InputError if a new run could not take its first step; computes nothing."""
    first_params(config)
    images, labels = model_inputs(data.train_images, data.train_labels, config.model)
    batch = slice(config.train.batch_size)

    def step(images: jax.Array, labels: jax.Array | None) -> tuple[TrainState, Metrics]:
        state = create_train_state(jax.random.key(0), config.model, config.train)
        return train_step(state, images, labels)

    state, _ = jax.eval_shape(step, images[batch], None if labels is None else labels[batch])
    needed, there = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), memory()
    if there is not None and needed > there:
        raise InputError(
            f"the model needs {needed / 1e9:,.0f} GB for parameters and the optimizer's state: "
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
    return replace(state, params=params, opt_state=optimizer(config.train).init(params))


def first_params(config: RunConfig) -> Params | None:
    """The parameters of the run to start from, if any; raises InputError as of `first_state`."""
    if config.start_from is None:
        return None
    params = load(config.start_from, network=config.model.own_network)
    if params.config != config.model:
        was, now = params.config.to_dict(), config.model.to_dict()
        name = next(name for name in now if was[name] != now[name])
        raise InputError(
            f"{config.start_from} has a model with {name} {was[name]}: "
            f"expected {now[name]}, as the run that starts from it"
        )
    return params


def refuse_another(run_dir: Path) -> None:
    """Raises InputError if there is a run, or a sweep, in the directory already."""
    if any((run_dir / name).exists() for name in ("config.json", "sweep.json")):
        raise InputError(
            f"{run_dir} already holds a run: go on with it (--resume), or choose another --run-dir"
        )
