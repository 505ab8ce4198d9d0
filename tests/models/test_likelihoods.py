"""Distributions against numerical integration, exact sums, SciPy and float64 NumPy."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conftest import OF_IMAGES, examples_of, refused
from jax.test_util import check_grads
from scipy import integrate, special, stats

from jaxvae import ModelConfig, reparameterize
from jaxvae.models.config import LIKELIHOODS
from jaxvae.models.distributions import Gaussian
from jaxvae.models.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    GaussianFamily,
    GaussianPixels,
    binarize,
    bits_per_dimension,
)
from jaxvae.validation import is_of_pixels

pytestmark = pytest.mark.usefixtures("compile_quickly")

GAUSSIANS = [(0.0, 0.0), (1.5, 0.0), (0.0, 2.0), (-3.0, -4.0), (0.3, 1.2), (6.0, -8.0), (0.1, 0.2)]

# At 1/2 and beside it, on both sides of where the series ends, and far out.
LOGITS = [0, 1e-30, -1e-6, 1e-3, -0.1, 0.7, 0.999, 1.001, -1.01, 1.5, -5, 12, 50, -50]


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


def as_pixels(values):
    """One image for every value, of one pixel."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def continuous_bernoulli(logit):
    """SciPy's: the exponential distribution cut off at 1, of 1 - x for positive logits."""
    rate = abs(logit)
    cut = stats.truncexpon(rate, scale=1 / rate) if rate > 1e-7 else stats.uniform()
    return (lambda x: cut.logpdf(1 - x)) if logit > 0 else cut.logpdf, cut


def moments(log_density):
    """Mass, mean and variance on [0, 1], by integration."""
    pieces = np.unique([0, *np.geomspace(1e-4, 0.5, 8), *(1 - np.geomspace(1e-4, 0.5, 8)), 1])

    def expected(f):
        return sum(
            integrate.quad(lambda x: f(x) * np.exp(log_density(x)), a, b, epsabs=1e-14)[0]
            for a, b in itertools.pairwise(pieces)
        )

    mass, mean = expected(lambda x: 1), expected(lambda x: x)
    return mass, mean, expected(lambda x: (x - mean) ** 2)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_is_a_density_on_the_unit_interval(logit):
    log_z = -float(ContinuousBernoulli(as_pixels([logit])).log_prob(as_pixels([0]))[0])
    mass, _, _ = moments(lambda x: x * logit - log_z)
    np.testing.assert_allclose(mass, 1, rtol=5e-6)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_log_prob_equals_scipys(logit):
    x = np.linspace(0, 1, 21, dtype="f")
    p_x = ContinuousBernoulli(jnp.full((21, 1, 1, 1), logit, jnp.float32))
    expected = continuous_bernoulli(logit)[0](np.float64(x))
    np.testing.assert_allclose(p_x.log_prob(as_pixels(x)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logit", LOGITS)
def test_derivatives_of_continuous_bernoulli_are_its_moments(logit):
    """d log p(x) / dl = x - mean, and its derivative is minus the variance."""

    def distribution(logit):
        return ContinuousBernoulli(logit.reshape(1, 1, 1, 1))

    def log_prob(logit):
        return distribution(logit).log_prob(as_pixels([0.3]))[0]

    _, mean, variance = moments(continuous_bernoulli(logit)[0])
    logit = jnp.float32(logit)
    np.testing.assert_allclose(distribution(logit).mean, mean, rtol=1e-6)
    slope, curvature = (jax.jit(f)(logit) for f in (jax.grad(log_prob), jax.hessian(log_prob)))
    np.testing.assert_allclose(slope, 0.3 - mean, atol=3e-7)
    np.testing.assert_allclose(curvature, -variance, rtol=2e-5)


@pytest.mark.parametrize("logit", [-0.25, 0.6, -0.95])
def test_the_series_of_continuous_bernoulli_is_good_enough_for_float64(logit):
    _, mean, variance = moments(continuous_bernoulli(logit)[0])
    with jax.enable_x64(True):
        logits = jnp.full((1, 1, 1, 1), logit)
        value, slope = jax.jvp(
            lambda a: ContinuousBernoulli(a).mean, (logits,), (jnp.ones_like(logits),)
        )
    np.testing.assert_allclose(value, mean, rtol=1e-8)
    np.testing.assert_allclose(slope, variance, rtol=1e-7)


def test_derivatives_of_continuous_bernoulli_agree_with_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.linspace(-9.05, 9.05, 40).reshape(4, 5, 2, 1)
        x = jnp.asarray(np.random.default_rng(0).uniform(size=logits.shape))
        log_prob = jax.jit(lambda logits: ContinuousBernoulli(logits).log_prob(x))
        check_grads(log_prob, (logits,), order=2, modes=["rev"])
        mean = jax.jit(lambda logits: ContinuousBernoulli(logits).mean)
        check_grads(mean, (logits,), order=1, modes=["rev"])


def test_continuous_bernoulli_of_saturated_pixels_is_exact():
    logits, x = np.float32([(a, x) for a in (-1e30, -1e4, 1e4, 1e30) for x in (0, 1)]).T
    p_x = ContinuousBernoulli(as_pixels(logits))
    # e^(x l) / Z(l), with Z(l) = e^max(l, 0) / |l|.
    distance = np.where(logits > 0, 1 - x, x)
    expected = np.log(np.abs(np.float64(logits))) - np.abs(np.float64(logits)) * distance
    np.testing.assert_allclose(p_x.log_prob(as_pixels(x)), expected, rtol=1e-5)
    mean = np.where(logits > 0, 1 - 1 / np.abs(logits), 1 / np.abs(logits))
    np.testing.assert_allclose(p_x.mean.ravel(), mean, rtol=1e-5)
    assert ((p_x.mean >= 0) & (p_x.mean <= 1)).all()
    slope = jax.grad(lambda a: ContinuousBernoulli(a).log_prob(as_pixels(x)).sum())(p_x.logits)
    np.testing.assert_allclose(slope.ravel(), x - mean, atol=1e-6)


@pytest.mark.parametrize("logit", [0, 1e-30, -1e-4, 0.02, -1.3, 8, -50, 1e4])
def test_continuous_bernoulli_samples_have_its_distribution(logit):
    n = 20_000
    p_x = ContinuousBernoulli(jnp.full((n, 1, 1, 1), logit, jnp.float32))
    x = np.float64(p_x.sample(jax.random.key(1))).ravel()
    assert x.min() >= 0
    assert x.max() <= 1
    _, cut = continuous_bernoulli(logit)
    turned = 1 - x if logit > 0 else x
    assert stats.kstest(turned, cut.cdf).pvalue > 1e-3
    # At a logit of 0 they are the uniform numbers that the inverse is taken of.
    u = ContinuousBernoulli(jnp.zeros((n, 1, 1, 1))).sample(jax.random.key(1))
    np.testing.assert_allclose(cut.cdf(turned), np.ravel(u), atol=1e-6 + 1e-7 * abs(logit))


def gaussian_pixels(log_scale=-1.0, shape=(5, 4, 3, 2)):
    """From a decoder's outputs, and images."""
    outputs, x = np.random.default_rng(0).normal(size=(2, *shape)).astype("f")
    shared = {"log_scale": jnp.float32(log_scale)}
    return GaussianFamily().from_outputs(jnp.asarray(outputs), shared), special.expit(x), outputs


@pytest.mark.parametrize("log_scale", [-1.0, -3.5, 0.7])
def test_gaussian_pixels_are_scipys(log_scale):
    p_x, x, outputs = gaussian_pixels(log_scale)
    scale = np.exp(np.logaddexp(log_scale, -6))
    expected = stats.norm.logpdf(np.float64(x), special.expit(np.float64(outputs)), scale)
    np.testing.assert_allclose(p_x.log_prob(x), expected.sum((1, 2, 3)), rtol=2e-5)
    np.testing.assert_allclose(p_x.mean, special.expit(outputs), rtol=1e-6)


def test_gaussian_pixels_share_one_learned_scale_which_cannot_run_away():
    shared = GaussianFamily().init(3)
    assert jax.tree.map(jnp.shape, shared) == {"log_scale": ()}
    outputs = jnp.zeros((2, 4, 4, 3))
    start = GaussianFamily().from_outputs(outputs, shared)
    # At least the standard deviation of uniform pixels, and not much more.
    assert 1 / np.sqrt(12) < np.exp(start.log_scale) < 0.5
    x = jnp.full(outputs.shape, 0.5)

    def log_prob(log_scale):
        return GaussianFamily().from_outputs(outputs, {"log_scale": log_scale}).log_prob(x)[0]

    # Perfect reconstructions: the density would have no bound.
    values = jax.vmap(log_prob)(jnp.array([0.0, -6, -20, -1e4, -1e30]))
    bound = 4 * 4 * 3 * stats.norm.logpdf(0, 0, np.exp(-6))
    assert (np.diff(values) >= 0).all()
    assert values.max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(values[-2:], bound, rtol=1e-6)
    slope = jax.vmap(jax.grad(log_prob))(jnp.array([-1e4, 1e4]))
    np.testing.assert_allclose(slope, [0, -4 * 4 * 3], atol=1e-6)


def test_the_likeliest_scale_of_gaussian_pixels_is_the_root_mean_square_error():
    p_x, x, _ = gaussian_pixels()
    best = jnp.log(jnp.sqrt(jnp.mean((x - p_x.mean) ** 2)))
    total = jax.grad(lambda s: GaussianPixels(p_x.mean, s).log_prob(x).sum())
    np.testing.assert_allclose(total(best), 0, atol=1e-3)
    assert total(best - 0.1) > 1 > -1 > total(best + 0.1)


def test_gaussian_pixels_samples_have_its_moments():
    n = 50_000
    p_x = GaussianPixels(jnp.full((n, 1, 1, 1), 0.9), jnp.log(0.3))
    error = (np.float64(p_x.sample(jax.random.key(0))).ravel() - 0.9) / 0.3
    assert stats.kstest(error, stats.norm.cdf).pvalue > 1e-3
    np.testing.assert_allclose([error.mean(), error.var()], [0, 1], atol=5 * np.sqrt(2 / n))


def level_log_probs(location, log_scale):
    """log P of all 256 levels, and SciPy's P by differences in float64."""
    levels = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1)
    p_x = DiscretizedLogistic(*(jnp.full(levels.shape, v, "f") for v in (location, log_scale)))
    edges = [-np.inf, *((np.arange(255) + 0.5) / 255), np.inf]
    logistic = stats.logistic(np.float32(location), np.exp(np.float64(np.float32(log_scale))))
    # Differences are of the smaller tail.
    below, above = np.diff(logistic.cdf(edges)), -np.diff(logistic.sf(edges))
    expected = np.where(edges[1:] < np.float32(location), below, above)
    return p_x.log_prob(levels), expected


@pytest.mark.parametrize("log_scale", [-80, -20, -7.7, -5, -3, -0.7, 2, 20, 80])
@pytest.mark.parametrize("location", [0.5, 0, 1, 0.3137, 77 / 255, 77.5 / 255, -0.4, 1.7])
def test_discretized_logistic_sums_to_one_over_the_levels(location, log_scale):
    log_p, _ = level_log_probs(location, log_scale)
    assert np.isfinite(log_p).all()
    assert (log_p <= 0).all()
    np.testing.assert_allclose(np.exp(np.float64(log_p)).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("log_scale", [-7.7, -5, -3, -0.7, 2, 12])
@pytest.mark.parametrize("location", [0.5, 0.3137, 77 / 255, -0.4, 1.7])
def test_discretized_logistic_equals_the_differences_of_scipys(location, log_scale):
    log_p, expected = level_log_probs(location, log_scale)
    seen = expected > 1e-250
    assert seen.any()
    np.testing.assert_allclose(log_p[seen], np.log(expected[seen]), rtol=2e-5, atol=2e-5)


def test_derivatives_of_discretized_logistic_agree_with_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray([0, 255, 0, 255, *rng.integers(0, 256, 28)]).reshape(2, 4, 2, 2) / 255
        location = jnp.asarray(rng.uniform(-0.2, 1.2, x.shape))
        log_scale = jnp.asarray(rng.uniform(-4, 3, x.shape))
        log_prob = jax.jit(lambda m, s: DiscretizedLogistic(m, s).log_prob(x))
        check_grads(log_prob, (location, log_scale), order=2, modes=["rev"])


@pytest.mark.parametrize("log_scale", [-100, -80, -7.7, -3, 4, 80, 100])
def test_discretized_logistic_is_finite_and_has_float64s_derivatives_at_every_scale(log_scale):
    def with_slopes(dtype):
        location, x = np.meshgrid([-3, 0, 0.5, 77 / 255, 1], np.array([0, 77, 78, 255]) / 255)
        m, x = (jnp.asarray(np.float32(v).reshape(-1, 1, 1, 1), dtype) for v in (location, x))
        s = jnp.full_like(m, log_scale)

        @jax.jit
        def log_prob(m, s):
            value = DiscretizedLogistic(m, s).log_prob(x)
            return value.sum(), value

        slopes, value = jax.jit(jax.grad(log_prob, (0, 1), has_aux=True))(m, s)
        return [np.asarray(v).ravel() for v in (value, *slopes)]

    with jax.enable_x64(True):
        expected = with_slopes(jnp.float64)
    for ours, float64s in zip(with_slopes(jnp.float32), expected, strict=True):
        assert np.isfinite(ours).all()
        atol = 1e-5 + 1e-6 * np.abs(float64s).max()
        np.testing.assert_allclose(ours, float64s, rtol=1e-3, atol=atol)


def test_discretized_logistic_takes_levels_as_they_come():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (3, 16, 16, 2), np.uint8)
    outputs = jnp.asarray(rng.normal(size=(3, 16, 16, 4)), jnp.float32)
    p_x = DiscretizedLogistic.from_outputs(outputs, DiscretizedLogistic.init(2))
    log_prob = p_x.log_prob(levels)
    np.testing.assert_array_equal(p_x.log_prob(np.float32(levels) / 255), log_prob)
    between = (levels + rng.uniform(-0.49, 0.49, levels.shape)).clip(0, 255) / 255
    np.testing.assert_array_equal(p_x.log_prob(np.float32(between)), log_prob)


def test_discretized_logistic_is_told_locations_then_scales_of_pixels_from_minus_one_to_one():
    outputs = np.random.default_rng(0).normal(scale=3, size=(2, 4, 4, 6)).astype("f")
    p_x = DiscretizedLogistic.from_outputs(jnp.asarray(outputs), {})
    location, log_scale = outputs[..., :3], np.logaddexp(np.float64(outputs[..., 3:]) - 2, -7)
    # 2 y - 1 has twice the scale of y.
    np.testing.assert_allclose(2 * p_x.location - 1, location, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(p_x.log_scale) * 2, np.exp(log_scale), rtol=1e-5)
    np.testing.assert_allclose(p_x.mean, np.clip((location + 1) / 2, 0, 1), rtol=1e-5)


@pytest.mark.parametrize(("location", "log_scale"), [(0.5, -3), (0.02, -2), (1.1, -1), (0.4, -7)])
def test_discretized_logistic_samples_are_levels_at_their_probabilities(location, log_scale):
    n = 40_000
    fields = (jnp.full((n, 1, 1, 1), v, jnp.float32) for v in (location, log_scale))
    x = np.ravel(DiscretizedLogistic(*fields).sample(jax.random.key(0)))
    levels = np.rint(255 * x).astype(int)
    np.testing.assert_allclose(x, levels / 255, rtol=1e-6)
    _, p = level_log_probs(location, log_scale)
    common = p * n > 10
    counts = np.bincount(levels, minlength=256)
    counts, expected = [[*c[common], c[~common].sum()] for c in (counts, p * n)]
    statistic = np.sum((np.array(counts) - expected) ** 2 / np.maximum(expected, 1))
    assert stats.chi2.sf(statistic, common.sum()) > 1e-3


def test_bits_per_dimension_of_uniform_levels_are_eight():
    shape = (4, 3, 2)
    log_prob = jnp.array([-math.prod(shape) * math.log(256), 0])
    np.testing.assert_allclose(bits_per_dimension(log_prob, shape), [8, 0], rtol=1e-6)


def outputs_shape(likelihood, images):
    config = ModelConfig(images[1:], network="mlp", likelihood=likelihood)
    return images[0], *config.outputs_shape


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_likelihood_of_images_is_made_of_the_decoders_outputs(name):
    likelihood = LIKELIHOODS.parse(name)
    outputs = 5 * jax.random.normal(jax.random.key(0), outputs_shape(likelihood, (2, 5, 4, 3)))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    shared = likelihood.init(3)

    @jax.jit
    def made(outputs, shared):
        return likelihood.from_outputs(outputs, shared)

    p_x = made(outputs, shared)
    mean, draw = p_x.mean, p_x.sample(jax.random.key(1))
    assert mean.shape == draw.shape == images.shape
    assert mean.dtype == draw.dtype == jnp.float32
    assert ((mean >= 0) & (mean <= 1)).all()
    log_prob = p_x.log_prob(images)
    assert log_prob.shape == (2,)
    assert np.isfinite(log_prob).all()
    for i in range(2):
        alone = made(outputs[i : i + 1], shared).log_prob(images[i : i + 1])
        np.testing.assert_allclose(alone, log_prob[i : i + 1], rtol=1e-5)
    with refused("(2, 5, 4, 1)", "expected the decoder's (2, 5, 4, 3)"):
        p_x.log_prob(images[..., :1])
    with refused("int32", "expected uint8, or floats between 0 and 1"):
        p_x.log_prob(images.astype(np.int32))


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_terms_are_float32_whatever_the_decoder_and_the_images_are(name, dtype):
    of = {"columns": "columns:of=gaussian+poisson+student_t"}
    likelihood, rng = LIKELIHOODS.parse(of.get(name, name)), np.random.default_rng(0)
    shape = (800, 3) if name == "columns" else (2, 20, 20, 3)
    outputs = 3 * rng.normal(size=outputs_shape(likelihood, shape))
    images = rng.uniform(size=shape)
    if not is_of_pixels(likelihood.support):
        images = examples_of(likelihood.support, images.shape)
    images = jnp.asarray(images, dtype)
    made = likelihood.from_outputs(jnp.asarray(outputs, dtype), likelihood.init(3))
    half = jax.tree.map(lambda x: jnp.asarray(x, dtype), made)
    log_prob = half.log_prob(images)
    assert log_prob.dtype == jnp.float32
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), half)
    expected = exact.log_prob(jnp.asarray(images, jnp.float32))
    np.testing.assert_array_equal(log_prob, expected)


# log p(x) of one pixel by what the decoder gives for it, as functions of mpmath's numbers.


def bernoulli_log_p(x, logit):
    return x * logit - mp.log(1 + mp.exp(logit))


def continuous_bernoulli_log_p(x, logit):
    return x * logit - (mp.log(mp.expm1(logit) / logit) if logit else 0)


def gaussian_log_p(x, output, log_scale):
    scale = mp.exp(-6) + mp.exp(log_scale)
    error = (x - 1 / (1 + mp.exp(-output))) / scale
    return -mp.log(2 * mp.pi) / 2 - mp.log(scale) - error**2 / 2


def discretized_logistic_log_p(x, output, log_scale):
    scale = (mp.exp(-7) + mp.exp(log_scale - 2)) / 2
    a, b = ((x + side / mp.mpf(510) - (1 + output) / 2) / scale for side in (1, -1))
    below_a = 0 if x == 1 else -mp.log(1 + mp.exp(-a))
    above_b = 0 if x == 0 else -mp.log(1 + mp.exp(b))
    return below_a + above_b + (mp.log(-mp.expm1(b - a)) if 0 < x < 1 else 0)


# At 0, at kinks of the implementation and beside them, and far out.
KINKS = [0, -0.0, 1e-30, -1e-30, 1e-6, 1, -1, 0.999, -1.001, 5, -5]
FAR = [17, -17, 50, -50, 88, -88, 100, -100, 1e4, -1e4]
END_OF_A_BIN = 2 * 77.5 / 255 - 1
# 82.693147 is where the discretized logistic's log scale is 80.
DERIVATIVES = {
    "bernoulli": (bernoulli_log_p, KINKS + FAR, []),
    "continuous_bernoulli": (continuous_bernoulli_log_p, KINKS + FAR, []),
    "gaussian": (gaussian_log_p, [0, 1e-30, -1, 5, 17, -17, 100, -100], [-1, -6, -20, 20]),
    "discretized_logistic": (
        discretized_logistic_log_p,
        [0, 1, END_OF_A_BIN, -20],
        [0, -5, -20, 60, 82.693147, 100],
    ),
}


@pytest.mark.parametrize("name", list(DERIVATIVES))
def test_values_and_first_and_second_derivatives_are_mpmaths(name):
    """By everything that a pixel's density depends on, in reverse and in forward mode."""
    log_p, *axes = DERIVATIVES[name]
    levels, *at = zip(*itertools.product([0, 77, 255], *filter(None, axes)), strict=True)
    at = [jnp.float32(a) for a in at]

    def log_prob(level, *at):
        likelihood, shared = LIKELIHOODS.parse(name), {}
        if name == "gaussian":
            *at, shared["log_scale"] = at
        p_x = likelihood.from_outputs(jnp.stack(at).reshape(1, 1, 1, -1), shared)
        return p_x.log_prob(level.reshape(1, 1, 1, 1))[0]

    by = tuple(range(1, 1 + len(at)))
    first = jax.grad(log_prob, by)
    functions = log_prob, first, jax.jacrev(first, by), jax.jacfwd(first, by)
    value, first, *seconds = (jax.jit(jax.vmap(f))(np.uint8(levels), *at) for f in functions)
    pairs = list(itertools.combinations_with_replacement(range(len(at)), 2))
    ours = [np.stack([value, *first, *(h[i][j] for i, j in pairs)], 1) for h in seconds]
    orders = [(), *((i,) for i in range(len(at))), *pairs]
    with mp.workdps(60):
        expected = np.array(
            [
                [
                    mp.diff(
                        partial(log_p, mp.mpf(level) / 255),
                        tuple(float(a) for a in point),
                        tuple(order.count(i) for i in range(len(at))),
                    )
                    for order in orders
                ]
                for level, *point in zip(levels, *at, strict=True)
            ],
            float,
        )
    # Where terms of this size cancel, float32 leaves so much.
    rounding = 5e-6 * np.abs(expected).max(axis=1, keepdims=True)
    for derivatives in ours:
        off = np.abs(derivatives - expected) - 2e-5 * np.abs(expected) - rounding
        worst = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)[0]
        assert np.all(off <= 1e-6), (
            levels[worst], [float(a[worst]) for a in at], derivatives[worst], expected[worst]
        )  # fmt: skip


@pytest.mark.parametrize("output", [17, 30, 80])
def test_a_gaussian_pixel_comes_back_from_white_as_from_black(output):
    """The slope of a location that float32 rounds to 1 is as of one near 0."""

    def log_prob(output, x):
        p_x = GaussianFamily().from_outputs(output.reshape(1, 1, 1, 1), GaussianFamily().init(1))
        return p_x.log_prob(as_pixels([x]))[0]

    white = jax.grad(log_prob)(jnp.float32(output), 0)
    black = jax.grad(log_prob)(jnp.float32(-output), 1)
    assert white < 0
    np.testing.assert_allclose(white, -black, rtol=1e-5)


def test_binarized_pixels_are_white_with_the_grey_levels_probability(monkeypatch):
    """Over all values of the random bits, each equally likely: the probability itself."""
    drawn = []

    def every_value(key, shape, dtype):
        drawn.append((shape, dtype))
        pairs = np.arange(2**16, dtype=np.uint32).reshape(-1, 2)
        return jnp.asarray(pairs[:, 0] << 16 | pairs[:, 1])

    monkeypatch.setattr(jax.random, "bits", every_value)
    levels = np.arange(256, dtype=np.uint8)
    images = np.broadcast_to(levels.reshape(-1, 1, 1, 1), (256, 256, 256, 1))
    keys = jax.random.split(jax.random.key(0), 256)
    for scale in (lambda x: x, lambda x: x.astype(jnp.float32) / 255):
        white = jax.jit(lambda x, scale=scale: binarize(keys, scale(x)).sum((1, 2, 3)))(images)
        p = np.float64(white) / 256**2
        np.testing.assert_allclose(p, levels / 255, rtol=0, atol=2.0**-16)
        assert (p[0], p[-1]) == (0, 1)
    assert set(drawn) == {((2**15,), jnp.uint32)}


def test_binarized_pixels_are_independent_draws():
    n = 3_000
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 1), np.uint8)
    x[0, 0], x[4, 2] = 0, 255
    images = np.broadcast_to(x, (n, *x.shape))
    keys = jax.random.split(jax.random.key(0), n)
    p = x.ravel() / 255
    for key in keys, keys[0]:
        draws = np.reshape(binarize(key, images), (n, -1))
        assert draws.dtype == np.float32
        assert set(np.unique(draws)) == {0, 1}
        error = draws - p
        covariance = error.T @ error / n
        np.testing.assert_allclose(error.mean(0), 0, atol=2.5 / np.sqrt(n))
        np.testing.assert_allclose(covariance, np.diag(p * (1 - p)), atol=1.25 / np.sqrt(n))


def test_an_images_bits_come_from_its_own_key():
    images = np.random.default_rng(0).uniform(size=(6, 5, 3, 1)).astype("f")
    keys = jax.random.split(jax.random.key(2), 6)
    together = binarize(keys, images)
    order = np.array([3, 1, 0, 5])
    np.testing.assert_array_equal(binarize(keys[order], images[order]), together[order])
    np.testing.assert_array_equal(binarize(keys[:1], images[:1]), binarize(keys[0], images[:1]))
    np.testing.assert_array_equal(binarize(jax.random.key_data(keys), images), together)
    np.testing.assert_array_equal(jax.jit(binarize)(keys, images), together)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(binarize(keys, images), together)


def test_black_and_white_images_stay_as_they_are():
    x = np.random.default_rng(0).integers(0, 2, (4, 8, 8, 1))
    for images in (x > 0, np.uint8(255 * x), np.float32(x), jnp.asarray(x, jnp.bfloat16)):
        np.testing.assert_array_equal(binarize(jax.random.key(0), images), x)


def test_binarize_refuses_keys_that_are_not_the_images():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    with refused("key has shape (3,): expected one key, or 4, one for each image"):
        binarize(jax.random.split(jax.random.key(0), 3), images)
    with refused("int32", "expected uint8, or floats between 0 and 1"):
        binarize(jax.random.key(0), images.astype(np.int32))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 4, 4), (3, 4, 5, 1), (3, 4, 4, 3)])
def test_images_of_another_shape_than_the_logits_are_refused(shape):
    with refused(str(shape), "expected the decoder's (3, 4, 4, 1)"):
        Bernoulli(jnp.zeros((3, 4, 4, 1))).log_prob(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint16, np.complex64])
def test_images_of_another_type_are_refused(dtype):
    with refused(np.dtype(dtype).name, "expected uint8, or floats between 0 and 1"):
        Bernoulli(jnp.zeros((3, 4, 4, 1))).log_prob(np.zeros((3, 4, 4, 1), dtype))
