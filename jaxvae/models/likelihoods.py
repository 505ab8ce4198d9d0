"""Likelihoods of pixels, which are the numbers of an example of any shape.

A likelihood p(x|z) is made from the decoder's unbounded `outputs`, [batch, height, width,
channels * outputs_per_channel] or in general [batch, ..., channels * outputs_per_channel], and from
`shared`, learned parameters that all pixels have in common, which start as `init(channels)`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxvae.errors import InputError
from jaxvae.models.pixels import (
    Images,
    Pixels,
    cdf_of_levels,
    expected_pixels,
    log_prob_of_level,
    series,
    sigmoid,
    soft_maximum,
    sum_observed,
)
from jaxvae.validation import (
    AnyKey,
    as_key,
    expect_one_of,
    expect_unit_interval,
    is_complete,
    is_image,
    scale_images,
)


# A base class has the fields, as type checkers take class attributes of a NamedTuple for fields.
class _Logits(NamedTuple):
    """Pixels with one logit each."""

    logits: Pixels

    @staticmethod
    def init(channels: int) -> dict[str, Array]:
        """Return no parameters: there are no shared ones."""
        return {}

    @classmethod
    def from_outputs(
        cls, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> Self:
        """Return the likelihood whose logits are the decoder's outputs."""
        return cls(outputs)


class Bernoulli(_Logits):
    """Independent Bernoulli pixels.

    The density is the probability of pixels that are 0 or 1 (with respect to counting measure).

    Attributes:
      logits: log-odds of each pixel being 1, [batch, height, width, channels].
    """

    outputs_per_channel = 1
    support = "binary"

    @property
    def mean(self) -> Pixels:
        """The probability of each pixel being 1."""
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(images), the negative cross-entropy.

            log p(x) = sum_pixels x log sigmoid(l) + (1 - x) log sigmoid(-l)
                     = sum_pixels x l - softplus(l)
            softplus(l) = log(1 + e^l) = max(l, 0) + log(1 + e^-|l|)

        where l are the logits. A grey level x in [0, 1] counts as the probability of a 1.

        Args:
          images: floats in [0, 1] or uint8, of the shape of the logits.

        Returns:
          The log-probability of each image, in nats.

        Raises:
          InputError: images of another shape than the logits.
        """

        def log_p(x: Array, logits: Array) -> Array:
            # Not by `maximum` and `abs`: JAX's derivatives of these at 0 (1/2 and 1) would give
            # softplus the slope 0 there instead of 1/2.
            positive = logits > 0
            tail = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
            softplus = jnp.where(positive, logits, 0) + tail
            return x * logits - softplus

        x = expected_pixels(images, self.logits.shape)
        return sum_observed(log_p, x, self.logits, complete=is_complete(images))

    def level_cdf(self, images: Images, channel: int) -> Float[Array, "*batch height width ends"]:
        """Compute P(x_c = 0), which does not depend on other channels; [..., 1].

        Args:
          images: not used.
          channel: c, from 0.

        Returns:
          The probabilities.
        """
        return jax.nn.sigmoid(-self.logits[..., channel, None])

    def sample(self, key: AnyKey) -> Pixels:
        """Draw pixels of 0 or 1."""
        return jax.random.bernoulli(key, self.mean).astype(self.logits.dtype)


class ContinuousBernoulli(_Logits):
    """Independent continuous Bernoulli pixels.

    The density is with respect to Lebesgue measure on [0, 1]; with l the logit of lambda,

        p(x) = C(lambda) lambda^x (1 - lambda)^(1 - x) = e^(x l) / Z(l),    Z(l) = (e^l - 1) / l

    Positive logits are computed by symmetry: 1 - x has the distribution that x has at -l.

    Attributes:
      logits: log-odds of lambda, [batch, height, width, channels].

    References:
      Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
      variational autoencoders.
    """

    outputs_per_channel = 1
    support = "unit"

    @property
    def mean(self) -> Pixels:
        """The mean of each pixel, d log Z / dl, which is not lambda = sigmoid(l)."""
        mean = jax.grad(lambda logits: jnp.sum(_log_partition(logits)))(self._negative())
        return jnp.where(self.logits > 0, 1 - mean, mean)

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(images).

        Args:
          images: floats in [0, 1] or uint8, of the shape of the logits.

        Returns:
          The log-density of each image, in nats.

        Raises:
          InputError: images of another shape than the logits.
        """
        x = expected_pixels(images, self.logits.shape)
        return sum_observed(
            lambda x, logits: x * logits - _log_partition(logits),
            jnp.where(self.logits > 0, 1 - x, x),
            self._negative(),
            complete=is_complete(images),
        )

    def sample(self, key: AnyKey) -> Pixels:
        """Draw pixels in [0, 1], by the inverse of the cumulative distribution function.

        F(x) = (e^(l x) - 1) / (e^l - 1)    F^-1(u) = log(1 + u (e^l - 1)) / l
        """
        u = jax.random.uniform(key, self.logits.shape, self.logits.dtype)
        # Logits closer to 0 give u to rounding; at 0 the quotient would be 0 / 0.
        logits = jnp.minimum(self._negative(), -1e-12)
        x = jnp.minimum(jnp.log1p(u * jnp.expm1(logits)) / logits, 1)
        return jnp.where(self.logits > 0, 1 - x, x)

    def _negative(self) -> Pixels:
        return jnp.where(self.logits > 0, -self.logits, self.logits)


class _LocationScale(NamedTuple):
    """Pixels with a location and a scale."""

    location: Pixels
    log_scale: Float[Array, "..."]


class GaussianPixels(_LocationScale):
    """Independent Gaussian entries, N(location, exp(2 log_scale)).

    The density is with respect to Lebesgue measure on the whole real line, not only on [0, 1].

    Attributes:
      location: means of the entries, of images in [0, 1]: [batch, height, width, channels].
      log_scale: logarithms of the standard deviations, of a shape that broadcasts to that.
    """

    support = "real"

    @property
    def mean(self) -> Pixels:
        """The location."""
        return self.location

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log N(images; location, exp(2 log_scale)).

        Args:
          images: floats or uint8, of the shape of the location.

        Returns:
          The log-density of each image, in nats.

        Raises:
          InputError: images of another shape than the location.
        """

        def log_p(x: Array, location: Array, log_scale: Array) -> Array:
            square = ((x - location) * jnp.exp(-log_scale)) ** 2
            return -0.5 * (math.log(2 * math.pi) + square) - log_scale

        x = expected_pixels(images, self.location.shape, self.support, bounded=False)
        return sum_observed(log_p, x, *self, complete=is_complete(images))

    def sample(self, key: AnyKey) -> Pixels:
        """Draw pixels; they are not clipped to [0, 1]."""
        noise = jax.random.normal(key, self.location.shape, self.location.dtype)
        return self.location + jnp.exp(self.log_scale) * noise


@dataclass(frozen=True)
class GaussianFamily:
    """Independent Gaussian pixels, with learned scales.

        x ~ N(location, exp(2 log_scale)),    log_scale >= -6, by a smooth maximum

    Attributes:
      scale: "shared", one learned scale; "feature", one for each place on the last axis (channel or
        column); "entry", from the decoder for every number of every example.

    References:
      Rybkin, Daniilidis and Levine (2021), Simple and Effective VAE Training with Calibrated
      Decoders: sigma-VAE, with the scale learned by gradient descent.
    """

    scale: str = "shared"

    support: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        expect_one_of("scale", self.scale, ("shared", "feature", "entry"))

    @property
    def outputs_per_channel(self) -> int:
        """The location, and with "entry" the log scale."""
        return 2 if self.scale == "entry" else 1

    def init(self, channels: int) -> dict[str, Array]:
        """Return scales of 0.37, a little above the standard deviation of pixels in [0, 1]."""
        if self.scale == "entry":
            return {}
        shape = () if self.scale == "shared" else (channels,)
        return {"log_scale": jnp.full(shape, -1.0, jnp.float32)}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> GaussianPixels:
        """Return the likelihood of a batch.

            location = sigmoid(outputs) for images, outputs for other examples

        With "entry" the last axis of the outputs has the locations, then the log scales plus 1.
        """
        if self.scale == "entry":
            outputs, log_scale = jnp.split(outputs, 2, axis=-1)
            log_scale = log_scale - 1
        else:
            log_scale = shared["log_scale"]
        location = sigmoid(outputs) if is_image(outputs.shape[1:]) else outputs
        return GaussianPixels(location, soft_maximum(log_scale, -6))


class DiscretizedLogistic(_LocationScale):
    """Independent pixels of 256 grey levels, each a logistic variable rounded to a level.

    The density is the probability of grey levels (with respect to counting measure). With
    F(y) = sigmoid((y - location) / exp(log_scale)), level k = 0, ..., 255 has

        P(k) = F((k + 1/2) / 255) - F((k - 1/2) / 255)

    where the bins of levels 0 and 255 extend to minus and plus infinity.

    Attributes:
      location: of pixels in [0, 1], [batch, height, width, channels].
      log_scale: logarithms of the scales, of the same shape.

    References:
      Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equation 2, with one component.
    """

    outputs_per_channel = 2
    support = "levels"

    @staticmethod
    def init(channels: int) -> dict[str, Array]:
        """Return no parameters: there are no shared ones."""
        return {}

    @classmethod
    def from_outputs(
        cls, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> Self:
        """Return the likelihood of a batch.

            location = (1 + outputs_1) / 2    log_scale = max(outputs_2 - 2, -7) - log 2

        where outputs_1 and outputs_2 are the halves of the last axis. As in the paper the outputs
        are for pixels in [-1, 1], with log scales of at least -7; here the maximum is smooth. The
        scales start at e^-2, about the error of a blurred image.
        """
        location, log_scale = jnp.split(outputs, 2, axis=-1)
        return cls((1 + location) / 2, soft_maximum(log_scale - 2, -7) - math.log(2))

    @property
    def mean(self) -> Pixels:
        """The location, clipped to [0, 1]."""
        return jnp.clip(self.location, 0, 1)

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log P(images).

        Args:
          images: floats in [0, 1], which are rounded to the nearest of the 256 levels, or uint8;
            of the shape of the location.

        Returns:
          The log-probability of each image, in nats.

        Raises:
          InputError: images of another shape than the location.
        """
        level = jnp.round(255 * expected_pixels(images, self.location.shape))
        complete = is_complete(images)
        return sum_observed(
            log_prob_of_level, level, self.location, self.log_scale, complete=complete
        )

    def level_cdf(self, images: Images, channel: int) -> Float[Array, "*batch height width ends"]:
        """Compute P(x_c <= k) of k = 0, ..., 254, which does not depend on other channels.

        Args:
          images: not used.
          channel: c, from 0.

        Returns:
          The probabilities.
        """
        return cdf_of_levels(self.location[..., channel], self.log_scale[..., channel])

    def sample(self, key: AnyKey) -> Pixels:
        """Draw grey levels k / 255."""
        noise = jax.random.logistic(key, self.location.shape, self.location.dtype)
        y = self.location + jnp.exp(self.log_scale) * noise
        return jnp.round(255 * jnp.clip(y, 0, 1)) / 255


def bits_per_dimension(
    log_prob: Float[Array, "*batch"], image_shape: tuple[int, ...]
) -> Float[Array, "*batch"]:
    """Convert log-probabilities to bits per dimension.

        -log P(x) / (height * width * channels * log 2)

    Args:
      log_prob: log P(x), in nats per image.
      image_shape: (height, width, channels), or the shape of one example.

    Returns:
      Bits per dimension of each image.
    """
    return -log_prob / (math.prod(image_shape) * math.log(2))


def binarize(key: AnyKey, images: Images) -> Float[Array, " batch *shape"]:
    """Draw binary images: each pixel is 1 with its grey level as the probability.

    The probability is exact to 2^-16, as pixels are compared with 16 random bits. Levels 0 and 1
    (255 of uint8) are certain.

    Args:
      key: a PRNG key, or [batch] keys, one for each image. With one for each, an image's pixels
        do not depend on the rest of the batch.
      images: floats in [0, 1] or uint8.

    Returns:
      Zeros and ones, float32. Missing pixels, NaN, stay missing.

    Raises:
      InputError: another number of keys than one or `batch`; images of another type.

    References:
      Salakhutdinov and Murray (2008), On the Quantitative Analysis of Deep Belief Networks.
    """
    expect_unit_interval(images, missing=True)
    x = scale_images(images).astype(jnp.float32)
    key = as_key(key, several=True)
    if key.shape not in ((), x.shape[:1]):
        raise InputError(
            f"key has shape {key.shape}: expected one key, or {len(x)}, one for each image"
        )

    def draw(key: Key[Array, ""], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        # On a CPU random bits take most of the time: a word of 32 serves two pixels.
        words = jax.random.bits(key, ((x.size + 1) // 2,), jnp.uint32)
        halves = jnp.concatenate([words >> 16, words & 0xFFFF])[: x.size].reshape(x.shape)
        drawn = (halves.astype(jnp.int32) < 65536 * x).astype(jnp.float32)
        return jnp.where(jnp.isnan(x), x, drawn)

    return jax.vmap(draw)(key, x) if key.shape else draw(key, x)


def _log_partition(logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute log Z(l) of the continuous Bernoulli for l <= 0, with finite derivatives at 0.

        log Z(l) = log((e^l - 1) / l) = log(1 - e^l) - log(-l)
                 = l/2 + l^2/24 - l^4/2880 + l^6/181440 - l^8/9676800 + l^10/479001600 - ...

    The series is used for l > -1, where it is accurate to 1e-10.
    """
    near = logits > -1
    # Each branch gets only logits of its own range: outside it the gradient may be inf or NaN.
    small, large = jnp.where(near, logits, 0), jnp.where(near, -1, logits)
    return jnp.where(near, series(small), jnp.log1p(-jnp.exp(large)) - jnp.log(-large))
