"""A run's checkpoints, kept by Orbax: the latest and the best, each with its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jaxvae.config import ModelConfig, TrainConfig
from jaxvae.errors import InputError
from jaxvae.model import Params
from jaxvae.parallel import placement
from jaxvae.training import TrainState, create_train_state

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Which = Literal["latest", "best"]


def save(run_dir: str | Path, state: TrainState) -> None:
    """Write a checkpoint of `state` into a run directory, and wait until it is whole.

    Raises InputError if the directory already holds a checkpoint of this step.
    """
    with open_checkpoints(run_dir) as checkpoints:
        if int(state.step) in checkpoints.all_steps():
            raise InputError(
                f"{run_dir} already holds a checkpoint of step {int(state.step)}: "
                "choose another directory"
            )
        write(checkpoints, state, {})


def restore(
    run_dir: str | Path,
    which: Which | int = "latest",
    network: Any = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    divide: bool = False,
) -> TrainState:
    """The training state of a run directory, to go on from.

    Args:
      which: "latest", "best" by test ELBO, or the number of steps taken.
      network: the modules (encoder, decoder), where the model was given some of its own.
      mesh: the devices to lay it out on, whatever it was saved from; by default the first one.
      divide: as of `jaxvae.parallel.lay_out`.
    Raises:
      InputError: the directory holds no checkpoint, or none of that step; the model has modules
        of its own and they are not handed over, or others are.
    """
    import orbax.checkpoint as ocp

    directory = _existing(run_dir)
    with open_checkpoints(directory.parent) as checkpoints:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            raise InputError(_no_checkpoint(run_dir))
        if isinstance(which, int):
            if which not in checkpoints.all_steps():
                raise InputError(f"{run_dir} holds no checkpoint of step {which}, only of {step}")
            step = which
        saved = checkpoints.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        own = {} if network is None else {"network": network}
        model = ModelConfig.from_dict(saved.config["model"] | own)
        train = TrainConfig.from_dict(saved.config["train"])
        like = jax.eval_shape(lambda: create_train_state(jax.random.key(0), model, train))
        abstract = _placed(jax.eval_shape(_to_tree, like), mesh, divide)
        if network is not None:
            # Looked at beforehand: Orbax tells of another shape only in the midst of reading.
            handler = ocp.StandardCheckpointHandler()
            stored = handler.metadata(checkpoints.directory / str(step) / "state").tree
            if any(_shapes(stored[n]) != _shapes(abstract[n]) for n in ("encoder", "decoder")):
                raise InputError(
                    f"{run_dir} holds other parameters than those of `network`: expected the "
                    "modules that the model was made with"
                )
        restored = checkpoints.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return _from_tree(restored.state, like)


def load(run_dir: str | Path, which: Which = "latest", network: Any = None) -> Params:
    """The model of a run directory.

    Args:
      which: "latest", or "best" by test ELBO.
      network: the modules (encoder, decoder), where the model was given some of its own.
    Raises:
      InputError: as of `restore`.
    """
    return restore(run_dir, which, network).params


@contextmanager
def open_checkpoints(run_dir: str | Path, latest: int = 1) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run; leaving the context waits for those still being written.

    latest: how many of the last ones to keep, beside the best.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    def elbo(metrics: Mapping[str, float]) -> float:
        return metrics.get("elbo", -math.inf)  # saved without a measurement: the last choice

    best = policies.BestN(get_metric_fn=elbo, n=1)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(latest), best]),
        best_fn=elbo,
    )
    directory = Path(run_dir).absolute() / "checkpoints"
    with ocp.CheckpointManager(directory, options=options) as manager:
        yield manager


def write(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    metrics: Mapping[str, float],
    begun: tuple[Mapping[str, float], float] = ({}, 0.0),
) -> None:
    """Begin to write a checkpoint; `metrics["elbo"]` decides which one is the best.

    begun: of an epoch that is not over, the sums of its metrics so far, and its seconds.
    """
    import orbax.checkpoint as ocp

    config = {
        "model": state.params.config.to_dict(),
        "train": state.config.to_dict(),
        "begun": [dict(begun[0]), begun[1]],
    }
    # A copy: while it is being written, the next steps take over the memory of the state.
    tree = jax.tree.map(jnp.copy, _to_tree(state))
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(tree), config=ocp.args.JsonSave(config)
        ),
        metrics=dict(metrics),
    )


def unfinished(checkpoints: ocp.CheckpointManager, step: int) -> tuple[dict[str, float], float]:
    """What the checkpoint of a step knows of an epoch that is not over: `begun`, as of `write`."""
    import orbax.checkpoint as ocp

    json = ocp.args.Composite(config=ocp.args.JsonRestore())
    saved = checkpoints.restore(step, args=json)
    totals, seconds = saved.config.get("begun", ({}, 0.0))
    return totals, seconds


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


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    """The state whose arrays are in `tree`; `like` has its structure and configurations."""
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), tree["opt_state"])
    learned = {name: tree[name] for name in _learned(like.params)}
    params = Params(tree["encoder"], tree["decoder"], like.params.config, **learned)
    key = jax.random.wrap_key_data(tree["key"])
    return TrainState(params, opt_state, tree["step"], key, like.config)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: tuple(x.shape), tree)


def _existing(run_dir: str | Path) -> Path:
    directory = Path(run_dir).absolute() / "checkpoints"
    if not directory.is_dir():
        raise InputError(_no_checkpoint(run_dir))
    return directory


def _no_checkpoint(run_dir: str | Path) -> str:
    return (
        f"{run_dir} holds no checkpoint: expected the run directory of `jaxvae train`, "
        "at least one epoch old"
    )
