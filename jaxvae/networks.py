"""Encoders and decoders.

An encoder takes images [batch, height, width, channels] to (mean, log_var), each [batch, latent];
a third result is what a flow on top of the posterior may look at. A decoder takes latents
[batch, latent] to the likelihood's raw outputs [batch, height, width, outputs]. Where the model is
conditional, both take the classes as a second argument, `labels`, [batch, classes] of 0 and 1.

A module's `dtype` is that of its layers' inputs, kernels and products; None is what they come in.
Parameters and outputs are float32 all the same.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from jaxvae.convolution import conv_general_dilated, conv_transpose

Encoded = tuple[jax.Array, jax.Array, jax.Array]

# Keras's defaults, which the notebook leaves as they are.
_kernel_init = nn.initializers.glorot_uniform()


def conv_3x3(features: int, stride: int = 1, *, dtype: Dtype | None, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        padding="SAME",
        dtype=dtype,
        promote_dtype=_promote,
        kernel_init=_kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def dense(features: int, *, dtype: Dtype | None, name: str) -> nn.Dense:
    return nn.Dense(
        features, dtype=dtype, promote_dtype=_promote, kernel_init=_kernel_init, name=name
    )


def _promote(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: Dtype | None, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A layer's operands in `dtype`, but for the bias.

    A bias's gradient is a sum over all pixels of a batch, too long for eight bits: the bias is
    added in float32, and so that sum is taken in float32.
    """
    x, kernel = promote_dtype(x, kernel, dtype=dtype, **options)
    return x, kernel, bias


def heads(x: jax.Array, latent_dim: int, dtype: Dtype | None) -> Encoded:
    """The posterior's mean and log_var, linear in the last hidden layer x, and x itself."""
    mean = dense(latent_dim, dtype=dtype, name="mean")(x)
    return mean, dense(latent_dim, dtype=dtype, name="log_var")(x), x


def with_labels(x: jax.Array, labels: jax.Array | None) -> jax.Array:
    """x [batch, features], with the classes beside it where there are any."""
    return x if labels is None else jnp.concatenate([x, labels.astype(x.dtype)], axis=1)


class ConvTranspose(nn.Module):
    """A 3x3 transposed convolution with "SAME" padding, `stride` times the size of its input.

    flax.linen.ConvTranspose, but for how it is carried out: that takes no
    `conv_general_dilated`.
    """

    features: int
    stride: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = _promote(x, kernel, bias, self.dtype)
        return conv_transpose(x, kernel, (self.stride, self.stride)) + bias


class Encoder(nn.Module):
    """The notebook's: four 3x3 convolutions and a dense layer of 32."""

    latent_dim: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> Encoded:
        conv = partial(conv_3x3, dtype=self.dtype)
        x = nn.relu(conv(32, name="conv_1")(images))
        x = nn.relu(conv(64, stride=2, name="conv_2")(x))
        x = nn.relu(conv(64, name="conv_3")(x))
        x = nn.relu(conv(64, name="conv_4")(x))
        x = with_labels(x.reshape(x.shape[0], -1), labels)
        x = nn.relu(dense(32, dtype=self.dtype, name="dense")(x))
        return heads(x, self.latent_dim, self.dtype)


class Decoder(nn.Module):
    """The notebook's: a dense layer, a transposed convolution and a convolution."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        height, width, outputs = self.image_shape
        rows, columns = -(-height // 2), -(-width // 2)
        x = with_labels(z, labels)
        x = nn.relu(dense(rows * columns * 64, dtype=self.dtype, name="dense")(x))
        x = x.reshape(x.shape[0], rows, columns, 64)
        x = nn.relu(ConvTranspose(32, stride=2, dtype=self.dtype, name="conv_transpose")(x))
        # An odd side was rounded up by the encoder's stride.
        return conv_3x3(outputs, dtype=self.dtype, name="conv")(x[:, :height, :width])


class MlpEncoder(nn.Module):
    """Two layers of 200 tanh units.

    Burda, Grosse and Salakhutdinov (2016), appendix C: one stochastic layer.
    """

    latent_dim: int
    dtype: Dtype | None = None
    hidden: int = 200

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> Encoded:
        x = with_labels(images.reshape(images.shape[0], -1), labels)
        x = nn.tanh(dense(self.hidden, dtype=self.dtype, name="dense_1")(x))
        x = nn.tanh(dense(self.hidden, dtype=self.dtype, name="dense_2")(x))
        return heads(x, self.latent_dim, self.dtype)


class MlpDecoder(nn.Module):
    """Two layers of 200 tanh units and a linear one, as of `MlpEncoder`."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    hidden: int = 200

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        x = with_labels(z, labels)
        x = nn.tanh(dense(self.hidden, dtype=self.dtype, name="dense_1")(x))
        x = nn.tanh(dense(self.hidden, dtype=self.dtype, name="dense_2")(x))
        x = dense(math.prod(self.image_shape), dtype=self.dtype, name="pixels")(x)
        return x.reshape(-1, *self.image_shape)


NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "notebook": (Encoder, Decoder),
    "mlp": (MlpEncoder, MlpDecoder),
}
