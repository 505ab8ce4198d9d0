"""Distributions against numerical integration, SciPy and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from scipy import integrate, special, stats

from jaxvae import reparameterize
from jaxvae.distributions import Bernoulli, Gaussian

GAUSSIANS = [(0.0, 0.0), (1.5, 0.0), (0.0, 2.0), (-3.0, -4.0), (0.3, 1.2), (6.0, -8.0), (0.1, 0.2)]


def integrated_kl(mean, log_var):
    q = stats.norm(mean, np.exp(log_var / 2))
    value, _ = integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)),
        mean - 12 * q.std(),
        mean + 12 * q.std(),
        epsabs=1e-10,
    )
    return value


def gaussian(seed=0, shape=(4, 3)):
    mean, log_var = np.random.default_rng(seed).normal(size=(2, *shape)).astype("f")
    return mean, log_var


def cross_entropy(logits, x):
    logits, x = np.float64(logits), np.float64(x)
    losses = -x * special.log_expit(logits) - (1 - x) * special.log_expit(-logits)
    return losses.reshape(len(x), -1).sum(1)


@pytest.mark.parametrize(("mean", "log_var"), GAUSSIANS)
def test_kl_equals_numerical_integration(mean, log_var):
    kl = Gaussian(jnp.array([[mean]]), jnp.array([[log_var]])).kl()
    np.testing.assert_allclose(kl, [integrated_kl(mean, log_var)], rtol=1e-5, atol=1e-6)


def test_kl_sums_over_latents():
    mean, log_var = gaussian()
    expected = np.vectorize(integrated_kl)(mean, log_var).sum(-1)
    np.testing.assert_allclose(Gaussian(mean, log_var).kl(), expected, rtol=1e-5)


def test_gaussian_log_prob_equals_scipys():
    mean, log_var = gaussian()
    z = np.random.default_rng(1).normal(scale=3, size=mean.shape).astype("f")
    expected = stats.norm.logpdf(z, mean, np.exp(log_var / 2)).sum(-1)
    np.testing.assert_allclose(Gaussian(mean, log_var).log_prob(z), expected, rtol=1e-5)


def test_reparameterize_is_mean_plus_exp_of_half_log_var_times_eps():
    key, (mean, log_var) = jax.random.key(3), gaussian()
    eps = jax.random.normal(key, mean.shape)
    z = reparameterize(key, mean, log_var)
    np.testing.assert_allclose(z, mean + np.exp(log_var / 2) * eps, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(reparameterize(key, mean, 0 * log_var), mean + eps)
    np.testing.assert_array_equal(Gaussian(mean, log_var).sample(key), z)


def test_reparameterized_draws_have_the_gaussians_moments():
    n, mean, log_var = 100_000, np.float32([-2, 0.5]), np.float32([-1, 1.2])
    shape = (n, 2)
    z = reparameterize(
        jax.random.key(0), jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_var, shape)
    )
    standard = (np.float64(z) - mean) / np.exp(log_var / 2)
    np.testing.assert_allclose(standard.mean(0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(standard.T), np.eye(2), atol=5 * np.sqrt(2 / n))
    np.testing.assert_allclose((standard**4).mean(0), 3, atol=5 * np.sqrt(96 / n))


def test_reparameterize_is_differentiable_in_mean_and_log_var():
    key, (mean, log_var) = jax.random.key(3), gaussian()
    weights, _ = gaussian(1)
    z = reparameterize(key, mean, log_var)
    to_mean, to_log_var = jax.grad(
        lambda m, v: jnp.sum(weights * reparameterize(key, m, v)), argnums=(0, 1)
    )(mean, log_var)
    np.testing.assert_allclose(to_mean, weights, rtol=1e-6)
    np.testing.assert_allclose(to_log_var, weights * (z - mean) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_bernoulli_log_prob_is_the_negative_cross_entropy(scale):
    rng = np.random.default_rng(scale)
    logits = rng.uniform(-scale, scale, (5, 4, 3, 2)).astype("f")
    for x in rng.uniform(size=logits.shape), rng.integers(0, 2, logits.shape):
        log_prob = Bernoulli(jnp.asarray(logits)).log_prob(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(log_prob, -cross_entropy(logits, x), rtol=1e-5)


def test_bernoulli_log_prob_of_saturated_pixels_is_exact():
    logits, x = np.array(
        [(logit, x) for logit in (-1e4, -100, 100, 1e4) for x in (0, 0.25, 1)], np.float32
    ).T.reshape(2, -1, 1, 1, 1)
    log_prob = Bernoulli(jnp.asarray(logits)).log_prob(x)
    np.testing.assert_allclose(log_prob, -cross_entropy(logits, x), rtol=1e-6, atol=1e-30)
    slope = jax.grad(lambda logits: Bernoulli(logits).log_prob(x).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(slope, x - special.expit(np.float64(logits)), atol=1e-6)


def test_bernoulli_mean_is_the_sigmoid_of_the_logits():
    logits = np.linspace(-12, 12, 24, dtype="f").reshape(2, 3, 4, 1)
    mean = Bernoulli(jnp.asarray(logits)).mean
    np.testing.assert_allclose(mean, special.expit(np.float64(logits)), rtol=1e-5)


def test_bernoulli_samples_are_black_or_white_at_the_means_rate():
    n, logits = 20_000, jnp.array([-2.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    samples = Bernoulli(jnp.broadcast_to(logits, (n, 3, 1, 1))).sample(jax.random.key(0))
    assert samples.dtype == jnp.float32
    assert set(np.unique(samples)) == {0, 1}
    rate = special.expit(np.ravel(logits))
    np.testing.assert_allclose(samples.mean((0, 2, 3)), rate, atol=2.5 / np.sqrt(n))


def test_uint8_images_count_as_their_255ths():
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    p_x = Bernoulli(jax.random.normal(jax.random.key(0), levels.shape))
    expected = -cross_entropy(p_x.logits, np.float64(levels) / 255)
    np.testing.assert_allclose(p_x.log_prob(levels), expected, rtol=1e-5)
    np.testing.assert_array_equal(p_x.log_prob(levels), p_x.log_prob(np.float32(levels) / 255))


def test_boolean_images_count_as_black_and_white():
    x = np.random.default_rng(0).integers(0, 2, (3, 4, 4, 1))
    p_x = Bernoulli(jax.random.normal(jax.random.key(0), x.shape))
    np.testing.assert_allclose(p_x.log_prob(x > 0), -cross_entropy(p_x.logits, x), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 4, 4), (3, 4, 5, 1), (3, 4, 4, 3)])
def test_images_of_another_shape_than_the_logits_are_refused(shape):
    with refused(str(shape), "expected the decoder's (3, 4, 4, 1)"):
        Bernoulli(jnp.zeros((3, 4, 4, 1))).log_prob(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint16, np.complex64])
def test_images_of_another_type_are_refused(dtype):
    with refused(np.dtype(dtype).name, "expected uint8, or floats between 0 and 1"):
        Bernoulli(jnp.zeros((3, 4, 4, 1))).log_prob(np.zeros((3, 4, 4, 1), dtype))
