"""The mixture of discretized logistics against mpmath and float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conftest import refused
from jax.test_util import check_grads
from scipy import special, stats

import jaxvae
from jaxvae.explorer.program import decoder_program
from jaxvae.models.config import LIKELIHOODS
from jaxvae.models.likelihoods import DiscretizedLogistic
from jaxvae.models.logistic_mixture import DiscretizedLogisticMixture, LogisticMixture

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
LEVELS = np.arange(256, dtype=np.uint8)


def random_outputs(components, channels, batch=1, side=1, scale=1.0, seed=0):
    width = LogisticMixture(components).outputs_per_pixel(channels)
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(batch, side, side, width)).astype(np.float32)


def made(outputs, components):
    return LogisticMixture(components).from_outputs(jnp.asarray(outputs), {})


def exact_log_prob(outputs, levels, components):
    """Log-probability of one pixel from the decoder's outputs, by equations 1 to 3, in mpmath."""
    channels = len(levels)
    outputs = [mp.mpf(float(x)) for x in outputs]
    rows = [outputs[i : i + components] for i in range(0, len(outputs), components)]
    logits, rest = rows[0], rows[1:]
    location, log_scale, coefficients = rest[:channels], rest[channels : 2 * channels], rest[6:]
    x = [2 * mp.mpf(int(level)) / 255 - 1 for level in levels]  # the paper's pixels, in [-1, 1]
    total = mp.mpf(0)
    for k in range(components):
        p = mp.exp(logits[k]) / sum(map(mp.exp, logits))
        means = [row[k] for row in location]
        if channels == 3:
            alpha, beta, gamma = (mp.tanh(row[k]) for row in coefficients)
            means[1] += alpha * x[0]
            means[2] += beta * x[0] + gamma * x[1]
        for c in range(channels):
            scale = mp.exp(-7) + mp.exp(log_scale[c][k] - 2)
            above, below = ((x[c] + side / mp.mpf(255) - means[c]) / scale for side in (1, -1))
            upper = mp.mpf(1) if levels[c] == 255 else 1 / (1 + mp.exp(-above))
            lower = mp.mpf(0) if levels[c] == 0 else 1 / (1 + mp.exp(-below))
            p *= upper - lower
        total += p
    return float(mp.log(total))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_log_prob_is_mpmaths(channels, scale):
    outputs = random_outputs(3, channels, batch=12, scale=scale)
    images = np.random.default_rng(1).integers(0, 256, (12, 1, 1, channels), np.uint8)
    images[:3] = np.uint8([0, 255, 254]).reshape(3, 1, 1, 1)
    log_prob = jax.jit(lambda outputs: made(outputs, 3).log_prob(images))(outputs)
    with mp.workdps(800):
        expected = [
            exact_log_prob(o[0, 0], x[0, 0], 3) for o, x in zip(outputs, images, strict=True)
        ]
    np.testing.assert_allclose(log_prob, expected, rtol=2e-5, atol=1e-5)


def test_log_prob_is_the_sum_over_pixels():
    outputs = random_outputs(4, 3, batch=2, side=5)
    images = np.random.default_rng(1).integers(0, 256, (2, 5, 5, 3), np.uint8)
    pixels = made(outputs.reshape(50, 1, 1, -1), 4).log_prob(images.reshape(50, 1, 1, 3))
    together = made(outputs, 4).log_prob(images)
    np.testing.assert_allclose(together, pixels.reshape(2, 25).sum(axis=1), rtol=1e-5)


def test_one_component_without_coefficients_is_a_discretized_logistic():
    for channels in (1, 3):
        outputs = random_outputs(1, channels, batch=3, side=4)
        images = np.random.default_rng(1).integers(0, 256, (3, 4, 4, channels), np.uint8)
        if channels == 3:
            outputs[..., -3:] = 0
        ours = made(outputs, 1)
        of_one = jnp.asarray(outputs[..., 1 : 1 + 2 * channels])
        plain = DiscretizedLogistic.from_outputs(of_one, {})
        np.testing.assert_allclose(ours.log_prob(images), plain.log_prob(images), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_probabilities_of_one_channel_sum_to_one(scale):
    outputs = np.broadcast_to(random_outputs(3, 1, scale=scale), (256, 1, 1, 9))
    log_prob = made(outputs, 3).log_prob(LEVELS[:, None, None, None])
    assert special.logsumexp(np.float64(log_prob)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_probabilities_given_earlier_channels_sum_to_one(channels):
    """sum_b p(r, g, b) = p(r, g), sum_g p(r, g) = p(r) and sum_r p(r) = 1."""
    p = made(random_outputs(2, 3, scale=2.0), 2)

    def log_prob(images):  # of the first channels alone
        c = images.shape[-1]
        first = p._replace(location=p.location[..., :c, :], log_scale=p.log_scale[..., :c, :])
        first = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(images), *x.shape[1:])), first)
        return np.float64(first.log_prob(images))

    images = np.full((256, 1, 1, channels), 77, np.uint8)
    before = log_prob(images[:1, ..., :-1])[0] if channels > 1 else 0
    images[..., -1] = LEVELS[:, None, None]
    assert special.logsumexp(log_prob(images)) == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_have_their_probabilities(channels):
    n = 40_000
    outputs = random_outputs(2, channels, scale=0.6)
    p = made(np.broadcast_to(outputs, (n, *outputs.shape[1:])), 2)
    x = np.asarray(p.sample(KEY))
    assert x.shape == (n, 1, 1, channels)
    assert x.dtype == np.float32
    levels = np.rint(255 * x).astype(np.uint8)
    np.testing.assert_allclose(x, levels / 255, rtol=1e-6)
    # The entropy of the density is the mean of -log p over its samples, and for any subset of
    # levels the frequency is the probability.
    if channels == 1:
        log_prob = made(np.broadcast_to(outputs, (256, *outputs.shape[1:])), 2).log_prob(
            LEVELS[:, None, None, None]
        )
        expected = n * np.exp(np.float64(log_prob))
        common = expected > 10
        counts = np.bincount(levels.ravel(), minlength=256)
        pairs = [[*c[common], c[~common].sum()] for c in (counts, expected)]
        statistic = np.sum(np.subtract(*pairs) ** 2 / np.maximum(pairs[1], 1))
        assert stats.chi2.sf(statistic, common.sum()) > 1e-3
        return
    # E[q(x) / p(x)] = 1 for a density q: the same model with the colours shifted.
    q = p._replace(location=p.location + 0.02)
    ratio = np.exp(np.float64(q.log_prob(levels) - p.log_prob(levels)))
    assert ratio.mean() == pytest.approx(1, abs=5 * ratio.std() / np.sqrt(n))
    without = p._replace(coefficients=jnp.zeros_like(p.coefficients))
    ratio = np.exp(np.float64(p.log_prob(levels) - without.log_prob(levels)))
    assert np.log(ratio).mean() > 0  # the samples have the dependence on earlier channels


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_mean_is_that_of_samples(channels):
    n = 20_000
    outputs = random_outputs(3, channels, scale=0.4)
    outputs[..., :3] *= 3
    p = made(np.broadcast_to(outputs, (n, *outputs.shape[1:])), 3)
    x = np.asarray(p.sample(KEY))
    error = 5 * x.std(axis=0) / np.sqrt(n) + 2e-3  # and what clipping does to conditional means
    assert np.all(np.abs(x.mean(axis=0) - p.mean[0]) < error)


@pytest.mark.parametrize("log_scale", [-9.0, -3.0, -0.1, 0.1, 3.0, 12.0])
def test_the_mean_of_one_channel_is_the_integral(log_scale):
    """int_0^1 1 - F(y) dy by mpmath."""
    locations = np.float32([-50, -0.3, 0, 0.4, 1, 1.2, 50])
    shape = (7, 1, 1, 1, 1)
    p = DiscretizedLogisticMixture(
        jnp.zeros((7, 1, 1, 1)),
        jnp.asarray(locations).reshape(shape),
        jnp.full(shape, log_scale, jnp.float32),
        jnp.zeros((7, 1, 1, 0, 1)),
    )
    with mp.workdps(40):
        s = mp.exp(mp.mpf(float(np.float32(log_scale))))
        expected = [
            float(s * (mp.log1p(mp.exp(m / s)) - mp.log1p(mp.exp((m - 1) / s))))
            for m in map(mp.mpf, map(float, locations))
        ]
    np.testing.assert_allclose(p.mean.ravel(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_finite_differences_in_float64(channels):
    with jax.enable_x64(True):
        outputs = jnp.asarray(random_outputs(2, channels, batch=2, side=2), jnp.float64)
        images = np.random.default_rng(1).integers(0, 256, (2, 2, 2, channels), np.uint8)
        images[0, 0, 0], images[1, 1, 1] = 0, 255
        check_grads(
            lambda outputs: made(outputs, 2).log_prob(images), (outputs,), order=1, atol=2e-5,
            rtol=2e-5,
        )  # fmt: skip


def test_everything_is_finite_at_extremes():
    images = np.uint8([0, 128, 255]).reshape(3, 1, 1, 1).repeat(3, axis=-1)

    @jax.jit
    def everything(outputs):
        p = made(outputs, 2)
        slope = jax.grad(lambda outputs: jnp.sum(made(outputs, 2).log_prob(images)))(outputs)
        return p.log_prob(images), p.mean, p.sample(KEY), slope

    for value, other in itertools.product([-1e4, -100.0, 0.0, 100.0, 1e4], repeat=2):
        outputs = np.full((3, 1, 1, 20), value, np.float32)
        outputs[..., ::2] = other
        results = everything(outputs)
        assert all(np.isfinite(x).all() for x in results)
        assert np.all((results[1] >= 0) & (results[1] <= 1))


def test_the_family():
    assert LIKELIHOODS.parse("logistic_mixture") == LogisticMixture(10)
    assert [LogisticMixture(4).outputs_per_pixel(c) for c in (1, 2, 3, 4)] == [12, 20, 40, 36]
    with refused("components is 0"):
        LogisticMixture(0)
    for network in ("mlp:width=4", "conv", "residual:width=4"):
        config = jaxvae.ModelConfig(
            (8, 8, 3), 2, network=network, likelihood="logistic_mixture:components=2"
        )
        assert config.outputs_shape == (8, 8, 20)
        mean = jax.eval_shape(lambda config=config: jaxvae.sample(jaxvae.init(KEY, config), KEY, 2))
        assert mean.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_explorer_translates_the_mean(channels):
    config = jaxvae.ModelConfig((4, 4, channels), 2, network="mlp:width=4",
                                likelihood="logistic_mixture:components=2")  # fmt: skip
    program = decoder_program(jaxvae.init(KEY, config))
    assert program.sizes[program.output] == 16 * channels
