"""The autoregressive prior over codes: its order, its probabilities and its samples."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import refused
from jax.test_util import check_grads

from jaxvae import ModelConfig
from jaxvae.models.autoregressive import Autoregressive, AutoregressiveCodes, CausalTransformer
from jaxvae.models.codebooks import Grid, UniformCodes

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
N, K = 3, 4


def prior(n=N, moved=0.5, layers=1, dtype=jnp.float32):
    """A prior over n codes of a grid with K points, with random weights."""
    network = CausalTransformer(n, K, width=8, layers=layers)
    weights = network.init(KEY, jnp.zeros((1, n, K)), jnp.arange(n))["params"]
    leaves, structure = jax.tree.flatten(weights)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(x + moved * rng.normal(size=x.shape), dtype) for x in leaves]
    return AutoregressiveCodes(jax.tree.unflatten(structure, leaves), Grid((2, 2)), network)


def test_a_code_depends_on_all_codes_before_it_and_on_no_other():
    p = prior(n=4, layers=2)
    codes = jax.random.uniform(KEY, (1, 4, K))
    slope = jax.jacobian(lambda codes: p.logits(codes)[0])(codes)[:, :, 0]  # [n, K, n, K]
    depends = np.any(np.asarray(slope) != 0, axis=(1, 3))
    np.testing.assert_array_equal(depends, np.tril(np.ones((4, 4), bool), -1))


def test_probabilities_sum_to_one_and_samples_have_them():
    p = prior()
    every = jnp.array(list(product(range(K), repeat=N)))
    expected = np.exp(np.float64(jax.jit(lambda p, z: p.log_prob(z))(p, p.book.embed(every))))
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert expected.max() > 4 * expected.min()
    draws = 20_000
    codes = p.book.codes(jax.jit(lambda p: p.sample(KEY, draws))(p))
    found = np.bincount(codes @ np.array([K * K, K, 1]), minlength=K**N) / draws
    assert np.max(np.abs(found - expected) / np.sqrt(expected / draws)) < 4.5


def test_the_log_probability_is_that_of_the_chain_rule():
    p = prior()
    codes = np.random.default_rng(1).integers(0, K, (5, N))
    log_p = jax.nn.log_softmax(p.logits(jax.nn.one_hot(codes, K)))
    expected = np.take_along_axis(np.asarray(log_p), codes[..., None], axis=-1).sum((1, 2))
    z = p.book.embed(jnp.asarray(codes)).reshape(5, 1, -1)
    np.testing.assert_allclose(p.log_prob(z), expected[:, None], rtol=1e-6)
    np.testing.assert_allclose(p.log_prob(z[0, 0]), expected[0], rtol=1e-5)


def test_it_starts_as_the_uniform_distribution():
    config = ModelConfig((8, 8, 1), 4, posterior="fsq:levels=2x2", prior="autoregressive:width=8")
    network = CausalTransformer(2, K, 8, 3)
    p = AutoregressiveCodes(Autoregressive(8).init(KEY, config), Grid((2, 2)), network)
    z = p.sample(KEY, 5)
    uniform = UniformCodes(p.book, 2).log_prob(z)
    np.testing.assert_allclose(p.log_prob(z), uniform, rtol=1e-6)
    np.testing.assert_allclose(uniform, -2 * np.log(K), rtol=1e-6)


def test_it_learns_a_dependence_between_codes():
    """Of two equal codes only the first has entropy: log K nats."""
    p, optimizer = prior(n=2, moved=0.05), optax.adam(0.02)
    z = p.book.embed(jnp.repeat(jnp.arange(K), 2).reshape(K, 2))

    def loss(p):
        return -jnp.mean(p.log_prob(z))

    def step(carry, _):
        p, state = carry
        value, slope = jax.value_and_grad(loss)(p)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(p, updates), state), value

    _, values = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=150))(p)
    assert values[0] > 2.5
    assert values[-1] == pytest.approx(np.log(K), abs=0.1)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        p = prior(dtype=jnp.float64)
        z = p.book.embed(jnp.arange(6).reshape(2, N) % K).astype(jnp.float64)

        def log_p(weights):
            return AutoregressiveCodes(weights, p.book, p.network).log_prob(z)

        check_grads(jax.jit(log_p), (p.weights,), order=1, modes=["rev"])


def test_a_wrong_option_is_refused():
    with refused("width is 6: expected a multiple of 4"):
        Autoregressive(width=6)
    with refused("layers is 0: expected at least 1"):
        Autoregressive(layers=0)
