"""The model's functions: what they return, and that every transformation of JAX applies."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused

import jaxvae
from jaxvae import ModelConfig, Params

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = ModelConfig((6, 5, 2), 2)
KEY = jax.random.key(7)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

# Each a function of (params, images) only.
FUNCTIONS = {
    "encode": lambda params, images: jaxvae.encode(params, images),
    "decode": lambda params, images: jaxvae.decode(params, images[:, 0, :2, 0]).mean,
    "sample": lambda params, images: jaxvae.sample(params, KEY, 4),
    "reconstruct": lambda params, images: jaxvae.reconstruct(params, images),
    "elbo": lambda params, images: jaxvae.elbo(params, KEY, images),
    "log_likelihood": lambda params, images: jaxvae.log_likelihood(params, KEY, images, 5),
}
every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
of_images = pytest.mark.parametrize(
    "f",
    [FUNCTIONS[name] for name in ("encode", "reconstruct", "elbo", "log_likelihood")],
    ids=["encode", "reconstruct", "elbo", "log_likelihood"],
)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(close, a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.fixture(scope="module")
def params():
    return jaxvae.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def stacked():
    return jax.vmap(partial(jaxvae.init, config=CONFIG))(jax.random.split(jax.random.key(1), 2))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 5, 2), dtype=np.uint8)


def test_init_depends_on_the_key_alone(params):
    assert_equal(jaxvae.init(jax.random.key(0), CONFIG), params)
    other = jaxvae.init(jax.random.key(1), CONFIG)
    for network in "encoder", "decoder":
        for name, layer in getattr(other, network).items():
            assert np.all(layer["kernel"] != getattr(params, network)[name]["kernel"])


def test_init_draws_every_kernel_independently(params):
    def first(layer):
        return np.ravel(layer["kernel"])[:6] / np.abs(layer["kernel"]).max()

    starts = [first(layer) for layer in (*params.encoder.values(), *params.decoder.values())]
    assert len(np.unique(np.round(starts, 5), axis=0)) == 10


def test_raw_keys_are_as_good_as_typed_ones(params, images):
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    assert_equal(jaxvae.init(raw, CONFIG), jaxvae.init(typed, CONFIG))
    for f in (
        lambda key: jaxvae.sample(params, key, 4),
        lambda key: jax.jit(jaxvae.elbo)(params, key, images),
        lambda key: jaxvae.reparameterize(key, jnp.zeros((2, 2)), jnp.ones((2, 2))),
    ):
        assert_equal(f(raw), f(typed))


def test_init_under_vmap_stacks_what_each_key_gives(stacked):
    for i, key in enumerate(jax.random.split(jax.random.key(1), 2)):
        assert_equal(row(stacked, i), jaxvae.init(key, CONFIG))
    assert stacked.config == CONFIG


@every_function
def test_functions_are_the_same_under_jit(f, params, images):
    assert_close(jax.jit(f)(params, images), f(params, images))


@every_function
def test_functions_map_over_stacked_params(f, stacked, images):
    both = jax.jit(jax.vmap(f, (0, None)))(stacked, images)
    for i in range(2):
        assert_close(row(both, i), f(row(stacked, i), images))


@pytest.mark.parametrize(
    "f",
    [
        lambda params, images, key: jaxvae.sample(params, key, 4),
        lambda params, images, key: jaxvae.elbo(params, key, images),
        lambda params, images, key: jaxvae.log_likelihood(params, key, images, 5),
    ],
    ids=["sample", "elbo", "log_likelihood"],
)
def test_functions_map_over_keys_and_their_noise_differs(f, params, images):
    keys = jax.random.split(jax.random.key(5), 3)
    f = jax.jit(partial(f, params, images))
    every = jax.vmap(f)(keys)
    for i, key in enumerate(keys):
        assert_close(row(every, i), f(key))
    assert not np.allclose(jax.tree.leaves(every)[0][0], jax.tree.leaves(every)[0][1])


@every_function
def test_functions_are_differentiable_in_the_params(f, params, images):
    def total(params):
        return sum(jnp.sum(x) for x in jax.tree.leaves(f(params, images)))

    slopes = jax.jit(jax.grad(total))(params)
    assert slopes.config == CONFIG
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes))
    used = {
        "encoder": f not in (FUNCTIONS["decode"], FUNCTIONS["sample"]),
        "decoder": f is not FUNCTIONS["encode"],
    }
    if f is FUNCTIONS["reconstruct"]:
        slopes.encoder.pop("log_var")
    for network, expected in used.items():
        for leaf in jax.tree.leaves(getattr(slopes, network)):
            assert np.any(leaf != 0) == expected


@of_images
def test_uint8_images_are_their_255ths(f, params, images):
    expected = f(params, np.float32(images) / 255)
    assert_close(f(params, images), expected)
    assert_close(f(params, jnp.asarray(images)), expected)


def test_encoding_a_batch_is_encoding_its_images_one_at_a_time(params):
    images = np.random.default_rng(1).uniform(size=(21, 6, 5, 2)).astype("f")
    encode = jax.jit(jaxvae.encode)
    together = encode(params, images)
    for i in range(21):
        assert_close(row(together, i), row(encode(params, images[i : i + 1]), 0))
    assert len(np.unique(np.round(together.mean, 5), axis=0)) == 21


def test_decoding_a_batch_is_decoding_its_latents_one_at_a_time(params):
    z = np.random.default_rng(1).normal(size=(21, 2)).astype("f")
    decode = jax.jit(jaxvae.decode)
    together = decode(params, z)
    for i in range(21):
        assert_close(row(together, i), row(decode(params, z[i : i + 1]), 0))


@pytest.mark.parametrize("n", [1, 19])
def test_samples_are_decoder_means_of_the_prior(params, n):
    images = jaxvae.sample(params, KEY, n)
    assert images.shape == (n, 6, 5, 2)
    assert images.dtype == jnp.float32
    assert np.min(images) >= 0
    assert np.max(images) <= 1
    z = jax.random.normal(KEY, (n, 2))
    assert_close(images, jax.jit(jaxvae.decode)(params, z).mean)
    assert len(np.unique(np.round(images, 5), axis=0)) == n


def test_reconstruct_is_the_decoder_mean_at_the_posterior_mean(params, images):
    reconstructed = jaxvae.reconstruct(params, images)
    assert reconstructed.shape == (5, 6, 5, 2)
    assert reconstructed.dtype == jnp.float32
    mean = jaxvae.encode(params, images).mean
    assert_close(reconstructed, jaxvae.decode(params, mean).mean)


def test_params_are_a_pytree_that_keeps_its_config(params):
    leaves, structure = jax.tree.flatten(params)
    assert len(leaves) == 20
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert_equal(jax.tree.unflatten(structure, leaves), params)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert isinstance(doubled, Params)
    assert doubled.config == CONFIG
    np.testing.assert_array_equal(
        doubled.encoder["mean"]["kernel"], 2 * params.encoder["mean"]["kernel"]
    )
    other = jax.eval_shape(lambda: jaxvae.init(KEY, ModelConfig((5, 6, 2), 2)))
    assert jax.tree.structure(other) != structure


@of_images
@pytest.mark.parametrize("shape", [(0, 6, 5, 2), (6, 5, 2), (4, 5, 6, 2), (4, 6, 5), (4, 60)])
def test_images_of_another_shape_are_refused(f, shape, params):
    with refused(str(shape), "expected (batch, 6, 5, 2)"):
        f(params, jnp.zeros(shape))


@of_images
@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_images_of_another_type_are_refused(f, dtype, params):
    with refused(np.dtype(dtype).name, "expected uint8"):
        f(params, np.zeros((4, 6, 5, 2), dtype))


@pytest.mark.parametrize("shape", [(0, 2), (2,), (4, 3), (4, 2, 1)])
def test_latents_of_another_shape_are_refused(shape, params):
    with refused(str(shape), "expected (batch, 2)"):
        jaxvae.decode(params, jnp.zeros(shape))


@pytest.mark.parametrize("n", [0, -1])
def test_numbers_of_samples_below_one_are_refused(n, params, images):
    with refused(f"n is {n}: expected at least 1"):
        jaxvae.sample(params, KEY, n)
    with refused(f"num_samples is {n}: expected at least 1"):
        jaxvae.log_likelihood(params, KEY, images, num_samples=n)


def mixed(params):
    """The same parameters, computed with in bfloat16."""
    return replace(params, config=replace(params.config, compute_dtype="bfloat16"))


def test_in_mixed_precision_every_product_is_of_bfloat16s(params, images):
    """Forward and backward."""
    batch = jnp.asarray(images, jnp.float32)

    def loss(params):
        return -jaxvae.elbo(params, KEY, batch).value.mean()

    for model, kind in ((params, jnp.float32), (mixed(params), jnp.bfloat16)):
        products = product_types(jax.make_jaxpr(jax.grad(loss))(model).jaxpr)
        assert len(products) > 20
        assert set(products) == {jnp.dtype(kind)}


def product_types(jaxpr):
    """The types that matrix products and convolutions in a program take."""
    types = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            types += [x.aval.dtype for x in equation.invars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            types += product_types(inner) if hasattr(inner, "eqns") else []
    return types


@every_function
def test_mixed_precision_gives_float32_near_float32s(f, params, images):
    exact, near = f(params, images), f(mixed(params), images)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        assert b.dtype == jnp.float32
        # bfloat16 has 8 significant bits: 2**-8 is 0.4 %.
        np.testing.assert_allclose(b, a, rtol=0.02, atol=0.02)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True)
    )


def test_gradients_in_mixed_precision_are_float32_near_float32s(params):
    """Of large, bright images: sums over their pixels would not fit bfloat16."""
    images = jnp.full((8, 40, 40, 1), 0.9)
    params = jaxvae.init(KEY, ModelConfig(images.shape[1:], 2))

    def loss(params):
        return -jaxvae.elbo(params, KEY, images).value.mean()

    exact, near = jax.grad(loss)(params), jax.grad(loss)(mixed(params))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        assert b.dtype == jnp.float32
        assert 0 < np.linalg.norm(b - a) < 0.1 * np.linalg.norm(a)
