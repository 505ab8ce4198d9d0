"""Checkpoints of a run, stored by Orbax: the last two and the best, each with its configuration.

A complete checkpoint has a file with the SHA-256 digests of all its files. A checkpoint that does
not match its digests is damaged: it is skipped, and the newest intact one is used instead.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jaxvae.components import is_dotted_path
from jaxvae.devices.processes import all_agree, is_first
from jaxvae.devices.sharding import placement
from jaxvae.errors import Damaged, InputError, TrainingFailed
from jaxvae.interchange.export import WEIGHTS, load_safetensors_with_step
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.runs.config import RunConfig, expect_components, read_config
from jaxvae.runs.files import (
    IN_PYTHON,
    NewerVersion,
    cannot_write,
    damaged_name,
    is_number,
    version,
    without_version,
    write_json,
)
from jaxvae.storage import (
    expect_utf8,
    is_temporary,
    make_folder,
    open_regular,
    read_bytes,
    refuse_links,
    write_atomic,
)
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState, create_train_state
from jaxvae.validation import as_key

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Which = Literal["latest", "best"]
_DIGESTS = "sha256.json"
_MISSING = "is missing"
_TRIES = 20  # to read a checkpoint while a training deletes older ones
_DELETION = 0.5  # seconds that a deletion may take
_MARGIN = 100_000  # bytes of a checkpoint besides its arrays


def save(run_dir: str | Path, state: TrainState) -> None:
    """Write a checkpoint of a training state to a run directory.

    A new directory also gets a config.json, so that the command line takes it as a run, whose data
    are named with `--data`.

    Args:
      run_dir: the run directory, which is made if it does not exist.
      state: the training state.

    Raises:
      InputError: the directory already holds a checkpoint of this step, or cannot be written; or
        the arrays of the state do not match its configuration, so that it could not be restored.
    """
    _expect_restorable(state)
    try:
        with open_checkpoints(run_dir) as checkpoints:
            if int(state.step) in checkpoints.all_steps():
                raise InputError(
                    f"{run_dir} already holds a checkpoint of step {int(state.step)}: "
                    "choose another directory"
                )
            write(checkpoints, state, {})
        path = Path(run_dir) / "config.json"
        if is_first() and not path.exists():
            config = RunConfig(data=IN_PYTHON, model=state.params.config, train=state.config)
            write_json(path, {"jaxvae": version(), **config.to_dict()})
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror or error}") from None


def restore(
    run_dir: str | Path,
    which: Which | int = "latest",
    network: Any = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    fsdp: bool = False,
    **own: Any,
) -> TrainState:
    """Return the training state of a run, with the dtypes that were saved.

    If the requested checkpoint is damaged, the newest (or best) intact one is used instead, with a
    warning of the category `jaxvae.errors.Damaged`.

    Args:
      run_dir: the run directory.
      which: "latest", "best" by test ELBO, or a number of steps.
      network: custom modules (encoder, decoder) that the run was trained with.
      mesh: the devices to restore to, which may differ from those it was saved from; by default
        the first device.
      fsdp: shard parameters and optimizer state over the mesh, as in
        `jaxvae.devices.sharding.shard`.
      own: other custom components that the run was trained with, by field: `prior=Laplace(2)`,
        `optimizer=...`.

    Returns:
      The state.

    Raises:
      InputError: the directory holds no checkpoint, none of that step, or none that is intact; a
        newer version wrote it; the run needs custom components that are missing or differ from
        the recorded ones; or it holds 64-bit arrays, and JAX has 64-bit types disabled.
    """
    return _restore(run_dir, which, network, own, mesh, fsdp, to_train=True)


def load(run_dir: str | Path, which: Which = "latest", network: Any = None, **own: Any) -> Params:
    """Return the parameters of a run: their moving average, if the run keeps one.

    Args:
      run_dir: the run directory, or a folder of `jaxvae export --to hub`.
      which: "latest", or "best" by test ELBO.
      network: custom modules (encoder, decoder) of the model.
      own: other custom components of the model, by field; those of the training are not needed.

    Returns:
      The parameters.

    Raises:
      InputError: as for `restore`.
    """
    return load_with_step(run_dir, which, network, **own)[0]


def load_with_step(
    run_dir: str | Path, which: Which = "latest", network: Any = None, **own: Any
) -> tuple[Params, int]:
    """Return the parameters as `load` does, and the number of steps they were trained for."""
    if is_shared(run_dir):
        return _load_shared(Path(run_dir), which, network, own)
    state = _restore(run_dir, which, network, own, None, False, to_train=False)
    return state.eval_params, int(state.step)


def is_shared(folder: str | Path) -> bool:
    """Return whether a folder is one of `jaxvae export --to hub`, and not a run directory."""
    return (Path(folder) / WEIGHTS).exists() and not steps_of(folder)


def _load_shared(
    folder: Path, which: Which, network: Any, own: Mapping[str, Any]
) -> tuple[Params, int]:
    if which != "latest":
        raise InputError(f"{folder} holds the parameters of one epoch only: leave out --best")
    own = dict(own) if network is None else {**own, "network": network}
    params, step = load_safetensors_with_step(folder / WEIGHTS, **own)
    recorded = read_config(folder, **own).model.to_dict()
    for name, value in params.config.to_dict().items():
        if value != recorded[name]:
            raise InputError(
                f"{folder / 'config.json'} has {name} {recorded[name]}, but {WEIGHTS} has {value}: "
                "expected the two files of one export"
            )
    return params, step


def _restore(
    run_dir: str | Path,
    which: Which | int,
    network: Any,
    own: Mapping[str, Any],
    mesh: jax.sharding.Mesh | None,
    fsdp: bool,
    *,
    to_train: bool,
) -> TrainState:
    own = dict(own) if network is None else {**own, "network": network}
    expect_components(own)
    for left in reversed(range(_TRIES)):
        step = which if isinstance(which, int) else newest_intact(run_dir, which)
        held = steps_of(run_dir)
        if not held:
            raise InputError(
                f"{run_dir} holds no checkpoint: expected the run directory of `jaxvae train`, "
                "after at least one epoch"
            )
        folder = _folder(run_dir) / str(step)
        try:
            if step not in held:
                shown = ", ".join(map(str, held))
                raise InputError(f"{run_dir} holds no checkpoint of step {step}, only of {shown}")
            if fault := _find_fault(folder):
                raise InputError(f"{run_dir}: the checkpoint of step {step} is damaged: {fault}")
            return _read(folder, own, mesh, fsdp, to_train)
        except (InputError, OSError, ValueError):
            # A training that is running in this directory deletes its older checkpoints.
            if not left or isinstance(which, int) or not _is_deleted(run_dir, step, held):
                raise
    raise AssertionError("unreachable")


def steps_of(run_dir: str | Path) -> list[int]:
    """Return the steps of all checkpoints, intact or damaged, in ascending order."""
    folder = _folder(run_dir)
    try:
        return sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def newest_intact(run_dir: str | Path, which: Which = "latest") -> int | None:
    """Return the step of the newest or the best intact checkpoint.

    A warning of the category `jaxvae.errors.Damaged` names every damaged one that is skipped.

    Args:
      run_dir: the run directory.
      which: "latest", or "best" by test ELBO.

    Returns:
      The step, or None if there is no checkpoint.

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
    """
    folder = _folder(run_dir)
    for _ in range(_TRIES):
        steps, faults = steps_of(run_dir), {}
        for step in reversed(steps):
            if fault := _find_fault(folder / str(step)):
                faults[step] = fault
            elif which == "latest":  # older ones need not be checked
                break
        missing = [step for step, fault in faults.items() if fault.endswith(_MISSING)]
        if not missing or not _is_deleted(run_dir, min(missing), steps):
            break
    sound = [step for step in steps if step not in faults]
    if faults and not sound:
        listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
        raise InputError(
            f"{run_dir} holds no intact checkpoint ({listed}): restore one from "
            "a copy, or start again in another directory"
        )
    if which == "best":
        sound.sort(key=lambda step: _elbo(folder / str(step)))
    for damaged, fault in faults.items():
        warnings.warn(
            f"{run_dir}: the checkpoint of step {damaged} is damaged ({fault}); "
            f"using that of step {sound[-1]} instead",
            Damaged,
            stacklevel=2,
        )
    return sound[-1] if sound else None


def _is_deleted(run_dir: str | Path, step: int | None, steps: list[int]) -> bool:
    """Return whether a running training is deleting the checkpoint of `step`.

    `steps` are those listed before. A training writes the newer checkpoint first, so that the list
    changes: either the newer one has appeared, or this one disappears within `_DELETION`.
    """
    end = time.monotonic() + _DELETION
    while steps_of(run_dir) == steps:
        if step == steps[-1] or time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def open_checkpoints(run_dir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints of a run for writing.

    Damaged ones are renamed to STEP.damaged, and incomplete ones are removed.

    Args:
      run_dir: the run directory.

    Yields:
      The Orbax manager.

    Raises:
      InputError: the folder of the checkpoints, or an entry in it, is a symbolic link.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    # Two latest ones: if one is damaged the other is used, and in a sweep a kill can leave one
    # model a checkpoint ahead of the others.
    kept = [policies.LatestN(2), policies.BestN(get_metric_fn=_elbo_of, n=1)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=_elbo_of,
        enable_async_checkpointing=False,
    )
    folder = make_folder(_folder(run_dir).parent, "checkpoints")
    refuse_links(*folder.iterdir())
    if is_first():
        newest = newest_intact(run_dir)
        for part in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(part)
        for step in steps_of(run_dir):
            fault = _find_fault(folder / str(step))
            if fault and fault.endswith(_MISSING) and step < (newest or 0):
                shutil.rmtree(folder / str(step))  # its deletion was interrupted
            elif fault:
                _set_aside(folder / str(step))
    try:
        manager = ocp.CheckpointManager(_literal(folder), options=options)
    except OSError:
        raise
    except Exception as error:  # of any kind, as the files may hold anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder} cannot be opened: {reason}; start again in another directory"
        ) from error
    with manager:
        yield manager


def write(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    metrics: Mapping[str, float],
    begun: tuple[Mapping[str, float], float] = ({}, 0.0),
) -> None:
    """Write a checkpoint, and wait until it is complete.

    Args:
      checkpoints: as opened by `open_checkpoints`.
      state: the training state.
      metrics: test metrics; the checkpoint of the highest "elbo" is the best.
      begun: sums of the metrics and seconds of an unfinished epoch.

    Raises:
      TrainingFailed: the disk is full, or the checkpoint cannot be written and read back.
    """
    import orbax.checkpoint as ocp

    config = {
        "jaxvae": version(),
        "model": state.params.config.to_dict(),
        "train": state.config.to_dict(),
        "begun": [dict(begun[0]), begun[1]],
        "key": str(jax.random.key_impl(state.key)),
    }
    step, run_dir = int(state.step), Path(checkpoints.directory).parent
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(_to_tree(state)), config=ocp.args.JsonSave(config)
    )
    # Checked first: on a full disk Orbax's threads print long tracebacks.
    needed = sum(x.nbytes for x in jax.tree.leaves(_to_tree(state))) + _MARGIN
    free = shutil.disk_usage(checkpoints.directory).free
    if is_first() and free < needed:
        reason = f"{free / 1e6:.1f} MB are free, and a checkpoint needs {needed / 1e6:.1f}"
        raise TrainingFailed(cannot_write(run_dir, reason))
    try:
        checkpoints.save(step, args=args, metrics=dict(metrics))
        checkpoints.wait_until_finished()
    except Exception as error:  # of any kind, groups of them too
        reason = " ".join(str(error).split())[:300]
        raise TrainingFailed(cannot_write(run_dir, reason)) from error
    folder = Path(checkpoints.directory) / str(step)
    if fault := _difference(folder, _to_tree(state)):
        if is_first():
            _set_aside(folder)
        reason = f"the checkpoint of step {step} is not read back as it was written ({fault})"
        raise TrainingFailed(cannot_write(run_dir, reason))
    if is_first():
        _write_digests(folder)


def metadata(run_dir: str | Path, step: int) -> dict[str, Any]:
    """Return the metadata of a checkpoint: `model`, `train`, and `begun` as for `write`.

    Args:
      run_dir: the run directory.
      step: the step of the checkpoint.

    Returns:
      The metadata.

    Raises:
      InputError: they are damaged, or a newer version wrote them.
    """
    return _read_metadata(_folder(run_dir) / str(step))


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / "config" / "metadata"
    try:
        saved = without_version(json.loads(read_bytes(path)), folder)
        sums, seconds = saved.get("begun", ({}, 0.0))
        for name in ("model", "train"):
            if not isinstance(saved[name], dict):
                raise ValueError(f"{name} is not an object of named fields")
        if not all(map(is_number, (*sums.values(), seconds))):
            raise ValueError("begun is not of numbers")
    except NewerVersion:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"{path} is damaged ({reason}): expected an unchanged checkpoint of `jaxvae train`; "
            "restore it from a copy"
        ) from None
    begun = {name: float(value) for name, value in sums.items()}, float(seconds)
    return {**saved, "begun": begun}


def _read(
    folder: Path,
    own: Mapping[str, Any],
    mesh: jax.sharding.Mesh | None,
    fsdp: bool,
    to_train: bool,
) -> TrainState:
    """Read a checkpoint; the optimizer's state is rebuilt only if `to_train`."""
    import orbax.checkpoint as ocp

    saved = metadata(folder.parents[1], int(folder.name))
    of = {kind: {n: own[n] for n in own if n in kind._registries}
          for kind in (ModelConfig, TrainConfig)}  # fmt: skip
    model = ModelConfig.from_dict(saved["model"], **of[ModelConfig])
    fields = saved["train"]
    if not to_train:
        fields = {name: value for name, value in fields.items() if not is_dotted_path(value)}
    train = TrainConfig.from_dict(fields, **of[TrainConfig])
    like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
    expected = jax.eval_shape(_to_tree, like)
    try:
        # Checked first: Orbax reports a shape mismatch only while reading.
        tree_metadata = ocp.StandardCheckpointHandler().metadata(_literal(folder / "state")).tree
        stored = _arrays(tree_metadata)
        before = "flow" in tree_metadata  # the name of "posterior" in version 0.1
        if before:
            expected["flow"] = expected.pop("posterior")
        if not to_train:
            expected["opt_state"] = list(tree_metadata["opt_state"])
        _expect_stored(folder, stored, _arrays(expected), own)
        abstract = tree_map_with_path(lambda path, _: stored[keystr(path)], expected)
        tree = _restored(folder, _placed(abstract, mesh, fsdp))
        if before:
            tree["posterior"] = tree.pop("flow")
        return _from_tree(tree, like, saved.get("key"), to_train)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of any kind, as the files may hold anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder} cannot be read: {reason}; expected an unchanged checkpoint of "
            "`jaxvae train`; restore it from a copy"
        ) from error


def _restored(folder: Path, like: Any) -> Any:
    """Read the arrays of a checkpoint, with the shapes, dtypes and shardings of `like`."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(_literal(folder), args=args).state


def _difference(folder: Path, tree: Any) -> str | None:
    """Read a checkpoint back; return what is wrong with it on any process, or None."""
    fault = None
    try:
        # Into host memory, as the device may not have room for a second copy.
        like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
        found = _restored(folder, like)
        if not jax.tree.all(jax.tree.map(_same, tree, found)):
            fault = "the values differ"
    except Exception as error:  # of any kind, as in writing
        fault = " ".join(str(error).split())[:300]
    return fault if all_agree(fault is None) else fault or "on another process"


def _same(x: Any, found: np.ndarray) -> bool:
    """Return whether the shards of an array on this process equal `found` bit for bit."""
    if not isinstance(x, jax.Array):
        return np.asarray(x).tobytes() == found.tobytes()
    return x.dtype == found.dtype and all(
        np.asarray(shard.data).tobytes() == found[shard.index].tobytes()
        for shard in x.addressable_shards
        if shard.replica_id == 0
    )


@functools.cache
def _literal_path() -> type:
    """Return a path class for Orbax whose `glob` does not interpret the path itself as a pattern.

    The class of etils does: in a folder named "lr[0.1]" Orbax would not find the arrays that it
    has just written, and would leave them out of the checkpoint.
    """
    from etils import epath

    @epath.register_path_cls
    class LiteralPath(type(epath.Path("."))):  # type: ignore[misc]
        def glob(self, pattern: str) -> Iterator[Any]:
            return map(type(self), Path(self).glob(pattern))

    return LiteralPath


def _literal(path: Path) -> Any:
    return _literal_path()(path)


def _expect_stored(
    folder: Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    own: Mapping[str, Any],
) -> None:
    """Raise InputError unless a checkpoint has the arrays of its model, in enabled dtypes."""
    # The shape of a PRNG key depends on its implementation.
    if name := _differs(stored, expected, ("['key']",)):
        if "network" in own and name.startswith(("['encoder']", "['decoder']")):
            raise InputError(
                f"{folder.parents[1]} holds other parameters than those of `network`: expected "
                "the modules that the model was trained with"
            )
        raise InputError(
            f"{folder} has {_array_text(stored, name)}: expected {_array_text(expected, name)}, "
            "from its configuration"
        )
    for array in stored.values():
        if jnp.asarray(np.zeros((), array.dtype)).dtype != array.dtype:
            raise InputError(
                f"{folder} holds arrays of {array.dtype}, and JAX has 64-bit types disabled: "
                "enable them with JAX_ENABLE_X64=1 or "
                "jax.config.update('jax_enable_x64', True)"
            )


def _expect_restorable(state: TrainState) -> None:
    """Raise InputError unless the arrays of a state match its configuration."""
    if not isinstance(state, TrainState):
        raise InputError(
            f"state is a {type(state).__name__}: expected a TrainState, as "
            "`jaxvae.create_train_state` returns"
        )
    as_key(state.key)  # rejects a batch of keys
    model, train = state.params.config, state.config
    like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
    expected, found = _arrays(like), _arrays(state)
    if name := _differs(found, expected, (".key",)):
        raise InputError(
            f"the state has {_array_text(found, name)}: expected {_array_text(expected, name)}, as "
            "`jaxvae.create_train_state` makes from its configuration (optimizer "
            f"{train.specs()['optimizer']})"
        )


def _arrays(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of all arrays in a tree, by their paths."""
    return {
        keystr(path): jax.ShapeDtypeStruct(np.shape(x), x.dtype)
        for path, x in tree_leaves_with_path(tree)
    }


def _differs(
    found: Mapping[str, jax.ShapeDtypeStruct],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    but: tuple[str, ...],
) -> str | None:
    """Return the first path whose array is missing or has another shape; skip those in `but`."""

    def shapes(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> set[tuple[str, tuple[int, ...]]]:
        return {(name, x.shape) for name, x in arrays.items() if name not in but}

    return min(shapes(found) ^ shapes(expected), default=(None,))[0]


def _array_text(arrays: Mapping[str, jax.ShapeDtypeStruct], name: str) -> str:
    return f"{name} of shape {arrays[name].shape}" if name in arrays else f"no {name}"


def _write_digests(folder: Path) -> None:
    """Write the digests of a checkpoint's files."""
    digests = json.dumps(_file_digests(folder), indent=0)
    write_atomic(folder / _DIGESTS, lambda file: file.write(digests.encode()))


def _find_fault(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None."""
    try:
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):  # Orbax reads them for all steps
            if (folder / name).is_file() and not isinstance(
                json.loads(read_bytes(folder / name)), dict
            ):
                return f"{name} is not an object of named fields"
        sealed = None
        if os.path.lexists(folder / _DIGESTS):
            sealed = json.loads(read_bytes(folder / _DIGESTS))
        else:
            # From version 0.1, or killed before the digests: complete if Orbax finished it.
            needed = ("config/metadata", "state/_METADATA", "_CHECKPOINT_METADATA")
            missing = [name for name in needed if not (folder / name).is_file()]
            if missing:
                return f"{missing[0]} {_MISSING}"
            _read_metadata(folder)
        found = _file_digests(folder)
    except NewerVersion:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return f"a file cannot be read: {' '.join(str(error).split())}"
    if not (folder / "state" / "manifest.ocdbt").is_file():
        # Orbax took the path for a pattern and did not find the arrays, see `_literal_path`.
        return "state/manifest.ocdbt was not written"
    if sealed is None:
        return None
    if not isinstance(sealed, dict):
        return f"{_DIGESTS} is not what was written"
    for name in sorted(sealed.keys() | found.keys(), key=lambda name: (name not in found, name)):
        if sealed.get(name) != found.get(name):
            return f"{name} {'is not what was written' if name in found else _MISSING}"
    return None


def _file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 digest of every file of a checkpoint except the digest file."""

    def fail(error: OSError) -> None:
        raise error  # os.walk ignores errors by default

    sums = {}
    for parent, _, names in os.walk(folder, onerror=fail):
        for name in names:
            if name.removesuffix(".part") == _DIGESTS or (
                is_temporary(name) and Path(parent) == folder
            ):
                continue
            path = Path(parent, name)
            with open(path, "rb", opener=open_regular) as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return sums


def _elbo(folder: Path) -> float:
    """Return the test ELBO of a checkpoint, or -inf."""
    try:
        return _elbo_of(json.loads(read_bytes(folder / "metrics" / "metrics")))
    except (OSError, ValueError, RecursionError):
        return -math.inf


def _elbo_of(metrics: Any) -> float:
    """Return the test ELBO, or -inf if the checkpoint was saved without metrics."""
    value = metrics.get("elbo") if isinstance(metrics, Mapping) else None
    return float(value) if is_number(value) else -math.inf  # type: ignore[arg-type]


def _set_aside(folder: Path) -> None:
    os.replace(folder, damaged_name(folder))


def _folder(run_dir: str | Path) -> Path:
    expect_utf8(Path(run_dir))
    return Path(run_dir).absolute() / "checkpoints"


def _to_tree(state: TrainState) -> dict[str, Any]:
    """Return a state as nested dicts and lists of arrays, the stored form."""
    averaged = {} if state.ema is None else {"ema": _tree_of(state.ema)}
    return {
        **_tree_of(state.params),
        **averaged,
        "opt_state": jax.tree.leaves(state.opt_state),
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def _tree_of(params: Params) -> dict[str, Any]:
    return {"encoder": params.encoder, "decoder": params.decoder, **_learned(params)}


def _placed(tree: Any, mesh: jax.sharding.Mesh | None, fsdp: bool) -> Any:
    """Return the shapes of a tree with shardings."""
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, tree)
    else:
        shardings = placement(tree, mesh, fsdp)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _learned(params: Params) -> dict[str, Any]:
    """Return the learned parameters of likelihood, prior and posterior."""
    parts = {"likelihood": params.likelihood, "prior": params.prior, "posterior": params.posterior}
    return {name: part for name, part in parts.items() if part}


def _from_tree(
    tree: dict[str, Any], like: TrainState, key_impl: str | None, to_train: bool
) -> TrainState:
    """Return the state with the arrays of `tree`, and structure and configuration of `like`."""
    opt_state = tree["opt_state"]
    if to_train:
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), opt_state)
    ema = None if like.ema is None else _params(tree["ema"], like.ema)
    key = jax.random.wrap_key_data(tree["key"], impl=key_impl)
    return TrainState(_params(tree, like.params), opt_state, tree["step"], key, like.config, ema)


def _params(tree: dict[str, Any], like: Params) -> Params:
    learned = {name: tree[name] for name in _learned(like)}
    return Params(tree["encoder"], tree["decoder"], like.config, **learned)
