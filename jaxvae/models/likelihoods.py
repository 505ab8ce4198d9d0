"""Likelihoods of pixels.

A likelihood p(x|z) is made of what the decoder gives: `outputs`, [batch, height, width,
channels * outputs_per_channel], unbounded, and `shared`, the parameters that all pixels have in
common, learned from what `init(channels)` returns. It has `.mean`, [batch, height, width,
channels] in [0, 1], `.log_prob(images)`, [batch] in nats per image, and `.sample(key)`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.components import Registry
from jaxvae.errors import InputError
from jaxvae.validation import as_array, as_key, expect_unit_interval, native


# The fields stand apart: type checkers take a class attribute of a NamedTuple for another field.
class _Logits(NamedTuple):
    """Pixels of one logit each."""

    logits: jax.Array

    @staticmethod
    def init(channels: int) -> dict[str, jax.Array]:
        """No shared parameters."""
        return {}

    @classmethod
    def from_outputs(cls, outputs: jax.Array, shared: Mapping[str, jax.Array]) -> Self:
        """logits = outputs."""
        return cls(outputs)


class Bernoulli(_Logits):
    """Independent Bernoulli pixels; `logits` are [batch, height, width, channels].

    The density is a probability of pixels that are 0 or 1 (with respect to counting measure).
    """

    outputs_per_channel = 1
    support = "binary"

    @property
    def mean(self) -> jax.Array:
        """The probability of each pixel being 1, float32 [batch, height, width, channels]."""
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log p(images): [batch], nats per image.

        A grey level x in [0, 1] counts as the probability of a 1, so that this is the
        negative cross-entropy, with l the logits:

            sum_pixels x log sigmoid(l) + (1 - x) log sigmoid(-l) = sum_pixels x l - softplus(l)
            softplus(l) = log(1 + e^l) = max(l, 0) + log(1 + e^-|l|)

        Raises InputError for images of another shape than the logits'.
        """
        x, logits = _flat(_pixels(images, self.logits.shape), self.logits)
        # Not `maximum` and `abs`: JAX's derivatives of these at 0, 1/2 and 1, give softplus the
        # slope 0 there instead of 1/2.
        positive = logits > 0
        tail = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
        softplus = jnp.where(positive, logits, 0) + tail
        return jnp.sum(x * logits - softplus, axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """Pixels of 0 or 1 drawn from the distribution: float32, the logits' shape."""
        return jax.random.bernoulli(key, self.mean).astype(self.logits.dtype)


class ContinuousBernoulli(_Logits):
    """Independent continuous Bernoulli pixels; `logits` are [batch, height, width, channels].

    The density is with respect to Lebesgue measure on [0, 1]; with l the logit of lambda,

        p(x) = C(lambda) lambda^x (1 - lambda)^(1 - x) = e^(x l) / Z(l),    Z(l) = (e^l - 1) / l

    Positive logits are turned around: 1 - x has the distribution that x has at -l.

    Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
    variational autoencoders.
    """

    outputs_per_channel = 1
    support = "unit"

    @property
    def mean(self) -> jax.Array:
        """The mean of each pixel, d log Z / dl, which is not lambda = sigmoid(l)."""
        mean = jax.grad(lambda logits: jnp.sum(_log_partition(logits)))(self._negative())
        return jnp.where(self.logits > 0, 1 - mean, mean)

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log p(images): [batch], nats per image.

        Raises InputError for images of another shape than the logits'.
        """
        x = _pixels(images, self.logits.shape)
        x, logits = _flat(jnp.where(self.logits > 0, 1 - x, x), self._negative())
        return jnp.sum(x * logits - _log_partition(logits), axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """Pixels in [0, 1] drawn from the distribution, the logits' shape.

        By the inverse of the cumulative distribution function:

            F(x) = (e^(l x) - 1) / (e^l - 1)    F^-1(u) = log(1 + u (e^l - 1)) / l
        """
        u = jax.random.uniform(key, self.logits.shape, self.logits.dtype)
        # Nearer to 0 than this it is u, and at 0 the quotient is 0 / 0.
        logits = jnp.minimum(self._negative(), -1e-12)
        x = jnp.minimum(jnp.log1p(u * jnp.expm1(logits)) / logits, 1)
        return jnp.where(self.logits > 0, 1 - x, x)

    def _negative(self) -> jax.Array:
        return jnp.where(self.logits > 0, -self.logits, self.logits)


class _LocationScale(NamedTuple):
    """Pixels of a location and a scale."""

    location: jax.Array
    log_scale: jax.Array


class GaussianPixels(_LocationScale):
    """Independent Gaussian pixels, N(location, exp(2 log_scale)), of one scale, which is learned.

    location: [batch, height, width, channels], in [0, 1].
    log_scale: of shape (), the logarithm of every pixel's standard deviation.

    The density is with respect to Lebesgue measure on the real line: it does not know that pixels
    end at 0 and 1.

    Rybkin, Daniilidis and Levine (2021), Simple and Effective VAE Training with Calibrated
    Decoders: sigma-VAE, with the scale learned by gradient descent.
    """

    outputs_per_channel = 1
    support = "real"

    @staticmethod
    def init(channels: int) -> dict[str, jax.Array]:
        """A scale of 0.37, a little above the spread of pixels in [0, 1]."""
        return {"log_scale": jnp.array(-1.0, jnp.float32)}

    @classmethod
    def from_outputs(cls, outputs: jax.Array, shared: Mapping[str, jax.Array]) -> Self:
        """location = sigmoid(outputs); the log scale is kept above -6, softly."""
        return cls(sigmoid(outputs), _soft_maximum(shared["log_scale"], -6))

    @property
    def mean(self) -> jax.Array:
        """The location."""
        return self.location

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log N(images; location, exp(2 log_scale)): [batch], nats per image.

        Raises InputError for images of another shape than the location's.
        """
        x = _pixels(images, self.location.shape, bounded=False)
        x, location = _flat(x, self.location)
        log_scale = at_least_float32(self.log_scale)
        square = ((x - location) * jnp.exp(-log_scale)) ** 2
        return jnp.sum(-0.5 * (math.log(2 * math.pi) + square) - log_scale, axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """Pixels drawn from the distribution, the location's shape: not clipped to [0, 1]."""
        noise = jax.random.normal(key, self.location.shape, self.location.dtype)
        return self.location + jnp.exp(self.log_scale) * noise


class DiscretizedLogistic(_LocationScale):
    """Independent pixels of 256 grey levels, each a logistic variable rounded to a level.

    location, log_scale: [batch, height, width, channels], of pixels in [0, 1].

    The density is a probability of grey levels (with respect to counting measure). With
    F(y) = sigmoid((y - location) / exp(log_scale)), level k = 0, ..., 255 has

        P(k) = F((k + 1/2) / 255) - F((k - 1/2) / 255)

    where the bins of levels 0 and 255 reach to minus and plus infinity.

    Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equation 2, with one component.
    """

    outputs_per_channel = 2
    support = "levels"

    @staticmethod
    def init(channels: int) -> dict[str, jax.Array]:
        """No shared parameters."""
        return {}

    @classmethod
    def from_outputs(cls, outputs: jax.Array, shared: Mapping[str, jax.Array]) -> Self:
        """The first half of the last axis gives the locations, the second their log scales.

        As in the paper they are outputs for pixels in [-1, 1], the log scale kept above -7, here
        softly; at outputs of 0 it is -2, about what a blurred image leaves of a pixel's spread:

            location = (1 + outputs_1) / 2    log_scale = max(outputs_2 - 2, -7) - log 2
        """
        location, log_scale = jnp.split(outputs, 2, axis=-1)
        return cls((1 + location) / 2, _soft_maximum(log_scale - 2, -7) - math.log(2))

    @property
    def mean(self) -> jax.Array:
        """The location, clipped to [0, 1]."""
        return jnp.clip(self.location, 0, 1)

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log P(images): [batch], nats per image. Floats count as the nearest of the 256 levels.

        With a and b the upper and lower end of a bin, in scales from the location,

            sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a))

        where a - b = w = exp(-log_scale) / 255.

        Raises InputError for images of another shape than the location's.
        """
        x = _pixels(images, self.location.shape)
        x, location, log_scale = _flat(x, self.location, self.log_scale)
        level = jnp.round(255 * x)
        # Below, float32 overflows.
        log_scale = jnp.where(log_scale < -80, -80, log_scale)
        width = jnp.exp(-log_scale) / 255
        # In levels the ends are exact, so that neighbouring bins meet exactly.
        a = (level + 0.5 - 255 * location) * width
        b = (level - 0.5 - 255 * location) * width
        below_a = jnp.where(level < 255, -jax.nn.softplus(-a), 0)
        above_b = jnp.where(level > 0, -jax.nn.softplus(b), 0)
        ends = (level <= 0) | (level >= 255)
        between = jnp.where(ends, 0, _log_one_minus_exp(width, -log_scale - math.log(255)))
        return jnp.sum(below_a + above_b + between, axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """Grey levels k / 255 drawn from the distribution, the location's shape."""
        noise = jax.random.logistic(key, self.location.shape, self.location.dtype)
        y = self.location + jnp.exp(self.log_scale) * noise
        return jnp.round(255 * jnp.clip(y, 0, 1)) / 255


LIKELIHOODS: Registry[Any] = Registry(
    "likelihood",
    {
        "bernoulli": Bernoulli,
        "continuous_bernoulli": ContinuousBernoulli,
        "gaussian": GaussianPixels,
        "discretized_logistic": DiscretizedLogistic,
    },
)


def bits_per_dimension(log_prob: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """-log P(x) / (height * width * channels * log 2), of a log_prob in nats per image."""
    return -log_prob / (math.prod(image_shape) * math.log(2))


def binarize(key: jax.Array, images: jax.Array) -> jax.Array:
    """Draw black and white images, each pixel 1 with its grey level as the probability.

    The probability is exact to 2^-16: pixels are compared with 16 random bits. Levels 0 and 1
    (or 255) stay what they are.

    Args:
      key: a PRNG key, or [batch] keys, one for each image, which alone decides on its pixels.
      images: [batch, height, width, channels], floats in [0, 1] or uint8.
    Returns:
      Zeros and ones: float32, of that shape.
    Raises:
      InputError: another number of keys than one or `batch`; images of another type.

    Salakhutdinov and Murray (2008), On the Quantitative Analysis of Deep Belief Networks.
    """
    expect_unit_interval(images)
    x = scale_images(images).astype(jnp.float32)
    key = as_key(key, several=True)
    if key.shape not in ((), x.shape[:1]):
        raise InputError(f"there are {key.shape} keys: expected one, or one for each of {len(x)}")

    def draw(key: jax.Array, x: jax.Array) -> jax.Array:
        # On a CPU random bits are most of the work: every word of 32 is two pixels'.
        words = jax.random.bits(key, ((x.size + 1) // 2,), jnp.uint32)
        halves = jnp.concatenate([words >> 16, words & 0xFFFF])[: x.size].reshape(x.shape)
        return (halves.astype(jnp.int32) < 65536 * x).astype(jnp.float32)

    return jax.vmap(draw)(key, x) if key.shape else draw(key, x)


def scale_images(images: jax.Array) -> jax.Array:
    """Images as floats in [0, 1]: uint8 is divided by 255, floats are taken as they are.

    Raises InputError for any other type.
    """
    if not isinstance(images, np.ndarray):  # whose division is exact
        images = as_array("images", images)
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if images.dtype == jnp.bool_:
        return images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(native(images))
    raise InputError(
        f"images are of type {images.dtype}: expected uint8, or floats between 0 and 1"
    )


def _pixels(images: jax.Array, shape: tuple[int, ...], *, bounded: bool = True) -> jax.Array:
    """Return images as floats in [0, 1]. Raises InputError for another shape than the decoder's.

    bounded: whether values beyond 0 and 1 are refused, where they are known.
    """
    if bounded:
        expect_unit_interval(images)
    x = at_least_float32(scale_images(images))
    if x.shape != shape:
        raise InputError(f"images have shape {x.shape}: expected the decoder's {shape}")
    return x


def _flat(*arrays: jax.Array) -> list[jax.Array]:
    """Each as [..., height * width * channels], for terms in float32 at least.

    On a CPU, XLA takes arrays with a last axis of 1 number by number: ten times as long.
    """
    return [at_least_float32(x).reshape(*x.shape[:-3], -1) for x in arrays]


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return an array of numbers as float32, or as float64 where it is of that type.

    A sum over the pixels of an image, in bfloat16, would be off by nats.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _log_partition(logits: jax.Array) -> jax.Array:
    """log Z(l) of the continuous Bernoulli for l <= 0, with its derivatives, which at 0 are finite.

        log Z(l) = log((e^l - 1) / l) = log(1 - e^l) - log(-l)
                 = l/2 + l^2/24 - l^4/2880 + l^6/181440 - l^8/9676800 + l^10/479001600 - ...

    The series is taken where l > -1 and is right to 1e-10 there.
    """
    near = logits > -1
    # Either branch sees logits of its own only: at others its gradient may be infinite or NaN.
    small, large = jnp.where(near, logits, 0), jnp.where(near, -1, logits)
    return jnp.where(near, _series(small), jnp.log1p(-jnp.exp(large)) - jnp.log(-large))


def _series(logits: jax.Array) -> jax.Array:
    """Evaluate the series of `_log_partition`."""
    even = [1 / 479001600, -1 / 9676800, 1 / 181440, -1 / 2880, 1 / 24, 0]
    return logits / 2 + jnp.polyval(jnp.array(even, logits.dtype), logits**2)


def _log_one_minus_exp(w: jax.Array, log_w: jax.Array) -> jax.Array:
    """Compute log(1 - e^-w) for w > 0, given log w, which is finite where w rounds to 0.

        log(1 - e^-w) = log w + log((1 - e^-w) / w)

    For small w the derivatives of the left side are differences of numbers like 1 / w^2.
    """
    near = w < 1
    small, large = jnp.where(near, w, 0), jnp.where(near, 1, w)
    return jnp.where(near, log_w + _series(-small), jnp.log1p(-jnp.exp(-large)))


def sigmoid(x: jax.Array) -> jax.Array:
    """Compute 1 / (1 + e^-x), with derivatives that do not round to 0 at large x.

    JAX's derivative is s (1 - s), which is 0 in float32 from x = 17 on, where s rounds to 1.
    """
    positive = x > 0
    tail = jax.nn.sigmoid(jnp.where(positive, -x, x))
    return jnp.where(positive, 1 - tail, tail)


def _soft_maximum(x: jax.Array, least: float) -> jax.Array:
    """x where it is well above `least`, approaching `least` from above where it is below."""
    return least + jax.nn.softplus(x - least)
