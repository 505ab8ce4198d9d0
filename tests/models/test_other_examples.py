"""Models of examples that are not images: vectors, and arrays of any rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OF_IMAGES, OwnDecoder, OwnEncoder, moved, refused
from scipy import stats

import jaxvae
from jaxvae import ModelConfig, TrainConfig
from jaxvae.models.config import NETWORKS, PRIORS
from jaxvae.models.likelihoods import bits_per_dimension
from jaxvae.models.priors import Vamp, pseudo_images

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
X = (10 * RNG.normal(size=(12, 5))).astype("f")
SHARES = RNG.random((12, 5), "f")
SMALL = {"logistic_mixture": "logistic_mixture:components=2", "vamp": "vamp:components=3"}


def params_of(shape=(5,), likelihood="gaussian", **fields):
    fields = {"network": "mlp:width=8", "latent_dim": 2} | fields
    config = ModelConfig(shape, likelihood=SMALL.get(likelihood, likelihood), **fields)
    return moved(jaxvae.init(KEY, config), 0.3)


def test_every_function_takes_vectors():
    params = params_of()
    posterior = jaxvae.encode(params, X)
    assert posterior.mean.shape == posterior.log_var.shape == (12, 2)
    p_x = jaxvae.decode(params, posterior.mean)
    assert p_x.mean.shape == p_x.sample(KEY).shape == jaxvae.reconstruct(params, X).shape == X.shape
    assert jaxvae.sample(params, KEY, 4).shape == (4, 5)
    assert p_x.log_prob(X).shape == jaxvae.log_likelihood(params, KEY, X, 3).shape == (12,)
    assert all(term.shape == (12,) for term in jaxvae.elbo(params, KEY, X))


def test_the_gaussian_of_vectors_is_scipys_with_its_mean_anywhere():
    params = params_of()
    p_x = jaxvae.decode(params, 30 * jax.random.normal(KEY, (12, 2)))
    assert jnp.min(p_x.mean) < 0  # an image's is between 0 and 1
    expected = stats.norm.logpdf(X, p_x.mean, np.exp(p_x.log_scale)).sum(1)
    np.testing.assert_allclose(p_x.log_prob(X), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in OF_IMAGES if n != "gaussian"])
def test_a_bounded_likelihood_of_a_vector_is_that_of_an_image_of_one_pixel(name):
    vector = params_of(likelihood=name)
    config = ModelConfig((1, 1, 5), likelihood=SMALL.get(name, name), network="mlp:width=8")
    image = jaxvae.Params(vector.encoder, vector.decoder, config, vector.likelihood)
    z = jax.random.normal(KEY, (12, 2))
    a, b = jaxvae.decode(vector, z), jaxvae.decode(image, z)
    np.testing.assert_allclose(a.log_prob(SHARES), b.log_prob(SHARES[:, None, None]), rtol=1e-5)
    np.testing.assert_allclose(a.mean, b.mean[:, 0, 0], rtol=1e-5)
    for wrong in (X, (SHARES * 255).astype(np.uint8)):  # which is not scaled
        with refused("expected numbers between 0 and 1", "scale the data", "'gaussian'"):
            jaxvae.elbo(vector, KEY, wrong)
        with refused("expected numbers between 0 and 1"):
            a.log_prob(wrong)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3, 2)])
def test_arrays_of_any_rank_have_the_likelihood_of_the_flat_vector(shape):
    params, size = params_of(shape), int(np.prod(shape))
    x = RNG.normal(size=(4, *shape)).astype("f")
    p_x = jaxvae.decode(params, jnp.zeros((4, 2)))
    assert p_x.mean.shape == x.shape
    mean, scale = np.reshape(p_x.mean, (4, size)), np.exp(p_x.log_scale)
    expected = stats.norm.logpdf(x.reshape(4, size), mean, scale).sum(1)
    np.testing.assert_allclose(p_x.log_prob(x), expected, rtol=1e-5)
    np.testing.assert_allclose(bits_per_dimension(jnp.log(jnp.full(1, 0.5)), shape), 1 / size)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float64])
def test_numbers_of_any_type_are_used_as_they_are(dtype):
    params, x = params_of(), (10 * SHARES).astype(dtype)
    as_floats = jaxvae.encode(params, x.astype(np.float32))
    np.testing.assert_array_equal(jaxvae.encode(params, x).mean, as_floats.mean)


def test_what_is_no_number_or_not_finite_or_of_another_shape_is_refused():
    params, bad = params_of(), X.copy()
    bad[3, 1] = np.nan
    with refused("images have NaN or infinity: expected finite numbers"):
        jaxvae.elbo(params, KEY, bad)
    with refused("images have shape (12, 4): expected (batch, 5)"):
        jaxvae.elbo(params, KEY, X[:, :4])
    with refused("images are of type complex64"):
        jaxvae.encode(params, X.astype(np.complex64))


def test_training_on_vectors_learns_their_mean():
    x = np.float32([3, -2, 0, 7, 1]) + 0.1 * RNG.normal(size=(640, 5)).astype("f")
    train = TrainConfig(batch_size=32, optimizer="adam", learning_rate=0.03)
    state = jaxvae.create_train_state(KEY, params_of().config, train)
    for _ in range(6):
        state, metrics = jaxvae.train_epoch(state, x)
    assert metrics["elbo"] == pytest.approx(float(metrics["log_likelihood"] - metrics["kl"]), 1e-4)
    np.testing.assert_allclose(jaxvae.reconstruct(state.params, x).mean(0), x.mean(0), atol=0.3)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "mlp"])
def test_networks_for_images_are_refused_in_a_line_that_names_mlp(name):
    with refused("image_shape is (33,)", f"the network {name!r} is for images", "choose 'mlp'"):
        ModelConfig((33,), network=name)


def test_a_shape_has_at_least_one_axis_of_whole_numbers():
    for shape in ((), 33, (0,), (2.5,)):
        with refused("image_shape"):
            ModelConfig(shape, network="mlp")
    assert ModelConfig((33,), network="mlp").outputs_shape == (33,)
    assert ModelConfig((33,), network="mlp").noun == "example"
    assert ModelConfig().noun == "image"


def test_own_modules_take_vectors():
    class Flat(OwnDecoder):
        def __call__(self, z, labels=None):
            return super().__call__(z, labels).reshape(-1, 5)

    config = ModelConfig((5,), network=(OwnEncoder(2), Flat((1, 1, 5))), likelihood="gaussian")
    assert jaxvae.reconstruct(jaxvae.init(KEY, config), X).shape == X.shape


@pytest.mark.parametrize("name", [n for n in PRIORS if not hasattr(PRIORS.parse(n), "over_codes")])
def test_priors_of_a_density_go_with_vectors(name):
    assert jaxvae.elbo(params_of(prior=SMALL.get(name, name)), KEY, X).value.shape == (12,)


def test_a_vamp_prior_starts_from_training_examples_as_they_are():
    params = params_of(prior="vamp:components=3")
    learned = Vamp(3).init_from(KEY, params, jnp.asarray(X), None)
    np.testing.assert_array_equal(pseudo_images(learned), X[:3])
