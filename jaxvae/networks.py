"""The notebook's encoder and decoder, layer for layer.

A module's `dtype` is that of its layers' inputs, kernels and products; None is what they come in.
Parameters and outputs are float32 all the same.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype

from jaxvae.convolution import conv_general_dilated, conv_transpose

# Keras's defaults, which the notebook leaves as they are.
_kernel_init = nn.initializers.glorot_uniform()


def _conv(features: int, stride: int = 1, *, dtype: Dtype | None, name: str) -> nn.Conv:
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


def _dense(features: int, *, dtype: Dtype | None, name: str) -> nn.Dense:
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
    """q(z|x): images [batch, height, width, channels] to (mean, log_var), each [batch, latent]."""

    latent_dim: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv, dense = partial(_conv, dtype=self.dtype), partial(_dense, dtype=self.dtype)
        x = nn.relu(conv(32, name="conv_1")(images))
        x = nn.relu(conv(64, stride=2, name="conv_2")(x))
        x = nn.relu(conv(64, name="conv_3")(x))
        x = nn.relu(conv(64, name="conv_4")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(32, name="dense")(x))
        return dense(self.latent_dim, name="mean")(x), dense(self.latent_dim, name="log_var")(x)


class Decoder(nn.Module):
    """p(x|z): latents [batch, latent] to Bernoulli logits [batch, height, width, channels]."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        height, width, channels = self.image_shape
        rows, columns = -(-height // 2), -(-width // 2)
        x = nn.relu(_dense(rows * columns * 64, dtype=self.dtype, name="dense")(z))
        x = x.reshape(x.shape[0], rows, columns, 64)
        x = nn.relu(ConvTranspose(32, stride=2, dtype=self.dtype, name="conv_transpose")(x))
        # An odd side was rounded up by the encoder's stride.
        return _conv(channels, dtype=self.dtype, name="conv")(x[:, :height, :width])
