"""Work shared out among the devices of this machine."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxvae.errors import InputError

AXIS = "batch"
_LEAST_DIVIDED = 256  # numbers of an array: smaller parts cost more to gather than they save
_LEAST = 8  # images of a batch: with fewer, a device costs more than it takes off the others


def make_cores_devices() -> None:
    """Let every CPU core be a device of its own, for `data_parallel` to use.

    XLA shares out the work of one device among all cores operation by operation, and what one
    core has in its cache the next operation needs on another. A core that takes its own part of
    the batch through the whole model keeps it. Changes JAX's configuration, so it is for
    programs to call, not for libraries, and before the first computation. A number of devices
    that the user chose stays.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", cores())


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def devices_for(items: int, least: int = _LEAST) -> jax.sharding.Mesh:
    """As many devices as can share so many items equally, at least `least` each.

    Where there are several processes, equally many of each, in the processes' order. Raises
    InputError if these cannot share the items equally.
    """
    processes = jax.process_count()
    if items % processes:
        raise InputError(
            f"{items} images cannot be dealt out equally to {processes} processes: "
            "expected a batch_size that divides by their number"
        )
    here = items // processes
    most = max(1, min(jax.local_device_count(), here // least))
    count = max(n for n in range(1, most + 1) if here % n == 0)
    devices = [d for p in range(processes) for d in jax.devices() if d.process_index == p]
    per_process = len(devices) // processes
    chosen = [d for i, d in enumerate(devices) if i % per_process < count]
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((len(chosen),), (AXIS,), (kind,), devices=chosen)


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The whole of an array on every device."""
    return jax.NamedSharding(mesh, jax.P())


def placement(tree: Any, mesh: jax.sharding.Mesh, fsdp: bool = False) -> Any:
    """Where each array of a tree lies: everywhere, or as `fsdp_specs` says."""
    if fsdp:
        return jax.tree.map(partial(jax.NamedSharding, mesh), fsdp_specs(tree, mesh))
    return jax.tree.map(lambda _: replicated(mesh), tree)


def shard(tree: Any, mesh: jax.sharding.Mesh, fsdp: bool = False) -> Any:
    """Arrays that every process has alike, laid out on the devices of all of them.

    fsdp: as of `placement`.
    """
    shardings = placement(tree, mesh, fsdp)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    # PRNG keys, and what lies on one process's devices, cannot be put on another's.
    keys = jax.tree.map(_is_key, tree)
    numbers = jax.tree.map(
        lambda x, key: np.asarray(jax.random.key_data(x) if key else x), tree, keys
    )
    return _as_keys(jax.device_put(numbers, shardings), keys)


def gather(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """What `shard` has laid out, on the first device of this process."""
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.local_devices()[0])
    keys = jax.tree.map(_is_key, tree)

    def key_data(tree: Any) -> Any:
        return jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)

    numbers = jax.jit(key_data, out_shardings=replicated(mesh))(tree)
    return _as_keys(jax.tree.map(lambda x: x.addressable_data(0), numbers), keys)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_keys(numbers: Any, keys: Any) -> Any:
    return jax.jit(
        lambda numbers: jax.tree.map(
            lambda x, key: jax.random.wrap_key_data(x) if key else x, numbers, keys
        )
    )(numbers)


def data_parallel(
    f: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    donate_argnums: tuple[int, ...] = (),
    in_specs: Any = None,
    out_specs: Any = None,
) -> Callable[..., Any]:
    """f(..., axis_name) on all devices: each takes its own part and comes to the same result.

    Args:
      f: `train_epoch`, `evaluate` or another function that takes an `axis_name`.
      mesh: from `devices_for`.
      donate_argnums: arguments of f whose memory its results may take over.
      in_specs, out_specs: how its arguments and results lie, where that is not `replicated`.
    Returns:
      f without its `axis_name`. On a CPU it returns when the result is there: the devices wait for
      each other inside a computation, and a second one begun meanwhile could take the threads
      that the first is waiting for.
    """
    parts = jax.shard_map(
        partial(f, axis_name=AXIS),
        mesh=mesh,
        in_specs=jax.P() if in_specs is None else in_specs,
        out_specs=jax.P() if out_specs is None else out_specs,
        check_vma=False,
    )
    compiled = jax.jit(parts, donate_argnums=donate_argnums)
    if mesh.devices.flat[0].platform != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


def fsdp_specs(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """How to lay arrays out so that every device holds an equal part of each: PartitionSpecs.

    An array is cut along its longest axis that divides by the number of devices; small ones, and
    those without such an axis, lie everywhere.
    """

    def spec(x: jax.Array) -> jax.P:
        axes = [i for i, side in enumerate(x.shape) if side % mesh.size == 0]
        if not axes or x.size < _LEAST_DIVIDED * mesh.size:
            return jax.P()
        longest = max(axes, key=lambda i: x.shape[i])
        return jax.P(*[AXIS if i == longest else None for i in range(x.ndim)])

    return jax.tree.map(spec, tree)


def on_parts(
    f: Callable[..., Any], tree: Any, full_shapes: Any, axis_name: str | None
) -> Callable[..., Any]:
    """f(tree, ...), where every device of the `pmap` axis may hold a part of the tree's arrays.

    full_shapes: the same tree with the shapes of the full arrays.

    They are put together for f and not kept for the backward pass but put together once more, so
    that no device ever holds all of them. The gradient in a part is then the sum over the
    devices, in all else this device's own.

    Rajbhandari et al. (2020), ZeRO, stage 3; Zhao et al. (2023), PyTorch FSDP, section 3.
    """
    if axis_name is None or all(jax.tree.leaves(jax.tree.map(_is_full, tree, full_shapes))):
        return f

    def gather_parts(x: jax.Array, like: jax.Array) -> jax.Array:
        if _is_full(x, like):
            return x
        axis = next(i for i in range(x.ndim) if x.shape[i] != like.shape[i])
        return lax.all_gather(x, axis_name, axis=axis, tiled=True)

    def on_full(tree: Any, *rest: Any) -> Any:
        return f(jax.tree.map(gather_parts, tree, full_shapes), *rest)

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name != "all_gather"

    return jax.checkpoint(on_full, policy=kept)


def mean_over(axis_name: str | None, tree: Any, full_shapes: Any) -> Any:
    """The devices' mean of a tree that is a gradient of `on_parts`."""
    if axis_name is None:
        return tree
    ours = jax.tree.map(lambda x, like: x if _is_full(x, like) else None, tree, full_shapes)
    means, count = lax.pmean(ours, axis_name), lax.axis_size(axis_name)
    return jax.tree.map(
        lambda mean, x: x / count if mean is None else mean,
        means,
        tree,
        is_leaf=lambda x: x is None,
    )


def sum_over(axis_name: str | None, numbers: Any, tree: Any, full_shapes: Any) -> jax.Array:
    """The sum of a tree of numbers, one for each array of `tree`, over all its parts."""
    if axis_name is None:
        return jax.tree.reduce(jnp.add, numbers)
    is_full = jax.tree.map(_is_full, tree, full_shapes)
    ours = jax.tree.map(lambda n, full: n * full, numbers, is_full)
    parts = jax.tree.map(lambda n, full: n * (not full), numbers, is_full)
    return jax.tree.reduce(jnp.add, ours) + lax.psum(jax.tree.reduce(jnp.add, parts), axis_name)


def _is_full(x: jax.Array, full: jax.Array) -> bool:
    return x.shape == full.shape


def own_part(tree: Any, axis_name: str | None, axis: int = 0) -> Any:
    """The rows, along an axis, that are this device's part of the `pmap` axis of that name.

    The devices' parts are equal and in the devices' order; what is left over is nobody's.
    """
    if axis_name is None:
        return tree

    def part(x: jax.Array) -> jax.Array:
        rows = x.shape[axis] // lax.axis_size(axis_name)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * rows, rows, axis)

    return jax.tree.map(part, tree)
