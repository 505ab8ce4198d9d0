"""Priors against SciPy, numerical integration and the moments of their draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate, special, stats

from jaxvae import ModelConfig
from jaxvae.models.distributions import GaussianMixture, UnitGaussian
from jaxvae.models.priors import Mixture, Vamp, pseudo_images

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)


def mixture(components=5, latents=3, log_var=-1.0):
    rng = np.random.default_rng(components)
    logits = rng.normal(size=components)
    mean, log_vars = rng.normal(size=(2, components, latents))
    return GaussianMixture(*map(jnp.float32, (logits, 2 * mean, log_var + log_vars)))


def scipys_log_prob(p, z):
    logits, mean, log_var, z = map(np.float64, (*p, z))
    normal = stats.norm.logpdf(z[..., None, :], mean, np.exp(log_var / 2)).sum(-1)
    return special.logsumexp(special.log_softmax(logits) + normal, axis=-1)


@pytest.mark.parametrize("shape", [(2,), (7, 2), (4, 3, 5)])
def test_standard_normals_log_prob_equals_scipys(shape):
    z = np.random.default_rng(0).normal(scale=3, size=shape).astype("f")
    expected = stats.norm.logpdf(np.float64(z)).sum(-1)
    np.testing.assert_allclose(UnitGaussian(shape[-1]).log_prob(z), expected, rtol=1e-6)


def test_standard_normals_draws_have_its_moments():
    n = 100_000
    z = np.float64(UnitGaussian(2).sample(KEY, n))
    assert z.shape == (n, 2)
    np.testing.assert_allclose(z.mean(0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=5 * np.sqrt(2 / n))
    np.testing.assert_allclose((z**4).mean(0), 3, atol=5 * np.sqrt(96 / n))


@pytest.mark.parametrize("p", [UnitGaussian(3), mixture()], ids=["standard_normal", "mixture"])
def test_priors_go_through_jit(p):
    through = jax.jit(lambda p: p)(p)
    assert type(through) is type(p)
    z = jax.jit(lambda p: p.sample(KEY, 4))(p)
    np.testing.assert_allclose(z, through.sample(KEY, 4), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda p: p.log_prob(z))(p), p.log_prob(z), rtol=1e-6)


@pytest.mark.parametrize(("components", "latents"), [(1, 2), (5, 1), (500, 40)])
@pytest.mark.parametrize("log_var", [0.0, -8.0])
def test_mixtures_log_prob_equals_scipys(components, latents, log_var):
    """Also where components are so narrow that multiplying the square out would show."""
    p = mixture(components, latents, log_var)
    z = np.concatenate([p.sample(KEY, 60), UnitGaussian(latents).sample(KEY, 4)])
    expected = scipys_log_prob(p, z)
    np.testing.assert_allclose(p.log_prob(z), expected, rtol=3e-6, atol=1e-4)


def test_mixture_takes_latents_of_any_leading_shape():
    p, z = mixture(), np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f")
    assert p.log_prob(z[0, 0]).shape == ()
    np.testing.assert_allclose(p.log_prob(z), scipys_log_prob(p, z), rtol=1e-5)


def test_mixture_integrates_to_one():
    p = mixture(latents=2)
    axis = np.linspace(-12, 12, 401, dtype="f")
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    mass = integrate.trapezoid(integrate.trapezoid(np.exp(p.log_prob(grid)), axis), axis)
    np.testing.assert_allclose(mass, 1, atol=1e-4)


def test_mixture_of_one_standard_normal_is_it():
    z = np.random.default_rng(0).normal(size=(6, 3)).astype("f")
    p = GaussianMixture(jnp.ones(1), jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    np.testing.assert_allclose(p.log_prob(z), UnitGaussian(3).log_prob(z), rtol=1e-6)


def test_mixtures_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        p = jax.tree.map(jnp.float64, mixture())
        z = np.random.default_rng(0).normal(size=(4, 3))
        check_grads(jax.jit(GaussianMixture.log_prob), (p, z), order=1)


def test_mixtures_gradients_are_finite_far_from_every_component():
    p, z = mixture(log_var=-8), jnp.full((2, 3), 100.0)
    gradients = jax.grad(lambda p, z: jnp.sum(p.log_prob(z)), argnums=(0, 1))(p, z)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_mixtures_draws_have_its_moments():
    n, p = 100_000, mixture(latents=2)
    z = np.float64(p.sample(KEY, n))
    logits, mean, log_var = map(np.float64, p)
    weights = special.softmax(logits)
    expected = weights @ mean
    second = np.einsum("k,ki,kj->ij", weights, mean, mean) + np.diag(weights @ np.exp(log_var))
    error = 5 * z.std(0) / np.sqrt(n)
    assert np.all(np.abs(z.mean(0) - expected) < error)
    products = z[:, :, None] * z[:, None]
    assert np.all(np.abs(products.mean(0) - second) < 5 * products.std(0) / np.sqrt(n))


def test_mixtures_components_are_drawn_at_their_weights():
    n, weights = 20_000, np.array([0.6, 0.1, 0.3])
    mean = jnp.array([[-100.0], [0.0], [100.0]])
    z = GaussianMixture(jnp.log(weights) + 7, mean, jnp.zeros((3, 1))).sample(KEY, n)
    counts, _ = np.histogram(z, bins=[-150, -50, 50, 150])
    assert counts.sum() == n
    assert stats.chisquare(counts, n * weights).pvalue > 1e-4


@pytest.mark.parametrize("latents", [2, 10])
def test_a_fresh_mixture_is_close_to_the_standard_normal(latents):
    learned = Mixture(500).init(KEY, ModelConfig(latent_dim=latents))
    p, standard = GaussianMixture(**learned), UnitGaussian(latents)
    assert len(np.unique(learned["mean"])) == 500 * latents
    z = standard.sample(jax.random.key(1), 2000)
    divergence = np.mean(standard.log_prob(z) - p.log_prob(z))
    assert -0.02 < divergence < 0.05


@pytest.mark.parametrize("shape", [(28, 28, 1), (5, 6, 3), (1, 1, 1)])
def test_fresh_pseudo_inputs_are_different_images_within_0_and_1(shape):
    learned = Vamp(50).init(KEY, ModelConfig(shape))
    images = np.asarray(pseudo_images(learned))
    assert images.shape == (50, *shape)
    assert images.dtype == np.float32
    assert np.all((images > 0) & (images < 1))
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    slope = jax.grad(lambda learned: jnp.sum(pseudo_images(learned)))(learned)
    assert all(np.all(g > 0) for g in jax.tree.leaves(slope))


def test_fresh_pseudo_inputs_are_smooth():
    images = pseudo_images(Vamp(50).init(KEY, ModelConfig((28, 28, 1))))
    across = np.diff(images, axis=2)
    assert across.std() < 0.6 * np.std(images)
    assert 0.1 < np.mean(images) < 0.5
