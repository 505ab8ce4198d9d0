"""Encoders and decoders.

An encoder maps images [batch, height, width, channels] to (mean, log_var), each [batch, latent];
its third result, features, is the context of a flow posterior. A decoder maps latents
[batch, latent] to the likelihood's raw outputs [batch, height, width, outputs]. In a conditional
model they take one-hot classes or covariates, `labels`, as a second argument.

A module's `dtype` is that of its layers' inputs, kernels and products; None is that of its inputs.
Parameters and outputs are float32 in any case.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import DotGeneralT, Dtype, Initializer
from jaxtyping import Array, Float, Num

from jaxvae.devices.convolution import conv_general_dilated, conv_transpose
from jaxvae.errors import InputError
from jaxvae.validation import expect_bool, expect_one_of, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig

Images = Float[Array, " batch *shape"]
Latents = Float[Array, "batch latent"]
Labels = Num[Array, "batch classes"] | None  # one-hot
Outputs = Float[Array, " batch *outputs"]
Features = Float[Array, "batch rows columns features"]
Encoded = tuple[Latents, Latents, Float[Array, "batch features"]]
OutputsShape = tuple[int, int, int]  # (height, width, outputs)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "softplus": nn.softplus,
}


def variance_scaling(
    scale: float, mode: Literal["fan_in", "fan_avg"], distribution: Literal["normal", "uniform"]
) -> Initializer:
    """Make an initializer of kernels [..., in, out] with the variance scale / fan.

    Its values are those of `jax.nn.initializers.variance_scaling`. They are drawn along one axis,
    which XLA compiles for a CPU in a third of the time.
    """

    def initialize(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in, fan_out = (math.prod(shape[:-2]) * channels for channels in shape[-2:])
        fan = fan_in if mode == "fan_in" else (fan_in + fan_out) / 2
        variance, draws = jnp.array(scale / fan, dtype), (math.prod(shape),)
        if distribution == "normal":
            return jnp.reshape(jax.random.normal(key, draws, dtype) * jnp.sqrt(variance), shape)
        uniform = jax.random.uniform(key, draws, dtype, minval=-1)
        return jnp.reshape(uniform * jnp.sqrt(3 * variance), shape)

    return initialize


# Glorot uniform: the default of Keras, which the notebook uses.
_kernel_init = variance_scaling(1.0, "fan_avg", "uniform")


def conv_3x3(
    features: int,
    stride: int = 1,
    *,
    dtype: Dtype | None,
    name: str,
    kernel_init: Initializer = _kernel_init,
) -> nn.Conv:
    """Make a 3x3 convolution with "SAME" padding."""
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
    """Make a dense layer; `dot_general` replaces its matrix product."""
    return nn.Dense(
        features,
        dtype=dtype,
        promote_dtype=_promote,
        kernel_init=kernel_init,
        dot_general=dot_general,
        name=name,
    )


def _promote(
    x: Array, kernel: Array, bias: Array, dtype: Dtype | None, **options: Any
) -> tuple[Array, Array, Array]:
    """Convert the operands of a layer to `dtype`, except the bias.

    The gradient of a bias is a sum over all pixels of a batch, for which the 8 bits of bfloat16 are
    too few. The bias is added in float32, so its gradient is summed in float32.
    """
    x, kernel = promote_dtype(x, kernel, dtype=dtype, **options)
    return x, kernel, bias


def heads(x: Float[Array, "batch features"], latent_dim: int, dtype: Dtype | None) -> Encoded:
    """Return mean and log_var, linear in the last hidden layer x, and x as features."""
    mean = dense(latent_dim, dtype=dtype, name="mean")(x)
    return mean, dense(latent_dim, dtype=dtype, name="log_var")(x), x


def with_labels(x: Num[Array, "batch features"], labels: Labels) -> Num[Array, "batch inputs"]:
    """Append one-hot classes or covariates to features, if there are any."""
    return x if labels is None else jnp.concatenate([x, labels.astype(x.dtype)], axis=1)


class ConvTranspose(nn.Module):
    """A 3x3 transposed convolution with "SAME" padding, which scales the size by `stride`.

    The result is that of flax.linen.ConvTranspose, which takes no `conv_general_dilated`.

    Attributes:
      features: output channels.
      stride: output size over input size.
      dtype: of the input, kernel and products.
      kernel_init: initializer of the kernel.
    """

    features: int
    stride: int
    dtype: Dtype | None = None
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch height width outputs"]:
        """Return the layer's output."""
        shape = 3, 3, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = _promote(x, kernel, bias, self.dtype)
        return conv_transpose(x, kernel, (self.stride, self.stride)) + bias


class Encoder(nn.Module):
    """The notebook's encoder: four 3x3 convolutions and a dense layer of 32.

    Attributes:
      latent_dim: number of latents.
      dtype: of the layers' inputs, kernels and products.
    """

    latent_dim: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Images, labels: Labels = None) -> Encoded:
        """Return mean, log_var and features."""
        conv = partial(conv_3x3, dtype=self.dtype)
        x = nn.relu(conv(32, name="conv_1")(images))
        x = nn.relu(conv(64, stride=2, name="conv_2")(x))
        x = nn.relu(conv(64, name="conv_3")(x))
        x = nn.relu(conv(64, name="conv_4")(x))
        x = with_labels(x.reshape(x.shape[0], -1), labels)
        x = nn.relu(dense(32, dtype=self.dtype, name="dense")(x))
        return heads(x, self.latent_dim, self.dtype)


class Decoder(nn.Module):
    """The notebook's decoder: a dense layer, a transposed convolution and a convolution.

    Attributes:
      image_shape: (height, width, outputs).
      dtype: of the layers' inputs, kernels and products.
    """

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, z: Num[Array, "batch latent"], labels: Labels = None) -> Outputs:
        """Return the outputs for the likelihood."""
        height, width, outputs = self.image_shape
        rows, columns = -(-height // 2), -(-width // 2)
        x = with_labels(z, labels)
        x = nn.relu(dense(rows * columns * 64, dtype=self.dtype, name="dense")(x))
        x = x.reshape(x.shape[0], rows, columns, 64)
        x = nn.relu(ConvTranspose(32, stride=2, dtype=self.dtype, name="conv_transpose")(x))
        # Strides round odd sizes up: crop.
        return conv_3x3(outputs, dtype=self.dtype, name="conv")(x[:, :height, :width])


def hidden_layers(
    x: Num[Array, "batch inputs"],
    width: int,
    layers: int,
    *,
    norm: bool,
    activation: str,
    dtype: Dtype | None,
) -> Float[Array, "batch features"]:
    """Apply hidden dense layers, in the calling module.

    Args:
      x: inputs.
      width: units of each layer.
      layers: number of layers.
      norm: whether to normalise before each activation (Ba, Kiros and Hinton 2016, Layer
        Normalization).
      activation: one of `ACTIVATIONS`.
      dtype: of the layers' inputs, kernels and products.
    """
    for i in range(1, layers + 1):
        x = dense(width, dtype=dtype, name=f"dense_{i}")(x)
        x = nn.LayerNorm(dtype=dtype, name=f"norm_{i}")(x) if norm else x
        x = ACTIVATIONS[activation](x)
    return x


class MlpEncoder(nn.Module):
    """An encoder with dense hidden layers.

    Attributes:
      latent_dim: number of latents.
      dtype: of the layers' inputs, kernels and products.
      width: units of a hidden layer.
      layers: number of hidden layers.
      norm: whether hidden layers are normalised.
      log1p: whether the inputs are log(1 + x).
      activation: one of `ACTIVATIONS`.

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, appendix C: one
      stochastic layer.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 200
    layers: int = 2
    norm: bool = False
    log1p: bool = False
    activation: str = "tanh"

    @nn.compact
    def __call__(self, images: Images, labels: Labels = None) -> Encoded:
        """Return mean, log_var and features."""
        x = images.reshape(images.shape[0], -1)
        x = with_labels(jnp.log1p(x) if self.log1p else x, labels)
        x = hidden_layers(
            x,
            self.width,
            self.layers,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
        )
        return heads(x, self.latent_dim, self.dtype)


class MlpDecoder(nn.Module):
    """The decoder for `MlpEncoder`: dense hidden layers and a linear layer.

    Attributes:
      image_shape: (height, width, outputs), or (..., outputs) of other examples.
      dtype: of the layers' inputs, kernels and products.
      width: units of a hidden layer.
      layers: number of hidden layers.
      norm: whether hidden layers are normalised.
      activation: one of `ACTIVATIONS`.
    """

    image_shape: tuple[int, ...]
    dtype: Dtype | None = None
    width: int = 200
    layers: int = 2
    norm: bool = False
    activation: str = "tanh"

    @nn.compact
    def __call__(self, z: Num[Array, "batch latent"], labels: Labels = None) -> Outputs:
        """Return the outputs for the likelihood."""
        x = with_labels(z, labels)
        x = hidden_layers(
            x,
            self.width,
            self.layers,
            norm=self.norm,
            activation=self.activation,
            dtype=self.dtype,
        )
        x = dense(math.prod(self.image_shape), dtype=self.dtype, name="pixels")(x)
        return x.reshape(-1, *self.image_shape)


# Keeps the variance of activations through relus: He et al. (2015), Delving Deep into Rectifiers,
# equation 10. In a transposed convolution of stride 2, a quarter of the taps meet each pixel.
he = variance_scaling(2.0, "fan_in", "normal")
he_transposed = variance_scaling(8.0, "fan_in", "normal")


class ResidualBlock(nn.Module):
    """A residual block, which is the identity at initialisation.

        x + conv_2(relu(conv_1(relu(x))))

    There is no batch normalization, which would make examples depend on their batch. Instead the
    last kernel starts at 0.

    Attributes:
      dtype: of the layers' inputs, kernels and products.

    References:
      He, Zhang, Ren and Sun (2016), Identity Mappings in Deep Residual Networks, figure 4(e).
      Zhang, Dauphin and Ma (2019), Fixup Initialization, section 3.
    """

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Return the block's output."""
        conv = partial(conv_3x3, x.shape[-1], dtype=self.dtype)
        y = conv(kernel_init=he, name="conv_1")(nn.relu(x))
        return x + conv(kernel_init=nn.initializers.zeros, name="conv_2")(nn.relu(y))


class ResidualEncoder(nn.Module):
    """An encoder for colour images: strided convolutions and residual blocks, down to 4x4 or less.

    Attributes:
      latent_dim: number of latents.
      dtype: of the layers' inputs, kernels and products.
      width: channels at full resolution; twice as many at half of it, four times below.
      blocks: residual blocks at half the resolution, and at each below.
      hidden: units of the dense layer.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1
    hidden: int = 256

    @nn.compact
    def __call__(self, images: Images, labels: Labels = None) -> Encoded:
        """Return mean, log_var and features."""
        _, rows, columns, _ = images.shape
        x = _down(images, _halvings(rows, columns, self.width), self.blocks, self.dtype)
        x = with_labels(x.reshape(x.shape[0], -1), labels)
        x = dense(self.hidden, kernel_init=he, dtype=self.dtype, name="dense")(x)
        x = nn.relu(x)
        return heads(x, self.latent_dim, self.dtype)


class ResidualDecoder(nn.Module):
    """The decoder for `ResidualEncoder`: residual blocks and transposed convolutions.

    Attributes:
      image_shape: (height, width, outputs).
      dtype: of the layers' inputs, kernels and products.
      width: as in `ResidualEncoder`.
      blocks: as in `ResidualEncoder`.
    """

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, z: Num[Array, "batch latent"], labels: Labels = None) -> Outputs:
        """Return the outputs for the likelihood."""
        sizes = _halvings(*self.image_shape[:2], self.width)
        x = dense(math.prod(sizes[-1]), dtype=self.dtype, name="dense")(with_labels(z, labels))
        return _up(x.reshape(-1, *sizes[-1]), sizes, self.image_shape[2], self.blocks, self.dtype)


class SpatialEncoder(nn.Module):
    """A convolutional encoder to a grid of latents, for colour images and many latents.

    The grid has a quarter of the images' height and width, rounded up, and the same number of
    latents at every position, which are adjacent in the latent vector.

    Attributes:
      latent_dim: number of latents, a multiple of the positions of the grid.
      dtype: of the layers' inputs, kernels and products.
      width: as in `ResidualEncoder`.
      blocks: as in `ResidualEncoder`.

    References:
      Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow,
      section 6.2, which has latents of this kind.
    """

    latent_dim: int
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, images: Images, labels: Labels = None) -> Encoded:
        """Return mean, log_var and features.

        Raises:
          InputError: `latent_dim` is not a multiple of the positions of the grid.
        """
        _, rows, columns, _ = images.shape
        sizes = _halvings(rows, columns, self.width, 1)[:3]
        x = _down(images, sizes, self.blocks, self.dtype)
        each = _latents_a_place(self.latent_dim, sizes[-1])
        x = with_planes(x, labels)
        head = partial(conv_3x3, each, dtype=self.dtype)
        mean = head(kernel_init=nn.initializers.lecun_normal(), name="mean")(x)
        # log_var starts at 0, the same at every position.
        log_var = head(kernel_init=nn.initializers.zeros, name="log_var")(x)
        return _flat(mean), _flat(log_var), jnp.mean(x, axis=(1, 2))


class SpatialDecoder(nn.Module):
    """The decoder for `SpatialEncoder`.

    Attributes:
      image_shape: (height, width, outputs).
      dtype: of the layers' inputs, kernels and products.
      width: as in `ResidualEncoder`.
      blocks: as in `ResidualEncoder`.
    """

    image_shape: tuple[int, int, int]
    dtype: Dtype | None = None
    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, z: Num[Array, "batch latent"], labels: Labels = None) -> Outputs:
        """Return the outputs for the likelihood."""
        sizes = _halvings(*self.image_shape[:2], self.width, 1)[:3]
        rows, columns, features = sizes[-1]
        each = _latents_a_place(z.shape[1], sizes[-1])
        x = with_planes(z.reshape(-1, rows, columns, each), labels)
        x = conv_3x3(features, kernel_init=he, dtype=self.dtype, name="conv_in")(x)
        return _up(x, sizes, self.image_shape[2], self.blocks, self.dtype)


def _down(
    x: Images, sizes: list[tuple[int, int, int]], blocks: int, dtype: Dtype | None
) -> Float[Array, "batch rows columns features"]:
    """Apply strided convolutions and residual blocks through all sizes, in the calling module."""
    conv = partial(conv_3x3, kernel_init=he, dtype=dtype)
    x = conv(sizes[0][2], name="conv_0")(x)
    for level, (*_, features) in enumerate(sizes[1:], start=1):
        x = conv(features, stride=2, name=f"conv_{level}")(nn.relu(x))
        for block in range(blocks):
            x = ResidualBlock(dtype, name=f"block_{level}_{block}")(x)
    return nn.relu(x)


def _up(
    x: Features,
    sizes: list[tuple[int, int, int]],
    outputs: int,
    blocks: int,
    dtype: Dtype | None,
) -> Outputs:
    """Apply residual blocks and transposed convolutions through all sizes, from the last.

    Args:
      x: features of the last size.
      sizes: (rows, columns, features) of each resolution, from the finest.
      outputs: channels of the result.
      blocks: residual blocks at each resolution except the finest.
      dtype: of the layers' inputs, kernels and products.

    Returns:
      The outputs for the likelihood.
    """
    for level in range(len(sizes) - 1, 0, -1):
        for block in range(blocks):
            x = ResidualBlock(dtype, name=f"block_{level}_{block}")(x)
        rows, columns, features = sizes[level - 1]
        up = ConvTranspose(features, 2, dtype, he_transposed, name=f"conv_transpose_{level}")
        # Halving rounds odd sizes up: crop.
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


def with_planes(
    x: Num[Array, "batch rows columns channels"], labels: Labels
) -> Num[Array, "batch rows columns inputs"]:
    """Append one-hot classes or covariates to the channels at every position, if there are any."""
    if labels is None:
        return x
    planes = jnp.broadcast_to(labels[:, None, None], (*x.shape[:3], labels.shape[1]))
    return jnp.concatenate([x, planes.astype(x.dtype)], axis=-1)


def _flat(x: Float[Array, "batch rows columns each"]) -> Float[Array, "batch latent"]:
    return x.reshape(x.shape[0], -1)


def _halvings(rows: int, columns: int, features: int, least: int = 4) -> list[tuple[int, int, int]]:
    """Return (rows, columns, features) of each resolution, halved until both are at most `least`.

    The features are doubled twice. Sides below 4 are too small for 3x3 kernels.
    """
    sizes = [(rows, columns, features)]
    while max(rows, columns) > least:
        rows, columns = -(-rows // 2), -(-columns // 2)
        sizes.append((rows, columns, features * min(2 ** len(sizes), 4)))
    return sizes


@dataclass(frozen=True)
class Conv:
    """The notebook's network: four 3x3 convolutions in the encoder, two in the decoder."""

    images_only: ClassVar[bool] = True

    def modules(
        self, latent_dim: int, outputs_shape: OutputsShape, dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return Encoder(latent_dim, dtype), Decoder(outputs_shape, dtype)


@dataclass(frozen=True)
class MLP:
    """Dense hidden layers in the encoder and in the decoder.

    Attributes:
      width: units of a hidden layer.
      layers: number of hidden layers, of the encoder and of the decoder.
      norm: whether hidden layers have layer normalization.
      log1p: whether the encoder sees log(1 + x): for counts, which differ by orders of magnitude.
      activation: "tanh", "relu" or "softplus".

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, appendix C: one
      stochastic layer. Lopez et al. (2018), Deep generative modeling for single-cell
      transcriptomics, for `log1p`.
    """

    width: int = 200
    layers: int = 2
    norm: bool = False
    log1p: bool = False
    activation: str = "tanh"

    def __post_init__(self) -> None:
        for name in ("width", "layers"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("norm", "log1p"):
            expect_bool(name, getattr(self, name))
        expect_one_of("activation", self.activation, tuple(ACTIVATIONS))

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for `log1p` with values that may be negative."""
        if self.log1p and getattr(config.likelihood, "support", "unit") != "count":
            raise InputError(
                "log1p is true, but the likelihood is not of counts: expected 'poisson', "
                "'negative_binomial' or 'zero_inflated_negative_binomial', or log1p=false"
            )

    def modules(
        self, latent_dim: int, outputs_shape: tuple[int, ...], dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        shared = self.width, self.layers, self.norm
        return (
            MlpEncoder(latent_dim, dtype, *shared, self.log1p, self.activation),
            MlpDecoder(outputs_shape, dtype, *shared, self.activation),
        )


@dataclass(frozen=True)
class Residual:
    """Residual blocks and strided convolutions, down to at most 4x4 pixels; for colour images.

    Attributes:
      width: channels at full resolution; twice as many at half of it, four times below.
      blocks: residual blocks at half the resolution, and at each below.
    """

    width: int = 32
    blocks: int = 1
    images_only: ClassVar[bool] = True

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
      width: channels at full resolution; twice as many at half of it, four times below.
      blocks: residual blocks at half the resolution, and at a quarter.
    """

    width: int = 32
    blocks: int = 1
    images_only: ClassVar[bool] = True

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
    """A user's Flax modules as encoder and decoder: see `protocols.Network`.

    Attributes:
      encoder: maps images [batch, height, width, channels] to (mean, log_var), each
        [batch, latent].
      decoder: maps latents [batch, latent] to [batch, height, width, outputs].
      spec: the name in `config.json`.
    """

    encoder: nn.Module
    decoder: nn.Module
    spec: ClassVar[str] = "own"

    def modules(
        self, latent_dim: int, outputs_shape: tuple[int, ...], dtype: Dtype | None
    ) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder."""
        return self.encoder, self.decoder
