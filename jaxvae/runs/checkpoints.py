"""A run's checkpoints, kept by Orbax: the last two and the best, each with its configuration.

A checkpoint that is whole is sealed: with it lie the SHA-256 sums of all its files. One whose
files are not those any more is never read but passed over for the newest that is whole.
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
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.runs.files import (
    NewerVersion,
    cannot_write,
    damaged_name,
    is_number,
    version,
    without_version,
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
_TRIES = 20  # to read a checkpoint beside a training that deletes it
_DELETION = 0.5  # seconds
_MARGIN = 100_000  # bytes that a checkpoint takes beside its arrays


def save(run_dir: str | Path, state: TrainState) -> None:
    """Write a checkpoint of `state` into a run directory, and wait until it is whole.

    Raises InputError if the directory already holds a checkpoint of this step or cannot be
    written, or if the state has other arrays than its configurations say, with which they could
    not be read again.
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
    """Return the training state of a run directory, its arrays of the types saved.

    Where the one that is asked for is damaged, the newest whole one, or the best one, takes its
    place, and a warning of the category `jaxvae.errors.Damaged` says so.

    Args:
      run_dir: the run directory.
      which: "latest", "best" by test ELBO, or the number of steps taken.
      network: the modules (encoder, decoder), where the model has some of the user's own.
      mesh: the devices to put it on, whatever it was saved from; by default the first one.
      fsdp: as of `jaxvae.devices.sharding.shard`.
      own: other components of the user's own that the run was trained with, by the name of
        their field: `prior=Laplace(2)`, `optimizer=...`.

    Returns:
      The state.

    Raises:
      InputError: the directory holds no checkpoint, none of that step or none that is whole; a
        newer version made it; it was made with components of the user's own and they are not
        handed over, or others are; it holds 64-bit arrays, and JAX has 64-bit types disabled.
    """
    return _restore(run_dir, which, network, own, mesh, fsdp, to_train=True)


def load(run_dir: str | Path, which: Which = "latest", network: Any = None, **own: Any) -> Params:
    """Return the model of a run directory: its averaged parameters, where the run keeps some.

    Args:
      run_dir: the run directory.
      which: "latest", or "best" by test ELBO.
      network: the modules (encoder, decoder), where the model has some of the user's own.
      own: other components of the user's own that the model was made with, by the name of their
        field; those of the training are not needed.

    Returns:
      The parameters.

    Raises:
      InputError: as of `restore`.
    """
    return load_with_step(run_dir, which, network, **own)[0]


def load_with_step(
    run_dir: str | Path, which: Which = "latest", network: Any = None, **own: Any
) -> tuple[Params, int]:
    """Return what `load` does, and the number of steps that these parameters were trained for."""
    state = _restore(run_dir, which, network, own, None, False, to_train=False)
    return state.eval_params, int(state.step)


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
    for left in reversed(range(_TRIES)):
        step = which if isinstance(which, int) else newest_intact(run_dir, which)
        held = steps_of(run_dir)
        if not held:
            raise InputError(
                f"{run_dir} holds no checkpoint: expected the run directory of `jaxvae train`, "
                "at least one epoch old"
            )
        folder = _folder(run_dir) / str(step)
        try:
            if step not in held:
                shown = ", ".join(map(str, held))
                raise InputError(f"{run_dir} holds no checkpoint of step {step}, only of {shown}")
            if fault := _fault(folder):
                raise InputError(f"{run_dir}: the checkpoint of step {step} is damaged: {fault}")
            return _read(folder, own, mesh, fsdp, to_train)
        except (InputError, OSError, ValueError):
            # A training that runs meanwhile deletes its older checkpoints.
            if not left or isinstance(which, int) or not _is_deleted(run_dir, step, held):
                raise
    raise AssertionError("unreachable")


def steps_of(run_dir: str | Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, in order."""
    folder = _folder(run_dir)
    try:
        return sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def newest_intact(run_dir: str | Path, which: Which = "latest") -> int | None:
    """The step of the newest checkpoint that is whole, or of the best; None where there is none.

    Warns of those that are damaged and would come before it. Raises InputError if all are.
    """
    folder = _folder(run_dir)
    for _ in range(_TRIES):
        steps, faults = steps_of(run_dir), {}
        for step in reversed(steps):
            if fault := _fault(folder / str(step)):
                faults[step] = fault
            elif which == "latest":  # the older ones, of which we want none, are not read
                break
        missing = [step for step, fault in faults.items() if fault.endswith(_MISSING)]
        if not missing or not _is_deleted(run_dir, min(missing), steps):
            break
    sound = [step for step in steps if step not in faults]
    if faults and not sound:
        listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
        raise InputError(
            f"{run_dir} holds no whole checkpoint, and nothing was changed ({listed}): put one "
            "back from a copy, or start anew in another directory"
        )
    if which == "best":
        sound.sort(key=lambda step: _elbo(folder / str(step)))
    for damaged, fault in faults.items():
        warnings.warn(
            f"{run_dir}: the checkpoint of step {damaged} is damaged ({fault}); "
            f"that of step {sound[-1]} takes its place",
            Damaged,
            stacklevel=2,
        )
    return sound[-1] if sound else None


def _is_deleted(run_dir: str | Path, step: int | None, steps: list[int]) -> bool:
    """Whether a training is deleting a checkpoint, one of `steps` that there were before.

    As it writes a newer one first, either that was not among them, or this one will be gone soon.
    """
    end = time.monotonic() + _DELETION
    while steps_of(run_dir) == steps:
        if step == steps[-1] or time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def open_checkpoints(run_dir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, to write more of them.

    Damaged ones are renamed to STEP.damaged, and what a kill left half-written is removed.
    Raises InputError if the folder, or one in it, is a symbolic link.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    # Two of the last: one to fall back on if the other is damaged, and a kill can leave one of
    # many models that are trained at once a checkpoint ahead of the others.
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
            fault = _fault(folder / str(step))
            if fault and fault.endswith(_MISSING) and step < (newest or 0):
                shutil.rmtree(folder / str(step))  # a kill came while it was being deleted
            elif fault:
                _set_aside(folder / str(step))
    try:
        manager = ocp.CheckpointManager(_literal(folder), options=options)
    except OSError:
        raise
    except Exception as error:  # of any kind, as the files may hold anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be opened: {reason}; start anew elsewhere") from error
    with manager:
        yield manager


def write(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    metrics: Mapping[str, float],
    begun: tuple[Mapping[str, float], float] = ({}, 0.0),
) -> None:
    """Write a checkpoint, and wait until it is whole; `metrics["elbo"]` decides which is the best.

    begun: of an epoch that is not over, the sums of its metrics so far, and its seconds.
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
    # Asked beforehand, as a full disk has Orbax's threads tell at length of one another.
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
    """What a checkpoint knows beside the state: `model`, `train`, and `begun`, as of `write`."""
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
            f"{path} is damaged ({reason}): expected a checkpoint of `jaxvae train`, as it was "
            "written"
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
    """Read a checkpoint; unless it is `to_train`, the optimizer's state is left as it is stored."""
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
        # Looked at beforehand: Orbax tells of another shape only in the midst of reading.
        tree_metadata = ocp.StandardCheckpointHandler().metadata(_literal(folder / "state")).tree
        stored = _arrays(tree_metadata)
        before = "flow" in tree_metadata  # as version 0.1 called it
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
            f"{folder} cannot be read: {reason}; expected a checkpoint of `jaxvae train`, "
            "as it was written"
        ) from error


def _restored(folder: Path, like: Any) -> Any:
    """The arrays of a checkpoint, of the kind and on the devices that `like` tells."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(_literal(folder), args=args).state


def _difference(folder: Path, tree: Any) -> str | None:
    """What is wrong with a checkpoint as it is read back, for any process, if anything."""
    fault = None
    try:
        # Into the memory of the host, as the device may have no room for it twice.
        like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
        found = _restored(folder, like)
        if not jax.tree.all(jax.tree.map(_same, tree, found)):
            fault = "other numbers"
    except Exception as error:  # of any kind, as of writing
        fault = " ".join(str(error).split())[:300]
    return fault if all_agree(fault is None) else fault or "by another process"


def _same(x: Any, found: np.ndarray) -> bool:
    """Whether the parts of an array that are on devices of this process have these bits."""
    if not isinstance(x, jax.Array):
        return np.asarray(x).tobytes() == found.tobytes()
    return x.dtype == found.dtype and all(
        np.asarray(shard.data).tobytes() == found[shard.index].tobytes()
        for shard in x.addressable_shards
        if shard.replica_id == 0
    )


@functools.cache
def _literal_path() -> type:
    """Return a class of paths for Orbax whose `glob` takes nothing but its argument as a pattern.

    That of etils takes the path itself as one too: in a folder of the name "lr[0.1]", Orbax would
    not find the arrays that it has just written, and leave them out of the checkpoint.
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
    """Raise InputError unless a checkpoint has the arrays of its model, of types that JAX holds."""
    # A key of another implementation than by default has another shape.
    if name := _differs(stored, expected, ("['key']",)):
        if "network" in own and name.startswith(("['encoder']", "['decoder']")):
            raise InputError(
                f"{folder.parents[1]} holds other parameters than those of `network`: expected "
                "the modules that the model was made with"
            )
        raise InputError(
            f"{folder} has {_array_text(stored, name)}: expected {_array_text(expected, name)}, as "
            "of its configuration"
        )
    for array in stored.values():
        if jnp.asarray(np.zeros((), array.dtype)).dtype != array.dtype:
            raise InputError(
                f"{folder} holds arrays of {array.dtype}, and JAX has 64-bit types disabled: "
                "enable them with JAX_ENABLE_X64=1 or "
                "jax.config.update('jax_enable_x64', True)"
            )


def _expect_restorable(state: TrainState) -> None:
    """Raise InputError unless a state has the arrays that its configurations say."""
    if not isinstance(state, TrainState):
        raise InputError("state: expected what `jaxvae.create_train_state` gives")
    as_key(state.key)  # refuses several
    model, train = state.params.config, state.config
    like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
    expected, found = _arrays(like), _arrays(state)
    if name := _differs(found, expected, (".key",)):
        raise InputError(
            f"the state has {_array_text(found, name)}: expected {_array_text(expected, name)}, as "
            "of `jaxvae.create_train_state` for its configurations (optimizer "
            f"{train.specs()['optimizer']})"
        )


def _arrays(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of all arrays in a tree, by their places in it."""
    return {
        keystr(path): jax.ShapeDtypeStruct(np.shape(x), x.dtype)
        for path, x in tree_leaves_with_path(tree)
    }


def _differs(
    found: Mapping[str, jax.ShapeDtypeStruct],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    but: tuple[str, ...],
) -> str | None:
    """Return the first place with an array of another shape, or with one in only one of two."""

    def shapes(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> set[tuple[str, tuple[int, ...]]]:
        return {(name, x.shape) for name, x in arrays.items() if name not in but}

    return min(shapes(found) ^ shapes(expected), default=(None,))[0]


def _array_text(arrays: Mapping[str, jax.ShapeDtypeStruct], name: str) -> str:
    return f"{name} of shape {arrays[name].shape}" if name in arrays else f"no {name}"


def _write_digests(folder: Path) -> None:
    """Write down the sums of a checkpoint's files, which are what they are to be."""
    sums = json.dumps(_sums(folder), indent=0)
    write_atomic(folder / _DIGESTS, lambda file: file.write(sums.encode()))


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    try:
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):  # which Orbax reads of all
            if (folder / name).is_file() and not isinstance(
                json.loads(read_bytes(folder / name)), dict
            ):
                return f"{name} is not an object of named fields"
        sealed = None
        if os.path.lexists(folder / _DIGESTS):
            sealed = json.loads(read_bytes(folder / _DIGESTS))
        else:
            # Of an older version, or killed before the seal: what Orbax has finished is whole.
            needed = ("config/metadata", "state/_METADATA", "_CHECKPOINT_METADATA")
            missing = [name for name in needed if not (folder / name).is_file()]
            if missing:
                return f"{missing[0]} {_MISSING}"
            _read_metadata(folder)
        found = _sums(folder)
    except NewerVersion:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return f"a file cannot be read: {' '.join(str(error).split())}"
    if not (folder / "state" / "manifest.ocdbt").is_file():
        # As where Orbax took the path for a pattern: nothing leads to the arrays.
        return "state/manifest.ocdbt was not written"
    if sealed is None:
        return None
    if not isinstance(sealed, dict):
        return f"{_DIGESTS} is not what was written"
    for name in sorted(sealed.keys() | found.keys(), key=lambda name: (name not in found, name)):
        if sealed.get(name) != found.get(name):
            return f"{name} {'is not what was written' if name in found else _MISSING}"
    return None


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 sum of every file of a checkpoint but the seal."""

    def fail(error: OSError) -> None:
        raise error  # which os.walk would pass over

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
    """The test ELBO of a checkpoint, as far as it says any."""
    try:
        return _elbo_of(json.loads(read_bytes(folder / "metrics" / "metrics")))
    except (OSError, ValueError, RecursionError):
        return -math.inf


def _elbo_of(metrics: Any) -> float:
    """The test ELBO, below all others where a checkpoint was saved without a measurement."""
    value = metrics.get("elbo") if isinstance(metrics, Mapping) else None
    return float(value) if is_number(value) else -math.inf  # type: ignore[arg-type]


def _set_aside(folder: Path) -> None:
    os.replace(folder, damaged_name(folder))


def _folder(run_dir: str | Path) -> Path:
    expect_utf8(Path(run_dir))
    return Path(run_dir).absolute() / "checkpoints"


def _to_tree(state: TrainState) -> dict[str, Any]:
    """Return a state as plain containers of arrays, which is what is stored."""
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
    """The shapes of a tree with where its arrays are to lie."""
    if mesh is None:
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: where, tree)
    else:
        shardings = placement(tree, mesh, fsdp)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _learned(params: Params) -> dict[str, Any]:
    """What else than networks has parameters in this model."""
    parts = {"likelihood": params.likelihood, "prior": params.prior, "posterior": params.posterior}
    return {name: part for name, part in parts.items() if part}


def _from_tree(
    tree: dict[str, Any], like: TrainState, key_impl: str | None, to_train: bool
) -> TrainState:
    """Return the state whose arrays are in `tree`; `like` has its structure and configurations."""
    opt_state = tree["opt_state"]
    if to_train:
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), opt_state)
    ema = None if like.ema is None else _params(tree["ema"], like.ema)
    key = jax.random.wrap_key_data(tree["key"], impl=key_impl)
    return TrainState(_params(tree, like.params), opt_state, tree["step"], key, like.config, ema)


def _params(tree: dict[str, Any], like: Params) -> Params:
    learned = {name: tree[name] for name in _learned(like)}
    return Params(tree["encoder"], tree["decoder"], like.config, **learned)
