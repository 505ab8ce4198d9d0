"""Annealed importance sampling against closed forms and integrals over the latents.

The closed forms are those of probabilistic PCA, p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I):

    p(x) = N(b, W W^T + s^2 I),    p(z|x) = N(M^-1 W^T (x - b), s^2 M^-1),    M = W^T W + s^2 I

Tipping and Bishop (1999), equations 4, 7 and 9.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OwnEncoder, moved, refused
from jax.flatten_util import ravel_pytree
from scipy import special, stats

import jaxvae
from jaxvae.evaluation.ais import _Chains, _densities, ais, bidirectional_ais, sigmoidal_schedule
from jaxvae.models.config import PRIORS
from jaxvae.models.likelihoods import GaussianPixels
from jaxvae.models.vae import prior
from jaxvae.objectives import example_keys, numbered_keys

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
W, B, S = RNG.normal(size=(4, 2)), np.linspace(-1, 1, 4), 0.7
COVARIANCE = W @ W.T + S**2 * np.eye(4)
M = W.T @ W + S**2 * np.eye(2)


class LinearDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(4, name="pixels")(z).reshape(-1, 2, 2, 1)


class LinearPixels(GaussianPixels):
    @classmethod
    def from_outputs(cls, outputs, shared):
        return cls(outputs, jnp.log(S))


CONFIG = jaxvae.ModelConfig(
    (2, 2, 1), 2, network=(OwnEncoder(2), LinearDecoder()), likelihood=LinearPixels
)
LINEAR = jaxvae.Params({}, {"pixels": {"kernel": jnp.float32(W.T), "bias": jnp.float32(B)}}, CONFIG)


def log_p(x):
    return stats.multivariate_normal(B, COVARIANCE).logpdf(np.float64(x).reshape(-1, 4))


def chains_of(params, images, num_leapfrog, labels=None):
    return _Chains(*_densities(params), jnp.asarray(images), labels, params, num_leapfrog)


def posterior_samples(x, chains):
    """Exact samples of p(z|x), [chains, batch, latent]."""
    mean = (x.reshape(-1, 4) - B) @ W @ np.linalg.inv(M)
    noise = np.random.default_rng(1).normal(size=(chains, len(x), 2))
    return jnp.float32(mean + S * noise @ np.linalg.cholesky(np.linalg.inv(M)).T)


def test_with_enough_steps_both_bounds_are_log_p_x():
    found = bidirectional_ais(LINEAR, KEY, 10, 200, num_chains=8, num_leapfrog=4)
    exact = log_p(found.images)
    assert np.std(exact) > 0.5
    np.testing.assert_allclose(found.lower, exact, atol=0.1)
    np.testing.assert_allclose(found.upper, exact, atol=0.1)
    assert np.mean(found.lower) < np.mean(found.upper)


def test_with_few_steps_the_weights_are_unbiased():
    """E[w] = p(x) and E[w'] = 1 / p(x) hold for any number of steps; the bounds then are loose."""
    found = bidirectional_ais(LINEAR, KEY, 20_000, 6, num_chains=1, num_leapfrog=2)
    exact = log_p(found.images)
    for log_ratio in (found.lower - exact, exact - found.upper):
        assert np.mean(log_ratio) < -0.05
        ratio = np.exp(np.float64(log_ratio))
        error = np.std(ratio) / np.sqrt(len(ratio))
        assert error < 0.02
        assert abs(np.mean(ratio) - 1) < 4 * error


def test_the_images_are_of_the_model():
    found = bidirectional_ais(LINEAR, KEY, 20_000, 1, num_chains=1, num_leapfrog=1)
    x = np.reshape(found.images, (-1, 4))
    np.testing.assert_allclose(np.mean(x, axis=0), B, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=0.1)


def test_one_step_is_importance_sampling_from_the_prior():
    x = np.float32(np.random.default_rng(2).uniform(size=(3, 2, 2, 1)))
    found = ais(LINEAR, KEY, x, 1, num_chains=20_000, num_leapfrog=1)
    np.testing.assert_allclose(found, log_p(x), atol=0.05)


def test_the_sequence_of_betas_is_sigmoidal():
    betas = sigmoidal_schedule(50)
    t = np.arange(51) / 50
    s = special.expit(4 * (2 * t - 1))
    np.testing.assert_allclose(betas, (s - s[0]) / (s[-1] - s[0]), atol=1e-6)
    assert betas[0] == 0
    assert betas[-1] == 1
    np.testing.assert_array_equal(sigmoidal_schedule(1), [0, 1])


def test_a_transition_leaves_the_posterior_invariant():
    """Also with steps so long that a third of the proposals is rejected."""
    x = np.float32(np.random.default_rng(3).uniform(size=(2, 2, 2, 1)))
    chains = chains_of(LINEAR, x, 3)
    z = posterior_samples(x, 20_000)
    keys = numbered_keys(example_keys(KEY, 2), jnp.arange(len(z)))
    transition = jax.jit(chains.transition)
    point, acceptance = transition(keys, chains.at(z), jnp.float32(1), jnp.full(2, 0.75))
    assert 0.5 < jnp.mean(acceptance) < 0.8
    assert jnp.mean(jnp.abs(point.z - z)) > 0.2
    for i in range(2):
        mean, cov = (
            f(posterior_samples(x, 20_000)[:, i].T) for f in (partial(np.mean, axis=1), np.cov)
        )
        np.testing.assert_allclose(jnp.mean(point.z[:, i], axis=0), mean, atol=0.02)
        np.testing.assert_allclose(np.cov(point.z[:, i].T), cov, atol=0.02)


def test_the_step_sizes_are_adapted_to_the_acceptance_rate():
    x = np.float32(np.random.default_rng(4).uniform(size=(20, 2, 2, 1)))
    chains = chains_of(LINEAR, x, 3)
    _, step_sizes = chains.lower_bound(example_keys(KEY, 20), 1, sigmoidal_schedule(150))
    assert step_sizes.shape == (150, 20)
    assert not np.any(step_sizes[0])  # which only evaluates the start
    z = posterior_samples(x, 200)
    keys = numbered_keys(example_keys(KEY, 20), jnp.arange(len(z)))
    _, acceptance = chains.transition(keys, chains.at(z), jnp.float32(1), step_sizes[-1])
    assert jnp.mean(acceptance) == pytest.approx(0.65, abs=0.07)


# The small networks have densities that are not Gaussian.
def small(image_shape=(4, 4, 1), latent_dim=2, **fields):
    config = jaxvae.ModelConfig(image_shape, latent_dim, **{"network": "mlp:width=8"} | fields)
    return moved(jaxvae.init(KEY, config), 0.5)


IMAGES = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 1)).astype(np.float32)


def test_leapfrog_steps_are_reversible_and_preserve_volume():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, small())
        chains = chains_of(params, np.float64(IMAGES[:1]), 5)
        start, unravel = ravel_pytree(tuple(np.random.default_rng(5).normal(size=(2, 1, 1, 2))))

        def simulate(state):
            z, momentum = unravel(state)
            step_size = jnp.full((1, 1), 0.3)
            point, momentum = chains.leapfrog(chains.at(z), momentum, jnp.float64(0.6), step_size)
            return ravel_pytree((point.z, -momentum))[0]

        moved_to = simulate(start)
        assert np.linalg.norm(moved_to - start) > 0.5
        np.testing.assert_allclose(simulate(moved_to), start, atol=1e-12)
        jacobian = jax.jacfwd(simulate)(start)
        assert abs(np.linalg.det(jacobian)) == pytest.approx(1, abs=1e-10)
        assert np.linalg.norm(jacobian - np.eye(4)) > 0.1


def integral(params, images, labels=None):
    """Log p(x) by a sum over a grid of two latents."""
    side = np.linspace(-8, 8, 161)
    z = jnp.float32(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2))
    log_p_z = prior(params).log_prob(z) + 2 * np.log(side[1] - side[0])
    assert special.logsumexp(log_p_z) == pytest.approx(0, abs=0.01)

    def of_image(x, label):
        label = None if label is None else jnp.full(len(z), label)
        likelihood = params.model.likelihood(params, z, label)
        log_p_x = likelihood.log_prob(jnp.broadcast_to(x, (len(z), *x.shape)))
        return jax.nn.logsumexp(log_p_x + log_p_z)

    return jax.jit(jax.vmap(of_image))(images, labels)


DENSITIES = {"standard_normal": "standard_normal", "mixture": "mixture:components=3",
             "vamp": "vamp:components=3", "realnvp": "realnvp:layers=2,hidden=8"}  # fmt: skip


def test_every_prior_over_densities_is_tested():
    assert {n for n in PRIORS if not hasattr(PRIORS.parse(n), "over_codes")} == set(DENSITIES)


@pytest.mark.parametrize("name", DENSITIES)
def test_the_bounds_enclose_the_integral_over_the_latents(name):
    params = small(prior=DENSITIES[name])
    found = bidirectional_ais(params, KEY, 8, 100, num_chains=10, num_leapfrog=4)
    exact = integral(params, found.images)
    assert np.std(exact) > 0.2
    np.testing.assert_allclose(found.lower, exact, atol=0.1)
    np.testing.assert_allclose(found.upper, exact, atol=0.1)


def test_a_conditional_model_is_bounded_given_the_labels():
    params = small(num_classes=3)
    steps = {"num_steps": 100, "num_chains": 10, "num_leapfrog": 4}
    labels = np.array([2, 0, 2, 1])
    exact, other = integral(params, IMAGES, labels), integral(params, IMAGES, (labels + 1) % 3)
    assert np.min(np.abs(exact - other)) > 0.3
    np.testing.assert_allclose(ais(params, KEY, IMAGES, labels=labels, **steps), exact, atol=0.1)
    found = bidirectional_ais(params, KEY, 4, **steps)
    exact = integral(params, found.images, np.array([0, 1, 2, 0]))
    np.testing.assert_allclose(found.lower, exact, atol=0.1)
    np.testing.assert_allclose(found.upper, exact, atol=0.1)


def test_a_hierarchy_is_bounded():
    params = small(latent_dim=2, network="ladder:groups=2x1+1x1,width=4,latents=1")
    found = bidirectional_ais(params, KEY, 4, 100, num_chains=10, num_leapfrog=4)
    estimate = jaxvae.log_likelihood(params, KEY, found.images, 20_000)
    assert np.std(estimate) > 0.2
    np.testing.assert_allclose(found.lower, estimate, atol=0.15)
    np.testing.assert_allclose(found.upper, estimate, atol=0.15)


def test_an_images_noise_is_its_keys_whatever_the_batch():
    keys = example_keys(KEY, 4)
    bound = partial(ais, small(), num_steps=3, num_chains=2, num_leapfrog=2)
    whole = bound(keys, IMAGES)
    np.testing.assert_allclose(bound(KEY, IMAGES), whole, rtol=1e-5)
    np.testing.assert_allclose(bound(keys[1:3], IMAGES[1:3]), whole[1:3], rtol=1e-5)
    each = jax.vmap(lambda key, x: bound(key[None], x[None])[0])(keys, IMAGES)
    np.testing.assert_allclose(each, whole, rtol=1e-5)
    assert not np.any(np.isclose(bound(keys[::-1], IMAGES), whole, rtol=1e-3))


def test_the_parameters_of_several_models_are_mapped_over():
    models = [small(), jax.tree.map(lambda x: 0.5 * x, small())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    bound = partial(ais, num_steps=3, num_chains=2, num_leapfrog=2)
    together = jax.vmap(bound, (0, None, None))(stacked, KEY, IMAGES)
    for params, found in zip(models, together, strict=True):
        np.testing.assert_allclose(found, bound(params, KEY, IMAGES), rtol=1e-4)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, small())
        found = ais(params, KEY, IMAGES, 2, num_chains=2, num_leapfrog=2)
        assert found.dtype == jnp.float64


def test_codes_are_refused():
    params = small(prior="uniform_codes", posterior="fsq:levels=3x2")
    for bound in (partial(ais, images=IMAGES), partial(bidirectional_ais, n=2)):
        with refused("annealed importance sampling", "which codes do not have", "expected a model"):
            bound(params, KEY)


@pytest.mark.parametrize("name", ["num_steps", "num_chains", "num_leapfrog"])
def test_numbers_below_1_are_refused(name):
    with refused(f"{name} is 0: expected at least 1"):
        ais(small(), KEY, IMAGES, **{name: 0})
    with refused(f"{name} is 'ten': expected a whole number"):
        bidirectional_ais(small(), KEY, 2, **{name: "ten"})


def test_no_images_are_refused():
    with refused("n is 0: expected at least 1"):
        bidirectional_ais(small(), KEY, 0)
    with refused("images have shape (4, 3, 4, 1): expected (batch, 4, 4, 1)"):
        ais(small(), KEY, IMAGES[:, 1:])
