"""Marginals of the priors and the KL divergence to each of them, against SciPy and sampling.

Densities and draws of the mixture are in test_priors.py, those of the Gaussian beside the pixels'
in test_likelihoods.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxvae.models.distributions import Gaussian, GaussianMixture, UnitGaussian

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)


def gaussian(batch=6, latents=3):
    mean, log_var = np.random.default_rng(0).normal(size=(2, batch, latents)).astype("f")
    return Gaussian(jnp.asarray(mean), jnp.asarray(log_var))


def mixture(components=4, latents=3):
    rng = np.random.default_rng(1)
    fields = rng.normal(size=components), *rng.normal(size=(2, components, latents))
    return GaussianMixture(*map(jnp.float32, fields))


@pytest.mark.parametrize("latent", [0, 2])
def test_a_marginal_of_a_mixture_is_of_one_latent_alone(latent):
    p, z = mixture(), np.linspace(-4, 4, 9, dtype="f")[:, None]
    logits, mean, log_var = map(np.float64, p)
    each = stats.norm.logpdf(z, mean[:, latent], np.exp(log_var[:, latent] / 2))
    expected = special.logsumexp(special.log_softmax(logits) + each, axis=-1)
    np.testing.assert_allclose(p.marginal(latent).log_prob(z), expected, rtol=1e-5, atol=1e-6)
    draws = p.marginal(latent).sample(KEY, 5)
    assert draws.shape == (5, 1)


def test_a_marginal_of_the_standard_normal_is_standard_normal():
    assert UnitGaussian(5).marginal(3) == UnitGaussian(1)


def test_a_marginal_is_the_joint_density_integrated_over_the_other_latents():
    p, axis = mixture(latents=2), np.linspace(-9, 9, 2001, dtype="f")
    z_0 = np.full_like(axis, 0.3)
    joint = np.exp(p.log_prob(np.stack([z_0, axis], axis=-1)))
    expected = np.exp(p.marginal(0).log_prob(np.float32([[0.3]])))
    np.testing.assert_allclose(np.trapezoid(joint, axis), expected[0], rtol=1e-4)


def test_the_kl_is_exact_to_the_standard_normal_and_unknown_to_a_mixture():
    q = gaussian()
    exact = q.kl(UnitGaussian(3))
    np.testing.assert_array_equal(exact, q.kl())
    np.testing.assert_allclose(exact, q.kl_per_latent().sum(-1), rtol=1e-6)
    mean, log_var = map(np.float64, q)
    expected = 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=-1)
    np.testing.assert_allclose(exact, expected, rtol=1e-5)
    assert q.kl(mixture()) is None


def test_the_kl_is_the_mean_of_the_log_ratio_at_draws():
    n = 50_000
    one = gaussian(1)
    q = Gaussian(*(jnp.broadcast_to(x, (n, 3)) for x in one))
    z, log_q = q.sample_and_log_prob(jax.random.split(KEY, n))
    ratio = np.float64(log_q - UnitGaussian(3).log_prob(z))
    assert abs(ratio.mean() - one.kl()[0]) < 5 * ratio.std() / np.sqrt(n)
    np.testing.assert_allclose(log_q, q.log_prob(z), rtol=1e-6)
    np.testing.assert_allclose(log_q, q.log_prob_per_latent(z).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("log_var", [-160.0, -90.0, 170.0])
def test_the_density_of_an_extreme_variance_is_finite(log_var):
    """At the mean and one standard deviation away: exp(-log_var) is not a float32."""
    p = Gaussian(jnp.zeros(2), jnp.full(2, log_var))
    z = jnp.array([0, np.exp(np.float32(log_var / 2))])
    expected = -0.5 * (np.log(2 * np.pi) + log_var + np.array([0, 1]))
    np.testing.assert_allclose(p.log_prob_per_latent(z), expected, rtol=1e-5)


def test_a_rows_draw_is_its_keys_whatever_the_batch():
    q, keys = gaussian(), jax.random.split(KEY, 6)
    z, log_q = q.sample_and_log_prob(keys)
    rows = np.array([4, 0])
    some, some_log_q = Gaussian(q.mean[rows], q.log_var[rows]).sample_and_log_prob(keys[rows])
    np.testing.assert_allclose(some, z[rows], rtol=1e-6)
    np.testing.assert_allclose(some_log_q, log_q[rows], rtol=1e-5)
    assert q.center is q.mean


@pytest.mark.parametrize(
    "p", [UnitGaussian(3), mixture(), gaussian()], ids=["standard normal", "mixture", "Gaussian"]
)
def test_distributions_are_pytrees(p):
    through = jax.jit(lambda p: p)(p)
    assert type(through) is type(p)
    assert jax.tree.structure(through) == jax.tree.structure(p)
    z = jax.random.normal(KEY, (6, 3))
    np.testing.assert_allclose(jax.jit(lambda p, z: p.log_prob(z))(p, z), p.log_prob(z), rtol=1e-5)


def test_components_and_their_weights_make_up_the_distribution():
    p, n = mixture(), 20_000
    np.testing.assert_allclose(p.weights, special.softmax(np.float64(p.logits)), rtol=1e-6)
    for k in range(len(p.weights)):
        draws = jax.vmap(p.sample_component, (0, None))(jax.random.split(KEY, n), k)
        assert draws.shape == (n, 3)
        error = (np.float64(draws) - p.mean[k]) / np.exp(np.float64(p.log_var[k]) / 2)
        np.testing.assert_allclose(error.mean(0), 0, atol=5 / np.sqrt(n))
        np.testing.assert_allclose(error.var(0), 1, atol=5 * np.sqrt(2 / n))
    normal = UnitGaussian(3)
    np.testing.assert_array_equal(normal.weights, [1])
    np.testing.assert_array_equal(normal.sample_component(KEY, 0), normal.sample(KEY, 1)[0])
