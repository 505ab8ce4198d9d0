"""Encoders and decoders.

An encoder takes images [batch, height, width, channels] to (mean, log_var), each [batch, latent];
a third result is what a flow on top of the posterior may look at. A decoder takes latents
[batch, latent] to the likelihood's raw outputs [batch, height, width, outputs]. Where the model is
conditional, both take the classes as a second argument, `labels`, [batch, classes] of 0 and 1.

A module's `dtype` is that of its layers' inputs, kernels and products; None is what they come in.
Parameters and outputs are float32 all the same.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import DotGeneralT, Dtype, Initializer

from jaxvae.devices.convolution import conv_general_dilated, conv_transpose
from jaxvae.errors import InputError
from jaxvae.validation import whole_number

Encoded = tuple[jax.Array, jax.Array, jax.Array]
OutputsShape = tuple[int, int, int]  # (height, width, outputs)

# Keras's defaults, which the notebook leaves as they are.
_kernel_init = nn.initializers.glorot_uniform()


def conv_3x3(
    features: int,
    stride: int = 1,
    *,
    dtype: Dtype | None,
    name: str,
    kernel_init: Initializer = _kernel_init,
) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        padding="SAME",
        dtype=dtype,
        promote_dtype=_promote,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def dense(
    features: int,
    *,
    dtype: Dtype | None,
    name: str,
    kernel_init: Initializer = _kernel_init,
    dot_general: DotGeneralT | None = None,
) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=dtype,
        promote_dtype=_promote,
        kernel_init=kernel_init,
        dot_general=dot_general,
        name=name,
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
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = 3, 3, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
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
    """Two layers of tanh units, 200 by default.

    Burda, Grosse and Salakhutdinov (2016), appendix C: one stochastic layer.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 200

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> Encoded:
        x = with_labels(images.reshape(images.shape[0], -1), labels)
        x = nn.tanh(dense(self.width, dtype=self.dtype, name="dense_1")(x))
        x = nn.tanh(dense(self.width, dtype=self.dtype, name="dense_2")(x))
        return heads(x, self.latent_dim, self.dtype)


class MlpDecoder(nn.Module):
    """Two layers of tanh units and a linear one, as of `MlpEncoder`."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    width: int = 200

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        x = with_labels(z, labels)
        x = nn.tanh(dense(self.width, dtype=self.dtype, name="dense_1")(x))
        x = nn.tanh(dense(self.width, dtype=self.dtype, name="dense_2")(x))
        x = dense(math.prod(self.image_shape), dtype=self.dtype, name="pixels")(x)
        return x.reshape(-1, *self.image_shape)


# Keeps the scale of what passes through relus: He et al. (2015), Delving Deep into Rectifiers,
# equation 10. A transposed convolution of stride 2 meets a quarter of its taps at every pixel.
he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
he_transposed = nn.initializers.variance_scaling(8.0, "fan_in", "normal")


class ResidualBlock(nn.Module):
    """x + conv_2(relu(conv_1(relu(x)))), which begins as x.

    He, Zhang, Ren and Sun (2016), Identity Mappings in Deep Residual Networks, figure 4(e), but
    without batch normalization, which would tie the examples of a batch together. What it gives,
    a deep network that begins as a shallow one, a last kernel of zeros gives as well: Zhang,
    Dauphin and Ma (2019), Fixup Initialization, section 3.
    """

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(conv_3x3, x.shape[-1], dtype=self.dtype)
        y = conv(kernel_init=he, name="conv_1")(nn.relu(x))
        return x + conv(kernel_init=nn.initializers.zeros, name="conv_2")(nn.relu(y))


class ResidualEncoder(nn.Module):
    """For colour images: strided convolutions and residual blocks, down to at most 4x4 pixels.

    width: channels at the images' own resolution; twice as many at half of it, four times below.
    blocks: residual blocks at half the resolution, and at each below.
    hidden: units of the dense layer.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1
    hidden: int = 256

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> Encoded:
        _, rows, columns, _ = images.shape
        x = _down(images, _halvings(rows, columns, self.width), self.blocks, self.dtype)
        x = with_labels(x.reshape(x.shape[0], -1), labels)
        x = dense(self.hidden, kernel_init=he, dtype=self.dtype, name="dense")(x)
        x = nn.relu(x)
        return heads(x, self.latent_dim, self.dtype)


class ResidualDecoder(nn.Module):
    """`ResidualEncoder` backwards: residual blocks and transposed convolutions."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        sizes = _halvings(*self.image_shape[:2], self.width)
        x = dense(math.prod(sizes[-1]), dtype=self.dtype, name="dense")(with_labels(z, labels))
        return _up(x.reshape(-1, *sizes[-1]), sizes, self.image_shape[2], self.blocks, self.dtype)


class SpatialEncoder(nn.Module):
    """For colour images in many latents: convolutions only, and equally many latents a place.

    The places are a grid of a quarter of the images' height and width, rounded up; the latents of
    one are next to each other. Raises InputError where their number is no multiple of its size.

    width, blocks: as of `ResidualEncoder`.

    Kingma et al. (2016), Inverse Autoregressive Flow, section 6.2, has latents of this kind.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> Encoded:
        _, rows, columns, _ = images.shape
        sizes = _halvings(rows, columns, self.width, 1)[:3]
        x = _down(images, sizes, self.blocks, self.dtype)
        each = _latents_a_place(self.latent_dim, sizes[-1])
        x = with_planes(x, labels)
        head = partial(conv_3x3, each, dtype=self.dtype)
        mean = head(kernel_init=nn.initializers.lecun_normal(), name="mean")(x)
        # With equal noise at first, every place has something to tell.
        log_var = head(kernel_init=nn.initializers.zeros, name="log_var")(x)
        return _flat(mean), _flat(log_var), jnp.mean(x, axis=(1, 2))


class SpatialDecoder(nn.Module):
    """`SpatialEncoder` backwards."""

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        sizes = _halvings(*self.image_shape[:2], self.width, 1)[:3]
        rows, columns, features = sizes[-1]
        each = _latents_a_place(z.shape[1], sizes[-1])
        x = with_planes(z.reshape(-1, rows, columns, each), labels)
        x = conv_3x3(features, kernel_init=he, dtype=self.dtype, name="conv_in")(x)
        return _up(x, sizes, self.image_shape[2], self.blocks, self.dtype)


def _down(
    x: jax.Array, sizes: list[tuple[int, int, int]], blocks: int, dtype: Dtype | None
) -> jax.Array:
    """Strided convolutions and residual blocks through all sizes, by the module that asks."""
    conv = partial(conv_3x3, kernel_init=he, dtype=dtype)
    x = conv(sizes[0][2], name="conv_0")(x)
    for level, (*_, features) in enumerate(sizes[1:], start=1):
        x = conv(features, stride=2, name=f"conv_{level}")(nn.relu(x))
        for block in range(blocks):
            x = ResidualBlock(dtype, name=f"block_{level}_{block}")(x)
    return nn.relu(x)


def _up(
    x: jax.Array,
    sizes: list[tuple[int, int, int]],
    outputs: int,
    blocks: int,
    dtype: Dtype | None,
) -> jax.Array:
    """`_down` backwards, and a convolution to the outputs."""
    for level in range(len(sizes) - 1, 0, -1):
        for block in range(blocks):
            x = ResidualBlock(dtype, name=f"block_{level}_{block}")(x)
        rows, columns, features = sizes[level - 1]
        up = ConvTranspose(features, 2, dtype, he_transposed, name=f"conv_transpose_{level}")
        # An odd side was rounded up when halved.
        x = up(nn.relu(x))[:, :rows, :columns]
    return conv_3x3(outputs, dtype=dtype, name="conv")(nn.relu(x))


def _latents_a_place(latent_dim: int, grid: tuple[int, int, int]) -> int:
    rows, columns, _ = grid
    if latent_dim % (rows * columns):
        raise InputError(
            f"latent_dim is {latent_dim}: expected a multiple of {rows * columns}, as the "
            f"network 'spatial' has a grid of {rows} x {columns} places for images of this size"
        )
    return latent_dim // (rows * columns)


def with_planes(x: jax.Array, labels: jax.Array | None) -> jax.Array:
    """x [batch, rows, columns, features], with the classes beside it in every place."""
    if labels is None:
        return x
    planes = jnp.broadcast_to(labels[:, None, None], (*x.shape[:3], labels.shape[1]))
    return jnp.concatenate([x, planes.astype(x.dtype)], axis=-1)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _halvings(rows: int, columns: int, features: int, least: int = 4) -> list[tuple[int, int, int]]:
    """(rows, columns, features), halving the sides until both are at most `least`.

    The features are doubled twice. Below 4 a kernel meets too few pixels to be worth its time.
    """
    sizes = [(rows, columns, features)]
    while max(rows, columns) > least:
        rows, columns = -(-rows // 2), -(-columns // 2)
        sizes.append((rows, columns, features * min(2 ** len(sizes), 4)))
    return sizes


@dataclass(frozen=True)
class Conv:
    """The notebook's network: four 3x3 convolutions; a dense layer and two convolutions back."""

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return Encoder(latent_dim, dtype), Decoder(outputs_shape, dtype)


@dataclass(frozen=True)
class MLP:
    """Two hidden layers of tanh units each way.

    Attributes:
      width: units of a hidden layer.

    References:
      Burda, Grosse and Salakhutdinov (2016), appendix C: one stochastic layer.
    """

    width: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", whole_number("width", self.width))

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return (
            MlpEncoder(latent_dim, dtype, self.width),
            MlpDecoder(outputs_shape, dtype, self.width),
        )


@dataclass(frozen=True)
class Residual:
    """Residual blocks and strided convolutions, down to at most 4x4 pixels; for colour images.

    Attributes:
      width: channels at the images' own resolution; twice as many at half of it, four times below.
      blocks: residual blocks at half the resolution, and at each below.
    """

    width: int = 32
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "blocks"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return (
            ResidualEncoder(latent_dim, dtype, self.width, self.blocks),
            ResidualDecoder(outputs_shape, dtype, self.width, self.blocks),
        )


@dataclass(frozen=True)
class Spatial:
    """As `residual`, with the latents on a grid of a quarter of the images' height and width.

    Attributes:
      width: channels at the images' own resolution; twice as many at half of it, four times below.
      blocks: residual blocks at half the resolution, and at a quarter.
    """

    width: int = 32
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "blocks"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return (
            SpatialEncoder(latent_dim, dtype, self.width, self.blocks),
            SpatialDecoder(outputs_shape, dtype, self.width, self.blocks),
        )


@dataclass(frozen=True)
class Modules:
    """Encoder and decoder of the user's own: Flax modules as `protocols.Network` describes them.

    Attributes:
      encoder: images [batch, height, width, channels] to (mean, log_var), each [batch, latent].
      decoder: latents [batch, latent] to [batch, height, width, outputs].
    """

    encoder: nn.Module
    decoder: nn.Module
    spec: ClassVar[str] = "own"

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder, as they were handed over."""
        return self.encoder, self.decoder
