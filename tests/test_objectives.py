"""The estimators against models whose log p(x) is known, and their gradients."""

import inspect
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

from jaxvae import InputError, ModelConfig, decode, elbo, encode, init, objectives
from jaxvae.distributions import Gaussian
from jaxvae.objectives import Elbo, example_keys, log_likelihood, negative_elbo

KEY = jax.random.key(7)
NOISE = 0.5
BIAS = np.linspace(-1, 1, 6)
# Orthogonal columns make the exact posterior's covariance diagonal.
LOADINGS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [1.5, 0.7]
PRECISION = 1 + np.sum(LOADINGS**2, axis=0) / NOISE**2


@dataclass
class LinearPixels:
    """p(x|z) = N(LOADINGS z + BIAS, NOISE^2) over images of (2, 3, 1)."""

    z: jax.Array

    def log_prob(self, images):
        error = images.reshape(len(images), 6) - self.z @ LOADINGS.T.astype("f") - BIAS.astype("f")
        return jnp.sum(-0.5 * (error / NOISE) ** 2 - np.log(NOISE * np.sqrt(2 * np.pi)), axis=-1)


def exact_posterior(images):
    centred = images.reshape(len(images), 6) - BIAS.astype("f")
    mean = centred @ (LOADINGS / (NOISE**2 * PRECISION)).astype("f")
    return Gaussian(mean, jnp.broadcast_to(-np.log(PRECISION).astype("f"), mean.shape))


def wrong_posterior(images):
    mean, log_var = exact_posterior(images)
    return Gaussian(mean + 0.3, log_var + 1)


def exact_log_p(images):
    x = stats.multivariate_normal(BIAS, LOADINGS @ LOADINGS.T + NOISE**2 * np.eye(6))
    return x.logpdf(np.reshape(images, (len(images), 6)))


def observations(n):
    return np.random.default_rng(1).normal(size=(n, 2, 3, 1)).astype("f")


def per_key(monkeypatch, posterior, estimate):
    """`estimate(params, key, images)` on the linear model, over [N] keys: [N, batch]."""
    monkeypatch.setattr(objectives, "encode", lambda params, images: posterior(images))
    monkeypatch.setattr(objectives, "decode", lambda params, z: LinearPixels(z))
    over_keys = jax.vmap(partial(estimate, None), (0, None))
    return lambda keys, images: np.float64(jax.jit(over_keys)(keys, jnp.asarray(images)))


# What is under a jit: its cache does not know that encode and decode were replaced.
def weighted(num_samples):
    return partial(inspect.unwrap(log_likelihood), num_samples=num_samples)


def bound(*args):
    return inspect.unwrap(elbo)(*args).value


@pytest.fixture(scope="module")
def params():
    """Random weights and biases, the decoder's large enough that images tell latents apart."""
    rng = np.random.default_rng(2)
    params = init(jax.random.key(0), ModelConfig((6, 5, 2), 2))
    decoder = jax.tree.map(lambda x: 2 * x, params.decoder)
    return jax.tree.map(
        lambda x: x if x.ndim > 1 else jnp.float32(0.1 * rng.normal(size=x.shape)),
        replace(params, decoder=decoder),
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).uniform(size=(7, 6, 5, 2)).astype("f")


@pytest.fixture(scope="module")
def terms(params, images):
    return jax.jit(elbo)(params, KEY, images)


def test_the_elbo_is_the_log_likelihood_less_the_kl(terms):
    assert isinstance(terms, Elbo)
    assert all(field.shape == (7,) and field.dtype == jnp.float32 for field in terms)
    np.testing.assert_allclose(terms.value, terms.log_likelihood - terms.kl, rtol=1e-6)


def test_the_loss_is_the_negative_elbo(params, images, terms):
    loss, same = jax.jit(negative_elbo)(params, KEY, images)
    np.testing.assert_allclose(loss, -terms.value, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), same, terms)


def test_the_elbos_terms_are_the_networks_at_a_posterior_draw(params, images, terms):
    mean, log_var = map(np.float64, jax.jit(encode)(params, images))
    eps = jax.vmap(lambda key: jax.random.normal(key, (2,)))(example_keys(KEY, 7))
    z = jnp.float32(mean + np.exp(log_var / 2) * eps)
    logits = np.float64(jax.jit(decode)(params, z).logits)
    pixels = images * special.log_expit(logits) + (1 - images) * special.log_expit(-logits)
    kl = 0.5 * np.sum(mean**2 + np.exp(log_var) - 1 - log_var, axis=-1)
    np.testing.assert_allclose(terms.log_likelihood, pixels.sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(terms.kl, kl, rtol=1e-4)


@pytest.mark.parametrize(
    "objective",
    [elbo, partial(log_likelihood, num_samples=1030)],
    ids=["elbo", "log_likelihood"],
)
def test_gradients_equal_central_differences(objective, params, images):
    with jax.enable_x64(True):
        params, images = jax.tree.map(jnp.float64, (params, images[:1]))
        flat, unravel = ravel_pytree(params)

        @jax.jit
        @jax.value_and_grad
        def value_and_gradient(flat):
            return jnp.sum(jax.tree.leaves(objective(unravel(flat), KEY, images))[0])

        _, gradient = value_and_gradient(flat)
        assert gradient.dtype == jnp.float64
        step = 1e-8
        for direction in np.random.default_rng(4).normal(size=(2, flat.size)):
            above, _ = value_and_gradient(flat + step * direction)
            below, _ = value_and_gradient(flat - step * direction)
            slope = (above - below) / (2 * step)
            np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-5)


@pytest.mark.parametrize("estimate", [elbo, log_likelihood])
def test_an_images_noise_is_its_keys_whatever_the_batch(estimate, params, images):
    def values(key, images):
        return jax.tree.leaves(estimate(params, key, images))

    if estimate is log_likelihood:
        estimate = partial(log_likelihood, num_samples=3)
    estimate = jax.jit(estimate)
    keys, whole = example_keys(KEY, 7), values(KEY, images)
    for a, b in zip(values(keys[3:5], images[3:5]), whole, strict=True):
        np.testing.assert_allclose(a, b[3:5], rtol=1e-4)
    assert not np.any(np.isclose(values(keys[:2], images[3:5])[0], whole[0][3:5], rtol=1e-4))


def test_example_keys_go_by_the_examples_index():
    data = jax.random.key_data
    keys = example_keys(KEY, 7)
    assert len(np.unique(data(keys), axis=0)) == 7
    np.testing.assert_array_equal(data(example_keys(KEY, 3, 4)), data(keys[4:]))
    np.testing.assert_array_equal(data(example_keys(keys, 7)), data(keys))
    np.testing.assert_array_equal(data(example_keys(data(keys), 7)), data(keys))
    np.testing.assert_array_equal(data(example_keys(data(KEY), 7)), data(keys))


def test_another_number_of_keys_than_images_is_refused(params, images):
    for estimate in elbo, log_likelihood:
        with pytest.raises(InputError) as error:
            estimate(params, jax.random.split(KEY, 6), images)
        assert str(error.value) == "there are (6,) keys: expected one, or one for each of 7"


def test_the_elbo_of_the_exact_posterior_has_expectation_log_p(monkeypatch):
    images = observations(3)
    values = per_key(monkeypatch, exact_posterior, bound)(jax.random.split(KEY, 20_000), images)
    error = values.std(0) / np.sqrt(len(values))
    assert np.all(error < 0.02)
    assert np.all(np.abs(values.mean(0) - exact_log_p(images)) < 4 * error)


def test_the_elbo_falls_short_of_log_p_by_the_kl_to_the_exact_posterior(monkeypatch):
    images = observations(3)
    values = per_key(monkeypatch, wrong_posterior, bound)(jax.random.split(KEY, 20_000), images)
    gap = 0.5 * np.sum(np.e - 2 + 0.3**2 * PRECISION)
    error = values.std(0) / np.sqrt(len(values))
    assert np.all(error < 0.03 * gap)
    assert np.all(np.abs(values.mean(0) - exact_log_p(images) + gap) < 4 * error)


@pytest.mark.parametrize("num_samples", [1, 7, 1500])
def test_importance_weights_of_the_exact_posterior_are_all_log_p(monkeypatch, num_samples):
    images = observations(3)
    values = per_key(monkeypatch, exact_posterior, weighted(num_samples))(
        jax.random.split(KEY, 10), images
    )
    np.testing.assert_allclose(
        values, np.broadcast_to(exact_log_p(images), values.shape), rtol=1e-5, atol=1e-5
    )


def test_the_importance_weighted_bound_grows_to_log_p(monkeypatch):
    images = observations(2)
    keys = jax.random.split(KEY, 4000)
    below = {
        k: exact_log_p(images) - per_key(monkeypatch, wrong_posterior, weighted(k))(keys, images)
        for k in (1, 3, 10)
    }
    gaps = [gap.mean(0) for gap in below.values()]
    errors = [gap.std(0) / np.sqrt(len(keys)) for gap in below.values()]
    assert np.all(np.abs(gaps[0] - 0.5 * np.sum(np.e - 2 + 0.09 * PRECISION)) < 4 * errors[0])
    assert np.all(gaps[2] > 4 * errors[2])
    for k in 0, 1:
        assert np.all(gaps[k + 1] < gaps[k] - 4 * errors[k])
    last = per_key(monkeypatch, wrong_posterior, weighted(5000))(keys[:20], images)
    np.testing.assert_allclose(last, np.tile(exact_log_p(images), (20, 1)), atol=0.1)
    np.testing.assert_allclose(last.mean(0), exact_log_p(images), atol=0.02)


@pytest.mark.parametrize("num_samples", [1, 7, 1500])
def test_the_importance_weighted_bound_does_not_depend_on_chunks(monkeypatch, num_samples):
    images = observations(300)
    keys = example_keys(KEY, 300)
    values = per_key(monkeypatch, wrong_posterior, weighted(num_samples))
    whole = values(keys[None], images)[0]
    alone = values(keys[None, 2:3], images[2:3])[0]
    np.testing.assert_allclose(alone, whole[2:3], rtol=1e-5, atol=1e-5)


def test_the_importance_weighted_bound_reaches_the_integral_over_the_latents(params, images):
    side = np.linspace(-6, 6, 121)
    z = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    logits = np.float64(jax.jit(decode)(params, jnp.float32(z)).logits).reshape(len(z), 1, 60)
    x = images[:3].reshape(3, 60)
    log_p_x = np.sum(x * special.log_expit(logits) + (1 - x) * special.log_expit(-logits), axis=-1)
    log_p_z = stats.norm.logpdf(z).sum(-1)[:, None]
    log_p = special.logsumexp(log_p_x + log_p_z + 2 * np.log(side[1] - side[0]), axis=0)
    assert np.std(log_p_x, axis=0).min() > 0.5
    np.testing.assert_allclose(log_likelihood(params, KEY, images[:3], 10_000), log_p, atol=0.03)


def test_log_likelihood_takes_5000_samples_unless_told():
    assert inspect.signature(log_likelihood).parameters["num_samples"].default == 5000
