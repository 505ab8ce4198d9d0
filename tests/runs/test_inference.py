"""A trained model applied to a whole data set, against the functions for a single batch."""

import jax
import numpy as np
import pytest
import scipy.special
from conftest import moved, refused

import jaxvae
from jaxvae.data import Dataset
from jaxvae.data.dataset import split_every_tenth
from jaxvae.models.discrete import codes
from jaxvae.runs import inference
from jaxvae.runs.config import RunConfig
from jaxvae.runs.data import binarized, examples_of, expect_conditions
from jaxvae.runs.inference import (
    Opened,
    bound_all,
    by_columns,
    encode_all,
    impute_all,
    reconstruct_all,
    score_all,
)

pytestmark = pytest.mark.usefixtures("compile_quickly", "small_batches")

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
PART = X.copy()
PART[::2, 1] = np.nan
PART[::5, 0] = np.nan
MODEL = {"image_shape": (3,), "latent_dim": 2, "network": "mlp:width=8", "likelihood": "gaussian"}


@pytest.fixture(scope="module")
def small_batches():
    """40 examples are two full batches of 16, and one that is filled up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_BATCH", 16)
        yield


def opened(x=X, labels=None, **model):
    params = moved(jaxvae.init(KEY, jaxvae.ModelConfig(**MODEL | model)), 0.3)
    conditions = labels if params.config.num_classes else None
    return Opened(params, KEY, x, labels, conditions)


def test_encoding_in_batches_is_encode():
    labels = np.arange(40) % 2
    one = opened(labels=labels, num_classes=2)
    seen = []
    found = encode_all(one, lambda *counts: seen.append(counts))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    posterior = jaxvae.encode(one.params, X, labels)
    np.testing.assert_allclose(found["mean"], posterior.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["log_var"], posterior.log_var, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["labels"], labels)


def test_the_center_of_a_flow_and_the_codes_of_a_discrete_model():
    flow = opened(posterior="iaf:steps=1")
    found = encode_all(flow)
    assert set(found) == {"center"}
    center = jaxvae.encode(flow.params, X).center
    np.testing.assert_allclose(found["center"], center, rtol=1e-4, atol=1e-5)
    discrete = opened(posterior="fsq:levels=3x3", prior="uniform_codes", latent_dim=4)
    found = encode_all(discrete)
    assert set(found) == {"codes"}
    np.testing.assert_array_equal(found["codes"], codes(discrete.params, X))


def test_scores_are_those_of_the_functions_for_a_batch():
    one = opened()
    found = score_all(one, 7)
    index = found["index"]
    assert sorted(index) == list(range(40))
    log_px = jaxvae.log_likelihood(one.params, KEY, X, 7)
    terms = jaxvae.elbo(one.params, KEY, X)
    error = np.mean((X - jaxvae.reconstruct(one.params, X)) ** 2, axis=1)
    for name, values in {
        "log_likelihood": log_px,
        "elbo": terms.value,
        "expected_log_likelihood": terms.log_likelihood,
        "kl": terms.kl,
        "reconstruction_error": error,
    }.items():
        np.testing.assert_allclose(found[name], np.asarray(values)[index], rtol=1e-4, atol=1e-5)


def test_bounds_are_those_of_the_scores_in_the_order_of_the_data():
    labels = np.arange(40) % 2
    one = opened(labels=labels, num_classes=2)
    found, scores = bound_all(one, 7), score_all(one, 7)
    assert set(found) == {"log_likelihood", "elbo", "expected_log_likelihood", "kl"}
    for name, values in found.items():
        np.testing.assert_allclose(values[scores["index"]], scores[name], rtol=1e-4, atol=1e-5)
    log_px = jaxvae.log_likelihood(one.params, KEY, X, 7, labels)
    np.testing.assert_allclose(found["log_likelihood"], log_px, rtol=1e-4, atol=1e-5)
    with refused("num_samples is 0"):
        bound_all(one, 0)


def test_many_samples_are_drawn_in_smaller_batches(monkeypatch):
    one, seen = opened(), []
    monkeypatch.setattr(inference, "_DECODED", 10 * 8)
    monkeypatch.setattr(inference, "LEAST", 1)
    found = bound_all(one, 10, lambda *counts: seen.append(counts))
    assert seen == [(8, 40), (16, 40), (24, 40), (32, 40), (40, 40)]
    log_px = jaxvae.log_likelihood(one.params, KEY, X, 10)
    np.testing.assert_allclose(found["log_likelihood"], log_px, rtol=1e-4, atol=1e-5)


def test_the_most_unusual_example_comes_first():
    x = X.copy()
    x[23] = 30
    one = opened(x, labels=np.arange(40))
    for by, sign in {"log_likelihood": 1, "elbo": 1, "reconstruction_error": -1}.items():
        found = score_all(one, 2, by)
        assert found["index"][0] == found["labels"][0] == 23
        assert np.all(np.diff(sign * found[by]) >= 0)
    with refused("by is 'kl': expected 'log_likelihood', 'elbo' or 'reconstruction_error'"):
        score_all(one, 2, "kl")
    with refused("num_samples is 0"):
        score_all(one, 0)


def test_reconstruction_in_batches_is_reconstruct():
    one = opened()
    found = reconstruct_all(one)
    assert set(found) == {"images"}
    expected = jaxvae.reconstruct(one.params, X)
    np.testing.assert_allclose(found["images"], expected, rtol=1e-5, atol=1e-6)


def test_imputation_in_batches_is_impute():
    one = opened(PART)
    found = impute_all(one, 50, num_draws=4)
    expected = jaxvae.impute(one.params, KEY, PART, 50)
    np.testing.assert_allclose(found["images"], expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["effective_sample_size"], expected.effective_sample_size, rtol=1e-3
    )
    np.testing.assert_array_equal(found["missing"], np.isnan(PART).sum(1))
    draws, hidden = found["draws"], np.isnan(PART)
    assert draws.shape == (4, 40, 3)
    np.testing.assert_array_equal(draws[:, ~hidden], np.tile(PART[~hidden], (4, 1)))
    assert np.all(np.ptp(draws[:, hidden], axis=0) > 0)
    assert len(np.unique(draws[:, hidden])) == draws[:, hidden].size  # no noise is used twice
    assert "draws" not in impute_all(one, 5)
    with refused("num_draws is -1"):
        impute_all(one, 5, -1)


def test_many_samples_are_imputed_in_smaller_batches(monkeypatch):
    one, seen = opened(PART), []
    whole = impute_all(one, 10)
    monkeypatch.setattr(inference, "_SAMPLES", 10 * 2 * 7)
    parts = impute_all(one, 10, progress=lambda *counts: seen.append(counts))
    assert seen[:2] == [(7, 40), (14, 40)]
    np.testing.assert_allclose(parts["images"], whole["images"], rtol=1e-4, atol=1e-5)


def test_the_other_functions_take_the_observed_entries():
    one = opened(PART)
    zeros = np.nan_to_num(PART)
    expected = jaxvae.encode(one.params, zeros).mean
    np.testing.assert_allclose(encode_all(one)["mean"], expected, rtol=1e-5, atol=1e-6)
    means = jaxvae.reconstruct(one.params, zeros)
    np.testing.assert_allclose(reconstruct_all(one)["images"], means, rtol=1e-5, atol=1e-6)
    found = score_all(one, 5)
    log_px = np.asarray(jaxvae.log_likelihood(one.params, KEY, PART, 5))[found["index"]]
    np.testing.assert_allclose(found["log_likelihood"], log_px, rtol=1e-4, atol=1e-5)
    error = np.nanmean((PART - means) ** 2, axis=1)[found["index"]]
    np.testing.assert_allclose(found["reconstruction_error"], error, rtol=1e-4, atol=1e-5)


def test_scores_of_a_classifier_are_sums_over_the_classes():
    """With the reconstruction of the known or most probable class."""
    labels = np.where(np.arange(40) % 2, 1, -1)
    one = opened(labels=labels, num_classes=2, classifier=True)
    found = score_all(one, 5)
    each = [jaxvae.log_likelihood(one.params, KEY, X, 5, np.full(40, y)) for y in range(2)]
    expected = scipy.special.logsumexp(np.stack(each), axis=0) - np.log(2)
    order = found["index"]
    np.testing.assert_allclose(found["log_likelihood"], expected[order], rtol=1e-4, atol=1e-5)
    elbo = jaxvae.elbo(one.params, KEY, X).value[order]
    np.testing.assert_allclose(found["elbo"], elbo, rtol=1e-4, atol=1e-5)
    y = np.where(labels < 0, np.argmax(jaxvae.classify(one.params, X), axis=1), labels)
    error = np.mean((X - jaxvae.reconstruct(one.params, X, y)) ** 2, axis=1)[order]
    np.testing.assert_allclose(found["reconstruction_error"], error, rtol=1e-4, atol=1e-5)


def test_vectors_as_columns_have_the_names_of_the_data():
    labels = np.arange(40)
    columns = by_columns(opened(), {"images": X, "labels": labels})
    assert list(columns) == ["1", "2", "3", "labels"]
    named = opened()._replace(columns=("a", "b", "c"), label_column="kind")
    columns = by_columns(named, {"images": X, "labels": labels})
    assert list(columns) == ["a", "b", "c", "kind"]
    np.testing.assert_array_equal(columns["b"], X[:, 1])
    columns = by_columns(named._replace(covariate_columns={"batch": labels}), {"images": X})
    assert list(columns) == ["a", "b", "c", "batch"]


def test_examples_are_in_the_order_of_the_data():
    x, labels = np.arange(25.0)[:, None], np.arange(25)
    config = RunConfig()
    whole = split_every_tenth(x, labels)
    images, found, _ = examples_of(whole, config, "all")
    np.testing.assert_array_equal(images[:], x)
    np.testing.assert_array_equal(images[np.array([3, 20, 7])], x[[3, 20, 7]])
    assert images.shape == (25, 1)
    np.testing.assert_array_equal(found, labels)
    images, found, _ = examples_of(whole, config, "test")
    np.testing.assert_array_equal(found, [0, 10, 20])
    images, found, _ = examples_of(whole, config, "train")
    assert len(images) == len(found) == 22

    apart = Dataset(x[:20], labels[:20], x[20:], None)
    images, found, _ = examples_of(apart, config, "all")
    np.testing.assert_array_equal(images[:], x)
    assert found is None


def test_splits_of_different_types_are_scaled():
    x = np.full((2, 8, 8, 1), 51, np.uint8)
    data = Dataset(x, None, np.float32(x / 51), None)
    images, *_ = examples_of(data, RunConfig(), "all")
    np.testing.assert_allclose(images[:][:, 0, 0, 0], [0.2, 0.2, 1, 1])


def test_training_images_are_binarized_as_the_test_images_are():
    x = np.full((20, 8, 8, 1), 100, np.uint8)
    config = RunConfig(train=jaxvae.TrainConfig(binarization="dynamic"))
    images, *_ = examples_of(Dataset(x, None, 0 * x, None), config, "all")
    assert set(np.unique(images[:20])) == {0, 255}
    assert np.mean(images[:20] == 255) == pytest.approx(100 / 255, abs=0.07)
    assert not images[20:].any()


def test_missing_pixels_stay_missing_when_images_are_binarized():
    x = np.full((20, 8, 8, 1), 0.4, np.float32)
    x[:, 2] = np.nan
    found = binarized(KEY, x)
    assert np.isnan(found[:, 2]).all()
    assert set(np.unique(np.delete(found, 2, axis=1))) == {0, 1}


def test_what_is_refused():
    data = Dataset(np.zeros((2, 8, 8, 1)), None, np.zeros((2, 8, 8, 1)), None)
    model = jaxvae.ModelConfig(num_classes=3)
    with refused("a.npz has no train labels: expected classes from 0 to 2"):
        expect_conditions("a.npz", data, model)
    with refused("a.npz has train labels from 0 to 3: expected classes from 0 to 2"):
        expect_conditions("a.npz", data._replace(train_labels=np.array([0, 3])), model)
    with refused("images have shape"):
        encode_all(opened(X[:, :2]))
