"""Training programs compiled for devices that need not be there, and what can be read in them."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxvae
from jaxvae.devices.sharding import AXIS, fsdp_specs
from jaxvae.training.step import train_epoch, train_step

IMAGES = 60_000
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "u8": 1, "pred": 1, "f64": 8}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def compiled(
    devices: Any, program: str, batch: int, model: jaxvae.ModelConfig, fsdp: bool = False
) -> Any:
    """`step`, `epoch` or `sample` for these devices together, with `batch` images for each."""
    devices = np.ravel(devices)
    mesh = jax.sharding.Mesh(devices, (AXIS,))
    shape = model.image_shape
    train = jaxvae.TrainConfig(batch_size=batch * mesh.size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda: jaxvae.create_train_state(jax.random.key(0), model, train))
    whole, rows = jax.P(), jax.P(AXIS)
    specs = fsdp_specs(state, mesh) if fsdp else jax.tree.map(lambda _: whole, state)
    if program == "sample":
        arguments = state.params, jax.ShapeDtypeStruct((mesh.size,), key.dtype)
        f, given, result = lambda p, k: jaxvae.sample(p, k[0], batch), (whole, rows), rows
    else:
        count, where = (IMAGES, whole) if program == "epoch" else (batch * mesh.size, rows)
        arguments = state, jax.ShapeDtypeStruct((count, *shape), jnp.uint8)
        f = partial(train_epoch if program == "epoch" else train_step, axis_name=AXIS)
        given, result = (specs, where), (specs, whole)
    parts = jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=result, check_vma=False)
    donated = () if program == "sample" else (0,)
    with jax.default_device(devices[0].platform):  # what is traced is for that, whatever is here
        return jax.jit(parts, donate_argnums=donated).lower(*arguments).compile()


def collectives(program: Any) -> dict[str, tuple[int, int]]:
    """What devices tell each other in a compiled program: of every kind, how often and bytes.

    The bytes are those of the results on one device. What is in a loop counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in re.findall(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(", program.as_text()):
        size = sum(
            _BYTES[number] * math.prod(int(side) for side in sides.split(",") if side)
            for number, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        )
        times, before = found.get(kind, (0, 0))
        found[kind] = times + 1, before + size
    return found
