"""What every registered component of a model keeps to: the contracts of `models.protocols`."""

import json
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples_of, moved

import jaxvae
from jaxvae.interchange.onnx import to_onnx
from jaxvae.models.codebooks import codebook_of
from jaxvae.models.config import LIKELIHOODS, NETWORKS, POSTERIORS, PRIORS
from jaxvae.models.vae import prior
from jaxvae.objectives import OBJECTIVES, WARMUPS
from jaxvae.training.optimizer import SCHEDULES, rate_at

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(3)
SHAPE = (4, 4, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (32, *SHAPE), np.uint8)
SMALL = {"mixture": "mixture:components=3", "vamp": "vamp:components=3", "mlp": "mlp:width=8",
         "residual": "residual:width=4", "spatial": "spatial:width=4",
         "ladder": "ladder:groups=2x1+1x1,width=4,latents=1",
         "logistic_mixture": "logistic_mixture:components=2",
         "iaf": "iaf:steps=1,hidden=8", "realnvp": "realnvp:layers=2,hidden=8",
         "categorical": "categorical:classes=2", "fsq": "fsq:levels=3x2", "vq": "vq:codes=4,dim=2",
         "autoregressive": "autoregressive:width=8,layers=1",
         "poisson": "poisson:size=0", "negative_binomial": "negative_binomial:size=0",
         "zero_inflated_negative_binomial": "zero_inflated_negative_binomial:size=0",
         "columns": "columns:of=student_t"}  # fmt: skip

CODE_POSTERIORS = [n for n in POSTERIORS if hasattr(POSTERIORS.parse(n), "codebook")]
CODE_PRIORS = [n for n in PRIORS if hasattr(PRIORS.parse(n), "over_codes")]
DENSITY_POSTERIORS = [n for n in POSTERIORS if n not in CODE_POSTERIORS]
DENSITY_PRIORS = [n for n in PRIORS if n not in CODE_PRIORS]


def small(name):
    return SMALL.get(name, name)


def latents_of(network):
    """A number of latents for every network; a ladder has its own, beside the default of 2."""
    return 2 if network == "ladder" else 4


def with_partner(kind, name):
    """The fields of a component: a prior over codes goes with a posterior over codes alone."""
    partners = {("prior", n): {"posterior": small("fsq")} for n in CODE_PRIORS}
    partners |= {("posterior", n): {"prior": "uniform_codes"} for n in CODE_POSTERIORS}
    return {kind: small(name)} | partners.get((kind, name), {})


def params_of(latent_dim=2, scale=0.3, image_shape=SHAPE, **fields):
    config = jaxvae.ModelConfig(image_shape, latent_dim, **{"network": "mlp:width=8"} | fields)
    return moved(jaxvae.init(KEY, config), scale)


@pytest.mark.parametrize("name", DENSITY_PRIORS)
def test_a_prior_is_a_density_and_its_samples_have_it(name):
    params = params_of(latent_dim=1, prior=small(name))
    z = jnp.linspace(-30, 30, 60_001)[:, None]
    p = jnp.exp(prior(params).log_prob(z))
    assert p.shape == (60_001,)
    assert p.dtype == jnp.float32
    assert jnp.trapezoid(p, z[:, 0]) == pytest.approx(1, abs=1e-4)
    draws = prior(params).sample(KEY, 40_000)
    assert draws.shape == (40_000, 1)
    below = jnp.cumsum(p) * 1e-3
    for quantile in (0.1, 0.5, 0.9):
        at = jnp.interp(quantile, below, z[:, 0])
        assert jnp.mean(draws < at) == pytest.approx(quantile, abs=0.01)


@pytest.mark.parametrize("name", CODE_PRIORS)
def test_a_prior_over_codes_sums_to_one_and_its_samples_have_it(name):
    params = params_of(4, **with_partner("prior", name))
    book = codebook_of(params)
    every = jnp.stack(jnp.divmod(jnp.arange(36), 6), axis=1)
    z = book.embed(every)
    assert z.shape == (36, 4)
    p = jnp.exp(prior(params).log_prob(z))
    assert p.dtype == jnp.float32
    assert jnp.sum(p) == pytest.approx(1, abs=1e-5)
    draws = prior(params).sample(KEY, 40_000)
    assert draws.shape == (40_000, 4)
    assert draws.dtype == jnp.float32
    drawn = jnp.bincount(book.codes(draws) @ jnp.array([6, 1]), length=36) / 40_000
    assert jnp.max(jnp.abs(drawn - p) / jnp.sqrt(p / 40_000)) < 4.5


@pytest.mark.parametrize("name", list(PRIORS))
def test_a_prior_is_a_pytree_under_jit_vmap_and_grad(name):
    params = params_of(**with_partner("prior", name))
    z = jax.random.normal(KEY, (3, 5, 2))
    log_p = jax.jit(lambda p, z: p.log_prob(z))(prior(params), z)
    np.testing.assert_allclose(log_p, prior(params).log_prob(z), rtol=1e-5)
    each = jax.vmap(jax.vmap(prior(params).log_prob))(z)
    np.testing.assert_allclose(each, log_p, rtol=1e-4)
    slope = jax.grad(lambda params: jnp.sum(prior(params).log_prob(z)))(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert not params.prior or any(jnp.any(x != 0) for x in jax.tree.leaves(slope.prior))
    if hasattr(prior(params), "marginal"):
        one = prior(params).marginal(1)
        grid = jnp.linspace(-20, 20, 4001)[:, None]
        assert jnp.trapezoid(jnp.exp(one.log_prob(grid)), grid[:, 0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", CODE_POSTERIORS)
def test_samples_of_a_posterior_over_codes_have_its_probabilities(name):
    """E_q[1 / q(z|x)] over hard samples is the number of codes that have a probability."""
    params = params_of(4, scale=0.1, **with_partner("posterior", name))
    book = codebook_of(params)
    keys = jax.random.split(KEY, 20_000)
    many = jaxvae.encode(params, np.broadcast_to(IMAGES[:1], (len(keys), *SHAPE)))
    z, log_q = many.sample_and_log_prob(keys)
    assert z.shape == many.center.shape == many.mean.shape == many.log_var.shape == (20_000, 4)
    assert log_q.shape == (20_000,)
    codes = book.codes(z)
    np.testing.assert_array_equal(book.embed(codes), z)
    np.testing.assert_array_equal(jnp.argmax(book.one_hot(z), axis=-1), codes)
    seen = np.unique(np.asarray(codes), axis=0)
    assert jnp.mean(jnp.exp(-log_q)) == pytest.approx(len(seen), rel=0.1)


@pytest.mark.parametrize("name", DENSITY_POSTERIORS)
def test_a_posterior_is_a_density_that_its_samples_have(name):
    """By importance sampling: E_q[f(z) / q(z|x)] is the integral of f, here a density's, 1."""
    params = params_of(latent_dim=1, scale=0.1, posterior=small(name))
    image = jnp.asarray(IMAGES[:1])
    keys = jax.random.split(KEY, 20_000)
    many = jaxvae.encode(params, jnp.broadcast_to(image, (len(keys), *SHAPE)))
    z, log_q = many.sample_and_log_prob(keys)
    assert z.shape == (20_000, 1)
    assert log_q.shape == (20_000,)
    middle, spread = jnp.mean(z), 0.5 * jnp.std(z)
    log_f = jax.scipy.stats.norm.logpdf(z[:, 0], middle, spread)
    assert jnp.mean(jnp.exp(log_f - log_q)) == pytest.approx(1, abs=0.03)
    assert many.center.shape == many.mean.shape == many.log_var.shape == (20_000, 1)


PAIRED = [*product(DENSITY_POSTERIORS, DENSITY_PRIORS), *product(CODE_POSTERIORS, CODE_PRIORS)]


@pytest.mark.parametrize(("name", "of_prior"), PAIRED)
def test_an_exact_kl_is_the_mean_of_its_estimate(name, of_prior):
    params = params_of(4, scale=0.1, posterior=small(name), prior=small(of_prior))
    keys = jax.random.split(KEY, 20_000)
    many = jaxvae.encode(params, np.broadcast_to(IMAGES[:1], (len(keys), *SHAPE)))
    exact = many.kl(prior(params))
    if exact is None:
        return
    z, log_q = many.sample_and_log_prob(keys)
    estimate = log_q - prior(params).log_prob(z)
    error = 5 * float(jnp.std(estimate)) / np.sqrt(len(keys))
    assert float(exact[0]) == pytest.approx(float(jnp.mean(estimate)), abs=error)


def shape_of(likelihood, *places):
    """A shape for every likelihood: columns are vectors, and a category has two classes."""
    return {"columns": (1,), "categorical": (*places, 2)}.get(likelihood, (*places, 1))


def support_of(family):
    """The values of one pixel, [values, channels], and the weight of each in an integral."""
    support = family.support if isinstance(family.support, str) else family.support[0][0]
    values = {"binary": jnp.array([[0.0], [1.0]]), "levels": jnp.arange(256)[:, None] / 255,
              "count": jnp.arange(20_000.0)[:, None], "one_hot": jnp.eye(2)}  # fmt: skip
    if support in values:
        return values[support], jnp.ones(len(values[support]))
    low, high = {"unit": (0, 1), "real": (-100, 100)}[support]
    values = jnp.linspace(low, high, 40_001)
    weights = jnp.full(len(values), (high - low) / 40_000)
    return values[:, None], weights.at[jnp.array([0, -1])].mul(0.5)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_a_likelihood_is_normalised_and_its_mean_and_samples_have_it(name):
    shape = shape_of(name, 1, 1)
    params = params_of(image_shape=shape, scale=1.0, likelihood=small(name))
    values, weights = support_of(params.config.likelihood)
    z = jnp.broadcast_to(jnp.array([[0.4, -0.7]]), (len(values), 2))
    p_x = jaxvae.decode(params, z)
    p = jnp.exp(p_x.log_prob(values.reshape(-1, *shape))) * weights
    assert p.dtype == jnp.float32
    assert jnp.sum(p) == pytest.approx(1, abs=1e-3)
    samples = p_x.sample(KEY).reshape(values.shape)
    error = 5 * jnp.std(samples, axis=0) / np.sqrt(len(samples)) + 1e-3
    if len(samples) > 1000:
        assert jnp.all(jnp.abs(jnp.mean(samples, axis=0) - p @ values) < error)
    if name != "discretized_logistic":  # whose mean is the location, before it is rounded
        np.testing.assert_allclose(p_x.mean[0].ravel(), p @ values, atol=1e-3)
    assert p_x.mean.shape == p_x.sample(KEY).shape == (len(values), *shape)


def examples_for(name, count):
    """Examples in the support of a likelihood, and their shape."""
    shape = shape_of(name, *SHAPE[:2])
    return examples_of(LIKELIHOODS.parse(small(name)).support, (count, *shape)), shape


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name", [n for n in LIKELIHOODS if LIKELIHOODS.parse(small(n)).support in ("binary", "levels")]
)
def test_the_probabilities_of_levels_are_those_of_log_prob(name, channels):
    params = params_of(image_shape=(3, 2, channels), likelihood=small(name))
    values, _ = support_of(params.config.likelihood)
    rng = np.random.default_rng(0)
    p_x = jaxvae.decode(params, rng.normal(size=(32, 2)).astype(np.float32))
    images = np.asarray(p_x.sample(KEY))  # other levels may have less than float32 can tell from 1
    level = np.round(images * (len(values) - 1)).astype(int)
    log_p = np.zeros(32)
    for c in range(channels):
        earlier = np.where(np.arange(channels) < c, images, 0)
        cdf = np.asarray(p_x.level_cdf(earlier, c), np.float64)
        assert cdf.shape == (32, 3, 2, len(values) - 1)
        p = np.diff(cdf, prepend=0, append=1)
        assert p.min() >= -1e-6
        log_p += np.log(np.take_along_axis(p, level[..., c, None], -1)).sum((1, 2, 3))
    np.testing.assert_allclose(log_p, p_x.log_prob(images), rtol=1e-3)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_a_likelihood_is_differentiable_under_jit_and_vmap(name):
    images, shape = examples_for(name, 4)
    params = params_of(image_shape=shape, likelihood=small(name))
    z = jax.random.normal(KEY, (4, 2))

    def log_p(params, z, images):
        return jaxvae.decode(params, z).log_prob(images)

    together = jax.jit(log_p)(params, z, images)
    assert together.shape == (4,)
    each = jax.vmap(lambda z, x: log_p(params, z[None], x[None])[0])(z, jnp.asarray(images))
    np.testing.assert_allclose(each, together, rtol=2e-5)
    slope = jax.grad(lambda params: jnp.sum(log_p(params, z, images)))(params)
    for part in ("decoder", "likelihood"):
        leaves = jax.tree.leaves(getattr(slope, part))
        assert all(jnp.isfinite(x).all() and jnp.any(x != 0) for x in leaves)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_missing_entries_do_not_count_in_a_likelihood(name):
    """log p(x) is the sum of those of its parts, each with the other part missing."""
    images, shape = examples_for(name, 4)
    params = params_of(image_shape=shape, likelihood=small(name))
    missing = np.random.default_rng(1).random((4, *shape[:-1], 1)) < 0.4
    missing[0] = True
    x = np.float32(images) / (255 if images.dtype == np.uint8 else 1)
    z = jax.random.normal(KEY, (4, 2))

    def log_p(params, x):
        return jaxvae.decode(params, z).log_prob(x)

    part, rest = (log_p(params, np.where(m, np.nan, x)) for m in (missing, ~missing))
    np.testing.assert_allclose(part + rest, log_p(params, x), rtol=1e-5)
    assert part[0] == pytest.approx(0, abs=1e-6)
    slope = jax.grad(lambda params: jnp.sum(log_p(params, np.where(missing, np.nan, x))))(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slope))


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_has_the_shapes_of_its_model_and_treats_images_alone(name, num_classes):
    fields = {"image_shape": (8, 7, 2), "network": small(name), "num_classes": num_classes}
    params = params_of(latents_of(name), **fields)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 7, 2), np.uint8)
    labels = (jnp.arange(5) % 3,) if num_classes else ()
    together = jaxvae.encode(params, images, *labels)
    alone = jaxvae.encode(params, images[3:4], *(x[3:4] for x in labels))
    assert together.mean.shape == together.log_var.shape == (5, params.config.latent_dim)
    np.testing.assert_allclose(together.mean[3], alone.mean[0], rtol=1e-4, atol=1e-5)
    means = jaxvae.decode(params, together.mean, *labels).mean
    assert means.shape == images.shape
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_has_one_jacobian_in_forward_and_in_reverse_mode(name):
    params = params_of(latents_of(name), image_shape=(8, 7, 2), network=small(name))
    images = jax.random.uniform(KEY, (2, 8, 7, 2))
    latents = jax.random.normal(KEY, (2, params.config.latent_dim))

    def encoder(image):
        return jaxvae.encode(params, image[None]).mean[0]

    def decoder(z):
        return jaxvae.decode(params, z[None]).mean[0]

    for f, x in (encoder, images), (decoder, latents):
        forward, reverse = (jax.jit(jax.vmap(mode(f)))(x) for mode in (jax.jacfwd, jax.jacrev))
        largest = jnp.max(jnp.abs(reverse))
        assert largest > 0
        np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-5 * largest)


CLASSIFIER = {"m2": {"num_classes": 2, "classifier": True}}
PAIRS = [(name, "mixture") for name in OBJECTIVES] + [("elbo", name) for name in PRIORS]


@pytest.mark.parametrize(("name", "of_prior"), sorted(set(PAIRS)))
def test_an_objective_gives_a_loss_and_terms_and_a_gradient(name, of_prior):
    params = params_of(**with_partner("prior", of_prior) | CLASSIFIER.get(name, {}))
    objective = OBJECTIVES.parse(name)

    def loss(params, key):
        loss, terms = objective(params, key, IMAGES, beta=0.7)
        return jnp.mean(loss), (loss, terms)

    slope, (losses, terms) = jax.jit(jax.grad(loss, has_aux=True))(params, KEY)
    assert losses.shape == terms.value.shape == (32,)
    np.testing.assert_allclose(terms.value, terms.log_likelihood - terms.kl, rtol=1e-5)
    for part in ("encoder", "decoder", "prior"):
        leaves = jax.tree.leaves(getattr(slope, part))
        assert all(jnp.isfinite(x).all() for x in leaves)
        is_constant = not leaves or (name == "prior" and part != "prior")
        assert any(jnp.any(x != 0) for x in leaves) != is_constant
    keys = jax.random.split(KEY, 2)
    both, _ = jax.jit(jax.vmap(loss, (None, 0)))(params, keys)
    assert both[1] == pytest.approx(float(jax.jit(loss)(params, keys[1])[0]), rel=1e-4)
    assert isinstance(objective.across_batch, bool)
    assert objective.num_samples >= 1


@pytest.mark.parametrize("name", list(WARMUPS))
def test_a_warmup_ends_at_beta_and_never_exceeds_it(name):
    warmup = WARMUPS.parse(name if name == "none" else f"{name}:steps=10")
    betas = jnp.stack([jnp.float32(warmup(2.0, jnp.int32(step))) for step in range(41)])
    assert betas.max() == 2
    assert betas.min() >= 0
    assert name == "none" or betas[0] == 0


@pytest.mark.parametrize("name", ["constant", "cosine", "burda"])
def test_a_schedule_starts_at_the_learning_rate_and_never_exceeds_it(name):
    schedule = SCHEDULES.parse(name)
    rates = [float(rate_at(schedule, 0.1, jnp.int32(step), 100)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) <= 0.1 + 1e-7
    assert min(rates) > 0


KINDS = {"network": NETWORKS, "likelihood": LIKELIHOODS, "prior": PRIORS, "posterior": POSTERIORS}
EVERY = [(kind, name) for kind, registry in KINDS.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_component_survives_config_and_checkpoint_and_trains(kind, name, tmp_path):
    fields = {"network": "mlp:width=8"} | with_partner(kind, name)
    images, shape = examples_for(name, 32) if kind == "likelihood" else (IMAGES, SHAPE)
    config = jaxvae.ModelConfig(shape, latents_of(name), **fields)
    assert config.to_dict()[kind] == small(name)
    assert jaxvae.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(jaxvae.ModelConfig.from_dict(config.to_dict())) == hash(config)
    train = jaxvae.TrainConfig(batch_size=8, optimizer="adam")
    state = jaxvae.create_train_state(KEY, config, train)
    state, metrics = jaxvae.train_epoch(state, images)
    assert all(jnp.isfinite(x) for x in metrics.values())
    jaxvae.save(tmp_path, state)
    again = jaxvae.restore(tmp_path)
    assert again.config == train
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jaxvae.sample(jaxvae.load(tmp_path), KEY, 2).shape == (2, *shape)
    assert replace(config, compute_dtype="bfloat16") != config


def check_in_onnx(f, x):
    """A function of a batch computes in ONNX Runtime what it does in JAX."""
    import onnxruntime

    expected = f(x)
    rows = {"x": jax.ShapeDtypeStruct(x.shape[1:], x.dtype)}
    content = to_onnx("function", f, rows, [str(i) for i in range(len(expected))])
    found = onnxruntime.InferenceSession(content).run(None, {"x": x})
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [one for one in EVERY if one[0] != "prior"])
def test_encoder_and_decoder_are_the_same_in_onnx(kind, name):
    shape = shape_of(name, 4, 4) if kind == "likelihood" else SHAPE
    params = params_of(latents_of(name), image_shape=shape, **with_partner(kind, name))

    def encoder(images):
        posterior = jaxvae.encode(params, images)
        if name in CODE_POSTERIORS:
            return posterior.center, codebook_of(params).codes(posterior.center)
        return posterior.mean, posterior.log_var, posterior.center

    if kind != "likelihood":
        check_in_onnx(encoder, np.float32(IMAGES[:3]) / 255)
    if kind != "posterior":
        latents = np.random.default_rng(1).normal(size=(3, params.config.latent_dim))
        check_in_onnx(lambda z: (jaxvae.decode(params, z).mean,), latents.astype("f"))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_survives_config_and_trains(name):
    config = jaxvae.TrainConfig(batch_size=8, objective=name)
    assert jaxvae.TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = jaxvae.ModelConfig(SHAPE, 2, network="mlp:width=8", **CLASSIFIER.get(name, {}))
    labels = np.arange(len(IMAGES)) % 3 - 1 if model.classifier else None
    _, metrics = jaxvae.train_epoch(jaxvae.create_train_state(KEY, model, config), IMAGES, labels)
    assert all(jnp.isfinite(x) for x in metrics.values())
