"""The commands of the command line."""

import argparse
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from jaxvae.cli.parser import completion_script, config_fields, make_parser
from jaxvae.cli.streams import tolerate_closed_streams
from jaxvae.components import imported, is_dotted_path
from jaxvae.devices.processes import pass_over_missing_tpu
from jaxvae.devices.sharding import make_cores_devices
from jaxvae.errors import (
    Converted,
    Damaged,
    Diverged,
    InputError,
    NotDrawn,
    NotTracked,
    OtherData,
    Preempted,
    TrainingFailed,
)
from jaxvae.runs.files import as_argument, resume_command, typed_again
from jaxvae.storage import write_atomic
from jaxvae.validation import is_image

# Warnings printed as one line.
_PRINTED = (Converted, Damaged, Diverged, NotDrawn, NotTracked, OtherData)
_BYTES_PER_SAMPLED = 24  # memory per pixel: the image and its copies until it is a PNG
_CACHE_BYTES = 2**30  # limit of the compilation cache


@tolerate_closed_streams()
def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the command line; by default that of the process.

    Returns:
      The exit code. 0: done; 1: interrupted, or training failed; 2: wrong input; 75: stopped by
      SIGTERM or Ctrl-C, and saved.
    """
    try:
        with warnings.catch_warnings():
            for category in _PRINTED:
                warnings.simplefilter("once", category)
            warnings.showwarning = _print_warnings(warnings.showwarning)
            _run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
    except InputError as error:
        return _fail(2, str(error))
    except OSError as error:  # usually of a file that the user named
        where = f"{error.filename}: " if error.filename else ""
        return _fail(2, f"{where}{error.strerror or error}")
    except TrainingFailed as error:
        return _fail(1, str(error))
    except Preempted as stop:
        return _fail(75, str(stop))
    except KeyboardInterrupt as interrupt:
        return _fail(1, f"interrupted{interrupt}")
    except Exception as error:
        _exit_if_distributed(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = " ".join(str(error).split())[:200]
            remedy = "use a smaller --batch-size or a smaller model"
            return _fail(1, f"out of memory: {reason}; {remedy}")
        if without := _no_device():
            return _fail(2, without)
        raise
    return 0


def _fail(code: int, message: str) -> int:
    print(f"jaxvae: {message}", file=sys.stderr)
    return code


def _run(arguments: list[str] | None) -> None:
    options = make_parser(_COMMANDS).parse_args(arguments)
    os.environ["MPLBACKEND"] = "agg"  # figures are only written to files
    pass_over_missing_tpu()
    make_cores_devices()
    _enable_compilation_cache()
    options.command(options)


def _print_warnings(show: Any) -> Any:
    """Return a `warnings.showwarning` that prints jaxvae's own warnings as one line."""

    def shown(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, _PRINTED):
            print(f"jaxvae: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    return shown


def _exit_if_distributed(error: Exception) -> None:
    """Exit at once if this is one of several processes and a collective computation failed.

    An ordinary exit would wait for the other processes, one of which has stopped.
    """
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        reason = " ".join(str(error).split())[:300]
        print(
            f"jaxvae: process {jax.process_index()} of {jax.process_count()} stopped because a "
            f"computation of all processes failed: {reason}; when all have ended, start them again "
            "with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _no_device() -> str | None:
    """Return a message if JAX finds no device, else None."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError where a plugin is missing
        reason = " ".join(str(error).split())[:300] or "there is no such device"
        return (
            f"JAX finds no device, as JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS', '')!r}: {reason}; unset it, or install JAX for "
            "that device"
        )
    return None


def _enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache in the user's cache folder.

    A cache folder that is already configured is left alone; a folder that cannot be written is
    not used.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home).absolute() / "jaxvae" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    _drop_oldest(folder, _CACHE_BYTES)
    # A damaged entry or a full disk only costs a compilation: not worth a warning.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _drop_oldest(folder: Path, limit: int) -> None:
    """Delete the least recently used files, until the folder holds at most `limit` bytes.

    JAX limits its cache only if the filelock package is installed.
    """
    with suppress(OSError):  # another command may delete them at the same time
        files = [(file, file.stat()) for file in folder.rglob("*") if file.is_file()]
        total = sum(stat.st_size for _, stat in files)
        for file, stat in sorted(files, key=lambda one: one[1].st_atime):
            if total <= limit:
                break
            file.unlink()
            total -= stat.st_size


def _train(options: argparse.Namespace) -> None:
    from jaxvae.devices import processes
    from jaxvae.runs import sweep, tensorboard, tracking
    from jaxvae.runs.callbacks import expect_callbacks
    from jaxvae.runs.config import RunConfig, read_config_file, resumed
    from jaxvae.runs.data import load_run_data
    from jaxvae.runs.directory import with_model_to_start_from
    from jaxvae.runs.profiling import Profiler
    from jaxvae.runs.progress import Progress

    processes.join(options.coordinator, options.num_processes, options.process_id)
    if processes.several() and not options.run_dir:
        raise InputError("several processes need the same run directory: pass --run-dir DIR")
    flags = _flags(options)
    base = read_config_file(options.config, flags) if options.config else RunConfig()
    if options.tensorboard:
        tensorboard.require_tensorboard()
    if options.new_data and not options.resume:
        raise InputError("--new-data is for a resumed run: pass --resume too")
    if options.config and options.resume:
        raise InputError(
            "--config is for a new run, but a resumed run keeps its configuration: leave it out"
        )
    if options.resume and not options.run_dir:
        raise InputError("--resume needs the directory of the run: pass --run-dir DIR")
    run_dir = Path(options.run_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    if not options.resume:
        seeds = flags.pop("seeds", 1)
        models = sweep.configured(flags, seeds, with_model_to_start_from(base, flags))
    elif (run_dir / "sweep.json").exists():
        models = sweep.resumed(run_dir, flags)
    else:
        models = {"": resumed(run_dir, _of_one_model(flags, run_dir))}
    if len(models) > 1 and processes.several():
        raise InputError(
            f"a sweep of {len(models)} models needs a single process: expected one model, or one "
            "process"
        )
    if len(models) > 1 and options.tensorboard:
        raise InputError(
            f"--tensorboard is for a single model, but {len(models)} are trained: leave it out"
        )
    if len(models) > 1 and any(config.fsdp for config in models.values()):
        raise InputError(
            f"--fsdp is for a single model, but {len(models)} are trained: leave it out"
        )
    progress = Progress()
    callbacks: list[Any] = [progress]
    if options.profile:
        callbacks.append(Profiler())
    if options.tensorboard:
        callbacks.append(tensorboard.TensorBoard())
    if options.mlflow is not None:
        # MLflow's own default is to wait for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        callbacks.append(tracking.MLflow(options.mlflow or None))
    if options.wandb is not None:
        callbacks.append(tracking.WandB(options.wandb or None))
    own = [imported("callback", path) for path in options.callbacks or ()]
    callbacks += expect_callbacks(own)
    start = {"resume": options.resume, "new_data": options.new_data}
    with progress.preparing():
        data = load_run_data(next(iter(models.values())), options.data)
        try:
            if len(models) > 1:
                paths = _train_many(run_dir, models, data, start, callbacks)
            else:
                (config,) = models.values()
                paths = _train_one(run_dir, config, data, start, callbacks)
        except KeyboardInterrupt:
            started = any((run_dir / name).exists() for name in ("config.json", "sweep.json"))
            remedy = f"; resume with: {resume_command(run_dir)}" if started else ""
            raise KeyboardInterrupt(remedy) from None
    if paths:
        lost = sweep.diverged(run_dir, models) if len(models) > 1 else []
        model = next(name for name in models if name not in lost)
        images = is_image(data.train_images.shape[1:])
        patience = models[model].train.patience
        name = model if len(models) > 1 else ""
        _print_next_steps(run_dir, name, paths, images=images, patience=patience)


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that were given, by field; dotted paths are imported."""
    given = {
        name: value
        for name in (*config_fields(), "seeds")
        if (value := getattr(options, name, None)) is not None
    }
    return given | {name: imported(name, given[name]) for name, registry in config_fields().items()
                    if registry is not None and is_dotted_path(given.get(name))}  # fmt: skip


def _own(options: argparse.Namespace) -> dict[str, Any]:
    """Return the custom components that a command on a run was given."""
    from jaxvae.models.config import ModelConfig

    return {name: imported(name, value) for name in ModelConfig._registries
            if (value := getattr(options, name)) is not None}  # fmt: skip


def _which(options: argparse.Namespace) -> Literal["latest", "best"]:
    return "best" if options.best else "latest"


def _params(options: argparse.Namespace) -> Any:
    """Return the parameters of the run that a command was given."""
    from jaxvae.runs.checkpoints import load

    return load(options.run, _which(options), **_own(options))


def _config_and_data(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return configuration and data of the run that a command was given."""
    from jaxvae.runs.config import read_config
    from jaxvae.runs.data import as_examples_of, load_run_data, warn_of_other_data

    config = read_config(options.run, **_own(options))
    data = load_run_data(config, options.data)
    data = as_examples_of(options.data or config.data, data, config.model)
    warn_of_other_data(options.run, config, data, options.data)
    return config, data


def _print_next_steps(
    run_dir: Path, model: str, figures: list[Path], *, images: bool = True, patience: int = 0
) -> None:
    """Print the number of figures and the next commands.

    Args:
      run_dir: directory of the run, or of a sweep.
      model: subfolder of the sweep.
      figures: paths of the figures.
      images: whether the model is of images.
      patience: that of the training, which may have ended it.
    """
    whole, one = as_argument(run_dir), as_argument(run_dir / model)
    of_model, again = (
        typed_again(run_dir / model, parts) for parts in (("model",), ("data", "model"))
    )
    print(f"{len(figures)} figures; the first: {figures[0]}", file=sys.stderr)
    name = _program_name()
    explore = {f"{name} explore {one}{again}": "write an interactive latent-space explorer"}
    sample = f"{name} sample {one}{of_model} --n 64 --out samples.{'png' if images else 'npz'}"
    lines = (explore if images else {}) | {
        f"{name} evaluate {one}{again}": "print test ELBO, log p(x) and other metrics",
        sample: f"draw new {'images' if images else 'examples'}",
        f"{name} train --resume --run-dir {whole}{typed_again(run_dir)} --epochs N"
        + " --patience 0" * bool(patience): "continue training to N epochs",
    }
    width = max(map(len, lines))
    for line, says in lines.items():
        print(f"  {line:{width}}  {says}", file=sys.stderr)


def _program_name() -> str:
    """Return the name by which this program was started, for commands that can be copied."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("jaxvae", "__main__.py"):
        return "python -m jaxvae"
    outside = called.name == "jaxvae" and not shutil.which("jaxvae")
    return as_argument(called) if outside else "jaxvae"


def _train_one(
    run_dir: Path, config: Any, data: Any, start: Any, callbacks: list[Any]
) -> list[Path]:
    from jaxvae.devices import processes
    from jaxvae.runs import directory, drawing, loop
    from jaxvae.runs.callbacks import AnimationFrames

    config = directory.start(run_dir, config, data, **start)
    if processes.is_first():
        _print_start(config, data, f"run directory {run_dir}")
    figures = drawing.Figures()
    loop.train(run_dir, config, data, callbacks=[*callbacks, AnimationFrames(), figures])
    return figures.paths


def _train_many(
    run_dir: Path, models: Any, data: Any, start: Any, callbacks: list[Any]
) -> list[Path]:
    from jaxvae.runs import drawing, sweep

    models = sweep.start(run_dir, models, data, **start)
    name, config = next(iter(models.items()))
    _print_start(config, data, f"{len(models)} models; run directories {run_dir}/{name}, ...")
    figures = drawing.Figures()
    sweep.train(run_dir, models, data, callbacks=[*callbacks, figures])
    for line in sweep.results(run_dir, models):
        print(line, file=sys.stderr)
    return figures.paths


def _print_start(config: Any, data: Any, where: str) -> None:
    from jaxvae.runs.data import labelled_counts

    counts = f"{len(data.train_images):,} training and {len(data.test_images):,} test"
    images = is_image(data.train_images.shape[1:])
    noun = "images" if images else "examples"
    split = " (every tenth, as there is no test split)" if data.every_tenth else ""
    print(f"{config.data}: {counts} {noun}{split}; {where}", file=sys.stderr)
    if found := labelled_counts(data, config):
        count, slots, times = found
        print(
            f"{count:,} training {noun} have a label: at least {slots} of a batch, so each comes "
            f"{times:.1f} times in an epoch",
            file=sys.stderr,
        )


def _of_one_model(flags: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return flags with a single value each; raise InputError if they ask for several models."""
    from jaxvae.runs.config import as_flag

    single = {}
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > 1 or (name == "seeds" and value != 1):
            raise InputError(
                f"{as_flag(name)} asks for several models, but {run_dir} is a run of one: "
                "leave it out"
            )
        single[name] = values[0]
    single.pop("seeds", None)
    return single


def _evaluate(options: argparse.Namespace) -> None:
    from jaxvae.runs import evaluation
    from jaxvae.runs.config import as_flag, read_config
    from jaxvae.runs.progress import counting

    _at_least_one("--num-samples", options.num_samples)
    which = _which(options)
    numbers = {
        name: value
        for name in ("num_images", "num_steps", "num_chains")
        if (value := getattr(options, name)) is not None
    }
    for name, value in numbers.items():
        flag = as_flag(name)
        if options.method != "ais":
            raise InputError(f"{flag} is for --method ais: pass that too, or leave {flag} out")
        _at_least_one(flag, value)
    if options.method == "ais":
        _print_bounds(options, numbers)
        return
    model = read_config(options.run, **_own(options)).model
    noun = model.noun
    with counting("evaluating", noun) as progress:
        found = evaluation.measure(
            options.run, options.num_samples, which, options.data, progress, **_own(options)
        )
    of_classes = "; log p(x) = log sum_y p(y) p(x|y)" if model.classifier else ""
    print(
        f"{options.run}, step {found['step']}: {found['images']:,} test {noun}s, nats per {noun}"
        f"{of_classes}"
    )
    for _, says, value in evaluation.described(found, noun):
        print(f"  {says:34}{value:>10}")
    for group, kl in enumerate(found.get("kl_per_group", ()), start=1):
        print(f"  {f'KL of group {group}, from the top':34}{kl:10.3f}")
    _write_evaluation(options.run, found, "evaluation.json")


_BOUNDS = {
    "elbo": "ELBO",
    "importance_sampling": "importance sampling, {num_samples} samples",
    "lower": "AIS, lower bound",
    "upper": "AIS, upper bound",
    "gap": "upper - lower bound",
    "bias": "upper bound - importance sampling",
}


def _print_bounds(options: argparse.Namespace, numbers: dict[str, int]) -> None:
    """Print the table of `evaluate --method ais`, and write its file."""
    from jaxvae.runs import evaluation
    from jaxvae.runs.progress import working

    own = _own(options)
    with working("evaluating"):
        found = evaluation.measure_bounds(
            options.run, options.num_samples, _which(options), options.data, **numbers, **own
        )
    print(
        f"{options.run}, step {found['step']}: {found['images']:,} images, {found['num_chains']:,} "
        f"chains of {found['num_steps']:,} steps, nats per image"
    )
    test, simulated = found["test"], dict(found["simulated"])
    simulated["gap"] = simulated["upper"] - simulated["lower"]
    simulated["bias"] = simulated["upper"] - simulated["importance_sampling"]
    print(f"  {'':36}{'test':>10}{'simulated':>12}")
    for name, says in _BOUNDS.items():
        of_test = f"{test[name]:.3f}" if name in test else ""
        print(f"  {says.format(**found):36}{of_test:>10}{simulated[name]:12.3f}")
    _write_evaluation(options.run, found, "ais.json")


def _write_evaluation(run_dir: Path, found: dict[str, Any], name: str) -> None:
    from jaxvae.runs import evaluation

    sys.stdout.flush()
    try:
        path = evaluation.write_evaluation(run_dir, found, name)
        print(f"evaluation: {path}", file=sys.stderr)
    except InputError as error:
        print(f"jaxvae: {name} was not written: {error}", file=sys.stderr)


def _sample(options: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from jaxvae.data.tables import write_table
    from jaxvae.devices.processes import memory
    from jaxvae.figures.grid import save_images
    from jaxvae.models.vae import sample
    from jaxvae.runs.config import read_config
    from jaxvae.runs.progress import working
    from jaxvae.validation import whole_number

    _at_least_one("--n", options.n)
    if options.seed is not None:
        whole_number("--seed", options.seed, 0, 2**32 - 1)
    config = read_config(options.run, **_own(options))
    shape = config.model.image_shape
    _expect_ending(options, (".png",) if is_image(shape) else _endings(shape), shape)
    needed = options.n * math.prod(shape) * _BYTES_PER_SAMPLED
    if (available := memory()) is not None and needed > available:
        raise InputError(
            f"--n is {options.n}, which needs {needed / 1e9:,.0f} GB: expected at most the "
            f"{available / 1e9:,.0f} GB of memory of this machine; draw fewer {config.model.noun}s"
        )
    seed = config.seed if options.seed is None else options.seed
    first, *others = options.temperature
    temperature = tuple(options.temperature) if others else first
    key, params = jax.random.key(seed), _params(options)
    labels = _sampled_covariates(options, params, seed)
    with working("sampling"):
        images = sample(params, key, options.n, labels, temperature=temperature)
        images.block_until_ready()
    if is_image(shape):
        save_images(images, options.out)
    else:
        examples = np.asarray(images)
        columns = {str(i + 1): x for i, x in enumerate(examples.T)}
        npz = options.out.suffix.lower() == ".npz"
        write_table(options.out, {"images": examples} if npz else columns)
    print(options.out)


def _sampled_covariates(options: argparse.Namespace, params: Any, seed: int) -> Any:
    """Return the covariates of samples, float32 [n, covariates]; None of a model without.

    They are those of random training examples, except for the columns that were given.
    """
    import numpy as np

    from jaxvae.data.covariates import rows_with

    parts = options.covariates.split(",") if options.covariates else []
    given = {name.strip(): value for name, _, value in (part.partition("=") for part in parts)}
    if not all(given) or len(given) < len(parts):
        raise InputError(
            f"--covariates is {options.covariates!r}: expected NAME=VALUE,NAME=VALUE, and each "
            "column once"
        )
    if not params.config.num_covariates:
        if given:
            raise InputError(
                "--covariates was given, but the model has no covariates: leave it out"
            )
        if options.data is not None:
            raise InputError(
                "--data was given, of which samples take the covariates, but the model has none: "
                "leave it out"
            )
        return None
    _, data = _config_and_data(options)
    known = data.conditions(params.config, "train")
    rows = known[np.random.default_rng(seed).integers(len(known), size=options.n)]
    return rows_with(rows, data.covariates, given) if given else rows


def _endings(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the file name endings for examples of this shape, as numbers."""
    return (".npz", ".csv", ".parquet") if len(shape) == 1 else (".npz",)


def _expect_ending(
    options: argparse.Namespace, ends: tuple[str, ...], shape: tuple[int, ...] = ()
) -> None:
    """Raise InputError unless the file to write has one of these endings, and a place."""
    from jaxvae.runs.config import read_config

    path = options.out
    if path.suffix.lower() not in ends:
        listed = f"{', '.join(ends[:-1])} or {ends[-1]}" if len(ends) > 1 else ends[0]
        reason = f", as the examples have shape {shape}" if shape and not is_image(shape) else ""
        raise InputError(f"--out is {path}: expected a file name ending in {listed}{reason}")
    if path.is_dir():
        raise InputError(f"--out is {path}, which is a folder: expected a file name")
    _expect_place(path, options.data or read_config(options.run, **_own(options)).data)


def _expect_place(path: Path, source: str | Path) -> None:
    """Raise InputError unless a file to write has a folder and is not the source of its content.

    This is checked before the content is computed.
    """
    if Path(source).is_file() and path.exists() and path.samefile(source):
        raise InputError(f"--out is {path}, the file that is read: expected another name")
    if not path.parent.is_dir():
        raise InputError(
            f"--out is {path}, which cannot be written: there is no folder {path.parent}; make it "
            "first"
        )


def _open(options: argparse.Namespace, *, missing: bool = False) -> Any:
    """Return the model of a run and the examples that a command was given."""
    from jaxvae.runs.inference import open_run

    own = _own(options)
    return open_run(
        options.run, options.data, options.split, _which(options), missing=missing, **own
    )


def _encode(options: argparse.Namespace) -> None:
    from jaxvae.data.tables import write_table
    from jaxvae.runs.inference import encode_all
    from jaxvae.runs.progress import counting

    _expect_ending(options, (".npz", ".csv", ".parquet"))
    opened = _open(options)
    noun = opened.params.config.noun
    with counting("encoding", noun) as progress:
        found = encode_all(opened, progress)
    write_table(options.out, found)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in found.items())
    print(f"{options.out}: {len(opened.images):,} {noun}s; {shapes}")


_PRINTED_SCORES = 5


def _score(options: argparse.Namespace) -> None:
    from jaxvae.data.tables import write_table
    from jaxvae.runs.inference import score_all
    from jaxvae.runs.progress import counting

    _at_least_one("--num-samples", options.num_samples)
    _expect_ending(options, (".npz", ".csv", ".parquet"))
    opened = _open(options, missing=True)
    config = opened.params.config
    with counting("scoring", config.noun) as progress:
        found = score_all(opened, options.num_samples, options.by, progress)
    write_table(options.out, found)
    where = str(options.out)
    if is_image(config.image_shape):
        where += f" and {_draw_unusual(options.out.with_suffix('.png'), opened, found['index'])}"
    count = len(opened.images)
    print(f"{where}: {count:,} {config.noun}s; the most unusual by {options.by}:")
    widths = {name: max(len(name), 10) for name in found}
    print(" ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in range(min(_PRINTED_SCORES, count)):
        cells = (
            f"{x[row]:{widths[name]}.{0 if x.dtype.kind == 'i' else 4}f}"
            for name, x in found.items()
        )
        print(" ".join(cells))


def _draw_unusual(path: Path, opened: Any, order: Any) -> Path:
    """Draw the most and the least unusual images, and return the path."""
    from jaxvae.figures.pictures import unusual
    from jaxvae.figures.style import save

    n = min(10, len(order))
    most, least = (opened.images[order[rows]] for rows in (slice(n), slice(-1, -n - 1, -1)))
    try:
        save(unusual(opened.params, most, least), path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _impute(options: argparse.Namespace) -> None:
    import numpy as np

    from jaxvae.data.tables import write_table
    from jaxvae.runs.config import read_config
    from jaxvae.runs.inference import by_columns, impute_all
    from jaxvae.runs.progress import counting
    from jaxvae.validation import whole_number

    _at_least_one("--num-samples", options.num_samples)
    whole_number("--draws", options.draws, 0)
    shape = read_config(options.run, **_own(options)).model.image_shape
    _expect_ending(options, _endings(shape), shape)
    npz = options.out.suffix.lower() == ".npz"
    if options.draws and not npz:
        raise InputError(
            f"--draws is {options.draws}, but --out is {options.out}: expected a file name ending "
            "in .npz, which holds the draws too"
        )
    opened = _open(options, missing=True)
    noun = opened.params.config.noun
    with counting("imputing", noun) as progress:
        found = impute_all(opened, options.num_samples, options.draws, progress)
    write_table(options.out, found if npz else by_columns(opened, found))
    missing = found["missing"]
    print(f"{options.out}: {len(missing):,} {noun}s, {missing.sum():,} missing entries")
    if missing.any():
        sizes = found["effective_sample_size"][missing > 0]
        print(
            f"effective sample size: median {np.median(sizes):.1f}, least {sizes.min():.1f}, of "
            f"{options.num_samples}"
        )


def _reconstruct(options: argparse.Namespace) -> None:
    from jaxvae.data.tables import write_table
    from jaxvae.figures.grid import save_images
    from jaxvae.runs.config import read_config
    from jaxvae.runs.inference import by_columns, reconstruct_all
    from jaxvae.runs.progress import counting

    shape = read_config(options.run, **_own(options)).model.image_shape
    ends = (".npz", ".png") if is_image(shape) else _endings(shape)
    _expect_ending(options, ends, shape)
    opened = _open(options)
    noun = opened.params.config.noun
    with counting("reconstructing", noun) as progress:
        found = reconstruct_all(opened, progress)
    suffix = options.out.suffix.lower()
    if suffix == ".png":
        save_images(found["images"], options.out)
    else:
        write_table(options.out, found if suffix == ".npz" else by_columns(opened, found))
    print(f"{options.out}: {len(opened.images):,} {noun}s")


def _figures(options: argparse.Namespace) -> None:
    from jaxvae.runs import drawing
    from jaxvae.runs.progress import working

    config, data = _config_and_data(options)
    with working("drawing"):
        paths = drawing.draw(options.run, config, data, _params(options), options.format)
    for path in paths:
        print(path)


def _export(options: argparse.Namespace) -> None:
    from jaxvae.runs.config import read_config
    from jaxvae.runs.hub import export_run
    from jaxvae.runs.progress import working
    from jaxvae.storage import make_folder

    read_config(options.run, **_own(options))  # no folder is made where there is no run
    out = options.out or make_folder(options.run, "export")
    with working("exporting"):
        paths = export_run(options.run, out, options.to, _which(options), **_own(options))
    for path in paths:
        print(path)


def _compress(options: argparse.Namespace) -> None:
    from jaxvae.compression import compress, header_of, is_compressed
    from jaxvae.evaluation.evaluate import evaluate
    from jaxvae.runs.config import read_config, run_keys
    from jaxvae.runs.data import examples_of, load_run_data
    from jaxvae.runs.progress import counting, working

    config = read_config(options.run, **_own(options))
    _expect_place(options.out, options.data or config.data)
    if options.out.exists() and not is_compressed(options.out):
        raise InputError(
            f"--out is {options.out}, which exists already and is not a file of compressed images: "
            "expected another name"
        )
    data = load_run_data(config, options.data)
    images = examples_of(data, config, options.split)[0][:]
    params = _params(options)
    began = time.perf_counter()
    with counting("compressing") as progress:
        content = compress(params, images, progress=progress)
    seconds = time.perf_counter() - began
    write_atomic(options.out, lambda file: file.write(content))
    with working("evaluating"):
        elbo = float(evaluate(params, run_keys(config)[1], images)["elbo"])
    bits, initial = 8 * len(content), header_of(content).initial_bits
    raw = images.size * (1 if config.model.likelihood.support == "binary" else 8)
    if config.train.binarization != "none":
        print("pixels: 0 or 1, drawn with the grey levels as probabilities, as in evaluation")
    print(
        f"{options.out}: {len(images):,} images, {len(content):,} bytes, "
        f"{raw / bits:.2f} times smaller than raw; bits per dimension: "
        f"{(bits - initial) / images.size:.4f}, and {initial / images.size:.4f} of initial bits; "
        f"by the ELBO {-elbo / math.log(2) / math.prod(config.model.image_shape):.4f}; "
        f"{seconds:.1f} s"
    )


def _decompress(options: argparse.Namespace) -> None:
    from jaxvae.compression import decompress
    from jaxvae.data.files import expect_free, write_images
    from jaxvae.runs.progress import counting
    from jaxvae.storage import read_bytes

    _expect_place(options.out, options.file)
    expect_free(options.out)
    content = read_bytes(options.file)
    try:
        with counting("decompressing") as progress:
            images = decompress(_params(options), content, progress=progress)
    except InputError as error:
        raise InputError(f"{options.file}: {error}") from None
    write_images(options.out, images)
    print(f"{options.out}: {len(images):,} images")


def _fit_prior(options: argparse.Namespace) -> None:
    from jaxvae.runs import drawing
    from jaxvae.runs.callbacks import AnimationFrames
    from jaxvae.runs.config import read_config
    from jaxvae.runs.fit_prior import fit_prior

    prior, options.prior = options.prior, None  # not a component of the trained run
    own = _own(options)
    if is_dotted_path(prior):
        prior = imported("prior", prior)
    figures = drawing.Figures()
    fitted = fit_prior(
        options.run,
        prior,
        out=options.out,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        data=options.data,
        callbacks=[AnimationFrames(), figures],
        **own,
    )
    run_dir, params = fitted.run_dir, fitted.params
    _print_next_steps(run_dir, "", figures.paths, images=is_image(params.config.image_shape))
    trained = read_config(options.run, **own)
    for when, model, test in (
        ("before", trained.model, fitted.before),
        ("after", params.config, fitted.after),
    ):
        terms = f"log-likelihood {test['log_likelihood']:.2f}, KL {test['kl']:.2f}"
        print(f"test ELBO {when:6} {test['elbo']:.2f} ({terms}), prior {model.specs()['prior']}")


def _import(options: argparse.Namespace) -> None:
    from jaxvae.runs.keras import import_keras

    layers = import_keras(options.file, options.run_dir, options.decoder, options.data)
    print(layers, file=sys.stderr)


def _explore(options: argparse.Namespace) -> None:
    from jaxvae import explorer
    from jaxvae.runs.progress import working

    out = options.out or options.run / "explorer.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out is {out}: expected a file name ending in .html")
    config, data = _config_and_data(options)
    _expect_place(out, options.data or config.data)
    with working("writing the page"):
        explorer.write(out, _params(options), data, options.run.resolve().name)
    print(out)


def _summary(options: argparse.Namespace) -> None:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.summary import summary
    from jaxvae.runs.config import read_config

    own = _own(options)
    print(summary(read_config(options.run, **own).model if options.run else ModelConfig(**own)))


def _benchmark(options: argparse.Namespace) -> None:
    from jaxvae.cli.benchmark import benchmark
    from jaxvae.runs.progress import working

    lines = benchmark()
    while True:
        with working("measuring"):
            line = next(lines, None)
        if line is None:
            return
        print(line, flush=True)


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{flag} is {value}: expected at least 1")


def _completion(options: argparse.Namespace) -> None:
    print(completion_script(make_parser(_COMMANDS), options.shell))


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "encode": _encode,
    "score": _score,
    "impute": _impute,
    "reconstruct": _reconstruct,
    "figures": _figures,
    "export": _export,
    "compress": _compress,
    "decompress": _decompress,
    "explore": _explore,
    "fit-prior": _fit_prior,
    "import": _import,
    "summary": _summary,
    "benchmark": _benchmark,
    "completion": _completion,
}
