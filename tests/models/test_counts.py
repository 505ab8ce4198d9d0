"""Likelihoods of counts against SciPy and mpmath."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conftest import refused
from scipy import special, stats

from jaxvae.models.counts import (
    Counts,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    _exp,
    _log_negative_binomial,
    _log_poisson,
    _log_zero_inflated,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
GENES = 5
LIBRARY = [Poisson(), NegativeBinomial(), ZeroInflatedNegativeBinomial(dispersion="entry")]
PLAIN = [Poisson(size=0), NegativeBinomial(size=0), ZeroInflatedNegativeBinomial(size=0)]


# Compiled as one program each; eagerly every operation would be one.
log_prob = jax.jit(lambda p_x, x: p_x.log_prob(x))
with_slope = jax.jit(jax.value_and_grad(lambda p_x, x: jnp.sum(p_x.log_prob(x))))
mean_and_sample = jax.jit(lambda p_x, key: (p_x.mean, p_x.sample(key)))


def name_of(family):
    return type(family).__name__


def made(family, batch=4, seed=0, scale=1.0):
    """From random outputs and parameters, and counts."""
    rng = np.random.default_rng(seed)
    outputs = scale * rng.normal(size=(batch, GENES * family.outputs_per_channel)).astype("f")
    learned = {k: jnp.asarray(rng.normal(size=v.shape), v.dtype)
               for k, v in family.init(GENES).items()}  # fmt: skip
    x = rng.poisson(4, (batch, GENES)) * rng.integers(0, 2, (batch, GENES))
    return family.from_outputs(jnp.asarray(outputs), learned), x, outputs, learned


def scipys(family, mean, log_theta, zero_logits, x):
    """log p of each count by SciPy."""
    if isinstance(family, Poisson):
        return stats.poisson.logpmf(x, mean)
    theta = np.exp(10 * np.tanh(log_theta / 10))
    p = stats.nbinom.pmf(x, theta, theta / (theta + mean))
    pi = special.expit(zero_logits) if family.zero_inflated else 0
    return np.log(pi * (x == 0) + (1 - pi) * p)


def parts(family, outputs, learned):
    """The log means or logits, log thetas and zero logits among a decoder's outputs."""
    mean, *others = np.split(np.float64(outputs), family.outputs_per_channel, axis=-1)
    zero_logits = others.pop() if getattr(family, "zero_inflated", False) else None
    theta = others.pop() if others else np.float64(learned.get("log_theta", 0))
    return mean, theta, zero_logits


@pytest.mark.parametrize("family", PLAIN, ids=name_of)
def test_log_prob_is_scipys(family):
    p_x, x, outputs, learned = made(family)
    log_mean, *others = parts(family, outputs, learned)
    expected = scipys(family, np.exp(log_mean), *others, x)
    for dtype in (np.int64, np.uint8):
        np.testing.assert_allclose(log_prob(p_x, x.astype(dtype)), expected.sum(1), rtol=1e-5)


@pytest.mark.parametrize("family", LIBRARY, ids=name_of)
def test_with_a_library_size_the_means_are_shares_of_the_total(family):
    p_x, x, outputs, learned = made(family)
    logits, *others = parts(family, outputs, learned)
    mean = x.sum(1, keepdims=True) * special.softmax(logits, axis=1)
    expected = scipys(family, mean, *others, x)
    np.testing.assert_allclose(log_prob(p_x, x), expected.sum(1), rtol=2e-5)
    kept = 1 - special.expit(others[1]) if others[1] is not None else 1
    np.testing.assert_allclose(p_x.with_size_of(x).mean, mean * kept, rtol=1e-5)
    np.testing.assert_allclose(p_x.mean, 1e4 * special.softmax(logits, axis=1) * kept, rtol=1e-5)


@pytest.mark.parametrize("family", LIBRARY, ids=name_of)
def test_with_missing_counts_the_observed_means_add_up_to_the_observed_total(family):
    p_x, x, outputs, learned = made(family)
    observed = np.random.default_rng(1).random(x.shape) < 0.6
    observed[0], observed[1] = True, False
    logits, theta, zero_logits = parts(family, outputs, learned)
    total = np.where(observed, x, 0).sum(1, keepdims=True)
    share = special.softmax(np.where(observed, logits, -np.inf)[[0, 2, 3]], axis=1)
    mean = np.zeros_like(logits)
    mean[[0, 2, 3]] = total[[0, 2, 3]] * share
    terms = scipys(family, np.where(observed, mean, 1), theta, zero_logits, x)
    part = np.where(observed, x, np.nan)
    log_p, slope = with_slope(p_x, part)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
    expected = np.where(observed, terms, 0).sum(1)
    np.testing.assert_allclose(log_prob(p_x, part), expected, rtol=2e-5, atol=1e-6)
    assert log_p == pytest.approx(expected.sum(), rel=2e-5)
    np.testing.assert_allclose(slope.outputs[1], 0, atol=1e-6)  # of which nothing is observed


@pytest.mark.parametrize("family", PLAIN, ids=name_of)
def test_probabilities_sum_to_one_and_samples_have_them(family):
    n = 20_000
    outputs = np.full((n, family.outputs_per_channel), [0.8, -0.5][: family.outputs_per_channel])
    learned = {k: jnp.full(v.shape, 0.4) for k, v in family.init(1).items()}
    p_x = family.from_outputs(jnp.asarray(outputs, jnp.float32), learned)
    p = np.exp(np.float64(log_prob(p_x, np.arange(n)[:, None])))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    mean, x = map(np.asarray, mean_and_sample(p_x, jax.random.key(21)))
    assert p @ np.arange(n) == pytest.approx(mean[0, 0], rel=1e-4)
    assert x.shape == (n, 1)
    assert x.dtype == np.float32
    assert p_x.sample(jax.random.key(0, impl="rbg")).shape == (n, 1)
    np.testing.assert_array_equal(x, np.rint(x))
    common = p * n > 10
    counts = np.bincount(x.ravel().astype(int), minlength=n)
    seen, expected = ([*c[common], c[~common].sum()] for c in (counts, n * p))
    assert stats.chisquare(seen, np.array(expected) * n / np.sum(expected)).pvalue > 1e-3


def exact(x, log_mean, log_theta=None, zero_logits=None):
    """Log-probability, of mpmath's numbers."""
    m = mp.exp(log_mean)
    if log_theta is None:
        return x * log_mean - m - mp.loggamma(x + 1)
    theta = mp.exp(log_theta)
    log_p = (
        mp.loggamma(x + theta) - mp.loggamma(theta) - mp.loggamma(x + 1)
        - theta * mp.log1p(m / theta) - x * mp.log1p(theta / m)
    )  # fmt: skip
    if zero_logits is None:
        return log_p
    odds = mp.exp(zero_logits)
    return mp.log((odds * (x == 0) + mp.exp(log_p)) / (1 + odds))


COUNTS = [0, 1, 16, 17, 300, 1e6]
LOG_MEANS = [-1e3, -50, 0.5, 5, 13.8, 50]
LOG_THETAS = [-9.9, 0, 2, 2.1, 9.9]  # the derivative has another form above log 8 = 2.08
ZEROS = [-1e3, -50, 0.3, 50]
GRIDS = {
    _log_poisson: [COUNTS, LOG_MEANS],
    _log_negative_binomial: [COUNTS, LOG_MEANS, LOG_THETAS],
    _log_zero_inflated: [[0, 1, 300], [-50, 0, 5, 50], [-9.9, 0, 9.9], ZEROS],
}


@pytest.mark.parametrize("log_p", list(GRIDS))
def test_values_and_derivatives_are_mpmaths_at_extremes(log_p):
    """At counts of 0 and 1e6, log means of 50 and beyond, and tiny and huge dispersion."""
    grid = [np.float32(x).ravel() for x in np.meshgrid(*GRIDS[log_p])]
    at = range(1, len(grid))
    value = jax.jit(log_p)(*grid)
    slopes = jax.jit(jax.grad(lambda *xs: jnp.sum(log_p(*xs)), tuple(at)))(*grid)
    with mp.workdps(40):
        points = [[mp.mpf(float(v)) for v in point] for point in zip(*grid, strict=True)]
        expected = [float(exact(*p)) for p in points]
        of_each = [
            [
                float(mp.diff(lambda t, i=i, p=p: exact(*p[:i], t, *p[i + 1 :]), p[i]))
                for p in points
            ]
            for i in at
        ]
    for slope, of_i in zip(slopes, of_each, strict=True):
        assert np.isfinite(slope).all()
        np.testing.assert_allclose(slope, of_i, rtol=2e-5, atol=2e-4 + 1e-8 * grid[0].max())
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value, expected, rtol=3e-6, atol=0.05)  # 0.03 at 1e6
    common = (grid[0] <= 300) & (np.abs(grid[1]) <= 5)
    np.testing.assert_allclose(value[common], np.array(expected)[common], rtol=3e-6, atol=2e-5)


def test_the_derivative_by_the_count_is_mpmaths():
    x, log_mean, log_theta = jnp.float32([[3, 5, 40], [0, 2, 1], [-2, 1, 4]])
    slope = jax.grad(lambda x: jnp.sum(_log_negative_binomial(x, log_mean, log_theta)))(x)
    points = zip(*np.float64([x, log_mean, log_theta]), strict=True)
    expected = [float(mp.diff(lambda t, p=p: exact(t, *p[1:]), p[0])) for p in points]
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_beyond_float32_the_exponential_has_its_tangent():
    assert _exp(jnp.float32(60.5)) == pytest.approx(np.exp(60) * 1.5, rel=1e-5)
    for x in (100.0, 1e4):
        assert jax.grad(_exp)(x) == pytest.approx(np.exp(60), rel=1e-5)
        assert np.isfinite(jax.value_and_grad(lambda x: _log_poisson(jnp.float32(3), x))(x)).all()


@pytest.mark.parametrize("family", LIBRARY, ids=name_of)
@pytest.mark.parametrize("total", [0, 1e6])
def test_logits_beyond_50_and_totals_of_0_and_a_million_are_finite(family, total):
    x = np.zeros((4, GENES), np.float32)
    x[:, 0] = total
    for scale in (50, 1e4):
        p_x = made(family, scale=scale)[0]
        everything = [with_slope(p_x, x)]
        if family == LIBRARY[-1]:  # which draws all that the others draw
            everything.append(mean_and_sample(p_x, KEY))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))


def test_of_an_empty_example_nothing_can_be_learned():
    x = np.zeros((4, GENES), np.float32)
    p_x = made(Poisson())[0]
    log_p, slope = with_slope(p_x, x)
    assert log_p == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(slope.outputs, 0, atol=1e-5)


def test_arrays_of_any_rank_are_one_example():
    """The total, the shares and the sum are over all axes but the first."""
    p_x, x, _, _ = made(Poisson(), batch=4)
    grid = Counts(p_x.outputs.reshape(1, 2, 2, GENES), p_x.log_size)
    row = Counts(p_x.outputs.reshape(1, -1), p_x.log_size)
    np.testing.assert_allclose(
        log_prob(grid, x.reshape(1, 2, 2, GENES)), log_prob(row, x.reshape(1, -1)), rtol=1e-5
    )


def test_values_that_are_no_counts_are_refused():
    p_x, x, _, _ = made(Poisson())
    for bad, has in ((x - 1, "values from -1"), (x + 0.5, "fractional")):
        with refused(has, "expected counts, whole numbers of at least 0"):
            p_x.log_prob(bad)
    with refused("images have NaN or infinity: expected finite numbers"):
        p_x.log_prob(x + np.inf)
    with refused("(4, 3)", "expected the decoder's (4, 5)"):
        p_x.log_prob(x[:, :3])
    with refused("size is -1: expected at least 0"):
        Poisson(size=-1)
    with refused("dispersion is 'gene': expected 'feature' or 'entry'"):
        NegativeBinomial(dispersion="gene")
