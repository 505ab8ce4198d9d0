"""Benchmark of the jitted training step, encoding and sampling against plain Flax."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxvae.devices.sharding import AXIS, devices_for, replicated
from jaxvae.models.config import ModelConfig
from jaxvae.models.vae import encode, init, sample
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import create_train_state, optimizer
from jaxvae.training.step import train_step

_BATCH_SIZES = (16, 128, 512)
_FORWARD = 2000  # images to encode, and to sample
_ROUNDS = 7


class _PlainEncoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for features, stride in ((32, 1), (64, 2), (64, 1), (64, 1)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=(stride, stride))(x))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(2)(x), nn.Dense(2)(x)


class _PlainDecoder(nn.Module):
    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(14 * 14 * 64)(z)).reshape(-1, 14, 14, 64)
        x = nn.relu(nn.ConvTranspose(32, (3, 3), strides=(2, 2))(x))
        return nn.Conv(1, (3, 3))(x)


def _plain_loss(params: Any, key: jax.Array, images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 255
    mean, log_var = _PlainEncoder().apply(params[0], x)  # type: ignore[misc]
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
    logits = _PlainDecoder().apply(params[1], z)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, x).sum((1, 2, 3))
    kl = -0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), axis=1)
    return jnp.mean(cross_entropy + kl)


@jax.jit
def _plain_step(carry: Any, images: jax.Array) -> Any:
    params, opt_state, key = carry
    key, noise_key = jax.random.split(key)
    grads = jax.grad(_plain_loss)(params, noise_key, images)
    updates, opt_state = optimizer(TrainConfig()).update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, key


def benchmark() -> Iterator[str]:
    """Time the notebook's model and the same model in plain Flax, in alternation.

    Yields:
      The lines of a table with medians, ranges and ratios.
    """
    device = jax.devices()[0]
    count = jax.local_device_count()
    yield f"JAX {jax.__version__} on {count} x {device.device_kind} ({device.platform}), float32"
    yield f"milliseconds per image: median (range) of {_ROUNDS} alternating rounds"
    yield f"{'':22}{'jaxvae':>24}{'plain Flax':>24}{'ratio':>8}"
    key = jax.random.key(0)
    config = ModelConfig()
    plain = (
        _PlainEncoder().init(key, jnp.zeros((1, 28, 28, 1))),
        _PlainDecoder().init(key, jnp.zeros((1, 2))),
    )
    for batch in _BATCH_SIZES:
        images = jax.random.bits(key, (batch, 28, 28, 1), jnp.uint8)
        state = create_train_state(key, config, TrainConfig(batch_size=batch))
        carry = (plain, optimizer(TrainConfig()).init(plain), key)
        step = partial(train_step, axis_name=AXIS)
        ours = _on_every_device(step, batch, jax.P(), state, images)
        peers = partial(_plain_step, carry, images)
        yield _compare(f"train step, batch {batch}", batch, ours, peers)
    params = init(key, config)
    images = jax.random.uniform(key, (_FORWARD, 28, 28, 1))
    plain_encode = jax.jit(_PlainEncoder().apply)
    ours = _on_every_device(encode, _FORWARD, jax.P(AXIS), params, images)
    yield _compare(f"encode {_FORWARD}", _FORWARD, ours, partial(plain_encode, plain[0], images))

    @jax.jit
    def plain_sample(params: Any, key: jax.Array) -> jax.Array:
        return nn.sigmoid(_PlainDecoder().apply(params, jax.random.normal(key, (_FORWARD, 2))))

    devices = devices_for(_FORWARD).size

    def part(params: Any, keys: jax.Array) -> jax.Array:
        return sample(params, keys[0], _FORWARD // devices)

    keys = jax.random.split(key, devices)
    ours = _on_every_device(part, _FORWARD, jax.P(AXIS), params, keys)
    peers = partial(plain_sample, plain[1], key)
    yield _compare(f"sample {_FORWARD}", _FORWARD, ours, peers)


def _on_every_device(
    f: Callable[..., Any], images: int, result: jax.P, whole: Any, rows: jax.Array
) -> Callable[[], Any]:
    """Return a call of f(whole, rows), with the rows sharded over the devices."""
    mesh = devices_for(images)
    parts = jax.shard_map(
        f, mesh=mesh, in_specs=(jax.P(), jax.P(AXIS)), out_specs=result, check_vma=False
    )
    whole = jax.device_put(whole, replicated(mesh))
    rows = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(AXIS)))
    return partial(jax.jit(parts), whole, rows)


def _compare(name: str, images: int, ours: Callable[[], Any], peers: Callable[[], Any]) -> str:
    seconds: list[list[float]] = [[], []]
    for _ in range(_ROUNDS + 1):
        for times, function in zip(seconds, (ours, peers), strict=True):
            began = time.perf_counter()
            jax.block_until_ready(function())
            times.append((time.perf_counter() - began) / images * 1e3)
    cells = []
    for times in seconds:
        del times[0]  # includes compilation
        cells.append(f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})")
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    return f"{name:22}{cells[0]:>24}{cells[1]:>24}{ratio:>7.1f}x"
