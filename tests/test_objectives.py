"""The objectives against models whose log p(x) is known, and their gradients.

The exactness tests are on probabilistic PCA,

    p(z) = N(0, I),    p(x|z) = N(W z + b, s^2 I)

where W has orthogonal columns, so that p(z|x) is Gaussian with a diagonal covariance and the
encoder can be right, or wrong by a known amount. Tipping and Bishop (1999), equation 7.
"""

import inspect
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import moved, refused
from jax.flatten_util import ravel_pytree
from scipy import integrate, special, stats

import jaxvae
from jaxvae import (
    ModelConfig,
    Params,
    TrainConfig,
    create_train_state,
    decode,
    elbo,
    encode,
    init,
    log_likelihood,
    train_step,
)
from jaxvae.models.distributions import Gaussian
from jaxvae.models.likelihoods import GaussianPixels
from jaxvae.models.networks import MlpDecoder, MlpEncoder
from jaxvae.models.posteriors import DiagonalGaussian
from jaxvae.models.vae import prior
from jaxvae.objectives import OBJECTIVES, WARMUPS, Elbo, example_keys

pytestmark = pytest.mark.usefixtures("compile_quickly")


def called(name):
    """An objective as a function that takes its options by keyword."""

    def call(*arguments, beta=1.0, axis_name=None, **options):
        objective = OBJECTIVES.entries[name](**options)
        return objective(*arguments, beta=beta, axis_name=axis_name)

    return call


EVERY = {name: called(name) for name in OBJECTIVES}
negative_elbo, sticking_the_landing = EVERY["elbo"], EVERY["stl"]
importance_weighted, doubly_reparameterized = EVERY["iwae"], EVERY["dreg"]
two_backward = partial(importance_weighted, backward=2)
beta_tc, maximum_mean_discrepancy = EVERY["beta_tc"], EVERY["mmd"]

KEY = jax.random.key(7)
NOISE = 0.5
BIAS = np.linspace(-1, 1, 6)
LOADINGS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [1.5, 0.7]
PRECISION = 1 + np.sum(LOADINGS**2, axis=0) / NOISE**2  # of the exact posterior
X = np.random.default_rng(1).uniform(size=(3, 2, 3, 1))


class LinearEncoder(nn.Module):
    @nn.compact
    def __call__(self, images):
        mean = nn.Dense(2, name="mean")(images.reshape(len(images), 6))
        log_var = self.param("log_var", nn.initializers.zeros, (2,))
        return mean, jnp.broadcast_to(log_var, mean.shape)


class LinearDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(6, name="pixels")(z).reshape(-1, 2, 3, 1)


class LinearPixels(GaussianPixels):
    """N(outputs, s^2), with a fixed scale."""

    outputs_per_channel = 1

    @staticmethod
    def init(channels):
        return {}

    @classmethod
    def from_outputs(cls, outputs, shared):
        return cls(outputs, jnp.log(NOISE))


@pytest.fixture
def pca():
    """Makes probabilistic PCA's parameters, in double precision.

    The posterior is the exact one, but for `shift` of its means and `widening` of its log_vars.
    """
    config = ModelConfig((2, 3, 1), 2, network=(LinearEncoder(), LinearDecoder()))

    def make(shift=0.0, widening=0.0):
        kernel = LOADINGS / (NOISE**2 * PRECISION)
        mean = {"kernel": kernel, "bias": shift - BIAS @ kernel}
        encoder = {"mean": mean, "log_var": widening - np.log(PRECISION)}
        decoder = {"pixels": {"kernel": LOADINGS.T, "bias": BIAS}}
        params = Params(encoder, decoder, replace(config, likelihood=LinearPixels))
        return jax.tree.map(jnp.float64, params)

    with jax.enable_x64(True):
        yield make


WRONG = {"shift": 0.3, "widening": 1.0}
KL_OF_WRONG = 0.5 * np.sum(np.e - 2 + 0.3**2 * PRECISION)


def log_p(x, prior_mean=(0, 0), prior_variance=(1, 1)):
    covariance = LOADINGS * prior_variance @ LOADINGS.T + NOISE**2 * np.eye(6)
    return stats.multivariate_normal(BIAS + LOADINGS @ prior_mean, covariance).logpdf(
        x.reshape(len(x), 6)
    )


def bounds(estimate, params, n, **options):
    """What a loss is minus, or an estimate of log p(X), over n keys: [n, batch]."""

    def one(key):
        if estimate is log_likelihood:
            return estimate(params, key, X, **options)
        return -estimate(params, key, X, **options)[0]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, n)))


def gradients(objective, params, n, beta=1.0, **options):
    """Of the mean loss over n keys: {"encoder", "decoder", "prior": [n, parameters]}."""
    return jax.tree.map(np.asarray, _gradients(objective, params, n, beta, **options))


@partial(jax.jit, static_argnames=("objective", "n", "num_samples"))
def _gradients(objective, params, n, beta, num_samples):
    @jax.grad
    def gradient(params, key):
        return jnp.mean(objective(params, key, X, beta=beta, num_samples=num_samples)[0])

    def one(key):
        grads = gradient(params, key)
        parts = {"encoder": grads.encoder, "decoder": grads.decoder, "prior": grads.prior}
        return {name: ravel_pytree(part)[0] for name, part in parts.items()}

    return jax.vmap(one)(jax.random.split(KEY, n))


def standard_error(x):
    return x.std(axis=0) / np.sqrt(len(x))


# ---- Bounds on log p(x) ----


@pytest.mark.parametrize(
    ("objective", "num_samples"),
    [
        (sticking_the_landing, 1),
        (sticking_the_landing, 3),
        (importance_weighted, 1),
        (importance_weighted, 7),
        (doubly_reparameterized, 7),
        (log_likelihood, 1),
        (log_likelihood, 1500),
    ],
)
def test_every_sample_of_the_exact_posterior_gives_log_p(pca, objective, num_samples):
    values = bounds(objective, pca(), 10, num_samples=num_samples)
    np.testing.assert_allclose(values, np.tile(log_p(X), (10, 1)), rtol=1e-11)


def test_the_elbo_of_the_exact_posterior_has_expectation_log_p(pca):
    values = bounds(negative_elbo, pca(), 20_000)
    assert np.all(standard_error(values) < 0.02)
    assert np.all(np.abs(values.mean(0) - log_p(X)) < 4 * standard_error(values))


@pytest.mark.parametrize("objective", [negative_elbo, sticking_the_landing])
def test_the_elbo_falls_short_of_log_p_by_the_kl_to_the_exact_posterior(pca, objective):
    gap = log_p(X) - bounds(objective, pca(**WRONG), 20_000)
    assert np.all(standard_error(gap) < 0.03 * KL_OF_WRONG)
    assert np.all(np.abs(gap.mean(0) - KL_OF_WRONG) < 4 * standard_error(gap))


@pytest.mark.parametrize("estimate", [importance_weighted, log_likelihood])
def test_the_importance_weighted_bound_grows_to_log_p(pca, estimate):
    gaps = [log_p(X) - bounds(estimate, pca(**WRONG), 3000, num_samples=k) for k in (1, 3, 10)]
    means, errors = [gap.mean(0) for gap in gaps], [standard_error(gap) for gap in gaps]
    assert np.all(np.abs(means[0] - KL_OF_WRONG) < 4 * errors[0])
    assert np.all(means[1] < means[0] - 4 * errors[0])
    assert np.all(means[2] < means[1] - 4 * errors[1])
    assert np.all(means[2] > 4 * errors[2])
    last = bounds(estimate, pca(**WRONG), 4, num_samples=10_000)
    np.testing.assert_allclose(last, np.tile(log_p(X), (4, 1)), atol=0.05)


def test_the_importance_weighted_bound_of_a_flow_reaches_log_p(pca):
    """Whatever the flow is: this is what log |det| in its log q is for."""
    params = pca(widening=3.0)
    config = replace(params.config, posterior="iaf")
    flow = jax.tree.map(
        lambda x: 0.1 * np.random.default_rng(2).normal(size=x.shape), init(KEY, config).posterior
    )
    params = replace(params, config=config, posterior=flow)
    values = bounds(log_likelihood, params, 4, num_samples=20_000)
    np.testing.assert_allclose(values, np.tile(log_p(X), (4, 1)), atol=0.1)


def with_mixture(params):
    mixture = {
        "logits": jnp.log(jnp.array([0.3, 0.7])),
        "mean": jnp.array([[-1.0, 0.5], [1.0, 0.0]]),
        "log_var": jnp.log(jnp.array([[0.25, 1.0], [0.5, 2.0]])),
    }
    return replace(params, config=replace(params.config, prior="mixture"), prior=mixture)


def with_vamp(params):
    """A prior whose parameters are the encoder's as well."""
    learned = {"pseudo_inputs": jnp.float64(np.random.default_rng(6).normal(size=(2, 2, 3, 1)))}
    return replace(params, config=replace(params.config, prior="vamp"), prior=learned)


def test_the_importance_weighted_bound_under_a_mixture_prior_reaches_log_p(pca):
    """log p(x) is then that of a mixture of probabilistic PCAs."""
    parts = [log_p(X, (-1, 0.5), (0.25, 1)), log_p(X, (1, 0), (0.5, 2))]
    exact = special.logsumexp(parts, axis=0, b=[[0.3], [0.7]])
    values = bounds(log_likelihood, with_mixture(pca(widening=1.0)), 4, num_samples=20_000)
    np.testing.assert_allclose(values, np.tile(exact, (4, 1)), atol=0.05)


# ---- Gradient estimators ----


@pytest.mark.parametrize(
    ("one", "other", "num_samples", "with_prior"),
    [
        (negative_elbo, sticking_the_landing, 1, None),
        (negative_elbo, sticking_the_landing, 2, with_mixture),
        (importance_weighted, doubly_reparameterized, 5, with_mixture),
        (importance_weighted, doubly_reparameterized, 5, with_vamp),
        (importance_weighted, two_backward, 5, with_mixture),
    ],
    ids=["elbo-stl", "elbo-stl-mixture", "iwae-dreg-mixture", "iwae-dreg-vamp", "iwae-backward"],
)
def test_two_estimators_of_one_gradient_agree_in_mean(pca, one, other, num_samples, with_prior):
    """And also where the KL is weighted; the learned prior's gradient as well."""
    params = with_prior(pca(**WRONG)) if with_prior else pca(**WRONG)
    for beta in 1.0, 0.3, 2.0:
        options = {"num_samples": num_samples, "beta": beta}
        expected = gradients(one, params, 10_000, **options)
        apart = jax.tree.map(np.subtract, gradients(other, params, 10_000, **options), expected)
        for part, difference in apart.items():
            error = standard_error(difference)
            assert np.linalg.norm(error) <= 0.1 * np.linalg.norm(expected[part].mean(0))
            assert np.all(np.abs(difference.mean(0)) <= 4 * error + 1e-12)


@pytest.mark.parametrize(
    ("quiet", "noisy", "num_samples"),
    [(sticking_the_landing, negative_elbo, 1), (doubly_reparameterized, importance_weighted, 5)],
    ids=["stl", "dreg"],
)
def test_the_encoders_gradient_vanishes_at_the_exact_posterior(pca, quiet, noisy, num_samples):
    """With every key, without log q's own gradient; else only in the mean."""
    params = pca()
    encoder = gradients(quiet, params, 100, num_samples=num_samples)["encoder"]
    assert np.abs(encoder).max() < 1e-12
    encoder = gradients(noisy, params, 10_000, num_samples=num_samples)["encoder"]
    assert np.all(encoder.std(0) > 0.01)
    assert np.all(np.abs(encoder.mean(0)) < 4 * standard_error(encoder))


@pytest.mark.parametrize(
    ("one", "other", "num_samples"),
    [
        (negative_elbo, sticking_the_landing, 1),
        (importance_weighted, doubly_reparameterized, 5),
        (importance_weighted, two_backward, 5),
    ],
    ids=["elbo-stl", "iwae-dreg", "iwae-backward"],
)
def test_derivatives_by_images_and_beta_agree_in_mean(pca, one, other, num_samples):
    params = pca(**WRONG)

    @partial(jax.jit, static_argnames="objective")
    def derivatives(objective):
        def loss(images, beta, key):
            return jnp.sum(objective(params, key, images, beta=beta, num_samples=num_samples)[0])

        keys = jax.random.split(KEY, 10_000)
        return jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0))(jnp.asarray(X), 0.7, keys)

    for ours, expected in zip(derivatives(other), derivatives(one), strict=True):
        difference = np.asarray(ours - expected)
        error = standard_error(difference)
        assert np.linalg.norm(error) <= 0.1 * np.linalg.norm(np.mean(expected, axis=0))
        assert np.all(np.abs(difference.mean(0)) <= 4 * error + 1e-12)


def test_the_terms_of_dreg_have_the_derivatives_of_stls(params, images):
    """Both are averages over the same samples."""

    def gradients(objective):
        @jax.jit
        @partial(jax.grad, argnums=(0, 1))
        def gradient(params, images):
            _, terms = objective(params, KEY, images, num_samples=3)
            return jnp.sum(terms.log_likelihood) + 0.3 * jnp.sum(terms.kl)

        gradients = gradient(*jax.tree.map(jnp.float64, (params, images)))
        return jax.tree.map(np.asarray, gradients)

    with jax.enable_x64(True):
        ours, expected = gradients(doubly_reparameterized), gradients(sticking_the_landing)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected[0].decoder))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, expected)


@pytest.mark.parametrize("name", ["stl", "iwae", "dreg"])
def test_forward_mode_agrees_with_reverse_mode(params, images, name):
    with jax.enable_x64(True):
        params, images = jax.tree.map(jnp.float64, (params, images))

        def outputs(params, images):
            return EVERY[name](params, KEY, images, beta=0.5, num_samples=3)

        rng = np.random.default_rng(5)
        tangents = jax.tree.map(lambda x: rng.normal(size=x.shape), (params, images))
        _, forward = jax.jit(partial(jax.jvp, outputs))((params, images), tangents)
        cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), forward)
        _, pull_back = jax.vjp(outputs, params, images)
        backward = pull_back(cotangents)
        one, other = (
            sum(np.sum(np.asarray(a) * b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in ((forward, cotangents), (backward, tangents))
        )
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_fewer_backward_samples_change_the_gradient_of_iwae_but_not_the_loss(params, images):
    def of(**options):
        def loss(params):
            return jnp.sum(importance_weighted(params, KEY, images, num_samples=6, **options)[0])

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, gradient), (expected, full) = of(backward=1), of()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not np.allclose(ravel_pytree(gradient)[0], ravel_pytree(full)[0], rtol=0.1)


def test_dreg_is_iwae_for_the_decoder_and_varies_less_for_the_encoder(pca):
    params = with_mixture(pca(**WRONG))
    iwae = gradients(importance_weighted, params, 1000, num_samples=16)
    dreg = gradients(doubly_reparameterized, params, 1000, num_samples=16)
    np.testing.assert_allclose(dreg["decoder"], iwae["decoder"], atol=1e-12)
    np.testing.assert_allclose(dreg["prior"], iwae["prior"], atol=1e-12)
    assert np.all(dreg["encoder"].var(0) < 0.5 * iwae["encoder"].var(0))


def test_dreg_is_iwae_for_covariates_of_the_decoder(images):
    config = replace(CONFIG, num_covariates=2, conditions="decoder")
    params = moved(init(KEY, config), 0.1)

    @partial(jax.jit, static_argnames="objective")
    def gradient(objective, c):
        return jax.grad(lambda c: jnp.sum(objective(params, KEY, images[:3], c, num_samples=4)[0]))(
            c
        )

    c = jnp.float32([[1, 2], [0, 1], [-1, 0.5]])
    ours, expected = (gradient(f, c) for f in (doubly_reparameterized, importance_weighted))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_signal_to_noise_ratio_grows_with_k_for_dreg_and_falls_for_iwae(pca):
    """As the root of k, and as its inverse.

    Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better, section 3.
    Tucker et al. (2019), section 6.
    """

    def ratios(k):
        dreg = gradients(doubly_reparameterized, pca(**WRONG), 500, num_samples=k)["encoder"]
        iwae = gradients(importance_weighted, pca(**WRONG), 500, num_samples=k)["encoder"]
        signal = np.linalg.norm(dreg.mean(0))  # of both, by the one that knows it better
        return signal / np.linalg.norm(dreg.std(0)), signal / np.linalg.norm(iwae.std(0))

    dreg, iwae = np.divide(ratios(64), ratios(4))
    assert 3 < dreg < 5
    assert 1 / 6 < iwae < 1 / 3


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_dreg_follows_its_formula(params, images, beta):
    """The encoder's gradient is sum_i v_i^2 (d log w_i / d z_i) (d z_i / d phi), at beta 1."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.float64, (params, images[:1]))
        phi, unravel = ravel_pytree(params.encoder)
        eps = noise(example_keys(KEY, 1), 4)[:, 0]

        def z(phi):
            q = encode(replace(params, encoder=unravel(phi)), x)
            return q.mean + jnp.exp(q.log_var / 2) * eps

        def log_w(z):
            ratio = prior(params).log_prob(z) - encode(params, x).log_prob(z)
            return decode(params, z).log_prob(jnp.tile(x, (4, 1, 1, 1))) + beta * ratio

        @jax.jit
        def by_hand(phi):
            v = jax.nn.softmax(log_w(z(phi)))
            weights = (1 - beta) * v + beta * v**2
            slopes = jax.grad(lambda z: jnp.sum(log_w(z)))(z(phi))
            return jnp.einsum("i,ij,ijp->p", weights, slopes, jax.jacobian(z)(phi))

        @jax.jit
        @jax.grad
        def gradient(params):
            return jnp.sum(doubly_reparameterized(params, KEY, x, beta=beta, num_samples=4)[0])

        expected = -by_hand(phi)
        gradient = ravel_pytree(gradient(params).encoder)[0]
        np.testing.assert_allclose(gradient, expected, atol=1e-10 * np.abs(expected).max())


# ---- What the losses are ----


CONFIG = ModelConfig((6, 5, 2), 2, network=(MlpEncoder(2, width=8), MlpDecoder((6, 5, 2), width=8)))


@pytest.fixture(scope="module")
def params():
    """Random weights and biases, the decoder's large enough that images tell latents apart."""
    rng = np.random.default_rng(2)
    params = init(jax.random.key(0), CONFIG)
    decoder = jax.tree.map(lambda x: 2 * x, params.decoder)
    return jax.tree.map(
        lambda x: x if x.ndim > 1 else jnp.float32(0.1 * rng.normal(size=x.shape)),
        replace(params, decoder=decoder),
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).uniform(size=(7, 6, 5, 2)).astype("f")


def noise(keys, num_samples):
    """The samples' eps, [samples, batch, 2]: sample k of an image has its key, folded with k.

    A single sample has the image's key itself.
    """

    def draw(k, key):
        key = key if num_samples == 1 else jax.random.fold_in(key, k)
        return jax.random.normal(key, (2,), float)

    over_images = jax.vmap(draw, (None, 0))
    return jax.vmap(over_images, (0, None))(jnp.arange(num_samples), keys)


def at(params, images, z):
    """log p(x|z), log p(z) and log q(z|x) of [..., batch, 2] by SciPy, and the posterior."""
    mean, log_var = map(np.float64, encode(params, images))
    logits = np.float64(decode(params, jnp.float32(z).reshape(-1, 2)).logits)
    logits = logits.reshape(*z.shape[:-1], *images.shape[1:])
    pixels = images * special.log_expit(logits) + (1 - images) * special.log_expit(-logits)
    log_q = stats.norm.logpdf(z, mean, np.exp(log_var / 2)).sum(-1)
    return pixels.sum((-3, -2, -1)), stats.norm.logpdf(z).sum(-1), log_q


def exact_kl(params, images):
    mean, log_var = map(np.float64, encode(params, images))
    return 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var)


def samples(params, images, eps):
    mean, log_var = map(np.float64, encode(params, images))
    return mean + np.exp(log_var / 2) * np.float64(eps)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_losses_are_their_formulas_at_draws_from_the_posterior(
    params, images, num_samples, beta
):
    keys = example_keys(KEY, 7)
    z = samples(params, images, noise(keys, num_samples))
    log_p_x, log_p_z, log_q = at(params, images, z)
    by_samples = np.mean(log_p_x + beta * (log_p_z - log_q), axis=0)
    weighted = special.logsumexp(log_p_x + beta * (log_p_z - log_q), axis=0) - np.log(num_samples)
    kl = exact_kl(params, images).sum(-1)
    expected = {"stl": by_samples, "iwae": weighted, "dreg": weighted}
    if num_samples > 1:
        expected["elbo"] = np.mean(log_p_x, axis=0) - beta * kl
    for name, bound in expected.items():
        loss, terms = EVERY[name](params, KEY, images, beta=beta, num_samples=num_samples)
        np.testing.assert_allclose(loss, -bound, rtol=1e-5)
        np.testing.assert_allclose(terms.log_likelihood, np.mean(log_p_x, axis=0), rtol=1e-5)
        sampled = np.mean(log_q - log_p_z, axis=0)
        np.testing.assert_allclose(terms.kl, kl if name == "elbo" else sampled, rtol=1e-4)
        np.testing.assert_allclose(terms.value, terms.log_likelihood - terms.kl, rtol=1e-6)


def one_sample(params, images):
    eps = jax.vmap(lambda key: jax.random.normal(key, (2,)))(example_keys(KEY, len(images)))
    return samples(params, images, eps)


def test_the_elbos_terms_are_the_networks_at_a_posterior_draw(params, images):
    terms = elbo(params, KEY, images)
    assert isinstance(terms, Elbo)
    assert all(field.shape == (7,) and field.dtype == jnp.float32 for field in terms)
    log_p_x, *_ = at(params, images, one_sample(params, images))
    np.testing.assert_allclose(terms.log_likelihood, log_p_x, rtol=1e-5)
    np.testing.assert_allclose(terms.kl, exact_kl(params, images).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(terms.value, terms.log_likelihood - terms.kl, rtol=1e-6)
    loss, same = negative_elbo(params, KEY, images, beta=3.0)
    np.testing.assert_allclose(loss, 3 * terms.kl - terms.log_likelihood, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), same, terms)


def test_free_bits_is_what_a_latent_costs_at_least(params, images):
    kls = exact_kl(params, images)
    least = float(kls.mean())
    below, above = np.argsort(kls.mean(0))
    assert kls[:, below].max() > least  # it is the mean over the images that counts
    loss, terms = negative_elbo(params, KEY, images, beta=3.0, free_bits=least)
    cost = least + kls[:, above].mean()
    np.testing.assert_allclose(jnp.mean(loss + terms.log_likelihood), 3 * cost, rtol=1e-5)
    np.testing.assert_allclose(terms.kl, kls.sum(-1), rtol=1e-4)

    def whole_cost(bias):
        log_var = params.encoder["log_var"] | {"bias": bias}
        moved = replace(params, encoder=params.encoder | {"log_var": log_var})
        loss, terms = negative_elbo(moved, KEY, images, free_bits=least)
        return jnp.sum(loss + terms.log_likelihood)

    gradient = jax.grad(whole_cost)(params.encoder["log_var"]["bias"])
    slopes = 0.5 * np.sum(np.exp(np.float64(encode(params, images).log_var)) - 1, axis=0)
    assert gradient[below] == 0
    np.testing.assert_allclose(gradient[above], slopes[above], rtol=1e-4)


def test_beta_tc_weights_the_total_correlation(params, images):
    mean, log_var = map(np.float64, encode(params, images))
    z = one_sample(params, images)
    log_p_x, log_p_z, log_q = at(params, images, z)
    correlation = np.empty(7)
    for n in range(7):
        density = [stats.norm.pdf(z[n], mean[m], np.exp(log_var[m] / 2)) for m in range(7)]
        log_q_z = np.log(np.mean([np.prod(latents) for latents in density]))
        log_q_z_j = [np.log(np.mean([latents[j] for latents in density])) for j in range(2)]
        correlation[n] = log_q_z - np.sum(log_q_z_j)
    assert np.abs(correlation).max() > 0.01
    for beta in 1.0, 0.0, 20.0:
        loss, terms = beta_tc(params, KEY, images, beta=beta)
        expected = -(log_p_x + log_p_z - log_q) + (beta - 1) * correlation
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.value, elbo(params, KEY, images).value, rtol=1e-5)


def test_mmd_is_the_u_statistic_of_its_kernel(params, images):
    z = one_sample(params, images)
    folded = jax.vmap(lambda key: jax.random.fold_in(key, 1))(example_keys(KEY, 7))
    y = np.stack([prior(params).sample(key, 1)[0] for key in folded])

    def mean_kernel(a, b, skip_itself):
        pairs = [(i, j) for i in range(7) for j in range(7) if i != j or not skip_itself]
        return np.mean([4 / (4 + np.sum((a[i] - b[j]) ** 2)) for i, j in pairs])

    squared = mean_kernel(z, z, True) + mean_kernel(y, y, True) - 2 * mean_kernel(z, y, False)
    loss, terms = maximum_mean_discrepancy(params, KEY, images, beta=0.5, weight=30.0)
    apart = jnp.mean(loss + terms.log_likelihood - 0.5 * terms.kl)
    np.testing.assert_allclose(apart, 30 * squared, atol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), terms, elbo(params, KEY, images))


@pytest.mark.parametrize("shift", [3e3, 1e6])
def test_mmd_of_far_latents_has_finite_gradients(params, images, shift):
    """There |z - y|^2, computed by a matrix product in float32, may round to less than -C."""
    mean = {name: x + shift * (name == "bias") for name, x in params.encoder["mean"].items()}
    params = replace(params, encoder={**params.encoder, "mean": mean})

    def mmd(params):
        loss, terms = maximum_mean_discrepancy(params, KEY, images, beta=0.0, weight=1.0)
        return jnp.mean(loss + terms.log_likelihood)

    value, gradients = jax.value_and_grad(mmd)(params)
    assert 0.5 < value < 2  # no kernel is above 1, and those across are near 0
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_mmd_has_the_expectation_of_the_distributions_discrepancy(pca, shift):
    """Of N(shift, I) and N(0, I): then |z - y|^2 / 2 is chi-squared, noncentral for z and y."""
    params = pca()
    mean = {"kernel": jnp.zeros((6, 2)), "bias": jnp.full(2, shift)}
    params = replace(params, encoder={"mean": mean, "log_var": jnp.zeros(2)})

    @jax.jit
    @jax.vmap
    def squared(key):
        x = jnp.zeros((16, 2, 3, 1))
        loss, terms = maximum_mean_discrepancy(params, key, x, weight=1.0)
        return jnp.mean(loss + terms.value)

    def kernel(squares):
        return 4 / (4 + 2 * squares)

    within = stats.chi2(2).expect(kernel)
    across = stats.ncx2(2, shift**2).expect(kernel) if shift else within
    values = np.asarray(squared(jax.random.split(KEY, 2000)))
    assert standard_error(values) < 0.005
    assert abs(values.mean() - 2 * (within - across)) < 4 * standard_error(values)


def mean_kernel(mean, other, variance, others_variance):
    """E[k(z, y)] of two independent Gaussians of two latents, by an integral of one dimension.

    4 / (4 + |z - y|^2) is the integral of 4 e^(-4 t) e^(-t |z - y|^2) over t > 0.
    """
    width = variance + others_variance

    def expected(t):
        factors = np.exp(-t * (mean - other) ** 2 / (1 + 2 * t * width)) / np.sqrt(
            1 + 2 * t * width
        )
        return 4 * np.exp(-4 * t) * np.prod(factors)

    return integrate.quad(expected, 0, np.inf, epsabs=1e-12)[0]


def discrepancy(mixture, mean, variance):
    """MMD^2 of N(mean, variance) and a mixture of Gaussians."""
    weights, means, variances = special.softmax(mixture[0]), mixture[1], np.exp(mixture[2])
    count = range(len(weights))
    of_y = [[mean_kernel(means[k], means[m], variances[k], variances[m]) for m in count]
            for k in count]  # fmt: skip
    across = [mean_kernel(mean, means[k], variance, variances[k]) for k in count]
    of_z = mean_kernel(mean, mean, variance, variance)
    return of_z + weights @ of_y @ weights - 2 * weights @ across


def central_differences(f, x, step=1e-4):
    def slope(at):
        moved = step * (np.arange(x.size) == at).reshape(x.shape)
        return (f(x + moved) - f(x - moved)) / (2 * step)

    return np.reshape([slope(at) for at in range(x.size)], x.shape)


@pytest.mark.parametrize("batch", [2, 16])
def test_mmd_has_the_expected_gradient_of_a_mixtures_weights(pca, batch):
    """And of its means and variances; with fewer images than components, and with more."""
    rng = np.random.default_rng(8)
    fields = "logits", "mean", "log_var"
    mixture = [*rng.normal(size=(1, 3)), *rng.normal(size=(2, 3, 2))]
    params = with_mixture(pca(**WRONG))
    params = replace(params, prior=dict(zip(fields, map(jnp.asarray, mixture), strict=True)))

    @jax.jit
    @jax.vmap
    @partial(jax.value_and_grad, argnums=1)
    def sampled(key, learned):
        loss, terms = maximum_mean_discrepancy(
            replace(params, prior=learned),
            key,
            jnp.zeros((batch, 2, 3, 1)),
            beta=0.0,
            weight=1.0,
        )
        return jnp.mean(loss + terms.log_likelihood)

    keys = jax.random.split(KEY, 4000)
    values, gradients = sampled(
        keys, jax.tree.map(lambda x: jnp.tile(x, (4000,) + (1,) * x.ndim), params.prior)
    )
    q = encode(params, jnp.zeros((1, 2, 3, 1)))
    mean, variance = np.asarray(q.mean[0]), np.exp(np.asarray(q.log_var[0]))
    values = np.asarray(values)
    exact = discrepancy(mixture, mean, variance)
    assert abs(values.mean() - exact) < 4 * standard_error(values)
    for at, name in enumerate(fields):
        slopes = central_differences(
            lambda x, at=at: discrepancy([*mixture[:at], x, *mixture[at + 1 :]], mean, variance),
            mixture[at],
        )
        gradient = np.asarray(gradients[name])
        error = standard_error(gradient)
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(slopes)
        assert np.all(np.abs(gradient.mean(0) - slopes) < 4 * error)


def test_mmd_of_many_components_makes_no_array_of_all_differences():
    """Which for two draws of each of 500 components of 40 latents would be 160 MB."""
    network = MlpEncoder(40, width=8), MlpDecoder((6, 5, 2), width=8)
    config = ModelConfig((6, 5, 2), 40, network=network, prior="mixture:components=500")
    images = jnp.zeros((10, 6, 5, 2))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(maximum_mean_discrepancy(params, KEY, images)[0])

    program = gradient.lower(init(KEY, config)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 120e6


# ---- Their gradients, and where they run ----


def everything_learned(posterior):
    """The likelihood's parameters too, and a mixture's and a flow's; and classes."""
    config = replace(CONFIG, likelihood="gaussian", posterior=posterior, num_classes=3)
    return with_mixture(init(KEY, config))


@pytest.mark.parametrize(
    ("objective", "posterior"),
    [
        (negative_elbo, None),
        (partial(negative_elbo, num_samples=2, beta=0.5), "iaf"),
        (partial(importance_weighted, num_samples=3, beta=0.5), "iaf"),
        (partial(beta_tc, beta=4.0), "gaussian"),
        (maximum_mean_discrepancy, "iaf"),
        (lambda *args: [log_likelihood(*args[:3], 700, *args[3:])], "iaf"),
    ],
    ids=["elbo", "elbo-2", "iwae", "beta_tc", "mmd", "log_likelihood"],
)
def test_gradients_equal_central_differences(objective, posterior, params, images):
    labels = ()
    if posterior:
        params, labels = everything_learned(posterior), (np.array([2, 0, 1]),)
    with jax.enable_x64(True):
        params, images = jax.tree.map(jnp.float64, (params, images[:3]))
        flat, unravel = ravel_pytree(params)

        @jax.jit
        @jax.value_and_grad
        def value_and_gradient(flat):
            return jnp.sum(objective(unravel(flat), KEY, images, *labels)[0])

        _, gradient = value_and_gradient(flat)
        step = 1e-5
        for direction in np.random.default_rng(4).normal(size=(2, flat.size)):
            direction /= np.linalg.norm(direction)
            above, _ = value_and_gradient(flat + step * direction)
            below, _ = value_and_gradient(flat - step * direction)
            slope = (above - below) / (2 * step)
            np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "m2"])
def test_objectives_run_under_jit_and_vmap_and_scan(params, images, name):
    @jax.jit
    def gradient(model):
        params, key = model

        def loss(params):
            return jnp.mean(EVERY[name](params, key, images, beta=0.5)[0])

        return ravel_pytree(jax.grad(loss)(params))[0]

    other = jax.tree.map(lambda x: 2 * x, params)
    models = [(params, KEY), (other, jax.random.key(1))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    alone = jnp.stack([gradient(model) for model in models])
    scale = 1e-4 * np.abs(alone).max()
    np.testing.assert_allclose(jax.vmap(gradient)(stacked), alone, atol=scale)
    _, scanned = jax.lax.scan(lambda _, model: (None, gradient(model)), None, stacked)
    np.testing.assert_allclose(scanned, alone, atol=scale)


# ---- Weights, keys, refusals ----


@pytest.mark.parametrize(
    ("warmup", "steps", "weights"),
    [
        ("none", [0, 7], [2, 2]),
        ("linear", [0, 1, 3, 4, 5, 8, 100], [0, 0.5, 1.5, 2, 2, 2, 2]),
        ("cyclical", [0, 1, 3, 4, 7, 8, 10, 12, 16], [0, 0.5, 1.5, 2, 2, 0, 1, 2, 0]),
    ],
)
def test_beta_is_warmed_up_over_4_steps(warmup, steps, weights):
    beta_at = WARMUPS.parse(warmup if warmup == "none" else f"{warmup}:steps=4")
    for step, weight in zip(steps, weights, strict=True):
        assert jax.jit(partial(beta_at, 2.0))(jnp.int32(step)) == weight
        assert beta_at(jnp.float32(3.0), jnp.int32(step)) == 1.5 * weight


@pytest.mark.parametrize("estimate", [elbo, partial(log_likelihood, num_samples=3)])
def test_an_images_noise_is_its_keys_whatever_the_batch(estimate, params, images):
    def values(key, images):
        return jax.tree.leaves(estimate(params, key, images))

    keys, whole = example_keys(KEY, 7), values(KEY, images)
    for a, b in zip(values(keys[3:5], images[3:5]), whole, strict=True):
        np.testing.assert_allclose(a, b[3:5], rtol=1e-4)
    assert not np.any(np.isclose(values(keys[:2], images[3:5])[0], whole[0][3:5], rtol=1e-4))


@pytest.mark.parametrize("num_samples", [1, 1500])
def test_the_importance_weighted_bound_does_not_depend_on_chunks(pca, num_samples):
    """As many samples are taken at once as the batch leaves room for."""
    x = np.random.default_rng(5).uniform(size=(300, 2, 3, 1))
    keys = example_keys(KEY, 300)
    whole = log_likelihood(pca(**WRONG), keys, x, num_samples)
    alone = log_likelihood(pca(**WRONG), keys[2:3], x[2:3], num_samples)
    np.testing.assert_allclose(alone, whole[2:3], rtol=1e-12)


def test_the_importance_weighted_bound_reaches_the_integral_over_the_latents(params, images):
    side = np.linspace(-6, 6, 121)
    z = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 1, 2)
    log_p_x, log_p_z, _ = at(params, images[:3], np.tile(z, (1, 3, 1)))
    log_p = special.logsumexp(log_p_x + log_p_z + 2 * np.log(side[1] - side[0]), axis=0)
    assert np.std(log_p_x, axis=0).min() > 0.5
    np.testing.assert_allclose(log_likelihood(params, KEY, images[:3], 10_000), log_p, atol=0.03)


def test_log_likelihood_takes_5000_samples_unless_told():
    assert inspect.signature(log_likelihood).parameters["num_samples"].default == 5000


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
        with refused("key has shape (6,): expected one key, or 7, one for each image"):
            estimate(params, jax.random.split(KEY, 6), images)


def test_no_samples_are_refused(params, images):
    with refused("num_samples is 0: expected at least 1"):
        log_likelihood(params, KEY, images, 0)


@pytest.mark.parametrize("name", ["stl", "dreg", "beta_tc"])
def test_a_flow_is_refused_where_log_q_is_needed_at_any_z(images, name):
    params = init(KEY, replace(CONFIG, posterior="iaf"))
    with refused("expected the posterior 'gaussian'", "train a flow by 'elbo'"):
        EVERY[name](params, KEY, images)


@pytest.mark.parametrize("changed", [{"posterior": "iaf"}, {"prior": "mixture"}])
def test_free_bits_are_refused_where_the_latents_kls_are_not_known(params, images, changed):
    params = with_mixture(init(KEY, replace(params.config, posterior="iaf")))
    params = replace(params, config=replace(CONFIG, **changed))
    with refused("free_bits needs the KL of every latent", "'gaussian'", "'standard_normal'"):
        negative_elbo(params, KEY, images, free_bits=0.1)


def test_miwae_of_complete_images_is_iwae_to_the_bit(images):
    params = init(KEY, ModelConfig((6, 5, 2), 2, network="mlp:width=8"))
    for x in (images, np.uint8(255 * images)):
        ours, iwae = (EVERY[name](params, KEY, x, beta=0.7) for name in ("miwae", "iwae"))
        jax.tree.map(np.testing.assert_array_equal, ours, iwae)


def test_miwae_is_a_bound_on_the_observed_pixels_which_only_it_takes(images):
    model = ModelConfig((6, 5, 2), 2, network="mlp:width=8")
    params = init(KEY, model)
    x = np.where(np.random.default_rng(1).random(images.shape) < 0.3, np.nan, images)
    miwae = OBJECTIVES.parse("miwae:num_samples=8")
    loss, _ = miwae(params, KEY, x)
    np.testing.assert_allclose(loss, -log_likelihood(params, KEY, x, 8), rtol=1e-5)
    p_x = decode(params, jnp.zeros((7, 2)))
    log_p = x * np.float64(p_x.logits) - np.logaddexp(0, np.float64(p_x.logits))
    np.testing.assert_allclose(p_x.log_prob(x), np.nansum(log_p, axis=(1, 2, 3)), rtol=1e-5)
    state, metrics = train_step(create_train_state(KEY, model, TrainConfig(objective=miwae)), x)
    assert np.isfinite([*metrics.values()]).all()
    assert np.isfinite(ravel_pytree(state.params)[0]).all()
    with refused("images have NaN: expected floats between 0 and 1"):
        train_step(create_train_state(KEY, model, TrainConfig(objective="iwae")), x)
    with refused("images have NaN: expected floats between 0 and 1"):
        importance_weighted(params, KEY, x)


# ---- Semi-supervised ----


M2 = ModelConfig((3,), 2, "mlp:width=4", "gaussian", num_classes=3, classifier=True)
ROWS = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def of_classes():
    return moved(init(KEY, M2), 0.3)


def test_the_bounds_of_m2_are_sums_over_the_classes(of_classes):
    keys = jax.random.split(KEY, 5)
    elbos = [jaxvae.elbo(of_classes, keys, ROWS, np.full(5, k)) for k in range(3)]
    bound = np.stack([terms.value - np.log(3) for terms in elbos], 1)  # of log p(x, y)
    q = np.float64(jaxvae.classify(of_classes, ROWS))
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-6)
    unlabelled = np.sum(q * (bound - np.log(q)), axis=1)
    labels = np.array([-1, 2, -1, 0, 1])
    y = np.maximum(labels, 0)
    expected = np.where(labels < 0, unlabelled, bound[np.arange(5), y])
    loss, terms = EVERY["m2"](of_classes, keys, ROWS, labels, alpha=7.0)
    np.testing.assert_allclose(terms.value, expected, rtol=1e-4)
    np.testing.assert_allclose(terms.value, terms.log_likelihood - terms.kl, rtol=1e-5)
    penalty = np.where(labels < 0, 0, -7 * np.log(q[np.arange(5), y]))
    np.testing.assert_allclose(loss, penalty - expected, rtol=1e-4)
    # Without labels none is known.
    _, terms = EVERY["m2"](of_classes, keys, ROWS)
    np.testing.assert_allclose(terms.value, unlabelled, rtol=1e-4)


def test_m2_weights_the_kl_of_the_latents_alone(of_classes):
    losses = [EVERY["m2"](of_classes, KEY, ROWS, beta=beta)[0] for beta in (0, 1, 2)]
    np.testing.assert_allclose(losses[2] - losses[1], losses[1] - losses[0], rtol=1e-4)
    kl = [jaxvae.elbo(of_classes, KEY, ROWS, np.full(5, k)).kl for k in range(3)]
    expected = np.sum(np.stack(kl, 1) * jaxvae.classify(of_classes, ROWS), axis=1)
    np.testing.assert_allclose(losses[1] - losses[0], expected, rtol=1e-3)


class Penalised(Gaussian):
    @property
    def penalty(self):
        return jnp.sum(self.mean**2, axis=-1)


@dataclass(frozen=True)
class PenalisedFamily(DiagonalGaussian):
    def bind(self, learned, encoded):
        return Penalised(*encoded[:2])


@pytest.mark.parametrize("name", ["beta_tc", "dreg", "m2"])
def test_the_penalty_of_a_posterior_is_part_of_the_loss(of_classes, name):
    labels = np.array([0, 2, 1, 0, 1])
    penalised = replace(of_classes, config=replace(M2, posterior=PenalisedFamily()))
    loss, without = (EVERY[name](p, KEY, ROWS, labels)[0] for p in (penalised, of_classes))
    expected = np.sum(np.float64(encode(of_classes, ROWS, labels).mean) ** 2, axis=1)
    np.testing.assert_allclose(loss - without, expected, rtol=1e-4)


def test_the_unlabelled_bound_is_below_log_p_x(of_classes):
    log_p_x = [log_likelihood(of_classes, KEY, ROWS, 2000, np.full(5, k)) for k in range(3)]
    log_p_x = scipy.special.logsumexp(np.stack(log_p_x), axis=0) - np.log(3)
    _, terms = EVERY["m2"](of_classes, KEY, ROWS, num_samples=1000)
    assert np.all(terms.value < log_p_x)


def test_the_gradient_of_m2_equals_central_differences(of_classes):
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(jnp.float64, of_classes))
        x, labels = jnp.float64(ROWS), np.array([-1, 2, -1, 0, 1])

        @jax.jit
        @jax.value_and_grad
        def value_and_gradient(flat):
            return jnp.sum(EVERY["m2"](unravel(flat), KEY, x, labels, alpha=3.0)[0])

        _, gradient = value_and_gradient(flat)
        for direction in np.random.default_rng(4).normal(size=(2, flat.size)):
            above, below = (
                value_and_gradient(flat + step * direction)[0] for step in (1e-5, -1e-5)
            )
            np.testing.assert_allclose(gradient @ direction, (above - below) / 2e-5, rtol=1e-5)


def test_m2_learns_two_clusters_from_three_labels_each():
    """Of which the nearest labelled example is often in the other cluster."""
    rng, classes = np.random.default_rng(0), np.arange(200) % 2
    x = np.float32(rng.normal(size=(200, 2)) * [0.15, 1])
    x[:, 0] += classes - 0.5
    labels = np.where(np.arange(200) < 6, classes, -1).astype(np.int32)
    nearest = np.argmin(np.sum((x[:, None] - x[:6]) ** 2, axis=-1), axis=1)
    assert np.mean(labels[nearest] == classes) < 0.95
    model = ModelConfig(
        (2,), 1, "mlp:width=16,layers=1", "gaussian:scale=feature", num_classes=2, classifier=True
    )
    train = jaxvae.TrainConfig(20, optimizer="adam", learning_rate=1e-2, objective="m2:alpha=10")
    state = jaxvae.create_train_state(KEY, model, train)
    for _ in range(30):
        state, _ = jaxvae.train_epoch(state, x, labels)
    found = np.argmax(jaxvae.classify(state.params, x), axis=1)
    assert np.mean(found == classes) > 0.98


def test_a_prior_is_fitted_to_the_latents_of_the_most_probable_class(of_classes):
    labels = np.array([-1, 2, -1, 0, 1])
    y = np.where(labels < 0, np.argmax(jaxvae.classify(of_classes, ROWS), axis=1), labels)
    losses = [EVERY["prior"](of_classes, KEY, ROWS, known)[0] for known in (labels, y)]
    np.testing.assert_array_equal(*losses)
    assert not np.allclose(losses[0], EVERY["prior"](of_classes, KEY, ROWS, (y + 1) % 3)[0])


def test_what_m2_needs(of_classes):
    with refused("the model has no classifier: expected ModelConfig(num_classes=..., classifier="):
        EVERY["m2"](init(KEY, replace(M2, classifier=False)), KEY, ROWS)
    with refused("alpha is -1: expected a number of at least 0"):
        EVERY["m2"](of_classes, KEY, ROWS, alpha=-1)
    with refused("labelled_share is 1.5: expected at most 1"):
        EVERY["m2"](of_classes, KEY, ROWS, labelled_share=1.5)
    labels = np.array([-1, 2, -1, 0, 1])
    with refused("labels are from -1 to 2: expected classes from 0 to 2"):
        jaxvae.elbo(of_classes, KEY, ROWS, labels)
    state = jaxvae.create_train_state(KEY, M2, jaxvae.TrainConfig(5))
    with refused("labels are from -1 to 2: expected classes from 0 to 2"):
        jaxvae.train_step(state, ROWS, labels)
