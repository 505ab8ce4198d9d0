"""The networks against the notebook's table and against Keras itself."""

from inspect import unwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvae import ModelConfig, convolution, decode, elbo, encode, init, reparameterize
from jaxvae.objectives import example_keys

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


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras

        assert keras.backend.backend() == "jax"
        yield keras


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
