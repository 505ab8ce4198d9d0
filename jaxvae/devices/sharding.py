"""Data parallelism and sharding over the devices of one or several processes."""

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
_LEAST_DIVIDED = 256  # numbers per part of an array: smaller parts are slower to gather
LEAST = 8  # images per device: with fewer, another device makes a step slower


def make_cores_devices() -> None:
    """Make every CPU core a JAX device, for `data_parallel`.

    With one device, XLA splits every operation over all cores, so a core often reads what another
    core has in its cache. With one device per core, each core takes its part of the batch through
    the whole model and its cache stays valid.

    Call it in programs, not in libraries, before the first computation: it changes JAX's
    configuration. A number of devices that the user has set is kept.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", cores())


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def devices_for(items: int, least: int = LEAST) -> jax.sharding.Mesh:
    """Make a mesh of as many devices as can split `items` equally.

    Args:
      items: examples of a batch.
      least: examples per device, at least.

    Returns:
      A mesh with the axis `AXIS`: the same number of devices of every process, in the order of
      the processes.

    Raises:
      InputError: the number of processes does not divide `items`.
    """
    processes = jax.process_count()
    if items % processes:
        raise InputError(
            f"{items} images cannot be split equally over {processes} processes: "
            "expected a batch_size that is a multiple of their number"
        )
    here = items // processes
    most = max(1, min(jax.local_device_count(), here // least))
    count = max(n for n in range(1, most + 1) if here % n == 0)
    devices = [d for p in range(processes) for d in jax.devices() if d.process_index == p]
    per_process = len(devices) // processes
    chosen = [d for i, d in enumerate(devices) if i % per_process < count]
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((len(chosen),), (AXIS,), (kind,), devices=chosen)


def divisible(items: int) -> int:
    """Round up a number of examples so that `devices_for` uses every device it can.

    Args:
      items: examples of a batch that can be filled up.

    Returns:
      The number, a multiple of as many devices as have `LEAST` examples each.
    """
    count = max(1, min(jax.device_count(), items // LEAST))
    return -(-items // count) * count


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Return the sharding that copies an array to every device."""
    return jax.NamedSharding(mesh, jax.P())


def placement(tree: Any, mesh: jax.sharding.Mesh, fsdp: bool = False) -> Any:
    """Return the sharding of each array of a tree.

    Args:
      tree: arrays, or their shapes.
      mesh: from `devices_for`.
      fsdp: whether the arrays are split as in `fsdp_specs`; otherwise they are replicated.

    Returns:
      A tree of `NamedSharding`.
    """
    if fsdp:
        return jax.tree.map(partial(jax.NamedSharding, mesh), fsdp_specs(tree, mesh))
    return jax.tree.map(lambda _: replicated(mesh), tree)


def shard(tree: Any, mesh: jax.sharding.Mesh, fsdp: bool = False) -> Any:
    """Move arrays that are equal in every process to the devices of the mesh.

    Args:
      tree: arrays.
      mesh: from `devices_for`.
      fsdp: as in `placement`.

    Returns:
      The tree of sharded or replicated arrays.
    """
    shardings = placement(tree, mesh, fsdp)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    # `device_put` to several processes takes neither PRNG keys nor arrays of one process's devices.
    keys = jax.tree.map(_is_key, tree)
    numbers = jax.tree.map(
        lambda x, key: np.asarray(jax.random.key_data(x) if key else x), tree, keys
    )
    return _as_keys(jax.device_put(numbers, shardings), keys)


def gather(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gather the arrays of `shard` on the first device of this process."""
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.local_devices()[0])
    keys = jax.tree.map(_is_key, tree)

    def key_data(tree: Any) -> Any:
        return jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)

    numbers = jax.jit(key_data, out_shardings=replicated(mesh))(tree)
    return _as_keys(jax.tree.map(lambda x: x.addressable_data(0), numbers), keys)


def _is_key(x: Any) -> bool:
    """Return whether x is an array of typed PRNG keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_keys(numbers: Any, keys: Any) -> Any:
    """Convert arrays of numbers to PRNG keys where `keys` is true."""
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
    """Compile f(..., axis_name) to run on all devices of a mesh.

    Args:
      f: `train_epoch`, `evaluate` or another function with an argument `axis_name`. Each device
        computes its own part and returns the same result.
      mesh: from `devices_for`.
      donate_argnums: arguments of f that are donated.
      in_specs: shardings of the arguments; by default they are replicated.
      out_specs: shardings of the results; by default they are replicated.

    Returns:
      f without its argument `axis_name`. On a CPU it waits for the result: collective operations
      wait for all devices, and a second computation could take the threads that the first needs.
    """
    parts = jax.shard_map(
        partial(f, axis_name=AXIS),
        mesh=mesh,
        in_specs=jax.P() if in_specs is None else in_specs,
        out_specs=jax.P() if out_specs is None else out_specs,
        check_vma=False,
    )
    if mesh.devices.flat[0].platform != "cpu":
        return jax.jit(parts, donate_argnums=donate_argnums)
    # XLA would also split the products of each device over all cores, where they displace those of
    # the other devices.
    alone = {"xla_cpu_multi_thread_eigen": mesh.size == 1}
    compiled = jax.jit(parts, donate_argnums=donate_argnums, compiler_options=alone)
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


def fsdp_specs(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return specs that give every device an equal part of each array.

    An array is split along its longest axis that is a multiple of the number of devices. Small
    arrays, and those without such an axis, are replicated.

    Args:
      tree: arrays, or their shapes.
      mesh: from `devices_for`.

    Returns:
      A tree of `PartitionSpec`.
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
    """Return f(tree, ...) for a tree of which every device may hold parts.

    The arrays are gathered for f. They are not saved for the backward pass but gathered again, so
    that no device holds all of them at once. The gradient with respect to a part is the sum over
    the devices; with respect to a full array it is this device's own.

    Args:
      f: a function of the full arrays and other arguments.
      tree: arrays, full or parts.
      full_shapes: the same tree, with the shapes of the full arrays.
      axis_name: axis over which the arrays are split.

    Returns:
      f as a function of the parts.

    References:
      Rajbhandari et al. (2020), ZeRO, stage 3.
      Zhao et al. (2023), PyTorch FSDP, section 3.
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
    """Average a gradient of `on_parts` over the devices."""
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
    """Sum numbers, one for each array of `tree`, over all arrays and all parts."""
    if axis_name is None:
        return jax.tree.reduce(jnp.add, numbers)
    is_full = jax.tree.map(_is_full, tree, full_shapes)
    ours = jax.tree.map(lambda n, full: n * full, numbers, is_full)
    parts = jax.tree.map(lambda n, full: n * (not full), numbers, is_full)
    return jax.tree.reduce(jnp.add, ours) + lax.psum(jax.tree.reduce(jnp.add, parts), axis_name)


def _is_full(x: jax.Array, full: jax.Array) -> bool:
    return x.shape == full.shape


def own_part(tree: Any, axis_name: str | None, axis: int = 0) -> Any:
    """Return this device's part of the rows of each array.

    The parts are equal and in the order of the devices; a remainder is left out.

    Args:
      tree: arrays.
      axis_name: axis of the `pmap` or `shard_map`; None: the tree is returned unchanged.
      axis: array axis of the rows.

    Returns:
      The tree of this device's rows.
    """
    if axis_name is None:
        return tree

    def part(x: jax.Array) -> jax.Array:
        rows = x.shape[axis] // lax.axis_size(axis_name)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * rows, rows, axis)

    return jax.tree.map(part, tree)
