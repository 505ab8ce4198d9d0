"""Priors against scipy and numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxvae.priors import (
    Mixture,
    StandardNormal,
    init_mixture,
    init_pseudo_inputs,
    like_images,
    pseudo_images,
)


def mixture(components, latent, log_var=0.0):
    rng = np.random.default_rng(0)
    return Mixture(
        jnp.float32(rng.normal(size=components)),
        jnp.float32(rng.normal(size=(components, latent))),
        jnp.float32(log_var + 0.5 * rng.normal(size=(components, latent))),
    )


def by_scipy(p_z, z):
    """log sum_k w_k N(z; mean_k, var_k), in float64."""
    logits, mean, log_var = map(np.float64, p_z)
    log_p = stats.norm.logpdf(np.float64(z)[..., None, :], mean, np.exp(log_var / 2)).sum(-1)
    return special.logsumexp(special.log_softmax(logits) + log_p, axis=-1)


def test_the_standard_normal_is_scipys():
    z = np.random.default_rng(1).normal(size=(3, 5, 4)).astype("f")
    expected = stats.norm.logpdf(np.float64(z)).sum(-1)
    np.testing.assert_allclose(StandardNormal(4).log_prob(jnp.asarray(z)), expected, rtol=1e-5)


def test_the_standard_normals_draws_are_jaxs():
    key = jax.random.key(0)
    np.testing.assert_array_equal(StandardNormal(3).sample(key, 7), jax.random.normal(key, (7, 3)))


@pytest.mark.parametrize(("components", "latent"), [(1, 1), (3, 2), (50, 20)])
def test_a_mixtures_density_is_scipys(components, latent):
    p_z = mixture(components, latent)
    z = np.random.default_rng(1).normal(size=(4, 6, latent)).astype("f")
    np.testing.assert_allclose(p_z.log_prob(jnp.asarray(z)), by_scipy(p_z, z), rtol=1e-5, atol=1e-5)


def test_narrow_components_keep_their_digits():
    p_z = mixture(20, 40, log_var=-8.0)
    z = np.float32(p_z.mean[:5] + 0.02 * np.random.default_rng(1).normal(size=(5, 40)))
    np.testing.assert_allclose(p_z.log_prob(jnp.asarray(z)), by_scipy(p_z, z), atol=2e-3)


def test_a_mixture_integrates_to_one():
    side = np.linspace(-8, 8, 401)
    z = np.stack(np.meshgrid(side, side), axis=-1).astype("f")
    density = np.exp(np.float64(mixture(3, 2).log_prob(jnp.asarray(z))))
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=1e-4)


def test_a_mixtures_draws_have_its_moments():
    p_z = mixture(3, 2)
    weights = np.exp(special.log_softmax(np.float64(p_z.logits)))
    mean = weights @ p_z.mean
    second = weights @ (np.square(p_z.mean) + np.exp(p_z.log_var))
    z = np.float64(p_z.sample(jax.random.key(0), 100_000))
    error = z.std(0) / np.sqrt(len(z))
    assert np.all(np.abs(z.mean(0) - mean) < 4 * error)
    np.testing.assert_allclose((z**2).mean(0), second, rtol=0.03)


def test_a_mixtures_gradient_is_the_finite_difference():
    with jax.enable_x64(True):
        p_z = Mixture(*map(jnp.float64, mixture(4, 3)))
        z = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))

        def total(p_z, z):
            return jnp.sum(p_z.log_prob(z))

        slopes = jax.grad(total, (0, 1))(p_z, z)
        rng = np.random.default_rng(2)
        ahead = jax.tree.map(lambda x: 1e-6 * rng.normal(size=x.shape), (p_z, z))
        above = total(*jax.tree.map(jnp.add, (p_z, z), ahead))
        below = total(*jax.tree.map(jnp.subtract, (p_z, z), ahead))
        expected = sum(
            jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (slopes, ahead)), strict=True)
        )
        np.testing.assert_allclose((above - below) / 2, expected, rtol=1e-6)


def test_a_fresh_mixture_is_near_the_standard_normal():
    p_z = Mixture(**init_mixture(jax.random.key(0), 200, 3))
    z = jnp.asarray(np.random.default_rng(1).normal(size=(100, 3)), jnp.float32)
    gap = p_z.log_prob(z) - StandardNormal(3).log_prob(z)
    assert np.abs(gap).max() < 0.5
    assert np.std(p_z.mean) > 0.2  # or all components would stay one


def test_pseudo_inputs_are_the_images_they_start_from():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 2), np.uint8)
    learned = like_images(jnp.asarray(images))
    fresh = init_pseudo_inputs(jax.random.key(0), 5, (4, 3, 2))
    assert jax.tree.map(jnp.shape, learned) == jax.tree.map(jnp.shape, fresh)
    assert np.all(np.isfinite(learned["pseudo_inputs"]))
    np.testing.assert_allclose(pseudo_images(learned), (images / 255).clip(0.02, 0.98), atol=1e-6)
    assert np.all((pseudo_images(fresh) > 0) & (pseudo_images(fresh) < 1))
