"""The directory of a run.

    config.json      the configuration
    metrics.jsonl    a line per epoch: epoch, step, train and test metrics, seconds
    checkpoints/     the last two epochs and the best one
    manifolds/       frames of the animation
    figures/         written by `jaxvae train` and `jaxvae figures`
    evaluation.json  the last result of `jaxvae evaluate`
    tensorboard/     with --tensorboard
    mlflow.json      with --mlflow: the identifier of the tracked run
    wandb.json       with --wandb: the same; wandb/ has its files
    profile/         with --profile
    .lock            locked while a training runs
    diverged.json    written if the loss became NaN or infinite

A training can be killed at any instant. An epoch counts once its checkpoint is complete; a resumed
run repeats everything after the last complete checkpoint.
"""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.data import Dataset
from jaxvae.devices.processes import is_first, memory, wait_for_all
from jaxvae.errors import InputError
from jaxvae.models.config import ModelConfig
from jaxvae.models.likelihoods import binarize
from jaxvae.models.protocols import Learned
from jaxvae.models.vae import Params, known_classes
from jaxvae.objectives import PriorFit
from jaxvae.runs.checkpoints import is_shared, load, metadata, newest_intact, steps_of
from jaxvae.runs.config import (
    MAY_CHANGE,
    RECORDED,
    Change,
    DataRecord,
    RunConfig,
    components,
    own_components,
    read_config,
)
from jaxvae.runs.data import describe, difference, expect_conditions, train_conditions
from jaxvae.runs.files import locked, read_metrics, version, write_json
from jaxvae.storage import expect_utf8
from jaxvae.training.optimizer import OptaxSchedule, expect_rate
from jaxvae.training.state import TrainState, create_train_state, state_of
from jaxvae.training.step import Metrics, train_step

_ENCODED = 2000  # training images from which a prior may start


def start(
    run_dir: Path, config: RunConfig, data: Dataset, *, resume: bool, new_data: bool = False
) -> RunConfig:
    """Make a run directory, or prepare one to be resumed.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      data: the data set.
      resume: whether the run is resumed.
      new_data: allow a resumed run to continue with another data set, which is recorded. It must
        have the same number of batches per epoch.

    Returns:
      The configuration with the shape of the images and a record of the data.

    Raises:
      InputError: the directory already holds a run and `resume` is false; the data are not those
        of the run, are smaller than one batch, or lack the classes or covariates of a conditional
        model; the run to start from has another model; model and objective do not match; or the
        newest checkpoint contradicts config.json.
    """
    config = with_data(run_dir, config, data, describe(data), resume=resume, new_data=new_data)
    if resume:
        config = replace(config, changes=expect_same_config(run_dir, config, RECORDED))
    else:
        expect_no_run(run_dir)
        check_first_step(config, data)
    wait_for_all("run is valid on all processes")
    if is_first():
        write_config(run_dir, config, new=not resume)
    wait_for_all("run directory exists")
    return config


def write_config(run_dir: Path, config: RunConfig, *, new: bool = False) -> None:
    """Make the run directory and write config.json.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      new: whether the directory must not hold a run yet.

    Raises:
      InputError: another training is running in the directory, or it cannot be written; or as for
        `expect_no_run`.
    """
    make_directory(run_dir)
    with locked(run_dir):
        if new:  # again, as another training may have started there meanwhile
            expect_no_run(run_dir)
        write_json(run_dir / "config.json", {"jaxvae": version(), **config.to_dict()})


def make_directory(run_dir: Path) -> None:
    """Make a run directory, if it does not exist.

    Args:
      run_dir: the run directory.

    Raises:
      InputError: it cannot be made, or its path is not UTF-8.
    """
    expect_utf8(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}") from None


def expect_same_config(
    run_dir: Path, config: RunConfig, recorded: Collection[str] = ()
) -> tuple[Change, ...]:
    """Check that the newest checkpoint was trained with this configuration.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      recorded: fields of the training that may differ, besides those in `MAY_CHANGE`.

    Returns:
      The changes of the run: those before this checkpoint, and the fields in `recorded` that
      differ.

    Raises:
      InputError: another field differs, or all checkpoints are lost or damaged.
    """
    if is_shared(run_dir):
        raise InputError(
            f"{run_dir} holds a model, but no state of a training: start a new run from it with "
            f"--start-from {shlex.quote(str(run_dir))}"
        )
    step = newest_intact(run_dir)
    if step is None:
        # A kill between the first line and the first checkpoint is harmless.
        if any(line["epoch"] > 1 for line in read_metrics(run_dir)):
            raise InputError(
                f"{run_dir} holds no checkpoint, but its metrics.jsonl lists finished epochs: "
                "restore the checkpoints from a copy, or start again in another directory"
            )
        return ()
    saved = metadata(run_dir, step)
    own = components(config)
    changes = [change for change in config.changes if change.step < step]
    for part, kind in ((config.model, "model"), (config.train, "train")):
        mine = {n: x for n, x in own.items() if n in part._registries}
        now, theirs = part.to_dict(), type(part).from_dict(saved[kind], **mine).to_dict()
        for name, value in now.items():
            if value == theirs[name] or name in MAY_CHANGE:
                continue
            if name not in recorded:
                raise InputError(
                    f"{run_dir / 'config.json'} has {name} {value}, but the checkpoint of step "
                    f"{step} was trained with {theirs[name]}: correct config.json"
                )
            changes.append(Change(step, name, theirs[name], value))
    return tuple(changes)


def with_data(
    run_dir: Path,
    config: RunConfig,
    data: Dataset,
    record: DataRecord,
    *,
    resume: bool,
    new_data: bool = False,
) -> RunConfig:
    """Return the configuration with the shape of the images and the record of the data.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      data: the data set.
      record: of the data set, from `describe`.
      resume: whether the run is resumed.
      new_data: as for `start`.

    Returns:
      The configuration.

    Raises:
      InputError: the data do not fit the run, as for `start`.
    """
    before = config.model.image_shape
    if resume and data.train_covariates is not None and not config.model.num_covariates:
        raise InputError(
            f"{config.data} has covariates, but {run_dir} was started without: leave them out"
        )
    config = _with_shape(config, data)
    if resume and config.model.image_shape != before:
        raise InputError(
            f"{config.data} has {config.model.noun}s of shape {config.model.image_shape}, "
            f"but {run_dir} was started with {before}"
        )
    seen = _seen(run_dir, config, record, new_data=new_data) if resume else (record,)
    _expect_steps(config, data)
    return replace(config, data_seen=seen)


def with_shape(config: RunConfig, data: Dataset) -> RunConfig:
    """Return the configuration with the shape of the images, for a training without a directory.

    Args:
      config: the configuration of the run.
      data: the data set.

    Returns:
      The configuration.

    Raises:
      InputError: no valid labels for a conditional model, or fewer images than one batch.
    """
    config = _with_shape(config, data)
    _expect_steps(config, data)
    return config


def _with_shape(config: RunConfig, data: Dataset) -> RunConfig:
    model = config.model.with_image_shape(data.train_images.shape[1:])
    if data.train_covariates is not None and not model.num_covariates:
        model = replace(model, num_covariates=data.train_covariates.shape[1])
    expect_conditions(config.data, data, model)
    if model.conditions != "both" and not model.condition_dim:
        raise InputError(
            f"conditions is {model.conditions!r}, but the model has no classes and no covariates: "
            "expected num_classes or covariate columns, or leave it out"
        )
    labels = data.train_labels if model.classifier else None
    hidden = config.labelled > 0 or (labels is not None and labels.min() < 0)
    if hidden and not getattr(config.train.objective, "unlabelled", False):
        raise InputError(
            "some training labels are hidden or missing: expected the objective 'm2', which takes "
            "images without a label, and classifier true"
        )
    config = replace(config, model=model, covariates=data.covariates)
    train_conditions(data, config)
    return config


def _expect_steps(config: RunConfig, data: Dataset) -> None:
    """Check that there is a batch, and a learning rate for a run of this length."""
    if config.train.batch_size > len(data.train_images):
        raise InputError(
            f"batch_size is {config.train.batch_size}: expected at most the number of "
            f"training {config.model.noun}s, {len(data.train_images)}"
        )
    if isinstance(config.train.schedule, OptaxSchedule):
        steps = config.train.epochs * (len(data.train_images) // config.train.batch_size)
        expect_rate(config.train.schedule, steps)


def _seen(
    run_dir: Path, config: RunConfig, record: DataRecord, *, new_data: bool
) -> tuple[DataRecord, ...]:
    """Return the data sets of a resumed run, this one last; raise InputError if it does not fit.

    A run of version 0.1 has no record of its data; only the batches per epoch are compared.
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
    remedy = "pass the original data set with --data"
    if before in (None, batches):
        if new_data or not config.data_seen:
            step = max(steps_of(run_dir), default=0) if config.data_seen else 0
            earlier = [one for one in config.data_seen if one.step < step]
            return (*earlier, replace(record, step=step))
        remedy += ", accept this one with --new-data"
    else:
        found += f", and has {batches} batches per epoch instead of {before}, which cannot change"
    raise InputError(
        f"{found}; {remedy}, or start a new run from this model with "
        f"--start-from {shlex.quote(str(run_dir))}"
    )


def check_first_step(config: RunConfig, data: Dataset, models: int = 1) -> None:
    """Check that a new run can take its first step, by tracing it without computing.

    Args:
      config: the configuration of the run.
      data: the data set.
      models: number of models that are trained together.

    Raises:
      InputError: model, objective and data do not match, or the memory is too small.
    """
    first_params(config)
    images, labels = data.train_images, data.conditions(config.model, "train")
    batch = slice(config.train.batch_size)

    def step(images: jax.Array, labels: jax.Array | None) -> tuple[TrainState, Metrics]:
        state = create_train_state(jax.random.key(0), config.model, config.train)
        return train_step(state, images, labels)

    state, _ = jax.eval_shape(step, images[batch], None if labels is None else labels[batch])
    needed = models * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    available = memory()
    if available is not None and needed > available:
        subject = "the model needs" if models == 1 else f"{models:,} models need"
        raise InputError(
            f"{subject} {needed / 1e9:,.0f} GB for parameters and optimizer state: "
            f"expected at most the {available / 1e9:,.0f} GB of memory of this machine; "
            "choose a smaller model"
        )


def first_state(key: jax.Array, config: RunConfig, data: Dataset | None = None) -> TrainState:
    """Return the initial training state of a run.

    Args:
      key: PRNG key.
      config: the configuration of the run.
      data: the data set, from which a prior that is fitted to a trained model may start.

    Returns:
      The state.

    Raises:
      InputError: the run to start from has another model.
    """
    state = create_train_state(key, config.model, config.train)
    params = first_params(config)
    if params is None:
        return state
    if params.config != config.model:
        params = replace(params, config=config.model, prior=state.params.prior)
        if data is not None and hasattr(config.model.prior, "init_from"):
            params = replace(params, prior=_encoded_prior(key, params, config, data))
    return state_of(params, state.key, config.train)


def _encoded_prior(key: jax.Array, params: Params, config: RunConfig, data: Dataset) -> Learned:
    """Return the initial parameters of a prior, from a random part of the training images."""
    rows_key, pixels_key, prior_key = jax.random.split(jax.random.fold_in(key, 2), 3)
    images, labels = data.train_images, train_conditions(data, config)
    rows = np.sort(jax.random.permutation(rows_key, len(images))[:_ENCODED])
    x = jnp.asarray(images[rows])
    if config.train.binarization == "dynamic":
        x = binarize(pixels_key, x)
    known = None if labels is None else known_classes(params, x, labels[rows])
    return config.model.prior.init_from(prior_key, params, x, known)


def with_model_to_start_from(base: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a new run with the model of the run that it starts from.

    Args:
      base: the configuration; a model that is not the default one is kept.
      flags: fields that were given, by name, which override the configuration.

    Returns:
      The configuration; `base` if it starts from no run.

    Raises:
      InputError: that run cannot be read, or has custom components that are not in `flags`.
    """
    start_from = flags.get("start_from", base.start_from)
    if start_from is None or base.model != ModelConfig():
        return base
    own = {n: x for n, x in own_components(flags).items() if n in ModelConfig._registries}
    if is_shared(start_from):
        return replace(base, model=read_config(Path(start_from), **own).model)
    step = newest_intact(start_from)
    if step is None:
        return base
    return replace(base, model=ModelConfig.from_dict(metadata(start_from, step)["model"], **own))


def first_params(config: RunConfig) -> Params | None:
    """Return the parameters of the run to start from, or None.

    With the objective "prior" that run may have another prior.

    Args:
      config: the configuration of the run.

    Returns:
      The parameters.

    Raises:
      InputError: that run has another model.
    """
    if config.start_from is None:
        return None
    own = {n: x for n, x in components(config).items() if n in ModelConfig._registries}
    new_prior = isinstance(config.train.objective, PriorFit)
    if new_prior:
        own.pop("prior", None)
    params = load(config.start_from, **own)
    expected = replace(params.config, prior=config.model.prior) if new_prior else params.config
    if expected != config.model:
        was, now = expected.to_dict(), config.model.to_dict()
        name = next(name for name in now if was[name] != now[name])
        raise InputError(
            f"{config.start_from} has a model with {name} {was[name]}: "
            f"expected {now[name]}, as in the run that starts from it"
        )
    return params


def expect_no_run(run_dir: Path) -> None:
    """Check that a directory does not hold a run or a sweep yet.

    Args:
      run_dir: the directory.

    Raises:
      InputError: it does, or it holds other files where a run would write.
    """
    if any((run_dir / name).exists() for name in ("config.json", "sweep.json")):
        raise InputError(
            f"{run_dir} already holds a run: resume it with --resume, or choose another --run-dir"
        )
    for name in ("checkpoints", "manifolds"):  # training deletes older files in them
        if (run_dir / name).is_symlink() or any((run_dir / name).glob("*")):
            raise InputError(
                f"{run_dir / name} exists already but does not belong to a run: choose another "
                "--run-dir"
            )
