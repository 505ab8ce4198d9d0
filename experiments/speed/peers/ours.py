"""jaxvae."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import protocol
from protocol import Timed

import jaxvae
from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, make_cores_devices, replicated

make_cores_devices()
GPU = jax.default_backend() == "gpu"


def info():
    device = jax.devices()[0]
    versions = {"jaxvae": jaxvae.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return {"device": f"{device.device_kind} ({device.platform})", "versions": versions}


def device_peak():
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def new_state(batch=128, seed=0, **model):
    if model.get("network") == "spatial":
        model["latent_dim"] = 4 * 7 * 7
    train_config = jaxvae.TrainConfig(batch_size=batch)
    return jaxvae.create_train_state(
        jax.random.key(seed), jaxvae.ModelConfig(**model), train_config
    )


def new_params():
    return jaxvae.init(jax.random.key(0), jaxvae.ModelConfig())


def loop(train, state, images, count):
    """Time train(state, images), which returns the next state first."""

    def run(n):
        nonlocal state
        for _ in range(n):
            state, metrics = train(state, images)
            if not GPU:  # devices that are CPU cores take one computation at a time
                jax.block_until_ready(metrics)
        jax.block_until_ready(state)

    return Timed(run, count)


def again(function, count):
    """Time function(), which changes nothing."""

    def run(n):
        for _ in range(n):
            result = function()
        jax.block_until_ready(result)

    return Timed(run, count)


def mapped(f, mesh, *in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def put(mesh, *arrays):
    return jax.device_put(arrays, replicated(mesh))


def put_rows(mesh, array):
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(AXIS)))


def step(batch, **model):
    mesh = devices_for(batch)
    one = partial(jaxvae.train_step, axis_name=AXIS)
    train_step = jax.jit(
        mapped(one, mesh, jax.P(), jax.P(AXIS), out_specs=jax.P()), donate_argnums=0
    )
    (state,) = put(mesh, new_state(batch, **model))
    return loop(train_step, state, put_rows(mesh, protocol.float_images(batch)), batch)


def seeds(batch, count):
    """`count` models, each from its own key, all on the same batch."""
    keys = jax.random.split(jax.random.key(0), count)
    train_config = jaxvae.TrainConfig(batch_size=batch)
    states = jax.vmap(
        lambda key: jaxvae.create_train_state(key, jaxvae.ModelConfig(), train_config)
    )(keys)
    train_steps = jax.jit(jax.vmap(jaxvae.train_step, in_axes=(0, None)), donate_argnums=0)
    return loop(train_steps, states, jnp.asarray(protocol.float_images(batch)), count * batch)


def epoch(batch, images):
    mesh = devices_for(batch)
    state, train_images = put(mesh, new_state(batch), protocol.make_images(images))
    return loop(
        data_parallel(jaxvae.train_epoch, mesh, donate_argnums=(0,)), state, train_images, images
    )


def sample(images):
    mesh = devices_for(images)
    (params,) = put(mesh, new_params())
    keys = put_rows(mesh, jax.random.split(jax.random.key(1), mesh.size))

    def part(params, keys):
        return jaxvae.sample(params, keys[0], images // mesh.size)

    draw = jax.jit(mapped(part, mesh, jax.P(), jax.P(AXIS), out_specs=jax.P(AXIS)))
    return again(lambda: draw(params, keys), images)


def encode(images):
    mesh = devices_for(images)
    (params,) = put(mesh, new_params())
    x = put_rows(mesh, protocol.float_images(images))
    run = jax.jit(mapped(jaxvae.encode, mesh, jax.P(), jax.P(AXIS), out_specs=jax.P(AXIS)))
    return again(lambda: run(params, x), images)


def log_likelihood(images, samples):
    mesh = devices_for(images)
    (params,) = put(mesh, new_params())
    x = put_rows(mesh, protocol.float_images(images))
    keys = put_rows(mesh, jax.random.split(jax.random.key(1), images))
    estimate = partial(jaxvae.log_likelihood, num_samples=samples)
    rows = jax.P(AXIS)
    f = jax.jit(mapped(estimate, mesh, jax.P(), rows, rows, out_specs=rows))
    compiled = f.lower(params, keys, x).compile()
    timed = again(lambda: compiled(params, keys, x), images)
    return timed._replace(warm=lambda: None)


def check(path, **model):
    """Write the weights, images and noise of the check, and answer with the terms of the loss."""
    state, images = new_state(**model), protocol.make_images(64)
    for _ in range(20):  # enough that no term, weight or bias is near nothing
        state, _ = jaxvae.train_step(state, images)
    params = state.params
    eps = np.random.default_rng(0).standard_normal((64, params.config.latent_dim), np.float32)
    weights = {
        f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(weight)
        for part in ("encoder", "decoder")
        for path, weight in jax.tree_util.tree_leaves_with_path(getattr(params, part))
    }
    np.savez(path, **weights, images=images, eps=eps)
    with jax.default_matmul_precision("highest"):
        log_p_x, kl = terms_at(params, jnp.asarray(images), eps)
    sizes = (
        sum(w.size for w in jax.tree.leaves(part)) for part in (params.encoder, params.decoder)
    )
    return protocol.check_answer(log_p_x, kl, *sizes)


def terms_at(params, images, eps):
    """log p(x|z) and KL of each image, with the given noise."""
    posterior = jaxvae.encode(params, images)
    if hasattr(params.model, "groups"):
        found = posterior.terms(noise=jnp.asarray(eps))
        return jaxvae.decode(params, found.z).log_prob(images), jnp.sum(found.kl, axis=-1)
    z = posterior.mean + jnp.exp(posterior.log_var / 2) * eps
    return jaxvae.decode(params, z).log_prob(images), posterior.kl()


def peak():
    """The machine's own rates: FLOP/s of matrix products, byte/s of a negation in place."""
    kinds = {"float32": ("float32", "highest")}
    if GPU:
        kinds["float32, TF32 allowed"] = ("float32", "default")
        kinds["bfloat16"] = ("bfloat16", "default")
    rates = {}
    for name, (dtype, precision) in kinds.items():
        multiply = jax.jit(lambda a, b, precision=precision: jnp.matmul(a, b, precision=precision))
        best = 0.0
        for n in (4096, 8192, 16384) if GPU else (1024, 2048, 4096):
            a = jax.random.normal(jax.random.key(0), (n, n), dtype)
            seconds = protocol.best(lambda a=a: multiply(a, a).block_until_ready())  # noqa: B023
            best = max(best, 2 * n**3 / seconds)
        rates[f"matrix product, {name}"] = best
    x = jnp.ones((2**28 if GPU else 2**26,), jnp.float32)
    negate = jax.jit(lambda x: -x, donate_argnums=0)  # in place: no fresh pages

    def copy():
        nonlocal x
        x = negate(x).block_until_ready()

    seconds = protocol.best(copy)
    return {"flops": rates, "bytes": 2 * x.nbytes / seconds}


if __name__ == "__main__":
    protocol.serve(
        {
            "info": info,
            "check": check,
            "step": step,
            "seeds": seeds,
            "epoch": epoch,
            "sample": sample,
            "encode": encode,
            "log_likelihood": log_likelihood,
            "peak": peak,
        },
        device_peak,
    )
