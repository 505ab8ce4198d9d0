"""Likelihoods of tables against SciPy."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conftest import refused
from scipy import special, stats

import jaxvae
from jaxvae.models.config import LIKELIHOODS, Columns
from jaxvae.models.likelihoods import GaussianFamily
from jaxvae.models.tables import Categorical, Categories, StudentT, StudentTNumbers

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
MIXED = "columns:of=gaussianx2+categorical3+poisson+student_t+bernoullix2+negative_binomial"


# Compiled as one program each; eagerly every operation would be one.
log_prob = jax.jit(lambda p_x, x: p_x.log_prob(x))
mean_and_sample = jax.jit(lambda p_x, key: (p_x.mean, p_x.sample(key)))


def numbers(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype("f")


@pytest.mark.parametrize("scale", ["shared", "feature", "entry"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3, 4)], ids=["vectors", "images"])
def test_a_gaussian_has_a_scale_that_is_shared_or_of_features_or_entries(scale, shape):
    family = GaussianFamily(scale)
    outputs = numbers((*shape[:-1], 4 * family.outputs_per_channel))
    x = special.expit(numbers(shape, 1))
    learned = family.init(4)
    shapes = {"shared": {"log_scale": ()}, "feature": {"log_scale": (4,)}, "entry": {}}
    assert jax.tree.map(jnp.shape, learned) == shapes[scale]
    learned = jax.tree.map(lambda a: a + jnp.asarray(numbers(a.shape, 2)), learned)
    log_scale = learned.get("log_scale", outputs[..., 4:] - 1)
    location = special.expit(outputs[..., :4]) if len(shape) == 4 else outputs[..., :4]
    expected = stats.norm.logpdf(x, location, np.exp(np.logaddexp(log_scale, -6)))
    p_x = family.from_outputs(jnp.asarray(outputs), learned)
    np.testing.assert_allclose(log_prob(p_x, x), expected.reshape(6, -1).sum(1), rtol=2e-5)
    np.testing.assert_allclose(p_x.mean, location, rtol=1e-5)


def test_whole_numbers_keep_their_values_in_a_table():
    p_x = GaussianFamily().from_outputs(jnp.zeros((2, 3)), {"log_scale": jnp.zeros(())})
    x = np.array([[0, 1, 200], [3, 2, 1]])
    expected = stats.norm.logpdf(x, 0, 1 + np.exp(-6)).sum(1)
    for dtype in (np.uint8, np.int64):
        np.testing.assert_allclose(log_prob(p_x, x.astype(dtype)), expected, rtol=1e-5)


def test_students_t_is_scipys():
    location, x = numbers((2, 50, 3))
    learned = {"log_scale": jnp.array([-1.0, 0.3, 2.0]), "log_excess": jnp.array([-3.0, 1.0, 8.0])}
    p_x = StudentT().from_outputs(jnp.asarray(location), learned)
    scale, nu = np.exp(np.logaddexp(learned["log_scale"], -6)), 1 + np.exp(learned["log_excess"])
    expected = stats.t.logpdf(np.float64(x), nu, location, scale)
    np.testing.assert_allclose(log_prob(p_x, x), expected.sum(1), rtol=2e-5)
    np.testing.assert_array_equal(p_x.mean, location)


def test_students_t_samples_have_its_distribution():
    n = 20_000
    p_x = StudentTNumbers(
        jnp.full((n, 2), 0.7), jnp.log(jnp.array([0.3, 2])), jnp.array([1.5, 8.0])
    )
    x = np.float64(mean_and_sample(p_x, KEY)[1])
    for column, scale, nu in zip(x.T, (0.3, 2), (1.5, 8), strict=True):
        assert stats.kstest(column, stats.t(nu, 0.7, scale).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("nu", "log_scale"), [(1.001, 0), (3, -6), (1e3, 20), (1e6, 0)])
def test_students_t_and_its_derivatives_are_mpmaths_at_extremes(nu, log_scale):
    x = np.float32([0, 0.1, -3, 50, 1e4, 1e6])

    def log_p(location, log_scale, nu):
        return StudentTNumbers(location[:, None], log_scale, nu).log_prob(x[:, None])

    at = [jnp.full(6, v, jnp.float32) for v in (0.25, log_scale, nu)]
    value = jax.jit(log_p)(at[0], *(a[0] for a in at[1:]))

    def one(m, s, v, x):
        return StudentTNumbers(m.reshape(1, 1), s, v).log_prob(x.reshape(1, 1))[0]

    slopes = jax.jit(jax.vmap(jax.grad(one, (0, 1, 2))))(*at, jnp.asarray(x))

    def exact(x, m, s, v):
        y = (x - m) / mp.exp(s)
        return (mp.loggamma((v + 1) / 2) - mp.loggamma(v / 2) - mp.log(v * mp.pi) / 2 - s
                - (v + 1) / 2 * mp.log1p(y**2 / v))  # fmt: skip

    with mp.workdps(40):
        points = [[mp.mpf(float(a)) for a in p] for p in zip(x, *at, strict=True)]
        np.testing.assert_allclose(value, [float(exact(*p)) for p in points], rtol=2e-6, atol=2e-6)
        for i, slope in enumerate(slopes, start=1):
            expected = [
                float(mp.diff(lambda t, p=p, i=i: exact(*p[:i], t, *p[i + 1 :]), p[i]))
                for p in points
            ]
            np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=1e-6)


def test_categories_are_a_softmax_and_their_samples_have_it():
    n = 20_000
    logits = numbers((1, 2, 3))
    p_x = Categories(jnp.broadcast_to(logits, (n, 2, 3)))
    p = special.softmax(logits[0], axis=-1)
    codes = np.array([[0, 2], [1, 1], [2, 0]])
    x = np.eye(3)[codes].reshape(3, 6)
    log_p = Categories(jnp.broadcast_to(logits, (3, 2, 3))).log_prob(x)
    np.testing.assert_allclose(log_p, np.log(p[0, codes[:, 0]] * p[1, codes[:, 1]]), rtol=1e-5)
    np.testing.assert_allclose(p_x.mean[0], p.ravel(), rtol=1e-5)
    drawn = np.asarray(p_x.sample(KEY)).reshape(n, 2, 3)
    np.testing.assert_array_equal(drawn.sum(-1), 1)
    assert np.all(np.abs(drawn.mean(0) - p) < 5 * np.sqrt(p / n))
    x[0, :3] = np.nan  # a missing variable
    assert float(Categories(jnp.broadcast_to(logits, (3, 2, 3))).log_prob(x)[0]) == pytest.approx(
        np.log(p[1, 2]), rel=1e-5
    )


@pytest.mark.parametrize("size", [50, 1e4])
def test_saturated_categories_are_finite(size):
    logits = jnp.asarray(size * np.float32([[[1, -1, 0]], [[-1, 1, 1]]]))
    x = np.float32([[0, 1, 0], [0, 0, 1]])
    log_p, slope = jax.value_and_grad(lambda a: jnp.sum(Categories(a).log_prob(x)))(logits)
    expected = special.log_softmax(np.float64(logits), axis=-1)
    assert log_p == pytest.approx(expected[0, 0, 1] + expected[1, 0, 2], rel=1e-6)
    np.testing.assert_allclose(slope[:, 0], x - np.exp(expected[:, 0]), atol=1e-6)


def mixed(batch=3, columns=10):
    """A likelihood of mixed columns, its outputs and parameters, and a table."""
    family = LIKELIHOODS.parse(MIXED)
    outputs = jnp.asarray(numbers((batch, family.outputs_per_pixel(columns))))
    learned = jax.tree.map(lambda a: jnp.asarray(numbers(a.shape, 2)), family.init(columns))
    x = numbers((batch, columns), 3)
    x[:, 2:5], x[:, 7:9] = np.eye(3)[[2, 0, 1]], np.eye(2)[[0, 1, 1]]
    x[:, 5], x[:, 9] = [0, 3, 1], [7, 0, 2]
    return family, outputs, learned, x


def test_each_column_has_its_own_likelihood():
    family, outputs, learned, x = mixed()
    p_x = jax.jit(family.from_outputs)(outputs, learned)
    o, s = np.float64(outputs), lambda i: np.exp(np.logaddexp(learned[i]["log_scale"], -6))
    theta = np.exp(10 * np.tanh(learned["5"]["log_theta"] / 10))
    expected = (
        stats.norm.logpdf(x[:, :2], o[:, :2], s("0")).sum(1)
        + np.sum(x[:, 2:5] * special.log_softmax(o[:, 2:5], axis=1), axis=1)
        + stats.poisson.logpmf(x[:, 5], np.exp(o[:, 5]))
        + stats.t.logpdf(x[:, 6], 1 + np.exp(learned["3"]["log_excess"]), o[:, 6], s("3"))
        + np.sum(x[:, 7:9] * o[:, 7:9] - np.logaddexp(0, o[:, 7:9]), axis=1)
        + stats.nbinom.logpmf(x[:, 9], theta, theta / (theta + np.exp(o[:, 9])))
    )
    np.testing.assert_allclose(log_prob(p_x, x), expected, rtol=2e-5)
    mean, sample = map(np.asarray, mean_and_sample(p_x, KEY))
    assert mean.shape == sample.shape == (3, 10)
    np.testing.assert_allclose(mean[:, 5], np.exp(o[:, 5]), rtol=1e-5)
    part = np.where(np.arange(10) == 5, np.nan, x)
    np.testing.assert_allclose(
        log_prob(p_x, part), expected - stats.poisson.logpmf(x[:, 5], np.exp(o[:, 5])), rtol=2e-5
    )


def test_values_outside_the_support_of_their_column_are_refused():
    family, outputs, learned, x = mixed()
    config = jaxvae.ModelConfig((10,), 2, network="mlp:width=4", likelihood=MIXED)
    params = jaxvae.init(KEY, config)
    for column, value, expected in (
        (5, -1, "expected counts, whole numbers of at least 0"),
        (5, 0.5, "expected counts, whole numbers of at least 0"),
        (3, 2, "expected one-hot columns of 0 and 1"),
        (8, 3, "expected numbers between 0 and 1"),
        (0, np.inf, "NaN or infinity: expected finite numbers"),
        (0, np.nan, "NaN or infinity: expected finite numbers"),
    ):
        bad = x.copy()
        bad[1, column] = value
        for bad_x in (bad, jnp.asarray(bad)):
            with refused("images have ", expected):
                jaxvae.encode(params, bad_x)
    assert jaxvae.encode(params, x).mean.shape == (3, 2)
    with refused("images have shape (3, 11): expected 10 columns"):
        family.from_outputs(outputs, learned).log_prob(numbers((3, 11)))


@pytest.mark.parametrize("of", ["gaussian*3", "gauss", "categorical", "gaussianx0", "", "a+", "3"])
def test_a_specification_of_columns_that_is_none_is_refused(of):
    with refused(f"of is {of!r}: expected kinds such as gaussianx3+categorical4, not", "'poisson'"):
        Columns(of)


def test_columns_of_another_number_than_the_datas_are_refused():
    with refused("the likelihood is of 7 columns, gaussianx3+categorical4, but the data have 6"):
        Columns("gaussianx3+categorical4").outputs_per_pixel(6)
    with refused("the likelihood 'columns' is of tables, but the examples are images"):
        Columns("gaussianx2").from_outputs(jnp.zeros((2, 3, 3, 2)), {})
    with refused("classes is 4, but there are 6 channels: expected a multiple"):
        Categorical(4).init(6)
