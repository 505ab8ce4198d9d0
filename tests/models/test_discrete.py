"""Discrete latents: posteriors over codes, their code books, and all that uses them."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import moved, refused
from jax.test_util import check_grads

import jaxvae
from jaxvae import ModelConfig, TrainConfig, explorer
from jaxvae.data import Dataset
from jaxvae.evaluation.evaluate import evaluate, examine
from jaxvae.interchange.export import export, load_safetensors
from jaxvae.models import codebooks, discrete
from jaxvae.models.categorical import Categorical, CategoricalFamily, RelaxedCategorical
from jaxvae.models.codebooks import CodeVectors, Grid, codebook_of
from jaxvae.models.quantization import (
    FiniteScalarQuantization,
    PointMass,
    VectorQuantization,
    straight_through,
)
from jaxvae.models.summary import summary
from jaxvae.models.vae import prior
from jaxvae.objectives import OBJECTIVES
from jaxvae.runs import drawing
from jaxvae.runs.config import read_config

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), np.uint8)
MODELS = {
    "fsq": "fsq:levels=3x2",
    "vq": "vq:codes=5,dim=2",
    "categorical": "categorical:classes=2",
}


def config_of(name, latent_dim=8, prior="uniform_codes", **fields):
    posterior = MODELS.get(name, name)
    network = "mlp:width=8"
    return ModelConfig(
        SHAPE, latent_dim, posterior=posterior, prior=prior, network=network, **fields
    )


def params_of(name, scale=0.6, **fields):
    """Parameters with which images have different codes."""
    return moved(jaxvae.init(KEY, config_of(name, **fields)), scale)


# Finite scalar quantization.


def test_the_grids_codes_and_points_are_each_others_inverse():
    book = Grid((3, 2, 4))
    every = jnp.arange(24)[:, None]
    points = book.embed(every)
    levels = [[-1, 0, 1], [-1, 1], [-1, -1 / 3, 1 / 3, 1]]
    expected = np.array([p[::-1] for p in product(*levels[::-1])])  # the first latent is fastest
    np.testing.assert_allclose(points, expected, atol=1e-6)
    np.testing.assert_array_equal(book.codes(points), every)
    np.testing.assert_array_equal(book.nearest(points), points)
    np.testing.assert_array_equal(book.one_hot(points)[:, 0], np.eye(24))
    two = jnp.array([[5, 17], [23, 0]])
    np.testing.assert_array_equal(book.codes(book.embed(two)), two)


def test_the_nearest_point_of_the_grid_is_that_of_a_search():
    book = Grid((5, 4))
    z = jnp.array(np.random.default_rng(0).uniform(-1.2, 1.2, (50, 2)), jnp.float32)
    points = np.asarray(book.embed(jnp.arange(20)[:, None]))
    nearest = np.argmin(((z[:, None] - points) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(book.codes(z)[:, 0], nearest)
    np.testing.assert_array_equal(book.nearest(z), points[nearest])


def test_fsq_rounds_the_bounded_mean_and_has_the_gradient_without_rounding():
    family = FiniteScalarQuantization("5x2")

    def z(mean):
        return family.bind({}, (mean, mean)).mean

    def relaxed(mean):
        rms = np.sqrt(np.mean(np.square(mean), axis=1, keepdims=True))
        return np.tanh(mean / np.maximum(1, rms / 1.5))

    with jax.enable_x64(True):
        mean = np.array([[0.0, 0.1, 0.4, -2.0], [9.0, -9.0, -0.3, 4.0]])  # the second is scaled
        np.testing.assert_allclose(
            z(jnp.asarray(mean)), [[0, 1, 0.5, -1], [1, -1, 0, 1]], atol=1e-12
        )
        slope = jax.grad(lambda mean: jnp.sum(z(mean)))(jnp.asarray(mean))
        h = 1e-6
        for i, j in np.ndindex(*mean.shape):
            step = h * (np.arange(8) == 4 * i + j).reshape(mean.shape)
            difference = np.sum(relaxed(mean + step) - relaxed(mean - step)) / (2 * h)
            np.testing.assert_allclose(slope[i, j], difference, atol=1e-9)


def test_fsq_has_a_gradient_however_large_and_however_small_the_mean_is():
    family = FiniteScalarQuantization("5")
    for scale in (0.0, 1e-6, 1.0, 1e4):
        mean = scale * jnp.array([[1.0, -2.0, 0.5, 1.0]])
        jacobian = jax.jacrev(lambda mean: family.bind({}, (mean, mean)).mean)(mean)
        # Large vectors can only turn, by an angle that is inversely proportional to their length.
        assert np.abs(jacobian).max() * max(1.0, scale) > 0.05
        assert np.isfinite(jacobian).all()


def test_straight_through_is_exactly_the_hard_value_with_the_soft_gradient():
    hard, soft = jnp.float32(1e-3), jnp.float32(1e4)
    value, slope = jax.value_and_grad(lambda soft: straight_through(hard, soft))(soft)
    assert value == hard
    assert slope == 1


@pytest.mark.parametrize("levels", ["", "8x", "x5", "1x5", "8xa", "-3", 2.5, "300"])
def test_wrong_levels_are_refused(levels):
    with refused("levels is", "expected numbers from 2 to 256 joined by x"):
        FiniteScalarQuantization(levels)


def test_levels_are_recorded_as_given():
    assert FiniteScalarQuantization(5) == FiniteScalarQuantization("5")
    assert FiniteScalarQuantization((8, 5)).levels == "8x5"
    assert FiniteScalarQuantization("8x5x5x5").num_codes == 1000
    config = config_of("fsq:levels=8x5x5x5")
    assert config.to_dict()["posterior"] == "fsq:levels=8x5x5x5"
    with refused("expected fewer than"):
        FiniteScalarQuantization("256x256x256x256")


# Vector quantization.


def test_the_nearest_vector_is_that_of_a_search(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 3)).astype("f")
    vectors[7] = vectors[8] + np.float32(1e-6)  # a product z . e does not tell these apart
    z = rng.normal(size=(20, 4, 3)).astype("f")
    z[0, :2] = vectors[7:9]
    distances = ((np.float64(z)[..., None, :] - np.float64(vectors)) ** 2).sum(-1)
    book = CodeVectors(jnp.asarray(vectors))
    expected = np.argmin(distances, axis=-1)
    flat = jnp.asarray(z.reshape(20, 12))
    np.testing.assert_array_equal(book.codes(flat), expected)
    found = book.embed(jnp.asarray(expected))
    np.testing.assert_array_equal(found, vectors[expected].reshape(20, 12))
    monkeypatch.setattr(codebooks, "_DISTANCES", 50 * 7)  # seven rows at a time
    np.testing.assert_array_equal(book.codes(flat), expected)


def quantizer(codes=6, dim=3, latents=6, dtype=jnp.float64):
    """A family, its parameters, and means of two images."""
    family = VectorQuantization(codes, dim, commitment=0.3)
    rng = np.random.default_rng(0)
    learned = family.init(KEY, ())
    learned["kernel"] += 0.3 * rng.normal(size=(dim, dim))
    learned = jax.tree.map(lambda x: x.astype(dtype), learned)
    return family, learned, jnp.asarray(rng.normal(size=(2, latents)), dtype)


def by_hand(family, learned, mean):
    """NumPy's u, code vectors and nearest codes."""
    vectors = np.asarray(learned["vectors"]) @ np.asarray(learned["kernel"])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    u = np.asarray(mean).reshape(len(mean), -1, family.dim)
    u = u / np.linalg.norm(u, axis=-1, keepdims=True)
    return u, vectors, np.argmin(((u[..., None, :] - vectors) ** 2).sum(-1), axis=-1)


def test_vq_takes_the_nearest_vector_and_has_the_penalty_of_its_paper():
    with jax.enable_x64(True):
        family, learned, mean = quantizer()
        u, vectors, nearest = by_hand(family, learned, mean)
        posterior = family.bind(learned, (mean, mean))
        np.testing.assert_allclose(posterior.mean, vectors[nearest].reshape(2, 6), atol=1e-9)
        np.testing.assert_array_equal(family.codebook(learned).codes(posterior.mean), nearest)
        squares = ((u - vectors[nearest]) ** 2).sum((1, 2))
        np.testing.assert_allclose(posterior.penalty, 1.3 * squares, atol=1e-9)


def test_vqs_gradients_are_those_of_its_terms_with_the_code_held_fixed():
    """By finite differences in NumPy: of the encoder's unit vectors, and of both terms."""
    with jax.enable_x64(True):
        family, learned, mean = quantizer()
        u_0, vectors_0, nearest = by_hand(family, learned, mean)
        weights = np.random.default_rng(1).normal(size=(2, 6))

        def of_z(mean):
            return jnp.sum(weights * family.bind(learned, (mean, mean)).mean)

        def of_u(mean):
            return np.sum(weights * by_hand(family, learned, mean)[0].reshape(2, 6))

        def penalty(mean, kernel):
            return jnp.sum(family.bind(learned | {"kernel": kernel}, (mean, mean)).penalty)

        def of_encoder(mean):
            u = by_hand(family, learned, mean)[0]
            return 0.3 * ((u - vectors_0[nearest]) ** 2).sum()

        def of_kernel(kernel):
            vectors = by_hand(family, learned | {"kernel": kernel}, mean)[1]
            return ((u_0 - vectors[nearest]) ** 2).sum()

        to_mean, to_kernel = jax.grad(penalty, (0, 1))(mean, learned["kernel"])
        pairs = [
            (jax.grad(of_z)(mean), of_u, mean),
            (to_mean, of_encoder, mean),
            (to_kernel, of_kernel, learned["kernel"]),
        ]
        for slope, function, at in pairs:
            np.testing.assert_allclose(slope, differences(function, np.array(at)), atol=1e-7)


def differences(function, x, h=1e-6):
    """Central differences of a function of an array."""
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        slope[i] = (function(x + step) - function(x - step)) / (2 * h)
    return slope


def test_a_training_step_moves_unused_code_vectors_too():
    images, config = IMAGES[:4], config_of("vq:codes=40,dim=2")
    state = jaxvae.create_train_state(KEY, config, TrainConfig(batch_size=4))
    before = codebook_of(state.params).vectors
    assert len(np.unique(discrete.codes(state.params, images))) <= 16
    after, metrics = jaxvae.train_step(state, images)
    assert np.all(np.any(codebook_of(after.params).vectors != before, axis=1))
    np.testing.assert_array_equal(
        after.params.posterior["vectors"], state.params.posterior["vectors"]
    )
    penalty = jnp.mean(jaxvae.encode(state.params, images).penalty)
    assert penalty > 0
    assert metrics["loss"] == pytest.approx(float(penalty - metrics["elbo"]), rel=1e-5)


def test_wrong_options_of_vq_are_refused():
    with refused("codes is 1: expected at least 2"):
        VectorQuantization(codes=1)
    with refused("dim is 1: expected at least 2"):
        VectorQuantization(dim=1)
    with refused("commitment is -1: expected a number of at least 0"):
        VectorQuantization(commitment=-1)


# Categorical codes.

CATEGORICAL = "categorical:classes=3"  # with 6 latents two codes, so nine sequences


def every_sequence(params):
    """All sequences of codes, their latents, and the log-probability of the prior."""
    book = codebook_of(params)
    codes = jnp.array(list(product(range(3), repeat=2)))
    z = book.embed(codes)
    return codes, z, prior(params).log_prob(z)


def enumerated(params, images):
    """log p(x), and the ELBO's terms, as sums over all sequences of codes: [batch]."""
    codes, z, log_p_z = every_sequence(params)
    log_p_x = jnp.stack(
        [jaxvae.decode(params, jnp.tile(one, (len(images), 1))).log_prob(images) for one in z]
    )
    log_q = jax.nn.log_softmax(jaxvae.encode(params, images).logits)  # [batch, 2, 3]
    log_q = jnp.stack([log_q[:, 0, a] + log_q[:, 1, b] for a, b in codes])
    q = jnp.exp(log_q)
    np.testing.assert_allclose(q.sum(0), 1, rtol=1e-5)
    kl = jnp.sum(q * (log_q - log_p_z[:, None]), axis=0)
    expected = jnp.sum(q * log_p_x, axis=0)
    return jax.nn.logsumexp(log_p_x + log_p_z[:, None], axis=0), expected, kl


@pytest.mark.parametrize("of_prior", ["uniform_codes", "autoregressive:width=8,layers=1"])
def test_the_bounds_of_categorical_codes_are_those_of_the_sum_over_all_codes(of_prior):
    params = params_of(CATEGORICAL, latent_dim=6, prior=of_prior, scale=0.3)
    images = IMAGES[:2]
    log_p_x, expected, kl = enumerated(params, images)
    estimate = jaxvae.log_likelihood(params, KEY, images, 4000)
    np.testing.assert_allclose(estimate, log_p_x, atol=0.05)
    assert np.all(expected - kl < log_p_x)
    draws = 4000
    many = np.repeat(images, draws, axis=0)
    terms = [np.asarray(x).reshape(2, draws) for x in jaxvae.elbo(params, KEY, many)]
    for found, exact in zip(terms, (expected - kl, expected, kl), strict=True):
        error = 5 * found.std(axis=1) / np.sqrt(draws) + 1e-3
        assert np.all(np.abs(found.mean(axis=1) - exact) < error)
    if of_prior == "uniform_codes":  # exact, of every draw
        np.testing.assert_allclose(terms[2], np.tile(kl[:, None], draws), rtol=1e-4)


def posterior_of(straight_through=True, temperature=0.7, rows=2, dtype=jnp.float32):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 2, 3)), dtype)
    return Categorical(logits, temperature, straight_through)


def test_one_hot_samples_have_the_probabilities_of_the_logits():
    posterior = posterior_of()
    keys = jax.random.split(KEY, 20_000)
    many = Categorical(jnp.tile(posterior.logits[:1], (len(keys), 1, 1)), 0.7, True)
    z, log_q = many.sample_and_log_prob(keys)
    assert set(np.unique(z)) == {0, 1}
    p = np.asarray(jax.nn.softmax(posterior.logits[0]))
    np.testing.assert_allclose(z.reshape(-1, 2, 3).mean(0), p, atol=0.02)
    np.testing.assert_allclose(posterior.mean[0], p.ravel(), rtol=1e-6)
    np.testing.assert_allclose(np.exp(posterior.log_var[0]), (p * (1 - p)).ravel(), rtol=1e-5)
    expected = np.log((np.asarray(z).reshape(-1, 2, 3) * p).sum(-1)).sum(-1)
    np.testing.assert_allclose(log_q, expected, rtol=1e-4)
    best = np.eye(3)[p.argmax(-1)].ravel()
    np.testing.assert_array_equal(posterior.center[0], best)


def test_relaxed_samples_are_those_of_their_formula_and_come_close_to_one_hot():
    relaxed = posterior_of(straight_through=False).relaxation
    assert isinstance(relaxed, RelaxedCategorical)
    keys = jax.random.split(KEY, 2)
    z, _ = relaxed.sample_and_log_prob(keys)
    noise = jnp.stack([jax.random.gumbel(key, (2, 3)) for key in keys])
    scores = np.float64(relaxed.logits + noise) / 0.7
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(z, expected.reshape(2, 6), rtol=1e-4)
    cold = posterior_of(straight_through=False, temperature=0.01)
    hard, log_q = cold.sample_and_log_prob(keys)
    soft, relaxed_log_q = cold.relaxation.sample_and_log_prob(keys)
    np.testing.assert_allclose(soft, hard, atol=1e-3)
    np.testing.assert_allclose(relaxed_log_q, log_q, atol=1e-2)
    assert posterior_of(straight_through=True).relaxation is None


def test_straight_through_samples_have_the_gradient_of_relaxed_ones():
    with jax.enable_x64(True):
        posterior = posterior_of(dtype=jnp.float64)
        keys, weights = jax.random.split(KEY, 2), np.random.default_rng(1).normal(size=(2, 6))

        def of(kind, logits):
            return jnp.sum(weights * kind(logits, 0.7, True).sample_and_log_prob(keys)[0])

        def soft(logits):
            return float(of(RelaxedCategorical, jnp.asarray(logits)))

        slope = jax.grad(lambda logits: of(Categorical, logits))(posterior.logits)
        expected = differences(soft, np.array(posterior.logits))
        np.testing.assert_allclose(slope, expected, atol=1e-7)


@pytest.mark.parametrize("of_prior", ["uniform_codes", "autoregressive:width=8,layers=1"])
def test_the_relaxed_objective_has_a_gradient_in_float64(of_prior):
    with jax.enable_x64(True):
        params = params_of(CATEGORICAL, latent_dim=6, prior=of_prior)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        images = IMAGES[:3] / 255

        def loss(params):
            return OBJECTIVES.parse("elbo")(params, KEY, images)[0]

        check_grads(jax.jit(loss), (params,), order=1, modes=["rev"])


def test_training_by_the_elbo_takes_relaxed_samples_unless_straight_through():
    relaxed = params_of(CATEGORICAL, latent_dim=6)
    hard = params_of(f"{CATEGORICAL},straight_through=true", latent_dim=6)
    objective = OBJECTIVES.parse("elbo")
    terms = jaxvae.elbo(relaxed, KEY, IMAGES)
    np.testing.assert_allclose(jaxvae.elbo(hard, KEY, IMAGES).value, terms.value, rtol=1e-6)
    np.testing.assert_allclose(objective(hard, KEY, IMAGES)[1].value, terms.value, rtol=1e-6)
    loss, of_relaxed = objective(relaxed, KEY, IMAGES)
    assert np.all(np.abs(of_relaxed.log_likelihood - terms.log_likelihood) > 1e-6)
    np.testing.assert_allclose(of_relaxed.kl, terms.kl, rtol=1e-6)
    with refused("this objective weights samples by log q(z|x)", "straight_through=true"):
        OBJECTIVES.parse("iwae")(relaxed, KEY, IMAGES)
    loss, _ = OBJECTIVES.parse("iwae:num_samples=4")(hard, KEY, IMAGES)
    assert np.isfinite(loss).all()


def test_wrong_options_of_categorical_are_refused():
    with refused("classes is 1: expected at least 2"):
        CategoricalFamily(classes=1)
    with refused("temperature is 0: expected a number above 0"):
        CategoricalFamily(temperature=0)
    with refused("straight_through is 1: expected true or false"):
        CategoricalFamily(straight_through=1)


# The bounds of a posterior that is one code.


@pytest.mark.parametrize("name", ["fsq", "vq"])
@pytest.mark.parametrize("of_prior", ["uniform_codes", "autoregressive:width=8,layers=1"])
def test_the_bounds_of_a_point_mass_are_its_elbo(name, of_prior):
    params = params_of(name, prior=of_prior)
    posterior = jaxvae.encode(params, IMAGES)
    assert isinstance(posterior, PointMass)
    terms = jaxvae.elbo(params, KEY, IMAGES)
    log_p_z = prior(params).log_prob(posterior.mean)
    np.testing.assert_allclose(terms.kl, -log_p_z, rtol=1e-5)
    log_p_x = jaxvae.decode(params, posterior.mean).log_prob(IMAGES)
    np.testing.assert_allclose(terms.log_likelihood, log_p_x, rtol=1e-5)
    np.testing.assert_allclose(
        jaxvae.log_likelihood(params, KEY, IMAGES, 3), terms.value, rtol=1e-5
    )
    loss, _ = OBJECTIVES.parse("iwae:num_samples=3")(params, KEY, IMAGES)
    np.testing.assert_allclose(loss, posterior.penalty - terms.value, rtol=1e-5)
    if of_prior == "uniform_codes":
        book = codebook_of(params)
        n = 8 // book.dim
        np.testing.assert_allclose(terms.kl, n * np.log(book.num_codes), rtol=1e-6)


# What any posterior over codes does, and refuses.


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_decoded_to_the_reconstructions(name):
    params = params_of(name)
    book = codebook_of(params)
    codes = discrete.codes(params, IMAGES)
    assert codes.dtype == jnp.int32
    assert codes.shape == (24, 8 // book.dim)
    assert len(np.unique(np.asarray(codes), axis=0)) > 1
    assert codes.min() >= 0
    assert codes.max() < book.num_codes
    means = discrete.decode_codes(params, codes).mean
    np.testing.assert_allclose(means, jaxvae.reconstruct(params, IMAGES), atol=1e-6)


def test_codes_of_a_conditional_model_take_the_classes():
    params = params_of("fsq", num_classes=3)
    labels = jnp.arange(24) % 3
    codes = discrete.codes(params, IMAGES, labels)
    means = discrete.decode_codes(params, codes, labels).mean
    np.testing.assert_allclose(means, jaxvae.reconstruct(params, IMAGES, labels), atol=1e-6)


def test_wrong_codes_are_refused():
    params = params_of("fsq")
    with refused("codes are from 0 to 6: expected codes from 0 to 5"):
        discrete.decode_codes(params, [[0, 1, 6, 2]])
    with refused("codes have shape (1, 3): expected (batch, 4)"):
        discrete.decode_codes(params, [[0, 1, 2]])
    with refused("codes are of type float32: expected whole numbers"):
        discrete.decode_codes(params, [[0.0, 1, 2, 3]])
    continuous = jaxvae.init(KEY, ModelConfig(SHAPE, network="mlp:width=8"))
    for call in (discrete.codes, discrete.decode_codes):
        with refused("the posterior 'gaussian' has no codes", "such as 'fsq'"):
            call(continuous, IMAGES)


@pytest.mark.parametrize("name", MODELS)
def test_codes_and_densities_do_not_go_together(name):
    for other in ("standard_normal", "mixture", "vamp", "realnvp"):
        with refused(f"posterior is '{MODELS[name]}'", f"the prior '{other}'", "'uniform_codes'"):
            config_of(name, prior=other)
    with refused("latent_dim is 7: expected a multiple of", MODELS[name]):
        config_of(name, latent_dim=7)


@pytest.mark.parametrize("of_prior", ["uniform_codes", "autoregressive"])
@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
def test_a_prior_over_codes_needs_a_posterior_over_codes(of_prior, posterior):
    with refused(f"prior is '{of_prior}'", f"posterior '{posterior}' is not", "such as 'fsq'"):
        config_of(posterior, prior=of_prior)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("stl", "needs the density q(z|x) at any z"),
        ("dreg", "needs the density q(z|x) at any z"),
        ("beta_tc", "needs the density q(z|x) at any z"),
        ("mmd", "samples of codes do not allow"),
        ("elbo:free_bits=1", "free_bits needs the KL of every latent"),
    ],
)
def test_an_objective_without_a_meaning_is_refused(name, objective, says):
    with refused(says):
        OBJECTIVES.parse(objective)(params_of(name), KEY, IMAGES)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_codes_goes_through_everything(name, tmp_path):
    data = Dataset(IMAGES, np.arange(24) % 3, IMAGES[:16], np.arange(16) % 3)
    config = config_of(name, prior="autoregressive:width=8,layers=1")
    train = TrainConfig(batch_size=8, epochs=2, optimizer="adam")
    run_dir = tmp_path / "run"
    result = jaxvae.fit(data, config, train, run_dir=run_dir, progress=False)
    params = jaxvae.load(run_dir)
    assert jaxvae.sample(params, KEY, 3).shape == (3, *SHAPE)
    drawn = drawing.draw(run_dir, read_config(run_dir), data, params)
    assert {path.stem for path in drawn} == {"reconstructions", "samples", "training"}
    assert not (run_dir / "manifolds").exists()
    found = examine(params, KEY, data)
    assert 1 <= found["code_perplexity"] <= codebook_of(params).num_codes + 1e-3
    assert "active_units" not in found
    assert np.isfinite(evaluate(params, KEY, IMAGES)["elbo"])
    assert "prior, autoregressive:width=8,layers=1" in summary(config)
    explorer.write(tmp_path / "explorer.html", params, data, "codes")
    paths = export(params, tmp_path / "export", ["stablehlo", "safetensors"])
    again = load_safetensors(next(p for p in paths if p.suffix == ".safetensors"))
    np.testing.assert_array_equal(
        discrete.codes(again, IMAGES), discrete.codes(result.params, IMAGES)
    )
    encoder = jax.export.deserialize((tmp_path / "export" / "encoder.stablehlo").read_bytes())
    codes, center = encoder.call(np.float32(IMAGES) / 255)
    np.testing.assert_array_equal(codes, discrete.codes(params, IMAGES))
    np.testing.assert_allclose(center, jaxvae.encode(params, IMAGES).center, atol=1e-5)
    sampler = jax.export.deserialize((tmp_path / "export" / "sampler.stablehlo").read_bytes())
    assert sampler.call(np.arange(6, dtype=np.uint32).reshape(3, 2)).shape == (3, *SHAPE)


@pytest.mark.parametrize("name", MODELS)
def test_the_objective_has_a_gradient_in_float64(name):
    """Of the decoder, whose derivative no rounding of the codes interrupts."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params_of(name))
        images = IMAGES[:3] / 255

        def loss(decoder):
            there = replace(params, decoder=decoder)
            return OBJECTIVES.parse("elbo")(there, KEY, images)[0]

        check_grads(jax.jit(loss), (params.decoder,), order=1, modes=["rev"])


def test_perplexity_is_the_effective_number_of_codes():
    assert discrete.perplexity(jnp.zeros((5, 2), jnp.int32), 4) == pytest.approx(1)
    assert discrete.perplexity(jnp.arange(8).reshape(4, 2) % 4, 9) == pytest.approx(4)
    uneven = jnp.array([[0, 0, 0, 1]])
    assert discrete.perplexity(uneven, 2) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
