"""A likelihood of pixels: a mixture of discretized logistics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvae.models.pixels import (
    Images,
    Pixels,
    cdf_of_levels,
    expected_pixels,
    flat,
    log_prob_of_level,
    soft_maximum,
)
from jaxvae.validation import AnyKey, at_least_float32, whole_number


class DiscretizedLogisticMixture(NamedTuple):
    """Pixels of 256 levels, each drawn from a mixture of discretized logistics.

        P(x) = sum_k softmax(logits)_k prod_c P(x_c; location_kc, exp(log_scale_kc))

    where all channels of a pixel have the same component, and P(x_c; ...) is that of
    `likelihoods.DiscretizedLogistic`. With three channels, red, green and blue, a location depends
    on the earlier channels of the pixel:

        location of green + alpha_k (red - 1/2)
        location of blue  + beta_k (red - 1/2) + gamma_k (green - 1/2)

    The density is the probability of levels (with respect to counting measure).

    Attributes:
      logits: of the components, [batch, height, width, components].
      location: of pixels in [0, 1], before the dependence on earlier channels:
        [batch, height, width, channels, components].
      log_scale: logarithms of the scales, of the same shape.
      coefficients: alpha, beta and gamma, [batch, height, width, 3, components]; with another
        number of channels than three there are none, [batch, height, width, 0, components].

    References:
      Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equations 1 to 3.
    """

    logits: Float[Array, "batch *places components"]
    location: Float[Array, "batch *places channels components"]
    log_scale: Float[Array, "batch *places channels components"]
    coefficients: Float[Array, "batch *places coefficients components"]

    @property
    def mean(self) -> Pixels:
        """The expected value of each pixel, before it is rounded to a level.

        Within a component the dependence on earlier channels is evaluated at their means, which is
        exact except where the location passes 0 or 1.
        """
        p = self._at_least_float32()
        means: list[Array] = []
        for c in range(p.location.shape[-2]):
            means.append(_clipped_mean(p._location(c, means), p.log_scale[..., c, :]))
        weights = jax.nn.softmax(p.logits)
        each = [jnp.sum(weights * mean, axis=-1, keepdims=True) for mean in means]
        return jnp.clip(jnp.concatenate(each, axis=-1), 0, 1)

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log P(images).

        Missing channels, NaN, are left out. That is exact unless a pixel of three channels has only
        some of them: later channels then depend on the location of the missing one.

        Args:
          images: floats in [0, 1], which are rounded to the nearest of the 256 levels, or uint8;
            [batch, height, width, channels].

        Returns:
          The log-probability of each image, in nats.

        Raises:
          InputError: images of another shape than the locations.
        """
        of_pixels = jax.nn.logsumexp(self._log_joint(images, self.location.shape[-2]), axis=-1)
        return jnp.sum(of_pixels, axis=tuple(range(1, of_pixels.ndim)))

    def level_cdf(self, images: Images, channel: int) -> Float[Array, "*batch height width ends"]:
        """Compute the cumulative probabilities of the levels of a channel, given the earlier ones.

            P(x_c <= k | x_<c) = sum_i P(i | x_<c) F_i((k + 1/2) / 255)

        where P(i | x_<c) are the weights of the components given the earlier channels.

        Args:
          images: as of `log_prob`; only the channels before `channel` are used.
          channel: c, from 0.

        Returns:
          P(x_c <= k | x_<c) of k = 0, ..., 254.
        """
        p = self._at_least_float32()
        x = jnp.round(255 * expected_pixels(images, p.location.shape[:-1])) / 255
        location = p._location(channel, [x[..., c, None] for c in range(channel)])
        log_scale = p.log_scale[..., channel, :]
        weights = jax.nn.softmax(p._log_joint(images, channel))
        cdf = jnp.zeros((), location.dtype)
        for i in range(weights.shape[-1]):  # XLA vectorises over a long last axis
            cdf += weights[..., i, None] * cdf_of_levels(location[..., i], log_scale[..., i])
        return cdf

    def sample(self, key: AnyKey) -> Pixels:
        """Draw levels k / 255: a component for each pixel, then its channels one after another."""
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, self.logits)[..., None]
        logits, *others = (
            jnp.take_along_axis(x, k if x.ndim == k.ndim else k[..., None], axis=-1) for x in self
        )
        one = type(self)(logits, *others)  # the chosen component alone
        shape = one.location.shape
        noise = jnp.exp(one.log_scale) * jax.random.logistic(noise_key, shape, one.location.dtype)
        x: list[Array] = []
        for c in range(shape[-2]):
            y = one._location(c, x) + noise[..., c, :]
            x.append(jnp.round(255 * jnp.clip(y, 0, 1)) / 255)
        return jnp.concatenate(x, axis=-1)

    def _log_joint(self, images: Images, channels: int) -> Float[Array, "batch *places components"]:
        """Compute log P(component, x_<c) of every pixel, where c is the number of channels."""
        p = self._at_least_float32()
        levels = jnp.round(255 * expected_pixels(images, p.location.shape[:-1]))
        log_joint = jax.nn.log_softmax(p.logits)
        earlier: list[Array] = []
        for c in range(channels):
            level, location = levels[..., c, None], p._location(c, earlier)
            missing = jnp.isnan(level)
            earlier.append(jnp.where(missing, jnp.clip(location, 0, 1), level / 255))
            level, missing = (jnp.broadcast_to(x, location.shape) for x in (level, missing))
            level, location, log_scale = flat(level, location, p.log_scale[..., c, :])
            missing = missing.reshape(level.shape)
            each = log_prob_of_level(jnp.where(missing, 0, level), location, log_scale)
            log_joint += jnp.where(missing, 0, each).reshape(log_joint.shape)
        return log_joint

    def _location(self, c: int, earlier: Sequence[Array]) -> Array:
        """Return the locations of channel c, [..., components], given the channels before it."""
        location = self.location[..., c, :]
        if self.coefficients.shape[-2]:
            for i, x in enumerate(earlier, start=c * (c - 1) // 2):
                location = location + self.coefficients[..., i, :] * (x - 0.5)
        return location

    def _at_least_float32(self) -> "DiscretizedLogisticMixture":
        return type(self)(*map(at_least_float32, self))


def _clipped_mean(
    location: Float[Array, "*shape"], log_scale: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Compute the mean of logistic variables that are clipped to [0, 1].

        int_0^1 1 - F(y) dy = s (softplus(a) - softplus(b)) = s log(1 + sigmoid(b) (e^w - 1))

    with scale s, a = location / s, b = (location - 1) / s and w = a - b = 1 / s.
    """
    log_scale = jnp.clip(log_scale, -80, 80)
    # Each form is evaluated only at scales where it is accurate. Beyond 20 of the smaller scales
    # the mean is 0 or 1.
    wide = log_scale > 0
    s = jnp.exp(jnp.where(wide, log_scale, 0))
    of_wide = s * jnp.log1p(jax.nn.sigmoid((location - 1) / s) * jnp.expm1(1 / s))
    s = jnp.exp(jnp.where(wide, 0, log_scale))
    near = jnp.clip(location, -20, 20)
    of_narrow = s * (jax.nn.softplus(near / s) - jax.nn.softplus((near - 1) / s))
    return jnp.where(wide, of_wide, of_narrow)


@dataclass(frozen=True)
class LogisticMixture:
    """A mixture of discretized logistics, in which green depends on red, and blue on both.

    Attributes:
      components: K, the number of logistics.

    References:
      Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equations 1 to 3.
    """

    components: int = 10

    support: ClassVar[str] = "levels"

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", whole_number("components", self.components))

    def outputs_per_pixel(self, channels: int) -> int:
        """Return K (1 + 2 channels), and 3 K more with three channels."""
        return self.components * (1 + 2 * channels + _coefficients(channels))

    def init(self, channels: int) -> dict[str, Array]:
        """Return no parameters: there are no shared ones."""
        return {}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> DiscretizedLogisticMixture:
        """Return the likelihood of a batch.

            location = (1 + outputs_1) / 2    log_scale = max(outputs_2 - 2, -7) - log 2
            coefficients = tanh(outputs_3)

        The last axis has the K logits, the locations and log scales, [channels, K] each, and the
        coefficients, [3, K]. Locations and scales are those of `DiscretizedLogistic`.
        """
        k = self.components
        groups = outputs.reshape(*outputs.shape[:-1], -1, k)
        # K (1 + 2 C) outputs, or 10 K with three channels.
        rows = groups.shape[-2]
        channels = 3 if rows == 10 else (rows - 1) // 2
        ends = [1, 1 + channels, 1 + 2 * channels]
        logits, location, log_scale, coefficients = jnp.split(groups, ends, axis=-2)
        return DiscretizedLogisticMixture(
            logits[..., 0, :],
            (1 + location) / 2,
            soft_maximum(log_scale - 2, -7) - math.log(2),
            jnp.tanh(coefficients),
        )


def _coefficients(channels: int) -> int:
    return 3 if channels == 3 else 0
