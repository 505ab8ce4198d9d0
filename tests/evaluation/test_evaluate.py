"""Test metrics are means over the whole test set, whatever blocks it is worked through in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvae
from jaxvae.data import Dataset
from jaxvae.evaluation import evaluate, metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def params(model_config):
    return jaxvae.init(jax.random.key(0), model_config)


@pytest.mark.parametrize("block", [1000, 64, 24])
def test_the_metrics_are_means_of_the_elbo(params, images, monkeypatch, block):
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    key = jax.random.key(1)
    terms = jaxvae.elbo(params, key, images)
    means = evaluate.evaluate.__wrapped__(params, key, jnp.asarray(images))
    assert set(means) == {"loss", "elbo", "log_likelihood", "kl"}
    np.testing.assert_allclose(means["elbo"], jnp.mean(terms.value), rtol=1e-5)
    np.testing.assert_allclose(means["loss"], -jnp.mean(terms.value), rtol=1e-5)
    np.testing.assert_allclose(means["log_likelihood"], jnp.mean(terms.log_likelihood), rtol=1e-5)
    np.testing.assert_allclose(means["kl"], jnp.mean(terms.kl), rtol=1e-5)


def test_the_log_likelihood_is_the_mean_of_the_estimates(params, images):
    key = jax.random.key(1)
    each = jaxvae.log_likelihood(params, key, images, num_samples=20)
    mean = evaluate.mean_log_likelihood(params, key, jnp.asarray(images), num_samples=20)
    np.testing.assert_allclose(mean, jnp.mean(each), rtol=1e-5)


CONDITIONAL = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", num_classes=3)


@pytest.mark.parametrize("block", [1000, 24])
def test_every_image_is_measured_with_its_own_label(images, monkeypatch, block):
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    params = jaxvae.init(jax.random.key(0), CONDITIONAL)
    key, labels = jax.random.key(1), np.arange(64) ** 2 % 3
    means = evaluate.evaluate.__wrapped__(params, key, jnp.asarray(images), jnp.asarray(labels))
    terms = jaxvae.elbo(params, key, images, labels)
    np.testing.assert_allclose(means["elbo"], jnp.mean(terms.value), rtol=1e-5)
    mean = evaluate.mean_log_likelihood.__wrapped__(
        params, key, jnp.asarray(images), jnp.asarray(labels), num_samples=4
    )
    each = jaxvae.log_likelihood(params, key, images, 4, labels)
    np.testing.assert_allclose(mean, jnp.mean(each), rtol=1e-5)


def dataset(images, labels):
    return Dataset(images, labels, images[:32], labels if labels is None else labels[:32])


def test_what_is_examined_is_of_the_test_images_and_their_labels(images):
    params = jaxvae.init(jax.random.key(0), CONDITIONAL)
    labels, key = np.arange(64) % 3, jax.random.key(1)
    found = evaluate.examine(params, key, dataset(images, labels))
    posterior = jaxvae.encode(params, images[:32], labels[:32])
    assert found["active_units"] == np.sum(np.var(np.float64(posterior.mean), axis=0) > 0.01)
    means = np.float64(jaxvae.reconstruct(params, images[:32], labels[:32]))
    error = np.mean((images[:32] / 255 - means) ** 2)
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    # The two parts are the mean KL, estimated at one sample of each posterior.
    z = posterior.sample(key)
    log_p_z = -0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1)
    kl = float(np.mean(posterior.log_prob(z) - log_p_z))
    assert found["mutual_information"] + found["marginal_kl"] == pytest.approx(kl, abs=1e-4)
    probe = metrics.latent_probe(
        np.asarray(jaxvae.encode(params, images, labels).mean),
        labels,
        np.asarray(posterior.mean),
        labels[:32],
    )
    assert probe._asdict().items() <= found.items()


@pytest.mark.parametrize("labels", [None, np.full(64, 7)], ids=["no labels", "one class"])
def test_without_two_classes_there_is_nothing_to_tell_apart(images, labels, params):
    found = evaluate.examine(params, jax.random.key(1), dataset(images, labels))
    names = {"mutual_information", "marginal_kl", "active_units", "reconstruction_error"}
    assert set(found) == names


def test_a_flow_has_no_density_to_take_the_kl_apart(images):
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", posterior="iaf:steps=1")
    params = jaxvae.init(jax.random.key(0), config)
    found = evaluate.examine(params, jax.random.key(1), dataset(images, None))
    assert set(found) == {"active_units", "reconstruction_error"}


def test_a_flow_that_makes_the_latents_constant_leaves_no_active_units(images):
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", posterior="iaf:steps=1")
    params = jaxvae.init(jax.random.key(0), config)
    data = dataset(images, None)
    head = params.encoder["mean"]
    params.encoder["mean"] = head | {"kernel": 30 * head["kernel"]}
    assert np.all(np.var(jaxvae.encode(params, data.test_images).mean, axis=0) > 0.01)
    assert evaluate.examine(params, jax.random.key(1), data)["active_units"] == 2
    # sigma = sigmoid(-40): z is m, which is 0.
    outputs = params.posterior["step_1"]["outputs"]
    outputs["bias"] = outputs["bias"].at[2:].set(-42)
    assert evaluate.examine(params, jax.random.key(1), data)["active_units"] == 0
