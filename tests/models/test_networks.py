"""The networks against the notebook's table and against Keras itself."""

from functools import partial
from inspect import unwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused

from jaxvae import ModelConfig, decode, elbo, encode, init, reparameterize
from jaxvae.devices import convolution
from jaxvae.models.config import NETWORKS
from jaxvae.models.networks import (
    ResidualBlock,
    ResidualDecoder,
    ResidualEncoder,
    SpatialDecoder,
    SpatialEncoder,
    variance_scaling,
)
from jaxvae.objectives import example_keys

pytestmark = pytest.mark.usefixtures("compile_quickly")

NOTEBOOKS = {
    "encoder": {
        "conv_1": (3, 3, 1, 32),
        "conv_2": (3, 3, 32, 64),
        "conv_3": (3, 3, 64, 64),
        "conv_4": (3, 3, 64, 64),
        "dense": (12544, 32),
        "mean": (32, 2),
        "log_var": (32, 2),
    },
    "decoder": {
        "dense": (2, 12544),
        "conv_transpose": (3, 3, 64, 32),
        "conv": (3, 3, 32, 1),
    },
}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def kernels(params):
    layers = [*params.encoder.values(), *params.decoder.values()]
    assert all(set(layer) == {"kernel", "bias"} for layer in layers)
    return [np.float64(layer["kernel"]) for layer in layers]


@pytest.fixture(scope="module")
def params():
    return init(jax.random.key(0), ModelConfig())


@pytest.mark.parametrize("shape", [(4, 3), (3, 3, 2, 5)])
@pytest.mark.parametrize(
    "how", [(1.0, "fan_avg", "uniform"), (2.0, "fan_in", "normal"), (0.5, "fan_avg", "normal")]
)
def test_kernels_have_the_values_of_jax_initializers(how, shape):
    key = jax.random.key(1)
    expected = jax.nn.initializers.variance_scaling(*how)(key, shape)
    np.testing.assert_array_equal(variance_scaling(*how)(key, shape), expected)


def test_parameter_counts_are_the_notebooks(params):
    assert count(params.encoder) == 494_244
    assert count(params.decoder) == 56_385


def test_layer_shapes_are_the_notebooks(params):
    for network, layers in NOTEBOOKS.items():
        shapes = {
            name: (layer["kernel"].shape, layer["bias"].shape)
            for name, layer in getattr(params, network).items()
        }
        assert shapes == {name: (kernel, kernel[-1:]) for name, kernel in layers.items()}
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_kernels_begin_glorot_uniform(params):
    for kernel in kernels(params):
        receptive = np.prod(kernel.shape[:-2])
        limit = np.sqrt(6 / (receptive * (kernel.shape[-2] + kernel.shape[-1])))
        scaled = kernel.ravel() / limit
        assert np.abs(scaled).max() <= 1 + 1e-6
        np.testing.assert_allclose(scaled.var(), 1 / 3, rtol=5 * np.sqrt(0.8 / kernel.size))
        np.testing.assert_allclose(scaled.mean(), 0, atol=5 * np.sqrt(1 / 3 / kernel.size))


def test_biases_begin_at_zero(params):
    for layer in *params.encoder.values(), *params.decoder.values():
        np.testing.assert_array_equal(layer["bias"], 0)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("latent_dim", [1, 5])
@pytest.mark.parametrize("shape", [(27, 27, 1), (32, 32, 3), (7, 5, 2), (1, 1, 1)])
def test_any_image_shape_and_latent_size_will_do(shape, latent_dim, platform, monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: platform)

    def outputs(key):
        params = unwrap(init)(key, ModelConfig(shape, latent_dim))
        posterior = unwrap(encode)(params, jnp.zeros((11, *shape)))
        return params, posterior, unwrap(decode)(params, posterior.mean).mean

    params, posterior, decoded = jax.eval_shape(outputs, jax.random.key(0))
    half = -(-shape[0] // 2) * -(-shape[1] // 2) * 64
    assert params.encoder["dense"]["kernel"].shape == (half, 32)
    assert params.decoder["dense"]["kernel"].shape == (latent_dim, half)
    assert posterior.mean.shape == posterior.log_var.shape == (11, latent_dim)
    assert decoded.shape == (11, *shape)


def notebooks_models(keras):
    layers = keras.layers
    x = images = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_1")(x)
    x = layers.Conv2D(64, 3, 2, padding="same", activation="relu", name="conv_2")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="conv_3")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="conv_4")(x)
    x = layers.Dense(32, activation="relu", name="dense")(layers.Flatten()(x))
    mean, log_var = layers.Dense(2, name="mean")(x), layers.Dense(2, name="log_var")(x)
    z = keras.Input((2,))
    x = layers.Dense(12544, activation="relu", name="dense")(z)
    x = layers.Reshape((14, 14, 64))(x)
    x = layers.Conv2DTranspose(32, 3, 2, padding="same", activation="relu", name="conv_transpose")(
        x
    )
    x = layers.Conv2D(1, 3, padding="same", activation="sigmoid", name="conv")(x)
    return keras.Model(images, [mean, log_var]), keras.Model(z, x)


def as_keras(weights, model):
    """Our weights, or a gradient in them, in the order and layout of a Keras model's."""

    def one(variable):
        layer, kind = variable.path.split("/")[-2:]
        x = weights[layer][kind]
        if (layer, kind) == ("conv_transpose", "kernel"):
            x = x[::-1, ::-1].swapaxes(2, 3)
        assert x.shape == variable.shape
        return x

    return [one(variable) for variable in model.trainable_variables]


@pytest.fixture(scope="module")
def both(keras, params):
    """One batch, one noise and one set of weights through Keras and through the library."""
    bumps = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 2 * x if x.ndim > 1 else jnp.float32(0.2 * bumps.normal(size=x.shape)), params
    )
    encoder, decoder = notebooks_models(keras)
    images = np.random.default_rng(1).uniform(size=(3, 28, 28, 1)).astype("f")
    key = jax.random.key(2)
    zeros = jnp.zeros((3, 2))
    eps = jax.vmap(reparameterize)(example_keys(key, 3), zeros, zeros)

    def keras_loss(weights):
        (mean, log_var), _ = encoder.stateless_call(weights["encoder"], [], images)
        z = mean + keras.ops.exp(log_var / 2) * eps
        p, _ = decoder.stateless_call(weights["decoder"], [], z)
        cross_entropy = keras.ops.sum(keras.ops.binary_crossentropy(images, p), axis=(1, 2, 3))
        kl = -0.5 * keras.ops.sum(1 + log_var - mean**2 - keras.ops.exp(log_var), axis=1)
        loss = cross_entropy + kl
        return keras.ops.mean(loss), {"mean": mean, "log_var": log_var, "p": p, "loss": loss}

    def our_loss(params):
        terms = elbo(params, key, images)
        posterior = encode(params, images)
        p = decode(params, posterior.mean + jnp.exp(posterior.log_var / 2) * eps).mean
        return -terms.value.mean(), {**posterior._asdict(), "p": p, "loss": -terms.value}

    weights = {
        "encoder": as_keras(params.encoder, encoder),
        "decoder": as_keras(params.decoder, decoder),
    }
    their_gradient, theirs = jax.jit(jax.grad(keras_loss, has_aux=True))(weights)
    gradient, ours = jax.jit(jax.grad(our_loss, has_aux=True))(params)
    our_gradient = {
        "encoder": as_keras(gradient.encoder, encoder),
        "decoder": as_keras(gradient.decoder, decoder),
    }
    return SimpleNamespace(
        ours=ours, theirs=theirs, our_gradient=our_gradient, their_gradient=their_gradient
    )


@pytest.mark.parametrize("output", ["mean", "log_var", "p", "loss"])
def test_outputs_equal_keras(both, output):
    np.testing.assert_allclose(both.ours[output], both.theirs[output], rtol=1e-5, atol=1e-5)


def test_the_keras_comparison_is_of_more_than_constants(both):
    for output, spread in {"mean": 0.01, "log_var": 0.01, "p": 0.05, "loss": 1}.items():
        assert np.std(both.theirs[output]) > spread


@pytest.mark.parametrize(("network", "variables"), [("encoder", 14), ("decoder", 6)])
def test_gradients_in_every_weight_equal_keras(both, network, variables):
    ours, theirs = both.our_gradient[network], both.their_gradient[network]
    assert len(ours) == len(theirs) == variables
    for a, b in zip(ours, theirs, strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * scale)


def layer_sizes(*sizes):
    """Parameters of layers that have so many inputs and outputs, biases too."""
    return sum(fan_in * outputs + outputs for fan_in, outputs in sizes)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((32, 32, 3), [16, 8, 4]),
        ((64, 64, 3), [32, 16, 8, 4]),
        ((28, 28, 1), [14, 7, 4]),
        ((33, 33, 3), [17, 9, 5, 3]),
        ((3, 3, 2), []),
    ],
)
def test_residual_shapes_and_parameter_counts(shape, sides, platform, monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: platform)
    encoder, decoder = ResidualEncoder(7), ResidualDecoder((*shape[:2], 2 * shape[2]))

    def outputs(images):
        key = jax.random.key(0)
        (mean, log_var, hidden), encoder_variables = encoder.init_with_output(key, images)
        decoded, decoder_variables = decoder.init_with_output(key, mean)
        return encoder_variables, decoder_variables, mean, log_var, hidden, decoded

    variables_and_outputs = jax.eval_shape(outputs, jnp.zeros((5, *shape)))
    encoder_variables, decoder_variables, mean, log_var, hidden, decoded = variables_and_outputs
    assert mean.shape == log_var.shape == (5, 7)
    assert hidden.shape == (5, 256)
    assert decoded.shape == (5, *shape[:2], 2 * shape[2])
    widths = [32, 64, 128, 128, 128][: 1 + len(sides)]
    grid = ([shape[0], *sides][-1]) ** 2 * widths[-1]
    blocks = 2 * [(9 * width, width) for width in widths[1:]]
    down = [(9 * a, b) for a, b in zip([shape[2], *widths], widths, strict=False)]
    up = [(9 * b, a) for a, b in zip([2 * shape[2], *widths], widths, strict=False)]
    heads = [(grid, 256), (256, 7), (256, 7)]
    assert count(encoder_variables) == layer_sizes(*down, *blocks, *heads)
    assert count(decoder_variables) == layer_sizes((7, grid), *up, *blocks)


def test_residual_parameter_counts_of_a_colour_image():
    """Worked out by hand, for 32x32 images of 3 channels and 128 latents."""
    key = jax.random.key(0)
    encoder = jax.eval_shape(ResidualEncoder(128).init, key, jnp.zeros((1, 32, 32, 3)))
    decoder = jax.eval_shape(ResidualDecoder((32, 32, 3)).init, key, jnp.zeros((1, 128)))
    assert count(encoder) == 896 + 18_496 + 73_856 + 147_584 + 664_192 + 524_544 + 65_792
    assert count(decoder) == 264_192 + 664_192 + 147_584 + 73_792 + 18_464 + 867


def bumped(params, seed=0):
    """Parameters none of which are zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.float32(0.05 * rng.normal(size=x.shape)), params)


def relu(x):
    return np.maximum(x, 0)


def convolved(x, layer):
    """The definition of a 3x3 convolution, a pixel's window at a time."""
    padded = np.pad(np.float64(x), [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias


@pytest.mark.parametrize("network", ["mlp", "residual", "spatial"])
def test_a_width_is_that_of_the_first_and_the_last_layer(network):
    config = ModelConfig((8, 8, 1), 4, network=f"{network}:width=5")
    params = jax.eval_shape(lambda key: unwrap(init)(key, config), jax.random.key(0))
    first, last = ("dense_1", "pixels") if network == "mlp" else ("conv_0", "conv")
    assert params.encoder[first]["kernel"].shape[-1] == 5
    assert params.decoder[last]["kernel"].shape[-2] == 5


ACTIVATIONS = {
    "": np.tanh,
    ",activation=tanh": np.tanh,
    ",activation=relu": lambda x: np.maximum(x, 0),
    ",activation=softplus": lambda x: np.log1p(np.exp(x)),
}


@pytest.mark.parametrize("option", ACTIVATIONS)
def test_an_mlp_has_layers_with_layer_norm_and_logarithms_of_counts(option):
    config = ModelConfig((6,), 2, network="mlp:width=5,layers=3,norm=true,log1p=true" + option,
                         likelihood="poisson")  # fmt: skip
    params = bumped(init(jax.random.key(0), config))
    x = np.random.default_rng(0).poisson(20, (3, 6))

    def hidden(x, layers):
        for i in (1, 2, 3):
            x = x @ np.float64(layers[f"dense_{i}"]["kernel"]) + layers[f"dense_{i}"]["bias"]
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
            x = ACTIVATIONS[option](x * layers[f"norm_{i}"]["scale"] + layers[f"norm_{i}"]["bias"])
        return x

    def linear(x, layer):
        return x @ np.float64(layer["kernel"]) + layer["bias"]

    mean = linear(hidden(np.log1p(x), params.encoder), params.encoder["mean"])
    np.testing.assert_allclose(encode(params, x).mean, mean, rtol=1e-4, atol=1e-5)
    logits = linear(hidden(mean, params.decoder), params.decoder["pixels"])
    p_x = decode(params, jnp.float32(mean))
    np.testing.assert_allclose(p_x.outputs, logits, rtol=1e-4, atol=1e-5)


def test_logarithms_are_refused_where_values_may_be_negative():
    with refused("log1p is true, but the likelihood is not of counts: expected 'poisson'"):
        ModelConfig(network="mlp:log1p=true", likelihood="student_t")


def test_an_unknown_activation_is_refused():
    with refused("activation is 'sine': expected 'tanh', 'relu' or 'softplus'"):
        ModelConfig(network="mlp:activation=sine")


def test_a_residual_block_begins_as_the_identity_and_can_leave_it():
    x = jnp.float32(np.random.default_rng(1).normal(size=(2, 5, 4, 16)))
    block = ResidualBlock()
    params = block.init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)
    gradient = jax.grad(lambda params: jnp.sum(block.apply({"params": params}, x) ** 2))(params)
    assert np.all(np.any(gradient["conv_2"]["kernel"] != 0, axis=(0, 1)))
    params = bumped(params)
    inside = convolved(relu(x), params["conv_1"])
    expected = x + convolved(relu(inside), params["conv_2"])
    assert np.abs(expected - x).max() > 0.5
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


SMALL = (10, 7, 3)
RESIDUAL = {
    "residual": (ResidualEncoder, ResidualDecoder),
    "spatial": (SpatialEncoder, SpatialDecoder),
}


@pytest.fixture(scope="module", params=RESIDUAL)
def residual(request):
    """A residual network of small images, what it makes of some of them, and its gradient."""
    encoder_class, decoder_class = RESIDUAL[request.param]
    latents, few = (6, {}) if request.param == "spatial" else (4, {"hidden": 32})
    images = jnp.float32(np.random.default_rng(2).uniform(size=(3, *SMALL)))
    encoder_key, decoder_key = jax.random.split(jax.random.key(3))

    def network(params, images, dtype=None, blocks=1):
        encoder = encoder_class(latents, dtype, width=16, blocks=blocks, **few)
        decoder = decoder_class(SMALL, dtype, width=16, blocks=blocks)
        mean, log_var, hidden = encoder.apply({"params": params["encoder"]}, images)
        return mean, log_var, hidden, decoder.apply({"params": params["decoder"]}, mean)

    def loss(params, dtype=None):
        mean, log_var, _, decoded = network(params, images, dtype)
        return jnp.sum((decoded - images) ** 2) + jnp.sum(mean**2) + jnp.sum(log_var**2)

    encoder, decoder = encoder_class(latents, width=16, **few), decoder_class(SMALL, width=16)
    params = {
        "encoder": jax.jit(encoder.init)(encoder_key, images)["params"],
        "decoder": jax.jit(decoder.init)(decoder_key, jnp.zeros((1, latents)))["params"],
    }
    return SimpleNamespace(
        network=jax.jit(network, static_argnames=("dtype", "blocks")),
        gradient=jax.jit(jax.grad(loss), static_argnames="dtype"),
        params=params,
        images=images,
    )


def test_the_residual_network_begins_as_one_without_its_blocks(residual):
    params = {
        name: {layer: x if "block" in layer else bumped(x) for layer, x in layers.items()}
        for name, layers in residual.params.items()
    }
    plain = {
        name: {layer: x for layer, x in layers.items() if "block" not in layer}
        for name, layers in params.items()
    }
    whole = residual.network(params, residual.images)
    for a, b in zip(whole, residual.network(plain, residual.images, blocks=0), strict=True):
        assert np.std(b) > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_residual_gradients_reach_every_weight(residual):
    for x in jax.tree.leaves(residual.gradient(bumped(residual.params))):
        assert np.all(np.isfinite(x))
        assert np.linalg.norm(x) > 0


def test_residual_examples_do_not_see_each_other(residual):
    params = bumped(residual.params)
    for whole, alone in zip(
        residual.network(params, residual.images),
        residual.network(params, residual.images[1:2]),
        strict=True,
    ):
        np.testing.assert_allclose(whole[1:2], alone, rtol=1e-4, atol=1e-5)


def test_residual_mixed_precision_gives_float32_near_float32s(residual):
    params = bumped(residual.params)
    for exact, near in (
        (
            residual.network(params, residual.images),
            residual.network(params, residual.images, dtype=jnp.bfloat16),
        ),
        (residual.gradient(params), residual.gradient(params, dtype=jnp.bfloat16)),
    ):
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
            assert a.dtype == b.dtype == jnp.float32
            assert 0 < np.linalg.norm(b - a) < 0.2 * np.linalg.norm(a)


@pytest.mark.parametrize("shape", [(32, 32, 3), (30, 17, 1)])
def test_spatial_latents_are_those_of_a_place(shape, monkeypatch):
    """The farthest corner changes nothing, and the nearest does, on the way there and back."""
    monkeypatch.setattr(convolution, "backend", lambda: "gpu")  # compiles faster
    rows, columns = -(-shape[0] // 4), -(-shape[1] // 4)
    encoder = SpatialEncoder(3 * rows * columns, width=4, blocks=0)
    decoder = SpatialDecoder(shape, width=4, blocks=0)
    rng = np.random.default_rng(5)
    images = jnp.float32(rng.uniform(size=(1, *shape)))
    latents = jnp.float32(rng.normal(size=(1, 3 * rows * columns)))
    coders = []
    for coder, given in ((encoder, images), (decoder, latents)):
        params = bumped(jax.jit(coder.init)(jax.random.key(6), given))
        coders.append(jax.jit(partial(coder.apply, params)))
    encode, decode = coders
    changed = images.at[:, 0, 0].add(1.0)
    for before, after in zip(encode(images)[:2], encode(changed)[:2], strict=True):
        change = np.abs(before - after).reshape(rows, columns, 3)
        assert np.all(change[0, 0] > 0)
        assert np.all(change[-1, -1] == 0)
    change = np.abs(decode(latents) - decode(latents.at[:, :3].add(1.0)))[0]
    assert change.shape == shape
    assert np.all(change[0, 0] > 0)
    assert np.all(change[-1, -1] == 0)


def test_spatial_latents_are_equally_many_in_every_place():
    config = ModelConfig((32, 30, 3), 100, network="spatial", likelihood="gaussian")
    with refused("latent_dim is 100: expected a multiple of 64", "a grid of 8 x 8 places"):
        init(jax.random.key(0), config)


@pytest.mark.parametrize("name", ["conv", "mlp", "residual", "spatial"])
def test_classes_change_what_a_conditional_network_gives(name, monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: "gpu")  # compiles faster
    encoder, decoder = NETWORKS.parse(name).modules(6, SMALL, None)
    images = jnp.float32(np.random.default_rng(4).uniform(size=(1, *SMALL)))
    zeros, ones = jnp.eye(2)[:1], jnp.eye(2)[1:]
    params = bumped(jax.jit(encoder.init)(jax.random.key(5), images, zeros))
    encode = jax.jit(encoder.apply)
    first, second = encode(params, images, zeros), encode(params, images, ones)
    for a, b in zip(first, second, strict=True):
        assert np.abs(a - b).max() > 1e-3
    params = bumped(jax.jit(decoder.init)(jax.random.key(6), first[0], zeros))
    decode = jax.jit(decoder.apply)
    a, b = decode(params, first[0], zeros), decode(params, first[0], ones)
    assert a.shape == b.shape == (1, *SMALL)
    assert np.abs(a - b).max() > 1e-3
