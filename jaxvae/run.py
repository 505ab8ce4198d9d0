"""A run is a directory: what it was told, what it measured, what it learned and what it drew.

    config.json      what it was told
    metrics.jsonl    a line per epoch: epoch, step, train and test metrics, seconds
    checkpoints/     the last two epochs and the best one
    manifolds/       frames of the film among them, an epoch each
    figures/         what `jaxvae figures` draws
    evaluation.json  what `jaxvae evaluate` measured last
    tensorboard/     and profile/, where they were asked for: `jaxvae.live`
    .lock            held by the training that is in it
    diverged.json    where the loss was no number any more, if it came to that

It can be killed at any instant: an epoch counts once its checkpoint is whole, and a resumed run
repeats what came after the last one that is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxvae.checkpoint import Which, load, newest_whole, open_checkpoints, restore, told, write
from jaxvae.config import Config, ModelConfig, TrainConfig, shown, whole_number
from jaxvae.data import Dataset, load_dataset
from jaxvae.distributions import binarize, bits_per_dimension
from jaxvae.errors import InputError, Preempted
from jaxvae.evaluation import evaluate, examine, mean_log_likelihood
from jaxvae.feed import Epoch, feed
from jaxvae.hosts import is_first, memory, preemption, wait_for_all
from jaxvae.journal import (
    append_history,
    on_disk,
    owned,
    read_json,
    read_metrics,
    version,
    write_history,
    write_json,
)
from jaxvae.model import Params
from jaxvae.objectives import example_keys
from jaxvae.parallel import devices_for, divided, everywhere, lay_out, share, whole
from jaxvae.progress import Progress, Shown
from jaxvae.training import (
    Metrics,
    Objective,
    TrainState,
    create_train_state,
    optimizer,
    train_step,
)
from jaxvae.watch import Watch

T = TypeVar("T")

Watcher = Callable[[dict[str, Any], Params], None]


@dataclass(frozen=True)
class RunConfig(Config):
    """What a run is told: its data, its seed, its model and how it is trained.

    start_from: the run directory whose last parameters it starts from; by default fresh ones.
    divide: whether every device keeps only its part of the parameters and of the optimizer's
      state, for models that are too large for one.
    workers: processes that read images on disk; 0: threads of the training process.
    """

    data: str = "mnist-5k"
    data_dir: str | None = None
    manual_dir: str | None = None
    seed: int = 0
    start_from: str | None = None
    divide: bool = False
    workers: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("data", "data_dir", "manual_dir", "start_from"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "data"):
                raise InputError(f"{name} is {shown(value)}: expected a string")
        if not isinstance(self.divide, bool):
            raise InputError(f"divide is {shown(self.divide)}: expected true or false")
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        object.__setattr__(self, "workers", whole_number("workers", self.workers, 0))
        for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, kind.from_dict(getattr(self, name)))


def load_run_data(config: RunConfig) -> Dataset:
    """The data set that a run was told to use.

    With binarization, the test images are 0/1 pixels drawn once, the same ones in every run, and
    so are the training images where it is fixed.
    """
    data = load_dataset(config.data, data_dir=config.data_dir, manual_dir=config.manual_dir)
    kind = config.train.binarization
    train_key, test_key = _binarization_keys()
    if kind == "fixed":
        if not isinstance(data.train_images, np.ndarray):
            raise InputError(
                f"{config.data} is read from disk image by image: "
                "expected the binarization 'dynamic' or 'none', not 'fixed'"
            )
        data = data._replace(train_images=_binarized(train_key, data.train_images))
    if kind != "none":
        data = data._replace(test_images=_binarized(test_key, data.test_images))
    return data


def _binarization_keys() -> jax.Array:
    # Not of the run's seed: runs are compared on the same images.
    return jax.random.split(jax.random.key(0))


def _binarized(key: jax.Array, images: np.ndarray) -> np.ndarray:
    return (255 * np.asarray(binarize(key, jnp.asarray(images)))).astype(np.uint8)


def configured(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run; `flags` are fields of it, or of its model or training."""
    return _with_flags(RunConfig(), flags)


def resumed(run_dir: Path, flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run that goes on.

    Raises InputError if the flags ask for another run than the recorded one; where the data lie
    and for how many epochs to train may change.
    """
    return going_on(read_config(run_dir), flags, run_dir)


def going_on(recorded: RunConfig, flags: Mapping[str, Any], run_dir: Path) -> RunConfig:
    """A recorded configuration with flags, or InputError where they ask for another run."""
    asked = _with_flags(recorded, flags)
    may_change = ("data_dir", "manual_dir", "epochs", "divide", "workers")
    for name in flags:
        was, now = _flag(recorded, name), _flag(asked, name)
        if was != now and name not in may_change:
            raise InputError(
                f"{as_flag(name)} is {now}, but {run_dir} was started with {was}: leave it out"
            )
    return asked


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
        (config.model.to_dict(), ModelConfig.from_dict(saved["model"]).to_dict()),
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
    images, labels = used(data.train_images, data.train_labels, config.model)
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
    params = load(config.start_from)
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


def keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    """The PRNG keys of a run: for training, and for measuring and drawing."""
    train_key, test_key = jax.random.split(jax.random.key(config.seed))
    return train_key, test_key


def read_config(run_dir: Path) -> RunConfig:
    """What a run was told. Raises InputError if the directory is not a run."""
    if not (run_dir / "config.json").exists() and (run_dir / "sweep.json").exists():
        raise InputError(f"{run_dir} holds many models: name the run directory of one, in it")
    return read_json(run_dir / "config.json", RunConfig.from_dict)


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
    train_key, test_key = keys(config)
    mesh = devices_for(config.train.batch_size)
    images, labels = used(data.train_images, data.train_labels, config.model)
    epochs, steps = config.train.epochs, len(images) // config.train.batch_size
    measure = _measuring(config, data, test_key)
    saved = newest_whole(run_dir)
    with open_checkpoints(run_dir) as checkpoints:
        if saved is None:
            state = lay_out(first_state(train_key, config), mesh, config.divide)
            totals, seconds = dict[str, Any](), 0.0
            _tell(watchers, run_dir, {"epoch": 0, "step": 0}, whole(state.params, mesh))
        else:
            state = restore(run_dir, saved, mesh=mesh, divide=config.divide)
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
    images, labels = used(data.test_images, data.test_labels, config.model)
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


def measure(run_dir: Path, num_samples: int, which: Which = "latest") -> dict[str, float | str]:
    """Measure a run's model on its test images; what comes out is written as evaluation.json too.

    Returns:
      `step`, `images` and `num_samples`; `elbo`, `log_likelihood`, `kl` and `log_p_x`, means in
      nats per image; `bits_per_dimension`, of log_p_x, where pixels are grey levels; what
      `jaxvae.evaluation.examine` finds; `seconds` and `devices`.
    """
    began = time.perf_counter()
    config = read_config(run_dir)
    data = load_run_data(config)
    # Of images on disk, as many as a probe of the latents needs.
    rows = np.linspace(
        0, len(data.train_images) - 1, min(len(data.train_images), 10_000), dtype=int
    )
    train_images = data.train_images
    if not isinstance(train_images, np.ndarray):
        train_images = train_images[rows]
        if data.train_labels is not None:
            data = data._replace(train_labels=data.train_labels[rows])
    if config.train.binarization == "dynamic":  # as the model has seen them
        train_images = _binarized(_binarization_keys()[0], train_images)
    data = data._replace(train_images=train_images)
    state = restore(run_dir, which)
    _, key = keys(config)
    devices = devices_for(len(data.test_images))
    images = used(data.test_images, data.test_labels, config.model)
    test = jax.device_put((state.params, key, *images), everywhere(devices))
    terms = share(evaluate, devices)(*test)
    terms["log_p_x"] = share(partial(mean_log_likelihood, num_samples=num_samples), devices)(*test)
    del terms["loss"]
    if config.model.likelihood == "discretized_logistic":
        shape = config.model.image_shape
        terms["bits_per_dimension"] = bits_per_dimension(terms["log_p_x"], shape)
    record: dict[str, float | str] = {
        "step": int(state.step),
        "images": len(data.test_images),
        "num_samples": num_samples,
        **{name: float(value) for name, value in terms.items()},
        **examine(state.params, key, data),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{devices.size} x {devices.devices.flat[0].device_kind}",
    }
    write_json(run_dir / "evaluation.json", record)
    return record


def used(images: T, labels: np.ndarray | None, model: ModelConfig) -> tuple[T, np.ndarray | None]:
    """Images, and their labels where the model is conditional."""
    return images, labels.astype(np.int32) if model.num_classes and labels is not None else None


def draw(run_dir: Path, data: Dataset, params: Params, kind: str = "png") -> list[Path]:
    """Draw the figures of a run's model into its directory; returns their paths.

    kind: "png", "svg" or "pdf".

    Raises InputError if they cannot be written.
    """
    # matplotlib takes as long to import as JAX, so only what draws pays for it.
    from jaxvae.figures import draw_all
    from jaxvae.film import draw_film

    _, key = keys(read_config(run_dir))
    try:
        paths = draw_all(run_dir / "figures", params, data, read_metrics(run_dir), key, kind)
        return paths + draw_film(run_dir)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{run_dir / 'figures'} cannot be written: {reason}") from None


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


def _with_flags(config: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    def own(kind: type) -> dict[str, Any]:
        names = {item.name for item in fields(kind)} - {"model", "train"}
        return {name: value for name, value in flags.items() if name in names}

    top = own(RunConfig)
    for name in ("data", "data_dir", "manual_dir", "start_from"):
        # A run may go on from another working directory.
        if name in top and Path(top[name]).exists():
            top[name] = str(Path(top[name]).resolve())
    model = replace(config.model, **own(ModelConfig))
    return replace(config, model=model, train=replace(config.train, **own(TrainConfig)), **top)


def as_flag(name: str) -> str:
    """A field of a configuration as the command line spells it."""
    return "--" + name.replace("_", "-")


def _flag(config: RunConfig, name: str) -> Any:
    return {**vars(config.model), **vars(config.train), **vars(config)}[name]
