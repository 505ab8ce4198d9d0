"""Test metrics are means over the whole test set, whatever blocks it is worked through in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvae
from jaxvae import evaluation

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def params(model_config):
    return jaxvae.init(jax.random.key(0), model_config)


@pytest.mark.parametrize("block", [1000, 64, 24])
def test_the_metrics_are_means_of_the_elbo(params, images, monkeypatch, block):
    monkeypatch.setattr(evaluation, "_BLOCK", block)
    key = jax.random.key(1)
    terms = jaxvae.elbo(params, key, images)
    means = evaluation.evaluate.__wrapped__(params, key, jnp.asarray(images))
    assert set(means) == {"loss", "elbo", "log_likelihood", "kl"}
    np.testing.assert_allclose(means["elbo"], jnp.mean(terms.value), rtol=1e-5)
    np.testing.assert_allclose(means["loss"], -jnp.mean(terms.value), rtol=1e-5)
    np.testing.assert_allclose(means["log_likelihood"], jnp.mean(terms.log_likelihood), rtol=1e-5)
    np.testing.assert_allclose(means["kl"], jnp.mean(terms.kl), rtol=1e-5)


def test_the_log_likelihood_is_the_mean_of_the_estimates(params, images):
    key = jax.random.key(1)
    each = jaxvae.log_likelihood(params, key, images, num_samples=20)
    mean = evaluation.mean_log_likelihood(params, key, jnp.asarray(images), num_samples=20)
    np.testing.assert_allclose(mean, jnp.mean(each), rtol=1e-5)
