"""The flow prior against Jacobians, its own inverse, numerical integration and its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate, stats

from jaxvae import ModelConfig
from jaxvae.models.coupling import CouplingFlow, RealNVP, masks
from jaxvae.models.distributions import UnitGaussian

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)


def flow(latents=3, layers=4, hidden=16, scale=0.5, dtype=np.float32):
    """A flow none of whose parameters is 0."""
    learned = RealNVP(layers, hidden).init(KEY, ModelConfig(latent_dim=latents))
    rng = np.random.default_rng(latents)
    moved = {k: dtype(x + scale * rng.normal(size=x.shape) / np.sqrt(x.shape[1])) for k, x in
             learned.items()}  # fmt: skip
    return CouplingFlow(jax.tree.map(jnp.asarray, moved))


@pytest.mark.parametrize("latents", [1, 2, 5, 40])
def test_a_new_flow_is_the_standard_normal(latents):
    learned = RealNVP().init(KEY, ModelConfig(latent_dim=latents))
    z = jax.random.normal(KEY, (7, latents))
    np.testing.assert_array_equal(
        CouplingFlow(learned).log_prob(z), UnitGaussian(latents).log_prob(z)
    )
    np.testing.assert_array_equal(
        CouplingFlow(learned).sample(KEY, 3), UnitGaussian(latents).sample(KEY, 3)
    )


@pytest.mark.parametrize("latents", [1, 2, 3, 8])
def test_a_draws_density_is_that_of_its_noise_by_the_jacobian(latents):
    """log p(f(eps)) = log N(eps; 0, I) - log |det df / deps|, with f read off `sample`."""
    p = flow(latents)
    eps = jax.random.normal(KEY, (1, latents), jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        noise = []
        patch.setattr(UnitGaussian, "sample", lambda self, key, n: noise[-1][None])

        def f(eps):
            noise.append(eps)
            return p.sample(KEY, 1)[0]

        z = f(eps[0])
        _, log_det = np.linalg.slogdet(np.float64(jax.jacrev(f)(eps[0])))
    expected = UnitGaussian(latents).log_prob(eps)[0] - log_det
    np.testing.assert_allclose(p.log_prob(z), expected, rtol=1e-4)
    assert abs(log_det) > 1e-3  # of a flow that does something


def test_the_density_integrates_to_one_in_two_dimensions():
    p = flow(2)
    side = np.linspace(-12, 12, 601)
    z = np.stack(np.meshgrid(side, side), axis=-1).astype("f")
    density = np.exp(np.float64(jax.jit(p.log_prob)(z)))
    total = integrate.trapezoid(integrate.trapezoid(density, side), side)
    np.testing.assert_allclose(total, 1, atol=1e-3)


def test_draws_have_the_density():
    """Probabilities of the quadrants, by draws and by the integral of the density."""
    p, n = flow(2, scale=1.0), 40_000
    z = np.asarray(p.sample(KEY, n))
    side = np.linspace(-16, 16, 801)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).astype("f")
    density = np.exp(np.float64(jax.jit(p.log_prob)(grid)))
    for first in (side <= 0, side >= 0):
        for second in (side <= 0, side >= 0):
            part = density[np.ix_(first, second)]
            mass = integrate.trapezoid(integrate.trapezoid(part, side[second], axis=1), side[first])
            inside = np.isin(np.sign(z[:, 0]), np.sign(side[first])) & np.isin(
                np.sign(z[:, 1]), np.sign(side[second])
            )
            assert stats.binomtest(int(inside.sum()), n, min(mass, 1)).pvalue > 1e-4


def test_any_two_latents_are_kept_and_changed_apart():
    """With 2 ceil(log2(latent_dim)) layers."""
    for layers, latents in ((6, 5), (8, 16), (12, 40)):
        kept = masks(layers, latents)
        assert kept.shape == (layers, latents)
        apart = np.any(kept[:, :, None] & ~kept[:, None, :], axis=0)
        np.testing.assert_array_equal(apart, ~np.eye(latents, dtype=bool))
    np.testing.assert_array_equal(masks(2, 1), [[True], [False]])


@pytest.mark.parametrize("of", ["log_prob", "sample"])
def test_gradients_equal_finite_differences(of):
    with jax.enable_x64(True):
        p = flow(3, layers=3, hidden=8, dtype=np.float64)
        z = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
        if of == "log_prob":
            check_grads(lambda p, z: p.log_prob(z), (p, z), order=1, modes=["fwd", "rev"])
        else:
            check_grads(lambda p: p.sample(KEY, 4), (p,), order=1, modes=["fwd", "rev"])


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="layers is 0: expected at least 1"):
        ModelConfig(prior="realnvp:layers=0")
