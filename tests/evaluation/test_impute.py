"""Imputation against a linear-Gaussian model, whose conditional distributions are known."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import moved, refused
from scipy import stats

import jaxvae

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
FEATURES = 5
LOADINGS = np.random.default_rng(0).normal(size=(FEATURES, 2))
BIAS = np.linspace(-1, 1, FEATURES)
NOISE = np.linspace(0.3, 0.7, FEATURES)
COVARIANCE = LOADINGS @ LOADINGS.T + np.diag(NOISE**2)


class WideEncoder(nn.Module):
    """A posterior as wide as the prior, whatever the observed entries are: a valid proposal."""

    @nn.compact
    def __call__(self, images):
        log_var = self.param("log_var", nn.initializers.zeros, (2,))
        return jnp.zeros((len(images), 2)), jnp.broadcast_to(log_var, (len(images), 2))


class LinearDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(FEATURES, name="x")(z).reshape(-1, FEATURES)


@pytest.fixture(scope="module")
def params():
    """x = W z + b + noise, with z ~ N(0, I)."""
    config = jaxvae.ModelConfig((FEATURES,), 2, network=(WideEncoder(), LinearDecoder()),
                                likelihood="gaussian:scale=feature")  # fmt: skip
    log_scale = -6 + np.log(np.expm1(np.log(NOISE) + 6))  # of which the smooth maximum is taken
    return replace(
        jaxvae.init(KEY, config),
        decoder={"x": {"kernel": jnp.float32(LOADINGS.T), "bias": jnp.float32(BIAS)}},
        likelihood={"log_scale": jnp.float32(log_scale)},
    )


def rows(x):
    return np.float32(x).reshape(-1, FEATURES)


X = rows(np.random.default_rng(1).multivariate_normal(BIAS, COVARIANCE, 3))
MISSING = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
PART = np.where(rows(MISSING) > 0, np.nan, X)


def conditional(x, missing):
    """Mean and covariance of the missing entries, given the others."""
    m, o = np.flatnonzero(missing), np.flatnonzero(~missing)
    gain = COVARIANCE[np.ix_(m, o)] @ np.linalg.inv(COVARIANCE[np.ix_(o, o)])
    return (
        BIAS[m] + gain @ (x[o] - BIAS[o]),
        COVARIANCE[np.ix_(m, m)] - gain @ COVARIANCE[np.ix_(o, m)],
    )


def test_imputation_is_the_conditional_gaussian(params):
    filled = jaxvae.impute(params, KEY, PART, 20_000, num_draws=4000)
    assert filled.mean.shape == X.shape
    assert filled.draws.shape == (4000, *X.shape)
    for i, missing in enumerate(MISSING):
        mean, covariance = conditional(X[i], missing)
        variance = np.diag(covariance)
        ess = float(filled.effective_sample_size[i])
        assert 200 < ess < 20_001
        np.testing.assert_allclose(
            filled.mean[i, missing], mean, atol=5 * np.sqrt(variance.max() / ess)
        )
        draws = np.asarray(filled.draws[:, i])[:, missing]
        error = 5 * np.sqrt(2 / 4000 + 2 / ess) * variance.max()
        np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(variance.max() / 1000))
        np.testing.assert_allclose(np.cov(draws.T), covariance, atol=error)
        for x in (filled.mean, *filled.draws[:3]):
            np.testing.assert_array_equal(x[i, ~missing], X[i, ~missing])


def test_log_likelihood_is_that_of_the_observed_entries(params):
    estimate = jaxvae.log_likelihood(params, KEY, PART, 20_000)
    for i, missing in enumerate(MISSING[:2]):
        o = np.flatnonzero(~missing)
        exact = stats.multivariate_normal(BIAS[o], COVARIANCE[np.ix_(o, o)]).logpdf(X[i, o])
        assert estimate[i] == pytest.approx(exact, abs=0.1)
    assert estimate[2] == pytest.approx(0, abs=1e-5)  # nothing is observed


def test_the_weights_of_a_chunked_sum_are_those_of_one(params):
    """1026 examples are taken one sample at a time, 3 with all 50 samples at once."""
    many = np.concatenate([PART] * 342)
    one_by_one = jaxvae.impute(params, KEY, many, 50)
    in_chunks = jaxvae.impute(params, KEY, PART, 50)
    np.testing.assert_allclose(one_by_one.mean[:3], in_chunks.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        one_by_one.effective_sample_size[:3], in_chunks.effective_sample_size, rtol=1e-3
    )


def test_images_are_inpainted_between_0_and_1():
    config = jaxvae.ModelConfig((6, 6, 1), 2, network="mlp:width=8")
    params = moved(jaxvae.init(KEY, config), 0.3)
    images = np.random.default_rng(0).random((4, 6, 6, 1), np.float32)
    images[:, :3] = np.nan
    filled = jaxvae.impute(params, KEY, images, 20, num_draws=2)
    np.testing.assert_array_equal(filled.mean[:, 3:], images[:, 3:])
    assert jnp.all((filled.mean >= 0) & (filled.mean <= 1))
    assert set(np.unique(filled.draws[:, :, :3])) == {0, 1}


def test_missing_counts_are_at_the_size_of_the_observed_ones():
    config = jaxvae.ModelConfig((4,), 2, network="mlp:width=8", likelihood="poisson")
    params = moved(jaxvae.init(KEY, config), 0.1)
    x = np.float32([[30, 50, 20, np.nan], [3000, 5000, 2000, np.nan]])
    mean = np.asarray(jaxvae.impute(params, KEY, x, 500).mean)[:, 3]
    assert 10 < mean[0] < 100
    assert 1000 < mean[1] < 10_000


def test_wrong_arguments_are_refused(params):
    with refused("num_samples is 0"):
        jaxvae.impute(params, KEY, PART, 0)
    with refused("num_draws is 0"):
        jaxvae.impute(params, KEY, PART, num_draws=0)
    with refused("images have shape (3, 4)"):
        jaxvae.impute(params, KEY, PART[..., :4])
    with refused("images have NaN or infinity: expected finite numbers"):
        jaxvae.impute(params, KEY, np.where(np.isnan(PART), np.inf, PART))
    for f in (jaxvae.encode, jaxvae.reconstruct):
        with refused("images have NaN or infinity: expected finite numbers"):
            f(params, PART)
