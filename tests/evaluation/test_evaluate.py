"""Test metrics are means over the whole test set, whatever blocks it is worked through in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import moved

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


CONDITIONAL = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp", num_classes=3)


@pytest.mark.parametrize("block", [1000, 24])
def test_every_image_is_measured_with_its_own_label(images, monkeypatch, block):
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    params = jaxvae.init(jax.random.key(0), CONDITIONAL)
    key, labels = jax.random.key(1), np.arange(64) ** 2 % 3
    means = evaluate.evaluate.__wrapped__(params, key, jnp.asarray(images), jnp.asarray(labels))
    terms = jaxvae.elbo(params, key, images, labels)
    np.testing.assert_allclose(means["elbo"], jnp.mean(terms.value), rtol=1e-5)


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


def test_the_reconstruction_error_of_counts_is_of_their_values():
    config = jaxvae.ModelConfig((2, 3, 1), 1, network="mlp:width=4", likelihood="poisson:size=0")
    params, x = jaxvae.init(jax.random.key(0), config), np.full((4, 2, 3, 1), 7, np.uint8)
    found = evaluate.examine(params, jax.random.key(1), Dataset(x, None, x, None))
    error = np.mean((7 - np.float64(jaxvae.reconstruct(params, x))) ** 2)
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("labels", [None, np.full(64, 7)], ids=["no labels", "one class"])
def test_without_two_classes_there_is_nothing_to_tell_apart(images, labels, params):
    found = evaluate.examine(params, jax.random.key(1), dataset(images, labels))
    names = {"mutual_information", "marginal_kl", "active_units", "reconstruction_error"}
    assert set(found) == names


def test_there_is_no_probe_without_a_second_class_among_its_images(images, params, monkeypatch):
    monkeypatch.setattr(metrics, "_PROBED", 16)
    labels = np.where(np.arange(64) == 63, 1, 0)
    found = evaluate.examine(params, jax.random.key(1), dataset(images, labels))
    assert "nearest_neighbors" not in found


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


# ---- A model with a classifier ----

M2 = jaxvae.ModelConfig((3,), 1, "mlp:width=4", "gaussian", num_classes=3, classifier=True)
X = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)
LABELS = np.array([-1, 2, -1, 0, 1])


@pytest.fixture(scope="module")
def of_classes():
    return moved(jaxvae.init(jax.random.key(0), M2), 0.3)


@pytest.mark.parametrize("missing", [False, True])
def test_log_p_x_of_a_classifier_is_the_sum_over_the_classes(of_classes, missing):
    """Each of which is integrated over z on a grid."""
    x, z = X.copy(), np.linspace(-8, 8, 2001)[:, None]
    if missing:
        x[0, 1] = x[3, 2] = np.nan
    log_p_z = scipy.stats.norm.logpdf(z[:, 0]) + np.log(z[1, 0] - z[0, 0])
    each = np.empty((5, 3))
    for y in range(3):
        p_x = jaxvae.decode(of_classes, z, np.full(len(z), y))
        for i in range(5):
            log_p_x_z = np.float64(p_x.log_prob(np.broadcast_to(x[i], (len(z), 3))))
            each[i, y] = scipy.special.logsumexp(log_p_x_z + log_p_z)
    expected = scipy.special.logsumexp(each + np.log(1 / 3), axis=1)
    found = jaxvae.log_likelihood(of_classes, jax.random.key(1), x, 100_000)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.ptp(each - expected[:, None], axis=1).min() > 0.1


def test_the_elbo_of_a_classifier_is_of_log_p_x_with_and_without_labels(of_classes):
    keys = jax.random.split(jax.random.key(1), 5)
    q = np.float64(jaxvae.classify(of_classes, X))
    each = [jaxvae.elbo(of_classes, keys, X, np.full(5, y)) for y in range(3)]
    expected = sum(q[:, y] * (each[y].value + np.log(1 / 3) - np.log(q[:, y])) for y in range(3))
    np.testing.assert_allclose(jaxvae.elbo(of_classes, keys, X).value, expected, rtol=1e-4)
    found = evaluate.evaluate(of_classes, keys, X, LABELS)
    np.testing.assert_allclose(found["elbo"], np.mean(expected), rtol=1e-4)
    assert found["loss"] == -found["elbo"]
    kl = sum(q[:, y] * (each[y].kl + np.log(3 * q[:, y])) for y in range(3))
    np.testing.assert_allclose(found["kl"], np.mean(kl), rtol=1e-3)


def test_the_classification_error_is_that_of_the_test_images_with_a_label(of_classes):
    y = np.argmax(jaxvae.classify(of_classes, X), axis=1)
    labels = np.where([True, True, False, True, False], [y[0], (y[1] + 1) % 3, 0, y[3], 0], -1)
    found = evaluate.examine(of_classes, jax.random.key(1), Dataset(X, labels, X, labels))
    assert found["classification_error"] == pytest.approx(1 / 3)


def test_test_images_with_missing_entries_are_classified_too(of_classes):
    x = X.copy()
    x[0, 1] = np.nan
    y = np.asarray(jaxvae.classify(of_classes, np.nan_to_num(x))).argmax(axis=1)
    found = evaluate.examine(of_classes, jax.random.key(1), Dataset(X, y, x, y))
    assert found["classification_error"] == 0
