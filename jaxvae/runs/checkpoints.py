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
import numpy as np

from jaxvae.devices.processes import all_agree, is_first
from jaxvae.devices.sharding import placement
from jaxvae.errors import Damaged, InputError, TrainingFailed
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import Params
from jaxvae.runs.files import NewerVersion, aside, cannot_write, is_number, unmarked, version
from jaxvae.storage import is_part, own_folder, read_bytes, refuse_links, regular, write_whole
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState, create_train_state

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Which = Literal["latest", "best"]
_SEAL = "sha256.json"
_MISSING = "is missing"
_TRIES = 20  # to read a checkpoint beside a training that deletes it
_DELETION = 0.05  # seconds
_MARGIN = 100_000  # bytes that a checkpoint takes beside its arrays


def save(run_dir: str | Path, state: TrainState) -> None:
    """Write a checkpoint of `state` into a run directory, and wait until it is whole.

    Raises InputError if the directory already holds a checkpoint of this step or cannot be
    written.
    """
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
    divide: bool = False,
) -> TrainState:
    """The training state of a run directory, to go on from.

    Where the one that is asked for is damaged, the newest whole one, or the best one, takes its
    place, and a warning of the category `jaxvae.errors.Damaged` says so.

    Args:
      which: "latest", "best" by test ELBO, or the number of steps taken.
      network: the modules (encoder, decoder), where the model was given some of its own.
      mesh: the devices to lay it out on, whatever it was saved from; by default the first one.
      divide: as of `jaxvae.devices.sharding.lay_out`.
    Raises:
      InputError: the directory holds no checkpoint, none of that step or none that is whole; a
        newer version made it; the model has modules of its own and they are not handed over, or
        others are.
    """
    for left in reversed(range(_TRIES)):
        step = which if isinstance(which, int) else newest_whole(run_dir, which)
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
            return _read(folder, network, mesh, divide)
        except (InputError, OSError, ValueError):
            # A training that goes on meanwhile deletes its older checkpoints.
            if not left or isinstance(which, int) or not _has_moved_on(run_dir, held):
                raise
    raise AssertionError


def load(run_dir: str | Path, which: Which = "latest", network: Any = None) -> Params:
    """The model of a run directory.

    Args:
      which: "latest", or "best" by test ELBO.
      network: the modules (encoder, decoder), where the model was given some of its own.
    Raises:
      InputError: as of `restore`.
    """
    return restore(run_dir, which, network).params


def steps_of(run_dir: str | Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, in order."""
    folder = _folder(run_dir)
    try:
        return sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def newest_whole(run_dir: str | Path, which: Which = "latest") -> int | None:
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
        if not faults or not _has_moved_on(run_dir, steps):
            break
    sound = [step for step in steps if step not in faults]
    if faults and not sound:
        told = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
        raise InputError(
            f"{run_dir} holds no whole checkpoint, and nothing was changed ({told}): put one back "
            "from a copy, or start anew in another directory"
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


def _has_moved_on(run_dir: str | Path, steps: list[int]) -> bool:
    """Whether there are other checkpoints by now, after the time it takes to delete one."""
    time.sleep(_DELETION)
    return steps_of(run_dir) != steps


@contextmanager
def open_checkpoints(run_dir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, to write more of them.

    Damaged ones are put aside, as STEP.damaged, and what a kill left half-written is taken away.
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
    folder = own_folder(Path(run_dir).absolute(), "checkpoints")
    refuse_links(*folder.iterdir())
    if is_first():
        newest = newest_whole(run_dir)
        for part in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(part)
        for step in steps_of(run_dir):
            fault = _fault(folder / str(step))
            if fault and fault.endswith(_MISSING) and step < (newest or 0):
                shutil.rmtree(folder / str(step))  # a kill came while it was being deleted
            elif fault:
                _put_aside(folder / str(step))
    with ocp.CheckpointManager(_literal(folder), options=options) as manager:
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
            _put_aside(folder)
        reason = f"the checkpoint of step {step} is not read back as it was written ({fault})"
        raise TrainingFailed(cannot_write(run_dir, reason))
    if is_first():
        _seal(folder)


def told(run_dir: str | Path, step: int) -> dict[str, Any]:
    """What a checkpoint knows beside the state: `model`, `train`, and `begun`, as of `write`."""
    return _told(_folder(run_dir) / str(step))


def _told(folder: Path) -> dict[str, Any]:
    path = folder / "config" / "metadata"
    try:
        saved = unmarked(json.loads(read_bytes(path)), folder)
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


def _read(folder: Path, network: Any, mesh: jax.sharding.Mesh | None, divide: bool) -> TrainState:
    import orbax.checkpoint as ocp

    saved = _told(folder)
    own = {} if network is None else {"network": network}
    model = ModelConfig.from_dict(saved["model"] | own)
    train = TrainConfig.from_dict(saved["train"])
    like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
    abstract = _placed(jax.eval_shape(_to_tree, like), mesh, divide)
    try:
        if network is not None:
            # Looked at beforehand: Orbax tells of another shape only in the midst of reading.
            stored = ocp.StandardCheckpointHandler().metadata(_literal(folder / "state")).tree
            if any(_shapes(stored[n]) != _shapes(abstract[n]) for n in ("encoder", "decoder")):
                raise InputError(
                    f"{folder.parents[1]} holds other parameters than those of `network`: expected "
                    "the modules that the model was made with"
                )
        return _from_tree(_restored(folder, abstract), like)
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


def _seal(folder: Path) -> None:
    """Write down the sums of a checkpoint's files, which are what they are to be."""
    sums = json.dumps(_sums(folder), indent=0)
    write_whole(folder / _SEAL, lambda file: file.write(sums.encode()))


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    try:
        sealed = None
        if os.path.lexists(folder / _SEAL):
            sealed = json.loads(read_bytes(folder / _SEAL))
        else:
            # Of an older version, or killed before the seal: what Orbax has finished is whole.
            needed = ("config/metadata", "state/_METADATA", "_CHECKPOINT_METADATA")
            missing = [name for name in needed if not (folder / name).is_file()]
            if missing:
                return f"{missing[0]} {_MISSING}"
            _told(folder)
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
        return f"{_SEAL} is not what was written"
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
            if name.removesuffix(".part") == _SEAL or (is_part(name) and Path(parent) == folder):
                continue
            path = Path(parent, name)
            with open(path, "rb", opener=regular) as file:
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
    return float(value) if is_number(value) else -math.inf


def _put_aside(folder: Path) -> None:
    os.replace(folder, aside(folder))


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir).absolute() / "checkpoints"


def _to_tree(state: TrainState) -> dict[str, Any]:
    """A state as plain containers of arrays, which is what is stored."""
    return {
        "encoder": state.params.encoder,
        "decoder": state.params.decoder,
        **_learned(state.params),
        "opt_state": jax.tree.leaves(state.opt_state),
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def _placed(tree: Any, mesh: jax.sharding.Mesh | None, divide: bool) -> Any:
    """The shapes of a tree with where its arrays are to lie."""
    if mesh is None:
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: where, tree)
    else:
        shardings = placement(tree, mesh, divide)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _learned(params: Params) -> dict[str, Any]:
    """What else than networks has parameters in this model."""
    parts = {"likelihood": params.likelihood, "prior": params.prior, "posterior": params.posterior}
    return {name: part for name, part in parts.items() if part}


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    """The state whose arrays are in `tree`; `like` has its structure and configurations."""
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["opt_state"])
    learned = {name: tree[name] for name in _learned(like.params)}
    params = Params(tree["encoder"], tree["decoder"], like.params.config, **learned)
    key = jax.random.wrap_key_data(tree["key"])
    return TrainState(params, opt_state, tree["step"], key, like.config)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: tuple(x.shape), tree)
