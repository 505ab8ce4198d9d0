"""Work shared out among the devices of this machine."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

AXIS = "batch"
_LEAST = 8  # images of a batch: with fewer, a device costs more than it takes off the others


def make_cores_devices() -> None:
    """Let every CPU core be a device of its own, for `share` to use.

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
    """As many local devices as can share so many items equally, at least `least` each."""
    devices = jax.local_devices()
    most = max(1, min(len(devices), items // least))
    count = max(n for n in range(1, most + 1) if items % n == 0)
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((count,), (AXIS,), (kind,), devices=devices[:count])


def everywhere(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The whole of an array on every device."""
    return jax.NamedSharding(mesh, jax.P())


def share(
    f: Callable[..., Any], mesh: jax.sharding.Mesh, donate_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """f(..., axis_name) on all devices: each takes its own part and comes to the same result.

    Args:
      f: `train_epoch`, `evaluate` or another function that takes an `axis_name`.
      mesh: from `devices_for`.
      donate_argnums: arguments of f whose memory its results may take over.
    Returns:
      f without its `axis_name`, for arguments that lie `everywhere`. On a CPU it returns when
      the result is there: the devices wait for each other inside a computation, and a second
      one begun meanwhile could take the threads that the first is waiting for.
    """
    parts = jax.shard_map(
        partial(f, axis_name=AXIS),
        mesh=mesh,
        in_specs=jax.P(),
        out_specs=jax.P(),
        check_vma=False,
    )
    compiled = jax.jit(parts, donate_argnums=donate_argnums)
    if mesh.devices.flat[0].platform != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


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
