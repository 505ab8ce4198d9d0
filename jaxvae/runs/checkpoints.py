"""A run's checkpoints, kept by Orbax: the last two and the best, each with its configuration.

A checkpoint that is whole is sealed: with it lie the SHA-256 sums of all its files. One whose
files are not those any more is never read but passed over for the newest that is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jaxvae.config import ModelConfig, TrainConfig
from jaxvae.devices.processes import is_first
from jaxvae.devices.sharding import placement
from jaxvae.errors import Damaged, InputError, TrainingFailed
from jaxvae.models.vae import Params
from jaxvae.runs.files import cannot_write, unmarked, version, write_whole
from jaxvae.training.step import TrainState, create_train_state
from jaxvae.validation import as_key

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Which = Literal["latest", "best"]
_SEAL = "sha256.json"
_MISSING = "is missing"
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
    divide: bool = False,
) -> TrainState:
    """The training state of a run directory, to go on from, its arrays of the types saved.

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
        others are; it holds 64-bit arrays, and JAX has 64-bit types disabled.
    """
    step = which if isinstance(which, int) else newest_whole(run_dir, which)
    if step is None or step not in steps_of(run_dir):
        held = ", ".join(map(str, steps_of(run_dir)))
        raise InputError(
            f"{run_dir} holds no checkpoint of step {step}, only of {held}"
            if held
            else f"{run_dir} holds no checkpoint: expected the run directory of `jaxvae train`, "
            "at least one epoch old"
        )
    folder = _folder(run_dir) / str(step)
    if fault := _fault(folder):
        raise InputError(f"{run_dir}: the checkpoint of step {step} is damaged: {fault}")
    return _read(folder, network, mesh, divide)


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
    folder, steps = _folder(run_dir), steps_of(run_dir)
    faults = {}
    for step in reversed(steps):
        if fault := _fault(folder / str(step)):
            faults[step] = fault
        elif which == "latest":  # the older ones, of which we want none, are not read
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


@contextmanager
def open_checkpoints(run_dir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, to write more of them.

    Damaged ones are put aside, as STEP.damaged, and what a kill left half-written is taken away.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    def elbo(metrics: Mapping[str, float]) -> float:
        return metrics.get("elbo", -math.inf)  # saved without a measurement: the last choice

    # Two of the last: one to fall back on if the other is damaged, and a kill can leave one of
    # many models that are trained at once a checkpoint ahead of the others.
    kept = [policies.LatestN(2), policies.BestN(get_metric_fn=elbo, n=1)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=elbo,
        enable_async_checkpointing=False,
    )
    folder = _folder(run_dir)
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
    with ocp.CheckpointManager(folder, options=options) as manager:
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
    if is_first():
        _seal(Path(checkpoints.directory) / str(step))


def told(run_dir: str | Path, step: int) -> dict[str, Any]:
    """What a checkpoint knows beside the state: `model`, `train`, and `begun`, as of `write`."""
    return _told(_folder(run_dir) / str(step))


def _told(folder: Path) -> dict[str, Any]:
    return unmarked(json.loads((folder / "config" / "metadata").read_text()), folder)


def _read(folder: Path, network: Any, mesh: jax.sharding.Mesh | None, divide: bool) -> TrainState:
    import orbax.checkpoint as ocp

    saved = _told(folder)
    own = {} if network is None else {"network": network}
    model = ModelConfig.from_dict(saved["model"] | own)
    train = TrainConfig.from_dict(saved["train"])
    like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
    expected = jax.eval_shape(_to_tree, like)
    try:
        # Looked at beforehand: Orbax tells of another shape only in the midst of reading.
        stored = _arrays(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
        _expect_stored(folder, stored, _arrays(expected), network)
        abstract = tree_map_with_path(lambda path, _: stored[keystr(path)], expected)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_placed(abstract, mesh, divide)))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            restored = reader.restore(folder, args=args)
        return _from_tree(restored.state, like, saved.get("key"))
    except InputError:
        raise
    except (
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        jax.errors.JaxRuntimeError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder} cannot be read: {reason}; expected a checkpoint of `jaxvae train`, "
            "as it was written"
        ) from error


def _expect_stored(
    folder: Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    network: Any,
) -> None:
    """Raise InputError unless a checkpoint has the arrays of its model, of types that JAX holds."""
    # A key of another implementation than by default has another shape.
    if name := _differs(stored, expected, ("['key']",)):
        if network is not None and name.startswith(("['encoder']", "['decoder']")):
            raise InputError(
                f"{folder.parents[1]} holds other parameters than those of `network`: expected "
                "the modules that the model was made with"
            )
        raise InputError(
            f"{folder} has {_told_of(stored, name)}: expected {_told_of(expected, name)}, as of "
            "its configuration"
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
            f"the state has {_told_of(found, name)}: expected {_told_of(expected, name)}, as of "
            f"`jaxvae.create_train_state` for its configurations (optimizer {train.optimizer!r})"
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


def _told_of(arrays: Mapping[str, jax.ShapeDtypeStruct], name: str) -> str:
    return f"{name} of shape {arrays[name].shape}" if name in arrays else f"no {name}"


def _seal(folder: Path) -> None:
    """Write down the sums of a checkpoint's files, which are what they are to be."""
    sums = json.dumps(_sums(folder), indent=0)
    write_whole(folder / _SEAL, lambda part: part.write_text(sums))


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    try:
        sealed = json.loads((folder / _SEAL).read_text())
        found = _sums(folder)
    except FileNotFoundError:
        # Of an older version, or killed before the seal: what Orbax has finished is whole.
        needed = ("config/metadata", "state/_METADATA", "_CHECKPOINT_METADATA")
        missing = [name for name in needed if not (folder / name).is_file()]
        return f"{missing[0]} {_MISSING}" if missing else None
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {' '.join(str(error).split())}"
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
        for path in (Path(parent, name) for name in names if name.removesuffix(".part") != _SEAL):
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return sums


def _elbo(folder: Path) -> float:
    """The test ELBO of a checkpoint, as far as it says any."""
    try:
        value = json.loads((folder / "metrics" / "metrics").read_text())["elbo"]
        return value if math.isfinite(value) else -math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def _put_aside(folder: Path) -> None:
    names = (f"{folder.name}.damaged{number or ''}" for number in itertools.count())
    os.replace(folder, next(one for name in names if not (one := folder.with_name(name)).exists()))


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
    parts = {"likelihood": params.likelihood, "prior": params.prior, "flow": params.flow}
    return {name: part for name, part in parts.items() if part}


def _from_tree(tree: dict[str, Any], like: TrainState, key_impl: str | None) -> TrainState:
    """The state whose arrays are in `tree`; `like` has its structure and configurations."""
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["opt_state"])
    learned = {name: tree[name] for name in _learned(like.params)}
    params = Params(tree["encoder"], tree["decoder"], like.params.config, **learned)
    key = jax.random.wrap_key_data(tree["key"], impl=key_impl)
    return TrainState(params, opt_state, tree["step"], key, like.config)
