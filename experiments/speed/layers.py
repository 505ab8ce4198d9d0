"""Time of every layer of the notebook's network in a training step, beside a lower limit.

    python experiments/speed/layers.py [OUT.md]

On one core of a CPU, in blocks of 4 images, as in training. The limit of a layer is the time of its
multiplications at the rate of a large matrix product, by Winograd's count where the layer uses
Winograd's algorithm, plus the time to move its inputs, outputs and their gradients at the bandwidth
of a copy in memory.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

CORE = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})  # before JAX counts the cores

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax import lax  # noqa: E402
from run import machine  # noqa: E402

import jaxvae  # noqa: E402
from jaxvae.devices.convolution import block_size  # noqa: E402
from jaxvae.devices.sharding import AXIS, devices_for, make_cores_devices  # noqa: E402
from jaxvae.models.networks import ConvTranspose, conv_3x3, dense  # noqa: E402

IMAGES = 128
ROUNDS = 9
WINOGRAD = 9 / 4  # multiplications of a 3x3 convolution over those of F(2x2, 3x3)
conv, linear = partial(conv_3x3, dtype=None, name=None), partial(dense, dtype=None, name=None)
# Name, layer, shape of its input, uses of a weight, and divisor of the multiplications.
LAYERS = [
    ("conv_1: 3x3, 1 to 32", conv(32), (28, 28, 1), 28 * 28, 1),
    ("conv_2: 3x3, 32 to 64, stride 2", conv(64, stride=2), (28, 28, 32), 14 * 14, 1),
    ("conv_3: 3x3, 64 to 64", conv(64), (14, 14, 64), 14 * 14, WINOGRAD),
    ("conv_4: 3x3, 64 to 64", conv(64), (14, 14, 64), 14 * 14, WINOGRAD),
    ("dense: 12,544 to 32", linear(32), (12544,), 1, 1),
    ("decoder dense: 2 to 12,544", linear(12544), (2,), 1, 1),
    ("transposed conv: 3x3, 64 to 32", ConvTranspose(32, 2), (14, 14, 64), 14 * 14, 1),
    ("conv: 3x3, 32 to 1", conv(1), (28, 28, 32), 28 * 28, 1),
]


def seconds(f, *arguments) -> float:
    """The least of some measurements: on a shared machine, that with the least other work."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first one compiles


def rates() -> tuple[float, float]:
    """Multiply-adds per second of a matrix product, and bytes per second of a copy."""
    a = jnp.ones((1024, 1024))
    product = seconds(jax.jit(jnp.matmul), a, a)
    large = jnp.ones(2**26)
    copy = seconds(jax.jit(jnp.negative), large)
    return 1024**3 / product, 2 * large.nbytes / copy


def step_seconds() -> float:
    """A whole training step, per image."""
    mesh = devices_for(IMAGES)
    state = jaxvae.create_train_state(jax.random.key(0), jaxvae.ModelConfig(), jaxvae.TrainConfig())
    images = jax.random.bits(jax.random.key(1), (IMAGES, 28, 28, 1), jnp.uint8)
    step = jax.jit(
        jax.shard_map(
            partial(jaxvae.train_step, axis_name=AXIS),
            mesh=mesh,
            in_specs=(jax.P(), jax.P(AXIS)),
            out_specs=jax.P(),
            check_vma=False,
        )
    )
    return seconds(step, state, images) / IMAGES


def layer_seconds(layer: nn.Module, shape: tuple[int, ...]) -> tuple[float, float, int]:
    """Forward pass, and gradients, in seconds per image; and the weights of the kernel."""
    key = jax.random.key(0)
    params = layer.init(key, jnp.zeros((1, *shape)))["params"]
    kernel = params["kernel"]
    size = block_size(IMAGES, params)
    x = jax.random.normal(key, (IMAGES // size, size, *shape))

    def forward(params, x):
        return lax.map(lambda block: layer.apply({"params": params}, block), x)

    y = forward(params, x)
    first = shape[-1] == 1  # the images need no gradient

    def both(params, x, dy):
        _, pull = jax.vjp(forward, params, x)
        return pull(dy)[: 1 if first else 2]

    forward_time = seconds(jax.jit(forward), params, x)
    total = seconds(jax.jit(both), params, x, jnp.ones_like(y))
    return forward_time / IMAGES, total / IMAGES, kernel.size


def main() -> None:
    make_cores_devices()
    rate, bandwidth = rates()
    rows, sums = [], [0.0] * 4
    for name, layer, shape, uses, divisor in LAYERS:
        forward, total, weights = layer_seconds(layer, shape)
        outputs = layer.init_with_output(jax.random.key(0), jnp.zeros((1, *shape)))[0].size
        inputs = int(jnp.prod(jnp.array(shape)))
        products = 2 if shape[-1] == 1 else 3
        # Forward: read x, write y. Gradients: read x and dy, write dx.
        floats = (2 if products == 2 else 3) * inputs + 2 * outputs
        multiply = products * uses * weights / divisor / rate
        limit = multiply + 4 * floats / bandwidth
        rows.append(
            f"| {name} | {uses * weights / 1e6:.2f} | {forward * 1e6:.0f} | {total * 1e6:.0f} "
            f"| {multiply * 1e6:.0f} | {limit * 1e6:.0f} | {limit / total:.2f} |"
        )
        sums = [a + b for a, b in zip(sums, (forward, total, multiply, limit), strict=True)]
    step = step_seconds()
    text = "\n".join(
        [
            f"JAX {jax.__version__}, one core of {machine()['cpu']}: {rate / 1e9:.0f} billion "
            f"multiply-adds per second in a product of two 1024x1024 matrices, "
            f"{bandwidth / 1e9:.1f} GB/s in a copy. Least of {ROUNDS} measurements.",
            "",
            "| layer | million multiply-adds | forward, µs/image | forward and gradients, µs/image "
            "| multiplications, µs/image | limit, µs/image | limit / time |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            f"| sum of the layers | | {sums[0] * 1e6:.0f} | {sums[1] * 1e6:.0f} "
            f"| {sums[2] * 1e6:.0f} | {sums[3] * 1e6:.0f} | {sums[3] / sums[1]:.2f} |",
            f"| whole training step, batch {IMAGES} | | | {step * 1e6:.0f} | "
            f"| | {sums[3] / step:.2f} |",
        ]
    )
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
