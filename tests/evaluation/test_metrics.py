"""Measures against closed forms, numerical integration, and float64 loops over all pairs."""

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from scipy import integrate, special, stats

from jaxvae.evaluation import metrics
from jaxvae.evaluation.metrics import (
    active_units,
    elbo_surgery,
    latent_probe,
    log_aggregate,
    reconstruction_error,
    variance_of_means,
)
from jaxvae.models.distributions import Gaussian
from jaxvae.models.flows import FlowPosterior

pytestmark = pytest.mark.usefixtures("compile_quickly")


def posteriors(n, latent, log_var, seed=0, spread=1.0):
    """Gaussians, a sample of each, and the standard normal's density there."""
    rng = np.random.default_rng(seed)
    mean = (spread * rng.normal(size=(n, latent))).astype("f")
    log_var = (log_var + 0.5 * rng.normal(size=(n, latent))).astype("f")
    z = mean + np.exp(log_var / 2) * rng.normal(size=(n, latent)).astype("f")
    return Gaussian(jnp.asarray(mean), jnp.asarray(log_var)), jnp.asarray(z), log_normal(z)


def log_normal(z):
    return stats.norm.logpdf(np.float64(z)).sum(-1)


def log_densities(posterior, z):
    """log q(z_n|x_m) of all pairs, one at a time, in float64."""
    means, log_vars, z = (np.float64(x) for x in (*posterior, z))
    return np.array(
        [
            [
                -0.5 * np.sum(np.log(2 * np.pi) + log_var + (z_n - mean) ** 2 / np.exp(log_var))
                for mean, log_var in zip(means, log_vars, strict=True)
            ]
            for z_n in z
        ]
    )


def two_clusters(n, distance, scale, seed=0):
    """Half the posteriors N(-distance / 2, scale^2), half N(distance / 2, scale^2)."""
    rng = np.random.default_rng(seed)
    mean = np.where(np.arange(n) % 2, distance / 2, -distance / 2)[:, None]
    z = mean + scale * rng.normal(size=mean.shape)
    return Gaussian(*(jnp.float32(x) for x in (mean, np.full_like(mean, 2 * np.log(scale))))), z


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_active_units_are_those_whose_means_vary(count):
    mean = np.random.default_rng(0).normal(3, 0.05, (200, 5))  # a variance of 0.0025
    mean[:, :count] *= 10
    assert active_units(jnp.asarray(mean, "f")) == count


def test_a_unit_is_active_above_the_threshold():
    mean = jnp.array([-1.0, 1.0])[:, None] * jnp.array([0.099, 0.101, 1.0])  # std of each latent
    assert active_units(mean) == 2
    assert active_units(mean, 0.009) == 3
    assert active_units(mean, threshold=0.5) == 1


def test_a_units_variance_far_from_zero():
    mean = 1000 + jnp.array([-1.0, 1.0])[:, None] * jnp.array([0.05, 0.2])
    assert active_units(mean) == 1


def flow_posterior(moved, scaled, n=300):
    """Of two latents: z_2 = scaled * z_1 + (1 - scaled) * moved * x_j, from a base that varies."""

    class Flow(nn.Module):
        def __call__(self, z, context):
            return scaled * z + (1 - scaled) * jnp.float32(moved) * context, jnp.zeros(len(z))

    rng = np.random.default_rng(0)
    base, context = (jnp.asarray(rng.normal(size=(n, 2)), "f") for _ in range(2))
    return FlowPosterior(base, jnp.zeros((n, 2)), context, {}, Flow())


@pytest.mark.parametrize("key", [0, 1, 2])
def test_a_flows_units_are_active_where_its_own_mean_varies(key):
    """Not where that of the Gaussian does which it starts from."""
    posterior = flow_posterior(moved=[0, 3], scaled=0.0)
    variance = variance_of_means(posterior, jax.random.key(key))
    np.testing.assert_allclose(variance[0], 0, atol=1e-7)
    np.testing.assert_allclose(variance[1], 9 * np.var(posterior.context[:, 1]), rtol=1e-5)
    # A latent of variance 1, whatever the image: 100 samples make means of variance 0.01.
    still = replace(posterior, mean=jnp.zeros((300, 2)))
    spread = replace(still, flow=flow_posterior(moved=[0, 0], scaled=1.0).flow)
    assert np.all(np.abs(variance_of_means(spread, jax.random.key(key))) < 0.006)


def test_a_flows_variance_of_means_is_right_in_expectation():
    posterior = flow_posterior(moved=[0, 0.5], scaled=0.5, n=50)
    keys = jax.random.split(jax.random.key(0), 400)
    estimates = jax.vmap(lambda key: variance_of_means(posterior, key, 4))(keys)
    mean = 0.5 * posterior.mean + 0.5 * jnp.float32([0, 0.5]) * posterior.context
    error = np.std(estimates, axis=0) / math.sqrt(400)
    # Of two means of N: the covariance's expectation is exact, as they are independent.
    assert np.all(np.abs(np.mean(estimates, axis=0) - np.var(mean, axis=0)) < 4 * error)
    assert np.all(error < 0.05 * np.var(mean, axis=0))


def test_a_gaussians_variance_of_means_is_exact():
    posterior, *_ = posteriors(70, 3, -1)
    variance = variance_of_means(posterior, jax.random.key(0))
    np.testing.assert_allclose(variance, np.var(np.float64(posterior.mean), axis=0), rtol=1e-5)


# At -10 a standard deviation is 0.007: among means of spread 1, squares are of the order 1e6.
@pytest.mark.parametrize(("latent", "log_var"), [(1, -2), (50, -2), (2, -10), (50, -10), (5, 2)])
def test_surgery_equals_a_loop_over_all_pairs(latent, log_var):
    posterior, z, log_p_z = posteriors(120, latent, log_var)
    pairs = log_densities(posterior, z)
    log_q_z = special.logsumexp(pairs, axis=1) - np.log(len(pairs))
    surgery = elbo_surgery(posterior, z, jnp.asarray(log_p_z, "f"))
    information = np.mean(np.diag(pairs) - log_q_z)
    np.testing.assert_allclose(surgery.mutual_information, information, atol=1e-4)
    np.testing.assert_allclose(surgery.marginal_kl, np.mean(log_q_z - log_p_z), atol=1e-4)


def test_narrow_posteriors_that_overlap():
    # Neighbors half a standard deviation of 0.007 apart: it takes exact differences to tell.
    rng = np.random.default_rng(0)
    mean = (2 + np.exp(-5) / 2 * rng.normal(size=(90, 30))).astype("f")
    log_var = np.full_like(mean, -10)
    posterior = Gaussian(jnp.asarray(mean), jnp.asarray(log_var))
    z = jnp.asarray(mean + np.exp(-5) * rng.normal(size=mean.shape), "f")
    pairs = log_densities(posterior, z)
    expected = special.logsumexp(pairs, axis=1) - np.log(len(pairs))
    assert np.mean(np.diag(pairs) - expected) < 0.9 * np.log(len(pairs))
    np.testing.assert_allclose(log_aggregate(posterior, z), expected, atol=2e-4)


@pytest.mark.parametrize("block", [1, 32, 64])
def test_the_blocks_do_not_show(monkeypatch, block):
    posterior, z, _ = posteriors(70, 3, -1)
    monkeypatch.setattr(metrics, "_BLOCK", 1000)
    whole = log_aggregate.__wrapped__(posterior, z)
    monkeypatch.setattr(metrics, "_BLOCK", block)
    np.testing.assert_allclose(log_aggregate.__wrapped__(posterior, z), whole, rtol=1e-6)


def test_two_clusters_apart_are_one_bit():
    posterior, z = two_clusters(1000, distance=20, scale=0.3)
    surgery = elbo_surgery(posterior, jnp.float32(z), jnp.float32(log_normal(z)))
    np.testing.assert_allclose(surgery.mutual_information, math.log(2), atol=1e-4)


def test_images_apart_are_log_n():
    mean = jnp.arange(300.0)[:, None]
    posterior = Gaussian(mean, jnp.full_like(mean, -10.0))
    surgery = elbo_surgery(posterior, mean + 0.003, jnp.zeros(300))
    np.testing.assert_allclose(surgery.mutual_information, math.log(300), atol=1e-4)


def test_one_posterior_for_all_images_has_no_information():
    mean, log_var = jnp.full((200, 3), 0.7), jnp.full((200, 3), -1.3)
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(jax.random.key(0), mean.shape)
    surgery = elbo_surgery(Gaussian(mean, log_var), z, jnp.float32(log_normal(z)))
    np.testing.assert_allclose(surgery.mutual_information, 0, atol=1e-5)


@pytest.mark.parametrize(("distance", "scale"), [(3.0, 0.5), (1.0, 1.0), (6.0, 0.1)])
def test_surgery_in_one_dimension_equals_numerical_integration(distance, scale):
    n = 4000
    posterior, z = two_clusters(n, distance, scale)
    components = [stats.norm(side * distance / 2, scale) for side in (-1, 1)]

    def log_q(z):
        return np.logaddexp(*(q.logpdf(z) for q in components)) - np.log(2)

    def expectation(f):
        """Of a function of z and its component's log density, over n and q(z|x_n)."""
        ends = distance / 2 + 12 * scale
        parts = [
            integrate.quad(lambda z, q=q: q.pdf(z) * f(z, q.logpdf(z)), -ends, ends, limit=400,
                           points=[q.mean()])[0]
            for q in components
        ]  # fmt: skip
        return np.mean(parts)

    terms = [
        lambda z, log_q_z_x: log_q_z_x - log_q(z),
        lambda z, _: log_q(z) - stats.norm.logpdf(z),
    ]
    surgery = elbo_surgery(posterior, jnp.float32(z), jnp.float32(log_normal(z)))
    for estimate, term in zip(surgery, terms, strict=True):
        exact = expectation(term)
        deviation = np.sqrt(expectation(lambda *at, f=term: f(*at) ** 2) - exact**2)
        np.testing.assert_allclose(estimate, exact, atol=5 * deviation / np.sqrt(n) + 1e-4)


@pytest.mark.parametrize("log_var", [-4, -1, 0])
def test_the_parts_add_up_to_the_mean_kl(log_var):
    posterior, z, log_p_z = posteriors(2000, 4, log_var, seed=1)
    log_ratio = posterior.log_prob(z) - log_p_z
    total = sum(elbo_surgery(posterior, z, jnp.asarray(log_p_z, "f")))
    np.testing.assert_allclose(total, jnp.mean(log_ratio), rtol=1e-5)  # of the same samples
    error = np.std(log_ratio - posterior.kl()) / math.sqrt(2000)
    np.testing.assert_allclose(total, jnp.mean(posterior.kl()), atol=5 * error)


def test_few_images_underestimate_the_information():
    # With z = x + noise, both normal: I(x; z) = 1/2 log(1 + var(x) / var(noise)).
    exact = 0.5 * math.log(1 + 1 / 0.01)
    posterior, z, log_p_z = posteriors(3000, 1, 0)
    posterior = Gaussian(posterior.mean, jnp.full_like(posterior.mean, math.log(0.01)))
    z = posterior.sample(jax.random.key(0))
    few, many = (
        elbo_surgery(Gaussian(posterior.mean[:n], posterior.log_var[:n]), z[:n], log_p_z[:n])
        for n in (10, 3000)
    )
    assert few.mutual_information < exact - 0.3
    np.testing.assert_allclose(many.mutual_information, exact, atol=0.1)


def test_the_reconstruction_error_is_the_mean_square():
    rng = np.random.default_rng(0)
    images, means = rng.integers(0, 256, (6, 4, 5, 3), np.uint8), rng.random((6, 4, 5, 3))
    expected = [
        np.mean((image / 255 - mean) ** 2) for image, mean in zip(images, means, strict=True)
    ]
    error = reconstruction_error(jnp.asarray(images), jnp.asarray(means, "f"))
    np.testing.assert_allclose(error, expected, rtol=1e-5)
    scaled = reconstruction_error(jnp.asarray(images / 255, "f"), jnp.asarray(means, "f"))
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


def test_the_reconstruction_error_leaves_out_missing_entries():
    x = jnp.array([[1, jnp.nan, 3], [0, 0, 0]])
    error = reconstruction_error(x, jnp.array([[0.0, 5, 1], [0, 3, 0]]))
    np.testing.assert_allclose(error, [(1 + 4) / 2, 3])


def test_reconstructions_of_another_shape_are_refused():
    with refused("(2, 8, 8, 1)", "(2, 8, 8, 3)"):
        reconstruction_error(jnp.zeros((2, 8, 8, 1)), jnp.zeros((2, 8, 8, 3)))


def classes(n, separation, seed=0, number=4):
    """Means around a corner for each class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, number, n)
    return (separation * np.eye(number)[labels] + rng.normal(size=(n, number))).astype("f"), labels


def test_probes_of_separable_classes_are_right():
    probe = latent_probe(*classes(400, 20), *classes(200, 20, seed=1))
    assert probe == (1, 1)


def test_probes_of_random_labels_are_at_chance():
    (train, train_labels), (test, test_labels) = classes(2000, 0), classes(2000, 0, seed=1)
    deviation = math.sqrt(0.25 * 0.75 / 2000)
    for accuracy in latent_probe(train, train_labels, test, test_labels):
        assert abs(accuracy - 0.25) < 5 * deviation


def test_a_probe_between_is_near_the_best_there_is():
    # Of two normals at a distance d, the best accuracy is Phi(d / 2); here d = 2 sqrt(2).
    probe = latent_probe(*classes(2000, 2, number=2), *classes(4000, 2, seed=1, number=2))
    best = stats.norm.cdf(math.sqrt(2))
    assert best - 0.02 < probe.logistic_regression < best + 0.02
    assert best - 0.06 < probe.nearest_neighbors < best + 0.02


def test_regression_does_not_depend_on_the_scale_of_a_latent():
    (train, train_labels), (test, test_labels) = classes(500, 2), classes(300, 2, seed=1)
    scale = np.float32([1e-4, 1, 1, 100])
    plain = latent_probe(train, train_labels, test, test_labels)
    scaled = latent_probe(train * scale, train_labels, test * scale, test_labels)
    assert scaled.logistic_regression == plain.logistic_regression
    assert scaled.nearest_neighbors < plain.nearest_neighbors


def test_a_latent_that_is_not_used_is_nothing_to_the_neighbors():
    (train, train_labels), (test, test_labels) = classes(500, 8), classes(300, 8, seed=1)
    noise = 1e-4 * np.random.default_rng(2).normal(size=(800, 30))
    plain = latent_probe(train, train_labels, test, test_labels)
    wider = np.hstack([train, noise[:500]]), train_labels, np.hstack([test, noise[500:]])
    assert latent_probe(*wider, test_labels).nearest_neighbors == plain.nearest_neighbors


@pytest.mark.parametrize("order", ["mixed", "sorted", "in turn"])
def test_a_probe_of_many_images_learns_from_all_classes(monkeypatch, order):
    monkeypatch.setattr(metrics, "_PROBED", 200)
    labels = np.random.default_rng(0).permutation(np.arange(1200) % 10)
    if order == "sorted":
        labels = np.sort(labels)
    if order == "in turn":
        labels = np.arange(1200) % 10
    rows = metrics.probed(labels)
    assert len(rows) == len(set(rows)) == 200
    assert np.bincount(labels[rows]).tolist() == [20] * 10
    mean = (20 * np.eye(10)[labels]).astype("f")
    assert latent_probe(mean, labels, mean, labels) == (1, 1)


def test_few_images_are_all_learned_from():
    labels = np.array([2, 0, 1, 1, 0])
    assert sorted(metrics.probed(labels)) == [0, 1, 2, 3, 4]
    mean = np.array([[0.0], [9.0], [9.1]])
    labels = np.array([0, 1, 1])
    assert latent_probe(mean, labels, mean[1:], labels[1:]) == (1, 1)


@pytest.mark.parametrize("kind", ["heavy tails", "constant", "collinear"])
def test_probes_of_ill_conditioned_means_do_not_warn(kind):
    rng = np.random.default_rng(0)
    labels, mean = rng.integers(0, 10, 1000), rng.standard_cauchy((1000, 20)) ** 3
    if kind == "constant":
        mean = np.full((1000, 20), 1e3)
    if kind == "collinear":
        mean = mean[:, :1] + 1e-6 * rng.normal(size=(1000, 20))
    probe = latent_probe(mean, labels, mean, labels)
    assert all(0 < accuracy <= 1 for accuracy in probe)


def test_what_cannot_be_probed_is_refused():
    mean, labels = classes(20, 1)
    broken = np.where(np.arange(20)[:, None] == 3, np.nan, mean)
    for train, test in [(broken, mean), (mean, broken)]:
        with refused("not finite"):
            latent_probe(train, labels, test, labels)
    with refused("class 7", "two classes"):
        latent_probe(mean, np.full(20, 7), mean, labels)
