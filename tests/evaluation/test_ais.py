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
    outputs_per_channel = 1

    @staticmethod
    def init(channels):
        return {}

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


def expect_unbiased(log_ratio, error_of_exact=0.0):
    """E[w / p(x)] = 1 for any number of steps, and the mean logarithm is negative."""
    ratio = np.exp(np.float64(log_ratio))
    error = np.std(ratio) / np.sqrt(len(ratio))
    assert 0 < error < 0.06
    assert abs(np.mean(ratio) - 1) < 4 * error + error_of_exact
    assert np.mean(log_ratio) < 0


def expect_sandwich(found, exact, error_of_exact=0.0):
    expect_unbiased(found.lower - exact, error_of_exact)
    expect_unbiased(exact - found.upper, error_of_exact)


def test_with_many_steps_both_bounds_are_log_p_x():
    found = bidirectional_ais(LINEAR, KEY, 200, 150, num_chains=2, num_leapfrog=4)
    exact = log_p(found.images)
    assert np.std(exact) > 0.5
    expect_sandwich(found, exact)
    np.testing.assert_allclose(np.mean(found.lower), np.mean(exact), atol=0.07)
    np.testing.assert_allclose(np.mean(found.upper), np.mean(exact), atol=0.07)


@pytest.fixture(scope="module")
def few_steps():
    return bidirectional_ais(LINEAR, KEY, 20_000, 20, num_chains=1, num_leapfrog=3)


def test_with_few_steps_the_bounds_are_loose_and_the_weights_unbiased(few_steps):
    exact = log_p(few_steps.images)
    expect_sandwich(few_steps, exact)
    assert np.mean(few_steps.lower - exact) < -0.1
    assert np.mean(few_steps.upper - exact) > 0.1


def test_the_simulated_images_are_of_the_model(few_steps):
    x = np.reshape(few_steps.images, (-1, 4))
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
    point, acceptance = transition(keys, chains.at(z), jnp.float32(1), jnp.full(2, 0.6))
    assert 0.5 < jnp.mean(acceptance) < 0.8
    assert jnp.mean(jnp.abs(point.z - z)) > 0.2
    for i in range(2):
        np.testing.assert_allclose(np.mean(point.z[:, i], 0), np.mean(z[:, i], 0), atol=0.02)
        np.testing.assert_allclose(np.cov(point.z[:, i].T), np.cov(z[:, i].T), atol=0.02)


def test_the_step_sizes_are_adapted_to_the_acceptance_rate():
    x = np.float32(np.random.default_rng(4).uniform(size=(20, 2, 2, 1)))
    chains = chains_of(LINEAR, x, 3)
    bound = jax.jit(partial(chains.lower_bound, num_chains=1, betas=sigmoidal_schedule(150)))
    _, step_sizes = bound(example_keys(KEY, 20))
    assert step_sizes.shape == (150, 20)
    assert not np.any(step_sizes[0])  # which only evaluates the start
    z = posterior_samples(x, 200)
    keys = numbered_keys(example_keys(KEY, 20), jnp.arange(len(z)))
    transition = jax.jit(chains.transition)
    _, acceptance = transition(keys, chains.at(z), jnp.float32(1), step_sizes[-1])
    assert jnp.mean(acceptance) == pytest.approx(0.65, abs=0.07)


# The small networks have densities that are not Gaussian.
def small(scale=0.4, **fields):
    config = jaxvae.ModelConfig((4, 4, 1), 2, **{"network": "mlp:width=8"} | fields)
    return moved(jaxvae.init(KEY, config), scale)


IMAGES = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 1)).astype(np.float32)


def test_leapfrog_steps_are_reversible_and_preserve_volume():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, small())
        chains = chains_of(params, np.float64(IMAGES[:1]), 5)
        start, unravel = ravel_pytree(tuple(np.random.default_rng(5).normal(size=(2, 1, 1, 2))))

        @jax.jit
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


def log_mean_likelihood(params, images, labels=None, n=4000):
    """Log p(x) by samples of the prior, of which p(x|z) is the weight: off by about 0.03."""
    z = prior(params).sample(jax.random.key(6), n)
    found = []
    for label in range(max(1, params.config.num_classes)):
        classes = None if labels is None else jnp.full(n, label)
        p_x = jaxvae.decode(params, z, classes)

        def of_image(x, p_x=p_x):
            return jax.nn.logsumexp(p_x.log_prob(jnp.broadcast_to(x, (n, *x.shape))))

        found.append(jax.lax.map(of_image, images) - np.log(n))
    return np.choose(np.zeros(len(images), int) if labels is None else labels, found)


FEW = {"num_steps": 12, "num_chains": 2, "num_leapfrog": 3}


@pytest.mark.parametrize("name", ["vamp:components=3", "realnvp:layers=2,hidden=8"])
def test_a_learned_prior_has_unbiased_weights(name):
    params = small(0.3, prior=name)
    found = bidirectional_ais(params, KEY, 300, **FEW)
    exact = log_mean_likelihood(params, found.images)
    assert np.std(exact) > 0.2
    expect_sandwich(found, exact, 0.03)


def test_simulated_images_are_of_all_classes_in_turn():
    params = small(num_classes=3)
    found = bidirectional_ais(params, KEY, 300, **FEW)
    labels = np.arange(300) % 3
    exact, other = (log_mean_likelihood(params, found.images, x) for x in (labels, labels[::-1]))
    assert np.mean(np.abs(exact - other)) > 0.3
    expect_sandwich(found, exact, 0.03)


def test_a_bound_is_of_the_image_its_label_and_its_key_whatever_the_batch():
    keys, labels = example_keys(KEY, 4), np.array([2, 0, 2, 1])
    bound = partial(ais, small(num_classes=3), num_steps=3, num_chains=2, num_leapfrog=2)
    whole = bound(keys, IMAGES, labels=labels)
    np.testing.assert_allclose(bound(KEY, IMAGES, labels=labels), whole, rtol=1e-5)
    alone = bound(keys[1:3], IMAGES[1:3], labels=labels[1:3])
    np.testing.assert_allclose(alone, whole[1:3], rtol=1e-5)
    for other in (
        bound(keys[::-1], IMAGES, labels=labels),
        bound(keys, IMAGES[::-1], labels=labels),
        bound(keys, IMAGES, labels=(labels + 1) % 3),
    ):
        assert not np.any(np.isclose(other, whole, rtol=1e-3))


def test_the_parameters_of_several_models_are_mapped_over():
    models = [LINEAR, jax.tree.map(lambda x: 0.5 * x, LINEAR)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    x = np.float32(np.random.default_rng(6).uniform(size=(3, 2, 2, 1)))
    bound = partial(ais, num_steps=3, num_chains=2, num_leapfrog=2)
    together = jax.vmap(bound, (0, None, None))(stacked, KEY, x)
    for params, found in zip(models, together, strict=True):
        np.testing.assert_allclose(found, bound(params, KEY, x), rtol=1e-4)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, small())
        found = ais(params, KEY, IMAGES, 2, num_chains=2, num_leapfrog=2)
        assert found.dtype == jnp.float64


def test_counts_are_not_scaled():
    config = jaxvae.ModelConfig((2, 3, 1), 1, network="mlp:width=4", likelihood="poisson:size=0")
    params, x = jaxvae.init(KEY, config), np.random.default_rng(0).poisson(3, (2, 2, 3, 1))
    log_p_x = [
        ais(params, KEY, x.astype(dtype), 1, num_chains=3, num_leapfrog=1)
        for dtype in (np.uint8, np.int32, np.float32)
    ]
    np.testing.assert_allclose(log_p_x, [log_p_x[2]] * 3)


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
