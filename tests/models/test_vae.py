"""The model's functions: what they return, and that every transformation of JAX applies."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import OF_IMAGES, OwnDecoder, OwnEncoder, moved, refused

import jaxvae
from jaxvae import ModelConfig, Params, TrainConfig
from jaxvae.models.config import PRIORS
from jaxvae.models.vae import prior

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = ModelConfig((6, 5, 2), 2)
KEY = jax.random.key(7)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

# Each a function of (params, images) only.
FUNCTIONS = {
    "encode": lambda params, images: jaxvae.encode(params, images),
    "decode": lambda params, images: jaxvae.decode(params, images[:, 0, :2, 0]).mean,
    "sample": lambda params, images: jaxvae.sample(params, KEY, 4),
    "reconstruct": lambda params, images: jaxvae.reconstruct(params, images),
    "elbo": lambda params, images: jaxvae.elbo(params, KEY, images),
    "log_likelihood": lambda params, images: jaxvae.log_likelihood(params, KEY, images, 5),
}
every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
of_images = pytest.mark.parametrize(
    "f",
    [FUNCTIONS[name] for name in ("encode", "reconstruct", "elbo", "log_likelihood")],
    ids=["encode", "reconstruct", "elbo", "log_likelihood"],
)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(close, a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.fixture(scope="module")
def params():
    return jaxvae.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def stacked():
    return jax.vmap(partial(jaxvae.init, config=CONFIG))(jax.random.split(jax.random.key(1), 2))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 5, 2), dtype=np.uint8)


def test_init_depends_on_the_key_alone(params):
    assert_equal(jaxvae.init(jax.random.key(0), CONFIG), params)
    other = jaxvae.init(jax.random.key(1), CONFIG)
    for network in "encoder", "decoder":
        for name, layer in getattr(other, network).items():
            assert np.all(layer["kernel"] != getattr(params, network)[name]["kernel"])


def test_init_draws_every_kernel_independently(params):
    def first(layer):
        return np.ravel(layer["kernel"])[:6] / np.abs(layer["kernel"]).max()

    starts = [first(layer) for layer in (*params.encoder.values(), *params.decoder.values())]
    assert len(np.unique(np.round(starts, 5), axis=0)) == 10


def test_raw_keys_are_as_good_as_typed_ones(params, images):
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    assert_equal(jaxvae.init(raw, CONFIG), jaxvae.init(typed, CONFIG))
    for f in (
        lambda key: jaxvae.sample(params, key, 4),
        lambda key: jax.jit(jaxvae.elbo)(params, key, images),
        lambda key: jaxvae.reparameterize(key, jnp.zeros((2, 2)), jnp.ones((2, 2))),
    ):
        assert_equal(f(raw), f(typed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"network": "residual:width=2"},
        {"network": "mlp:width=4", "prior": "mixture:components=3", "num_classes": 3},
        {"network": "mlp:width=4", "prior": "vamp:components=3",
         "likelihood": "gaussian"},
        {"network": "mlp:width=4", "posterior": "iaf:steps=1"},
    ],
    ids=["notebook", "residual", "mixture", "vamp", "iaf"],
)  # fmt: skip
def test_parameters_are_float32_with_64_bit_types_enabled_too(options):
    """And so is what comes of them and of float32 images."""
    config = ModelConfig((6, 5, 2), 2, **options)
    with jax.enable_x64(True):
        state = jaxvae.create_train_state(KEY, config, TrainConfig(batch_size=2))
        made = [state.params, state.opt_state, jaxvae.sample(state.params, KEY, 2)]
        if not options:
            images = np.zeros((2, 6, 5, 2), np.uint8)
            made += [jaxvae.elbo(state.params, KEY, images), jaxvae.train_step(state, images)]
            made[-1] = made[-1][0].params, made[-1][0].opt_state, made[-1][1]
        assert {x.dtype.name for x in jax.tree.leaves(made)} == {"float32"}


def test_modules_of_ones_own_may_ask_for_other_parameters():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, z):
            return nn.Dense(60, param_dtype=jnp.float64)(z).reshape(-1, 6, 5, 2)

    with jax.enable_x64(True):
        params = jaxvae.init(KEY, ModelConfig((6, 5, 2), 2, network=(OwnEncoder(2), Wide())))
        assert {x.dtype.name for x in jax.tree.leaves(params.decoder)} == {"float64"}
        assert {x.dtype.name for x in jax.tree.leaves(params.encoder)} == {"float32"}


def test_init_under_vmap_stacks_what_each_key_gives(stacked):
    for i, key in enumerate(jax.random.split(jax.random.key(1), 2)):
        assert_equal(row(stacked, i), jaxvae.init(key, CONFIG))
    assert stacked.config == CONFIG


@every_function
def test_functions_are_the_same_under_jit(f, params, images):
    assert_close(jax.jit(f)(params, images), f(params, images))


@every_function
def test_functions_map_over_stacked_params(f, stacked, images):
    both = jax.jit(jax.vmap(f, (0, None)))(stacked, images)
    for i in range(2):
        assert_close(row(both, i), f(row(stacked, i), images))


@pytest.mark.parametrize(
    "f",
    [
        lambda params, images, key: jaxvae.sample(params, key, 4),
        lambda params, images, key: jaxvae.elbo(params, key, images),
        lambda params, images, key: jaxvae.log_likelihood(params, key, images, 5),
    ],
    ids=["sample", "elbo", "log_likelihood"],
)
def test_functions_map_over_keys_and_their_noise_differs(f, params, images):
    keys = jax.random.split(jax.random.key(5), 3)
    f = jax.jit(partial(f, params, images))
    every = jax.vmap(f)(keys)
    for i, key in enumerate(keys):
        assert_close(row(every, i), f(key))
    assert not np.allclose(jax.tree.leaves(every)[0][0], jax.tree.leaves(every)[0][1])


@every_function
def test_functions_are_differentiable_in_the_params(f, params, images):
    def total(params):
        return sum(jnp.sum(x) for x in jax.tree.leaves(f(params, images)))

    slopes = jax.jit(jax.grad(total))(params)
    assert slopes.config == CONFIG
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes))
    used = {
        "encoder": f not in (FUNCTIONS["decode"], FUNCTIONS["sample"]),
        "decoder": f is not FUNCTIONS["encode"],
    }
    if f is FUNCTIONS["reconstruct"]:
        slopes.encoder.pop("log_var")
    for network, expected in used.items():
        for leaf in jax.tree.leaves(getattr(slopes, network)):
            assert np.any(leaf != 0) == expected


@of_images
def test_uint8_images_are_their_255ths(f, params, images):
    expected = f(params, np.float32(images) / 255)
    assert_close(f(params, images), expected)
    assert_close(f(params, jnp.asarray(images)), expected)


def test_encoding_a_batch_is_encoding_its_images_one_at_a_time(params):
    images = np.random.default_rng(1).uniform(size=(21, 6, 5, 2)).astype("f")
    encode = jax.jit(jaxvae.encode)
    together = encode(params, images)
    for i in range(21):
        assert_close(row(together, i), row(encode(params, images[i : i + 1]), 0))
    assert len(np.unique(np.round(together.mean, 5), axis=0)) == 21


def test_decoding_a_batch_is_decoding_its_latents_one_at_a_time(params):
    z = np.random.default_rng(1).normal(size=(21, 2)).astype("f")
    decode = jax.jit(jaxvae.decode)
    together = decode(params, z)
    for i in range(21):
        assert_close(row(together, i), row(decode(params, z[i : i + 1]), 0))


@pytest.mark.parametrize("n", [1, 19])
def test_samples_are_decoder_means_of_the_prior(params, n):
    images = jaxvae.sample(params, KEY, n)
    assert images.shape == (n, 6, 5, 2)
    assert images.dtype == jnp.float32
    assert np.min(images) >= 0
    assert np.max(images) <= 1
    z = jax.random.normal(KEY, (n, 2))
    assert_close(images, jax.jit(jaxvae.decode)(params, z).mean)
    assert len(np.unique(np.round(images, 5), axis=0)) == n


def test_reconstruct_is_the_decoder_mean_at_the_posterior_mean(params, images):
    reconstructed = jaxvae.reconstruct(params, images)
    assert reconstructed.shape == (5, 6, 5, 2)
    assert reconstructed.dtype == jnp.float32
    mean = jaxvae.encode(params, images).mean
    assert_close(reconstructed, jaxvae.decode(params, mean).mean)


def test_params_are_a_pytree_that_keeps_its_config(params):
    leaves, structure = jax.tree.flatten(params)
    assert len(leaves) == 20
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert_equal(jax.tree.unflatten(structure, leaves), params)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert isinstance(doubled, Params)
    assert doubled.config == CONFIG
    np.testing.assert_array_equal(
        doubled.encoder["mean"]["kernel"], 2 * params.encoder["mean"]["kernel"]
    )
    other = jax.eval_shape(lambda: jaxvae.init(KEY, ModelConfig((5, 6, 2), 2)))
    assert jax.tree.structure(other) != structure


@of_images
@pytest.mark.parametrize("shape", [(0, 6, 5, 2), (6, 5, 2), (4, 5, 6, 2), (4, 6, 5), (4, 60)])
def test_images_of_another_shape_are_refused(f, shape, params):
    with refused(str(shape), "expected (batch, 6, 5, 2)"):
        f(params, jnp.zeros(shape))


@of_images
@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_images_of_another_type_are_refused(f, dtype, params):
    with refused(np.dtype(dtype).name, "expected uint8"):
        f(params, np.zeros((4, 6, 5, 2), dtype))


@pytest.mark.parametrize("shape", [(0, 2), (2,), (4, 3), (4, 2, 1)])
def test_latents_of_another_shape_are_refused(shape, params):
    with refused(str(shape), "expected (batch, 2)"):
        jaxvae.decode(params, jnp.zeros(shape))


@pytest.mark.parametrize("n", [0, -1])
def test_numbers_of_samples_below_one_are_refused(n, params, images):
    with refused(f"n is {n}: expected at least 1"):
        jaxvae.sample(params, KEY, n)
    with refused(f"num_samples is {n}: expected at least 1"):
        jaxvae.log_likelihood(params, KEY, images, num_samples=n)


def mixed(params):
    """The same parameters, computed with in bfloat16."""
    return replace(params, config=replace(params.config, compute_dtype="bfloat16"))


def test_in_mixed_precision_every_product_is_of_bfloat16s(params, images):
    """Forward and backward."""
    batch = jnp.asarray(images, jnp.float32) / 255

    def loss(params):
        return -jaxvae.elbo(params, KEY, batch).value.mean()

    for model, kind in ((params, jnp.float32), (mixed(params), jnp.bfloat16)):
        products = product_types(jax.make_jaxpr(jax.grad(loss))(model).jaxpr)
        assert len(products) > 20
        assert set(products) == {jnp.dtype(kind)}


def product_types(jaxpr):
    """The types that matrix products and convolutions in a program take."""
    types = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            types += [x.aval.dtype for x in equation.invars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            types += product_types(inner) if hasattr(inner, "eqns") else []
    return types


@every_function
def test_mixed_precision_gives_float32_near_float32s(f, params, images):
    exact, near = f(params, images), f(mixed(params), images)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        assert b.dtype == jnp.float32
        # bfloat16 has 8 significant bits: 2**-8 is 0.4 %.
        np.testing.assert_allclose(b, a, rtol=0.02, atol=0.02)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True)
    )


def test_gradients_in_mixed_precision_are_float32_near_float32s(params):
    """Of large, bright images: sums over their pixels would not fit bfloat16."""
    images = jnp.full((8, 40, 40, 1), 0.9)
    params = jaxvae.init(KEY, ModelConfig(images.shape[1:], 2))

    def loss(params):
        return -jaxvae.elbo(params, KEY, images).value.mean()

    exact, near = jax.grad(loss)(params), jax.grad(loss)(mixed(params))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        assert b.dtype == jnp.float32
        assert 0 < np.linalg.norm(b - a) < 0.1 * np.linalg.norm(a)


HALF = {
    "bernoulli": {},
    "continuous_bernoulli": {"prior": "mixture"},
    "gaussian": {"posterior": "iaf:steps=1"},
    "discretized_logistic": {"prior": "vamp:components=4"},
}


@pytest.mark.parametrize("likelihood", HALF)
def test_of_bfloat16_parameters_and_images_the_terms_are_float32(likelihood, images):
    """And those of the same numbers as float32, where no network comes between."""
    config = ModelConfig((6, 5, 2), 2, network="mlp", likelihood=likelihood, **HALF[likelihood])
    params = jaxvae.init(KEY, config)
    params = jax.tree.map(lambda x: jnp.asarray(x + 0.1, jnp.bfloat16), params)
    batch = jnp.asarray(images / np.float32(255), jnp.bfloat16)
    everything = (
        jaxvae.elbo(params, KEY, batch),
        jaxvae.log_likelihood(params, KEY, batch, 5),
        jaxvae.reconstruct(params, batch),
        jaxvae.sample(params, KEY, 2),
    )
    for x in jax.tree.leaves(everything):
        assert x.dtype == jnp.float32
    float32 = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    posterior = jaxvae.encode(params, batch)
    keys = jax.random.split(KEY, len(batch))
    z, log_q = posterior.sample_and_log_prob(keys)
    for x, y in zip((z, log_q), float32(posterior).sample_and_log_prob(keys), strict=True):
        assert x.dtype == jnp.float32
        close(x, y)
    p_z = prior(params)
    close(p_z.log_prob(z), float32(p_z).log_prob(z))
    # The decoder's float32 inputs make it compute in float32.
    log_p_x = jaxvae.decode(params, z).log_prob(batch)
    expected = jaxvae.decode(float32(params), z).log_prob(float32(batch))
    np.testing.assert_allclose(log_p_x, expected, rtol=1e-5, atol=1e-3)


OWN = ModelConfig((6, 5, 2), 2, network=(OwnEncoder(2), OwnDecoder((6, 5, 2))))


def test_networks_of_ones_own_are_the_models(images):
    encoder, decoder = OWN.network.encoder, OWN.network.decoder
    params = jaxvae.init(KEY, OWN)
    posterior = jaxvae.encode(params, images)
    mean, log_var = encoder.apply({"params": params.encoder}, images / np.float32(255))
    close(posterior.mean, mean)
    close(posterior.log_var, log_var)
    logits = decoder.apply({"params": params.decoder}, mean)
    close(jaxvae.decode(params, mean).mean, 1 / (1 + np.exp(-logits)))
    close(jaxvae.reconstruct(params, images), 1 / (1 + np.exp(-logits)))
    terms = jaxvae.elbo(params, KEY, images)
    close(terms.kl, 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=1))
    assert not np.allclose(*(jaxvae.init(key, OWN).encoder["Dense_0"]["kernel"]
                             for key in jax.random.split(KEY)))  # fmt: skip


def test_networks_of_ones_own_are_trained_saved_and_loaded(tmp_path, images):
    state = jaxvae.create_train_state(KEY, OWN, TrainConfig(batch_size=5))
    after, metrics = jaxvae.train_step(state, images)
    assert np.isfinite(metrics["elbo"])
    for old, new in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True):
        assert np.any(old != new)
    jaxvae.save(tmp_path, after)
    assert_equal(jaxvae.load(tmp_path, network=OWN.network), after.params)
    assert jaxvae.restore(tmp_path, network=OWN.network).params.config == OWN
    with refused("pair of Flax modules, which are not saved: pass network=(encoder, decoder)"):
        jaxvae.load(tmp_path)


class Gives(nn.Module):
    """A network that gives so many numbers per image, in arrays of these shapes."""

    shapes: tuple[tuple[int, ...], ...] | tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        def one(shape):
            x_ = nn.Dense(int(np.prod(shape)))(x.reshape(len(x), -1))
            return x_.reshape(-1, *shape)

        alone = isinstance(self.shapes[0], int)
        return one(self.shapes) if alone else tuple(map(one, self.shapes))


GOOD_ENCODER, GOOD_DECODER = Gives(((2,), (2,))), Gives((6, 5, 2))


def test_an_error_inside_a_network_of_ones_own_is_told_as_it_is():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return len(None)

    config = jaxvae.ModelConfig((6, 5, 2), 2, network=(Wrong(), GOOD_DECODER))
    with pytest.raises(TypeError, match="NoneType"):
        jaxvae.init(jax.random.key(0), config)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            (Gives(((3,), (3,))), GOOD_DECODER),
            "encoder returns (1, 3), (1, 3) for one image: expect",
        ),
        ((Gives(((2,), (1,))), GOOD_DECODER), "expected (1, 2), (1, 2)"),
        ((Gives((2,)), GOOD_DECODER), "the encoder returns (1, 2) for one image"),
        (
            (GOOD_ENCODER, Gives((6, 5, 1))),
            "returns (1, 6, 5, 1) for one image: expected (1, 6, 5,",
        ),
        ((GOOD_ENCODER, Gives((60,))), "the decoder returns (1, 60) for one image"),
        ((GOOD_ENCODER, GOOD_ENCODER), "the decoder returns tuple for one image"),
    ],
    ids=["latents", "log_var", "only a mean", "channels", "flat", "two results"],
)
def test_networks_of_other_shapes_are_refused(network, says):
    with refused(says):
        jaxvae.init(KEY, ModelConfig((6, 5, 2), 2, network=network))


def test_a_decoder_gives_as_many_numbers_as_the_likelihood_takes():
    config = ModelConfig((6, 5, 2), 2, network=(GOOD_ENCODER, GOOD_DECODER))
    assert jaxvae.init(KEY, replace(config, likelihood="continuous_bernoulli"))
    config = replace(config, likelihood="discretized_logistic")
    with refused("the decoder returns (1, 6, 5, 2) for one image: expected (1, 6, 5, 4)"):
        jaxvae.init(KEY, config)
    assert jaxvae.init(KEY, replace(config, network=(GOOD_ENCODER, Gives((6, 5, 4)))))


def test_networks_with_other_variables_than_parameters_are_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.BatchNorm(use_running_average=False)(images.reshape(len(images), -1))
            return nn.Dense(2)(x), nn.Dense(2)(x)

    with refused("the encoder has variables 'batch_stats': expected 'params' only"):
        jaxvae.init(KEY, ModelConfig((6, 5, 2), 2, network=(Normed(), GOOD_DECODER)))


def test_a_third_result_of_the_encoder_is_for_the_flow_alone(images):
    two, three = Gives(((2,), (2,))), Gives(((2,), (2,), (7,)))
    for encoder, posterior in (
        (two, "gaussian"),
        (three, "gaussian"),
        (two, "iaf"),
        (three, "iaf"),
    ):
        network = (encoder, GOOD_DECODER)
        params = jaxvae.init(KEY, ModelConfig((6, 5, 2), 2, network=network, posterior=posterior))
        q = jaxvae.encode(params, images)
        results = encoder.apply({"params": params.encoder}, images / np.float32(255))
        close(q.mean, results[0])
        close(q.log_var, results[1])
        if posterior == "iaf":
            seen = np.concatenate(results, axis=1) if encoder is two else results[2]
            close(q.context, seen)
        else:
            assert isinstance(q, jaxvae.Gaussian)
            assert params.posterior == {}


CONDITIONAL = {
    name: ModelConfig((6, 5, 2), 2, network=network, num_classes=3)
    for name, network in (("mlp", "mlp"), ("own", OWN.network))
}
LABELS = np.array([2, 0, 1, 1, 0])


@pytest.fixture(scope="module", params=CONDITIONAL)
def conditional(request):
    return jaxvae.init(KEY, CONDITIONAL[request.param])


# Each a function of (params, images, labels) only.
OF_LABELS = {
    "encode": lambda params, images, labels: jaxvae.encode(params, images, labels),
    "decode": lambda params, images, labels: jaxvae.decode(params, images[:, 0, :2, 0], labels),
    "reconstruct": lambda params, images, labels: jaxvae.reconstruct(params, images, labels),
    "elbo": lambda params, images, labels: jaxvae.elbo(params, KEY, images, labels),
    "log_likelihood": lambda params, images, labels: jaxvae.log_likelihood(
        params, KEY, images, 5, labels
    ),
}
every_function_of_labels = pytest.mark.parametrize("f", OF_LABELS.values(), ids=OF_LABELS)


@every_function_of_labels
def test_every_image_is_taken_with_its_own_label(f, conditional, images):
    results = jax.tree.leaves(f(conditional, images, LABELS))
    others = jax.tree.leaves(f(conditional, images, np.array([2, 0, 0, 1, 0])))
    for result, other in zip(results, others, strict=True):
        close(np.delete(other, 2, axis=0), np.delete(result, 2, axis=0))
        assert not np.allclose(other[2], result[2])


def test_networks_are_told_the_class_as_a_vector(conditional, images):
    encoder, decoder = jaxvae.models.vae.VAE(conditional.config).modules()
    classes = np.float32([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]])
    posterior = jaxvae.encode(conditional, images, LABELS)
    x, classes = jnp.asarray(images / np.float32(255)), jnp.asarray(classes)
    close(posterior.mean, encoder.apply({"params": conditional.encoder}, x, classes)[0])
    logits = decoder.apply({"params": conditional.decoder}, posterior.mean, classes)
    p_x = jaxvae.decode(conditional, posterior.mean, LABELS)
    close(p_x.mean, 1 / (1 + np.exp(-logits)))
    close(jaxvae.reconstruct(conditional, images, LABELS), p_x.mean)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_are_of_any_kind_of_whole_number(kind, conditional, images):
    expected = jaxvae.encode(conditional, images, jnp.asarray(LABELS))
    assert_equal(jaxvae.encode(conditional, images, LABELS.astype(kind)), expected)


def test_samples_are_of_all_classes_in_turn_or_of_those_asked_for(conditional):
    by_default = jaxvae.sample(conditional, KEY, 7)
    in_turn = jnp.array([0, 1, 2, 0, 1, 2, 0])
    assert_equal(jaxvae.sample(conditional, KEY, 7, in_turn), by_default)
    ones = jaxvae.sample(conditional, KEY, 7, jnp.ones(7, int))
    same = [bool(np.allclose(*pair)) for pair in zip(ones, by_default, strict=True)]
    assert same == [False, True, False, False, True, False, False]


@every_function_of_labels
def test_labels_that_are_missing_or_of_another_shape_are_refused(f, conditional, images):
    with refused("labels are missing: expected shape (5,), classes from 0 to 2 (num_classes=3)"):
        f(conditional, images, None)
    for labels in (LABELS[:4], np.eye(3)[LABELS], np.int32(1)):
        with refused(f"labels have shape {labels.shape}: expected (5,), classes from 0 to 2"):
            f(conditional, images, labels)


@every_function_of_labels
def test_labels_for_a_model_without_classes_are_refused(f, params, images):
    with refused("labels were given, but the model is unconditional (num_classes=0)"):
        f(params, images, LABELS)


def test_labels_of_samples_and_steps_are_checked(params, images):
    model = CONDITIONAL["mlp"]
    conditional = jaxvae.init(KEY, model)
    with refused("labels have shape (5,): expected (4,)"):
        jaxvae.sample(conditional, KEY, 4, LABELS)
    with refused("labels were given, but the model is unconditional"):
        jaxvae.sample(params, KEY, 5, LABELS)
    state = jaxvae.create_train_state(KEY, model, TrainConfig(batch_size=5))
    with refused("labels are missing: expected shape (5,)"):
        jaxvae.train_step(state, images)
    with refused("labels have shape (4,): expected (5,)"):
        jaxvae.train_step(state, images, LABELS[:4])
    state, metrics = jaxvae.train_step(state, images, LABELS)
    assert np.isfinite(metrics["elbo"])


CODES = ("uniform_codes", "autoregressive")  # priors over codes
SMALL = {
    "mixture": "mixture:components=5",
    "vamp": "vamp:components=5",
    "realnvp": "realnvp:layers=2,hidden=8",
    "autoregressive": "autoregressive:width=8,layers=1",
}


@pytest.mark.parametrize(
    ("likelihood", "prior_name", "posterior"),
    [  # every prior with each of its posteriors, and every likelihood
        (OF_IMAGES[(i + j) % len(OF_IMAGES)], prior, posterior)
        for i, prior in enumerate(PRIORS)
        for j, posterior in enumerate(["fsq"] if prior in CODES else ["gaussian", "iaf"])
    ],
)
def test_every_model_is_trained_sampled_saved_and_loaded(
    likelihood, prior_name, posterior, tmp_path
):
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    config = ModelConfig(
        (8, 8, 1),
        2,
        network="mlp:width=8",
        likelihood=likelihood,
        prior=SMALL.get(prior_name, prior_name),
        posterior="iaf:steps=1" if posterior == "iaf" else posterior,
    )
    state = jaxvae.create_train_state(KEY, config, TrainConfig(batch_size=8))
    after, metrics = jaxvae.train_step(state, images)
    assert all(np.isfinite(value) for value in metrics.values())
    close(metrics["elbo"], metrics["log_likelihood"] - metrics["kl"])
    learned = {
        "encoder": True,
        "decoder": True,
        "likelihood": likelihood == "gaussian",
        "prior": prior_name not in ("standard_normal", "uniform_codes"),
        "posterior": posterior == "iaf",
    }
    for part, learns in learned.items():
        old, new = (jax.tree.leaves(getattr(s.params, part)) for s in (state, after))
        assert any(np.any(a != b) for a, b in zip(old, new, strict=True)) == learns
    assert prior(after.params).log_prob(jnp.zeros((3, 2))).shape == (3,)
    samples = jaxvae.sample(after.params, KEY, 3)
    assert samples.shape == (3, 8, 8, 1)
    assert samples.dtype == jnp.float32
    assert np.min(samples) >= 0
    assert np.max(samples) <= 1
    jaxvae.save(tmp_path, after)
    assert_equal(jaxvae.load(tmp_path), after.params)


# ---- Covariates ----

NETWORKS = {
    "mlp": {"network": "mlp:width=4"},
    "spatial": {"network": "spatial:width=4", "latent_dim": 4},
    "ladder": {"network": "ladder:groups=2x1,width=2"},
}


@pytest.mark.parametrize(
    ("name", "conditions"),
    [
        ("mlp", "both"),
        ("mlp", "encoder"),
        ("mlp", "decoder"),
        ("spatial", "both"),
        ("ladder", "decoder"),
    ],
)
def test_one_hot_covariates_are_classes(name, conditions):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    fields = {"image_shape": (4, 4, 1), "conditions": conditions} | NETWORKS[name]
    classes = moved(jaxvae.init(KEY, ModelConfig(**fields, num_classes=3)), 0.1)
    covariates = replace(classes, config=ModelConfig(**fields, num_covariates=3))
    made = jax.eval_shape(jaxvae.init, KEY, covariates.config)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, covariates)
    one_hot = np.eye(3, dtype=np.float32)[LABELS]
    assert_equal(jaxvae.elbo(covariates, KEY, x, one_hot), jaxvae.elbo(classes, KEY, x, LABELS))


@pytest.mark.parametrize(
    ("name", "conditions", "takes"),
    [
        ("mlp", "both", (True, True)),
        ("mlp", "encoder", (True, False)),
        ("mlp", "decoder", (False, True)),
    ],
)
def test_only_the_networks_named_depend_on_the_covariates(name, conditions, takes):
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    fields = {"image_shape": (4, 4, 1), "num_covariates": 2, "conditions": conditions}
    params = moved(jaxvae.init(KEY, ModelConfig(**fields | NETWORKS[name])), 0.1)
    z, c = jnp.ones((3, params.config.latent_dim)), jnp.ones((3, 2))
    encoder = jax.jacobian(lambda c: jaxvae.encode(params, x, c).mean)(c)
    decoder = jax.jacobian(lambda c: jaxvae.decode(params, z, c).mean)(c)
    assert (bool(jnp.any(encoder)), bool(jnp.any(decoder))) == takes
    # The other one needs none.
    for f, given, taken in zip((jaxvae.encode, jaxvae.decode), (x, z), takes, strict=True):
        if taken:
            with refused("labels are missing: expected shape (3, 2), the covariates of each"):
                f(params, given)
        else:
            assert_equal(jax.tree.leaves(f(params, given)), jax.tree.leaves(f(params, given, c)))


@pytest.mark.parametrize("network", ["mlp:width=4", "ladder:groups=2x1,width=4,latents=1"])
def test_the_elbo_of_a_conditional_decoder_needs_labels(network):
    config = ModelConfig((4, 4, 1), network=network, num_classes=3, conditions="decoder")
    with refused("labels are missing: expected shape (2,), classes from 0 to 2 (num_classes=3)"):
        jaxvae.elbo(jaxvae.init(KEY, config), KEY, np.zeros((2, 4, 4, 1), np.uint8))


class LinearDecoder(nn.Module):
    """x = W z + B c + b."""

    features: int

    @nn.compact
    def __call__(self, z, c):
        x = nn.Dense(self.features, name="z")(z)
        return x + nn.Dense(self.features, use_bias=False, name="c")(c)


class LinearEncoder(nn.Module):
    """mean = V (x - B c - b), with a constant log_var."""

    latent_dim: int

    @nn.compact
    def __call__(self, x, c):
        x = x - nn.Dense(x.shape[1], name="c")(c)
        log_var = self.param("log_var", nn.initializers.zeros, (self.latent_dim,))
        return nn.Dense(self.latent_dim, use_bias=False, name="x")(x), jnp.tile(
            log_var, (len(x), 1)
        )


def test_log_p_x_of_a_linear_gaussian_model_is_shifted_by_the_covariates():
    """p(x|c) = N(B c + b, W W' + s^2 I). As q(z|x, c) is exact, one sample gives log p(x|c)."""
    rng = np.random.default_rng(0)
    weight, shift, bias = (rng.normal(size=shape) for shape in ((1, 3), (2, 3), 3))
    log_scale = 0.3
    variance = np.exp(2 * np.logaddexp(log_scale, -6))  # the smooth maximum of the likelihood
    precision = 1 + weight @ weight.T / variance
    config = ModelConfig(
        (3,), 1, (LinearEncoder(1), LinearDecoder(3)), "gaussian", num_covariates=2
    )
    params = jaxvae.init(KEY, config)
    params = replace(
        params,
        encoder={
            "c": {"kernel": shift, "bias": bias},
            "x": {"kernel": (weight / variance / precision).T},
            "log_var": -np.log(precision[0]),
        },
        decoder={"z": {"kernel": weight, "bias": bias}, "c": {"kernel": shift}},
        likelihood={name: np.full_like(x, log_scale) for name, x in params.likelihood.items()},
    )
    params = jax.tree.map(jnp.float32, params)
    x, c = np.float32(rng.normal(size=(4, 3))), np.float32(rng.normal(size=(4, 2)))
    covariance = weight.T @ weight + variance * np.eye(3)
    expected = [
        scipy.stats.multivariate_normal(ci @ shift + bias, covariance).logpdf(xi)
        for xi, ci in zip(x, c, strict=True)
    ]
    close(jaxvae.log_likelihood(params, KEY, x, 1, c), expected)
    # One unit of a covariate moves the mean by its row of B.
    z = np.float32([[0.4]])
    means = jaxvae.decode(params, np.repeat(z, 3, 0), np.float32([[0, 0], [1, 0], [0, 1]])).mean
    close(means[1:] - means[:1], shift)


def test_covariates_of_another_shape_or_kind_are_refused(images):
    params = jaxvae.init(KEY, ModelConfig((6, 5, 2), 2, "mlp:width=4", num_covariates=2))
    c = np.ones((5, 2), np.float32)
    with refused("labels are missing: expected shape (4, 2), the covariates of each example"):
        jaxvae.sample(params, KEY, 4)
    for wrong in (LABELS, c[:4], c[:, :1]):
        with refused(f"labels have shape {wrong.shape}: expected (5, 2), the covariates"):
            jaxvae.encode(params, images, wrong)
    for number in (np.nan, np.inf):
        with refused("labels have NaN or infinity: expected finite covariates"):
            jaxvae.encode(params, images, np.where(np.arange(5)[:, None] == 3, number, c))
    with refused("labels: expected"):
        jaxvae.encode(params, images, np.full((5, 2), "x"))
    assert_equal(jaxvae.encode(params, images, c), jaxvae.encode(params, images, c.astype(int)))


@pytest.mark.parametrize("network", ["mlp:width=4", "residual:width=2"])
def test_a_classifier_changes_no_other_parameter_and_takes_images_alone(network):
    model = ModelConfig((4, 4, 1), 2, network, num_classes=3)
    params = jaxvae.init(KEY, replace(model, classifier=True))
    learned = params.encoder["classifier"]
    encoder = {name: x for name, x in params.encoder.items() if name != "classifier"}
    without = jaxvae.init(KEY, model)
    assert_equal((encoder, params.decoder), (without.encoder, without.decoder))
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    module, _ = model.network.modules(3, model.outputs_shape, None)
    logits = module.apply({"params": learned}, jnp.float32(x) / 255)[0]
    close(jaxvae.classify(params, x), jax.nn.softmax(logits))
    with refused("the model has no classifier: expected ModelConfig(num_classes=..., classifier="):
        jaxvae.classify(without, x)
