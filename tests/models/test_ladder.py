"""The ladder against a flat VAE, a linear-Gaussian hierarchy and its own densities."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import moved, refused
from scipy import stats

import jaxvae
from jaxvae.evaluation.evaluate import kl_per_group
from jaxvae.explorer.program import decoder_program
from jaxvae.figures.grid import coordinates, decode_coordinates
from jaxvae.models.ladder import BottomUp, Ladder, LadderVAE, TopDown
from jaxvae.models.vae import prior
from jaxvae.objectives import ELBO, DoublyReparameterized, StickingTheLanding, draw

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
SHAPE = (6, 5, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
THREE = "ladder:groups=4x1+2x2,width=4,latents=2"


def params_of(network=THREE, scale=0.1, **fields):
    """Parameters that are moved away from their start, where posterior and prior are equal."""
    return moved(jaxvae.init(KEY, jaxvae.ModelConfig(SHAPE, network=network, **fields)), scale)


def test_the_groups_are_at_the_resolutions_that_are_asked_for():
    ladder = Ladder("8x1+4x2z3+2x1w16", width=8, latents=2)
    assert ladder.levels == ((8, 1, 2, 8), (4, 2, 3, 8), (2, 1, 2, 16))
    shapes = [group[1:] for group in ladder.groups_of((28, 20, 1))]
    assert shapes == [(4, 3, 2), (7, 5, 3), (7, 5, 3), (14, 10, 2)]
    config = jaxvae.ModelConfig((28, 20, 1), network=ladder)
    assert config.latent_dim == 24 + 2 * 105 + 280
    assert jaxvae.ModelConfig.from_dict(config.to_dict()) == config
    assert config.with_image_shape((32, 32, 3)).latent_dim == 32 + 2 * 192 + 512


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"network": "ladder:groups=3x1"}, "expected FACTORxCOUNT joined by +"),
        ({"network": "ladder:groups=4"}, "not '4'"),
        ({"network": "ladder:groups=2x1+4x1"}, "the largest first"),
        ({"network": "ladder:groups=2x0"}, "expected FACTORxCOUNT"),
        ({"network": "ladder:groups=4x1z0"}, "not '4x1z0'"),
        ({"network": "ladder:groups=4x1w0"}, "not '4x1w0'"),
        ({"latent_dim": 7}, "the network has 44 latents: leave latent_dim out"),
        ({"prior": "mixture"}, "prior is 'mixture', but the network 'ladder' has a prior of its"),
        ({"posterior": "iaf"}, "posterior is 'iaf', but the network 'ladder' has a posterior"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, says):
    with refused(says):
        jaxvae.ModelConfig(SHAPE, **{"network": THREE} | fields)


def test_a_new_posterior_is_the_prior():
    params = jaxvae.init(KEY, jaxvae.ModelConfig(SHAPE, network=THREE))
    assert np.all(draw(params, KEY, IMAGES).kl == 0)


class FlatEncoder(nn.Module):
    ladder: Any

    @nn.compact
    def __call__(self, images):
        bottom_up, _ = LadderVAE(self.ladder).modules()
        module = BottomUp(bottom_up.levels, bottom_up.groups, name="encoder")
        features = module(images)
        start = self.param("top", nn.initializers.zeros, features[0].shape[1:])
        h = jnp.broadcast_to(start, features[0].shape)
        mean, log_var = module.posterior(0, h, features)
        return tuple(x.reshape(len(x), -1) for x in (mean, 5 * jnp.tanh(log_var / 5)))


class FlatDecoder(nn.Module):
    ladder: Any

    @nn.compact
    def __call__(self, z):
        _, top_down = LadderVAE(self.ladder).modules()
        module = TopDown(top_down.levels, top_down.groups, top_down.outputs_shape, name="decoder")
        group = top_down.groups[0]
        z = z.reshape(-1, group.rows, group.columns, group.latents)
        return module.outputs(module.update(0, module.start(len(z)), z))


def test_a_ladder_of_one_group_is_the_flat_model():
    one = params_of("ladder:groups=2x1,width=4,latents=2")
    flat = jaxvae.init(
        KEY,
        jaxvae.ModelConfig(
            SHAPE, one.config.latent_dim, (FlatEncoder(one.config), FlatDecoder(one.config))
        ),
    )
    flat = replace(
        flat,
        encoder={"encoder": one.encoder, "top": one.decoder["top"]},
        decoder={"decoder": one.decoder},
    )
    for a, b in zip(jaxvae.elbo(one, KEY, IMAGES), jaxvae.elbo(flat, KEY, IMAGES), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for a, b in (
        (jaxvae.sample(one, KEY, 3), jaxvae.sample(flat, KEY, 3)),
        (jaxvae.reconstruct(one, IMAGES), jaxvae.reconstruct(flat, IMAGES)),
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_one_pass_gives_what_the_distributions_give():
    params = params_of()
    drawn = draw(params, KEY, IMAGES, num_samples=3)
    posterior = jaxvae.encode(params, IMAGES)
    assert drawn.z.shape == (3, 4, params.config.latent_dim)
    assert drawn.kl_per_group.shape == (3, 4, 3)
    np.testing.assert_allclose(posterior.log_prob(drawn.z), drawn.log_posterior, rtol=1e-5)
    np.testing.assert_allclose(prior(params).log_prob(drawn.z), drawn.log_prior, rtol=1e-5)
    for z, log_p_x in zip(drawn.z, drawn.log_likelihood, strict=True):
        np.testing.assert_allclose(jaxvae.decode(params, z).log_prob(IMAGES), log_p_x, rtol=1e-5)


def test_the_kl_of_the_groups_is_the_mean_of_its_estimate():
    params = params_of(scale=0.2)
    drawn = draw(params, KEY, IMAGES[:1], num_samples=4000)
    difference = np.float64(drawn.log_ratio - drawn.kl_per_group.sum(-1))
    assert drawn.kl[0] > 0.1
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    np.testing.assert_allclose(drawn.kl, drawn.kl_per_group.sum(-1).mean(0), rtol=1e-5)
    mean = draw(params, KEY, IMAGES).kl_per_group[0].mean(0)
    np.testing.assert_allclose(kl_per_group(params, KEY, IMAGES), mean, rtol=1e-5)


# A hierarchy whose every density is Gaussian and linear: z_1, z_2 | z_1, x | z_1, z_2.
A, B, C = 0.8, np.float32([0.3, -0.5, 0.9]), np.float32([0.7, 0.4, -0.2])
VAR_2, VAR_X = 0.5, 0.3


class Linear(NamedTuple):
    mean: Any

    @classmethod
    def from_outputs(cls, outputs, learned):
        return cls(outputs)

    def log_prob(self, images):
        square = (images - self.mean) ** 2 / VAR_X
        return -0.5 * jnp.sum(square + np.log(2 * np.pi * VAR_X), axis=(1, 2, 3))

    def sample(self, key):
        return self.mean + VAR_X**0.5 * jax.random.normal(key, self.mean.shape)


@dataclass(frozen=True)
class LinearLikelihood:
    outputs_per_channel = 1
    support = "real"

    def init(self, channels):
        return {}

    def from_outputs(self, outputs, learned):
        return Linear(outputs)


def moments(x):
    """Mean and covariance of (z_1, z_2) given x, by the formulas for a joint Gaussian."""
    loading = np.stack([B, C], axis=1)  # x = loading @ z + noise
    cov = np.array([[1, A], [A, A**2 + VAR_2]])
    gain = cov @ loading.T @ np.linalg.inv(loading @ cov @ loading.T + VAR_X * np.eye(3))
    return x @ gain.T, cov - gain @ loading @ cov


class LinearBottomUp(nn.Module):
    def __call__(self, images, labels=None):
        return (images,)

    def posterior(self, g, h, features):
        mean, cov = moments(features[0].reshape(-1, 3))
        if g == 0:
            mean, var, mean_p, var_p = mean[:, 0], cov[0, 0], 0, 1
        else:  # given z_1
            slope = cov[1, 0] / cov[0, 0]
            mean = mean[:, 1] + slope * (h[:, 0, 0, 0] - mean[:, 0])
            var, mean_p, var_p = cov[1, 1] - slope * cov[0, 1], A * h[:, 0, 0, 0], VAR_2
        log_var = 5 * np.arctanh(np.log(var / var_p) / 5)  # the model bounds it by 5 tanh(x / 5)
        shape = len(h), 1, 1, 1
        return (mean - mean_p).reshape(shape), jnp.full(shape, log_var, jnp.float32)


class LinearTopDown(nn.Module):
    def start(self, rows):
        return jnp.zeros((rows, 1, 1, 2))

    def prior(self, g, h):
        from jaxvae.models.distributions import Gaussian

        var = VAR_2 if g else 1.0
        mean = A * h[..., :1] if g else 0 * h[..., :1]
        return Gaussian(mean, jnp.full_like(mean, np.log(var))), h

    def update(self, g, h, z):
        return h.at[..., g : g + 1].set(z)

    def outputs(self, h, labels=None):
        return (h[:, 0, 0] @ jnp.stack([B, C])).reshape(-1, 3, 1, 1)


class LinearVAE(LadderVAE):
    def modules(self):
        return LinearBottomUp(), LinearTopDown()


@dataclass(frozen=True)
class LinearLadder(Ladder):
    def model(self, config):
        return LinearVAE(config)

    def groups_of(self, image_shape):
        return tuple(group._replace(rows=1, columns=1) for group in super().groups_of(image_shape))


LINEAR = jaxvae.Params(
    {},
    {},
    jaxvae.ModelConfig(
        (3, 1, 1), network=LinearLadder("1x2", latents=1), likelihood=LinearLikelihood()
    ),
)


def linear_log_p(x):
    loading = np.stack([B, C], axis=1)
    cov = loading @ np.array([[1, A], [A, A**2 + VAR_2]]) @ loading.T + VAR_X * np.eye(3)
    return stats.multivariate_normal(np.zeros(3), cov).logpdf(np.float64(x).reshape(-1, 3))


def test_a_linear_gaussian_hierarchy_has_its_exact_likelihood():
    """At the true posterior the ELBO is log p(x), whatever the sample, and so is any IWAE bound."""
    params = LINEAR
    x = np.random.default_rng(0).uniform(size=(5, 3, 1, 1)).astype("f")
    exact = linear_log_p(x)
    drawn = draw(params, KEY, x, num_samples=20)
    np.testing.assert_allclose(
        drawn.log_likelihood - drawn.log_ratio, np.tile(exact, (20, 1)), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(jaxvae.log_likelihood(params, KEY, x, 50), exact, atol=1e-4)
    mean = np.mean(drawn.elbo().value)
    assert mean == pytest.approx(exact.mean(), abs=0.3)  # its KL is of the samples above


def test_annealed_importance_sampling_of_a_hierarchy_bounds_its_exact_likelihood():
    """In the space of the noise of the prior; the weights are unbiased."""
    found = jaxvae.bidirectional_ais(LINEAR, KEY, 2000, 20, num_chains=2, num_leapfrog=3)
    exact = linear_log_p(found.images)
    for log_ratio in (found.lower - exact, exact - found.upper):
        assert -0.3 < np.mean(log_ratio) < 0
        ratio = np.exp(log_ratio)
        error = np.std(ratio) / np.sqrt(len(ratio))
        assert error < 0.03
        assert abs(np.mean(ratio) - 1) < 4 * error


def test_free_bits_are_of_the_groups():
    params = params_of(scale=0.2)
    loss, terms = ELBO(free_bits=2.0)(params, KEY, IMAGES)
    kl = draw(params, KEY, IMAGES).kl_per_group[0]
    counted = np.where(kl.mean(0) > 2, kl, 2).sum(-1)
    np.testing.assert_allclose(loss, counted - terms.log_likelihood, rtol=1e-5)
    assert np.any(kl.mean(0) < 2)


def test_balance_weights_the_groups_while_beta_is_below_1():
    """The weight of a group is its KL per latent, over the mean of those of all groups."""
    params = params_of(scale=0.2)
    kl = np.float64(draw(params, KEY, IMAGES).kl_per_group[0])
    sizes = [group.size for group in params.model.groups]
    assert len(set(sizes)) > 1
    density = (kl.mean(0) + 0.01) / sizes
    for beta, weights in ((0.25, density / density.mean()), (1.0, 1.0)):
        loss, terms = ELBO(balance=True)(params, KEY, IMAGES, beta=beta)
        expected = beta * np.sum(weights * kl, axis=-1) - terms.log_likelihood
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(terms.kl, kl.sum(-1), rtol=1e-5)


def test_balance_needs_groups(images):
    params = jaxvae.init(KEY, jaxvae.ModelConfig(image_shape=(8, 8, 1)))
    with refused("balance needs the KL of every group: expected network 'ladder'"):
        ELBO(balance=True)(params, KEY, images)


def test_the_explorers_coordinates_are_the_noise_of_the_prior():
    params = params_of(scale=0.3)
    noise = np.asarray(jax.random.normal(KEY, (3, params.config.latent_dim)))
    z = params.model.top_down(params.decoder, noise=jnp.asarray(noise)).z
    np.testing.assert_allclose(coordinates(params, z), noise, atol=1e-4)
    found = decode_coordinates(params, jnp.asarray(noise)).mean
    np.testing.assert_allclose(found, jaxvae.decode(params, z).mean, atol=1e-6)
    operations = decoder_program(params).operations
    assert {operation["kind"] for operation in operations} >= {"conv", "dot", "map"}


@pytest.mark.parametrize("objective", [StickingTheLanding(2), DoublyReparameterized(2)])
def test_path_derivatives_work_for_a_hierarchy(objective):
    """Their losses are those of the plain estimators at the same samples."""
    params = params_of()
    loss, _ = objective(params, KEY, IMAGES)
    drawn = draw(params, KEY, IMAGES, num_samples=2)
    weights = drawn.log_likelihood - drawn.log_ratio
    mean = jax.nn.logsumexp(weights, axis=0) - np.log(2)
    expected = jnp.mean(weights, axis=0) if isinstance(objective, StickingTheLanding) else mean
    np.testing.assert_allclose(loss, -expected, rtol=1e-5)


def test_the_gradient_equals_finite_differences_with_and_without_remat():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params_of())
        ahead = jax.tree.map(jnp.subtract, moved(params, 1.0, seed=1), params)

        def loss(t, remat):
            config = replace(params.config, network=replace(params.config.network, remat=remat))
            there = replace(jax.tree.map(lambda x, d: x + t * d, params, ahead), config=config)
            return jnp.sum(ELBO()(there, KEY, IMAGES)[0])

        step = 1e-5
        value = jax.jit(partial(loss, remat=False))
        slope = (value(step) - value(-step)) / (2 * step)
        for remat in (False, True):
            gradient = jax.jit(jax.grad(partial(loss, remat=remat)))(0.0)
            assert gradient == pytest.approx(float(slope), rel=1e-6)


def test_the_temperature_scales_the_noise_of_each_group():
    params = params_of(scale=0.3)
    p = prior(params)
    mean = p.sample(KEY, 2, temperature=0.0)
    np.testing.assert_array_equal(mean[0], mean[1])
    some = p.sample(KEY, 2, temperature=(1.0, 0.0, 0.0))
    top = params.model.groups[0].size
    np.testing.assert_array_equal(some[:, :top], p.sample(KEY, 2)[:, :top])
    again = params.model.top_down(params.decoder, z=some)
    np.testing.assert_allclose(again.mean[:, top:], some[:, top:], atol=1e-6)
    assert jaxvae.sample(params, KEY, 3, temperature=(1.0, 0.5, 0.0)).shape == (3, *SHAPE)
    with refused("temperature has 2 numbers: expected one, or one for each of the 3 groups"):
        jaxvae.sample(params, KEY, 3, temperature=(1.0, 0.5))
    plain = jaxvae.init(KEY, jaxvae.ModelConfig(SHAPE, network="mlp:width=4"))
    with refused("temperature has 2 numbers, but the model has no groups", "expected one number"):
        jaxvae.sample(plain, KEY, 3, temperature=(1.0, 0.5))


def test_a_conditional_ladder_uses_the_classes():
    params = params_of(num_classes=3, scale=0.3)
    one, other = (jaxvae.elbo(params, KEY, IMAGES, jnp.full(4, i)) for i in (0, 1))
    assert np.all(one.log_likelihood != other.log_likelihood)
    assert np.all(one.kl != other.kl)
