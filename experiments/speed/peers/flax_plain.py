"""The same VAE as one writes it in Flax and Optax, without jaxvae: XLA's own convolutions."""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
from protocol import Timed

OPTIMIZER = optax.rmsprop(1e-3, decay=0.9, eps=1e-7, eps_in_sqrt=True)
AT_ONCE = 10_000 if jax.default_backend() == "gpu" else 500  # images, when only run forward


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for layer, (features, stride) in enumerate(((32, 1), (64, 2), (64, 1), (64, 1)), start=1):
            x = nn.relu(nn.Conv(features, (3, 3), (stride, stride), name=f"conv_{layer}")(x))
        x = nn.relu(nn.Dense(32, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(2, name="mean")(x), nn.Dense(2, name="log_var")(x)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        x = nn.relu(nn.Dense(14 * 14 * 64, name="dense")(z)).reshape(-1, 14, 14, 64)
        x = nn.relu(nn.ConvTranspose(32, (3, 3), (2, 2), name="conv_transpose")(x))
        return nn.Conv(1, (3, 3), name="conv")(x)


def encode(params, x):
    return Encoder().apply({"params": params["encoder"]}, x)


def decode(params, z):
    return Decoder().apply({"params": params["decoder"]}, z)


def terms(params, x, eps):
    """log p(x|z) and KL of each image, nats."""
    mean, log_var = encode(params, x)
    logits = decode(params, mean + jnp.exp(log_var / 2) * eps)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, x).sum((1, 2, 3))
    return -cross_entropy, -0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), axis=1)


def loss(params, key, x):
    log_p_x, kl = terms(params, x, jax.random.normal(key, (len(x), 2)))
    return jnp.mean(kl - log_p_x)


def train(carry, x):
    params, opt_state, key = carry
    key, noise_key = jax.random.split(key)
    value, grads = jax.value_and_grad(loss)(params, noise_key, x)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state, key), value


@partial(jax.jit, donate_argnums=0)
def train_on(carry, images, batch):
    return train(carry, images[batch].astype(jnp.float32) / 255)


def new_params():
    encoder = Encoder().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    decoder = Decoder().init(jax.random.key(1), jnp.zeros((1, 2)))
    return {"encoder": encoder["params"], "decoder": decoder["params"]}


def new_carry():
    params = new_params()
    return params, OPTIMIZER.init(params), jax.random.key(2)


def step(batch):
    carry, x = new_carry(), jnp.asarray(protocol.float_images(batch))
    train_step = jax.jit(train, donate_argnums=0)

    def run(n):
        nonlocal carry
        for _ in range(n):
            carry, _ = train_step(carry, x)
        jax.block_until_ready(carry)

    return Timed(run, batch)


def epoch(batch, images):
    """A dispatch per step: on a CPU, XLA's convolutions are far slower inside a lax.scan."""
    carry, x = new_carry(), jnp.asarray(protocol.make_images(images))
    key, shuffle = jax.random.key(3), jax.jit(lambda key: jax.random.permutation(key, images))

    def run(n):
        nonlocal carry, key
        for _ in range(n):
            key, shuffle_key = jax.random.split(key)
            order = shuffle(shuffle_key)
            for i in range(0, images // batch * batch, batch):
                carry, _ = train_on(carry, x, order[i : i + batch])
        jax.block_until_ready(carry)

    return Timed(run, images)


def forward(function, x):
    """Time function(params, x), AT_ONCE rows at a time."""
    params, compiled = new_params(), jax.jit(function)
    blocks = [x[i : i + AT_ONCE] for i in range(0, len(x), AT_ONCE)]

    def run(n):
        for _ in range(n):
            result = [compiled(params, block) for block in blocks]
        jax.block_until_ready(result)

    return Timed(run, len(x))


def encode_all(images):
    return forward(encode, jnp.asarray(protocol.float_images(images)))


def sample(images):
    z = jax.random.normal(jax.random.key(3), (images, 2))
    return forward(lambda params, z: nn.sigmoid(decode(params, z)), z)


def check(path):
    weights, images, eps = protocol.load_check(path)
    params = flax.traverse_util.unflatten_dict(weights, sep="/")
    with jax.default_matmul_precision("highest"):
        log_p_x, kl = jax.jit(terms)(params, images.astype(np.float32) / 255, eps)
    sizes = (sum(w.size for w in jax.tree.leaves(new_params()[m])) for m in ("encoder", "decoder"))
    return protocol.check_answer(log_p_x, kl, *sizes)


def info():
    device = jax.devices()[0]
    versions = {"flax": flax.__version__, "jax": jax.__version__, "optax": optax.__version__}
    return {"device": f"{device.device_kind} ({device.platform})", "versions": versions}


def device_peak():
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    protocol.serve(
        {
            "info": info,
            "check": check,
            "step": step,
            "epoch": epoch,
            "sample": sample,
            "encode": encode_all,
        },
        device_peak,
    )
