"""Numerics that likelihoods share. A pixel is a number of an example, which may be no image."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Num

from jaxvae.errors import InputError
from jaxvae.validation import (
    Support,
    as_floats,
    at_least_float32,
    expect_support,
    expect_unit_interval,
    is_scaled,
)

Images = Num[ArrayLike, " batch *shape"] | Bool[ArrayLike, " batch *shape"]
Pixels = Float[Array, " batch *shape"]


def expected_pixels(
    images: Images, shape: tuple[int, ...], support: Support = "unit", *, bounded: bool = True
) -> Pixels:
    """Return images, or other examples, as floats; images are in [0, 1]. NaN: missing entries.

    Args:
      images: of the decoder's shape.
      shape: the decoder's shape.
      support: of the likelihood.
      bounded: whether to refuse values outside the support, where values are known.

    Raises:
      InputError: images of another shape, or values outside the support.
    """
    scaled = is_scaled(support, shape[1:])
    if bounded and scaled:
        expect_unit_interval(images, missing=True)
    x = at_least_float32(as_floats(support, images))
    if x.shape != shape:
        raise InputError(f"images have shape {x.shape}: expected the decoder's {shape}")
    if bounded and not scaled:
        expect_support(support, x, missing=True)
    return x


def flat(*arrays: Pixels) -> list[Float[Array, "batch pixels"]]:
    """Reshape each array to [batch, pixels], at least float32.

    On a CPU, XLA does not vectorise over a last axis of size 1, which takes ten times as long.
    """
    return [at_least_float32(x).reshape(x.shape[0], -1) for x in arrays]


def sum_observed(
    log_prob: Callable[..., Float[Array, "batch pixels"]],
    x: Pixels,
    *parameters: Float[Array, "..."],
    complete: bool = False,
) -> Float[Array, " batch"]:
    """Sum the log-probabilities of the entries of each example that are not missing, NaN.

    Args:
      log_prob: function of x and the parameters, entry by entry.
      x: examples. A missing entry counts as 0 before `log_prob`: if it were only left out of the
        sum, its derivatives would be NaN.
      *parameters: arrays that broadcast to the shape of x.
      complete: whether no entry can be missing, as `is_complete` returns.
    """
    x, *at = flat(x, *(jnp.broadcast_to(p, x.shape) for p in parameters))
    if complete:
        return jnp.sum(log_prob(x, *at), axis=-1)
    missing = jnp.isnan(x)
    each = log_prob(jnp.where(missing, 0, x), *at)
    return jnp.sum(jnp.where(missing, 0, each), axis=-1)


def log_prob_of_level(
    level: Float[Array, "*shape"],
    location: Float[Array, "*shape"],
    log_scale: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Compute the log-probabilities of levels 0 to 255 under logistics rounded to a level.

        P(k) = F((k + 1/2) / 255) - F((k - 1/2) / 255) = sigmoid(a) - sigmoid(b)
             = sigmoid(a) sigmoid(-b) (1 - e^(b - a))

    where a and b are the upper and lower end of a bin, minus the location, divided by the scale,
    and a - b = w = exp(-log_scale) / 255. The bins of levels 0 and 255 extend to minus and plus
    infinity.

    Args:
      level: whole numbers from 0 to 255.
      location: of pixels in [0, 1].
      log_scale: logarithms of the scales.

    Returns:
      log P(level), in nats.
    """
    log_scale, width = _width(log_scale)
    # In units of levels the ends are exact, so neighbouring bins meet exactly.
    a = (level + 0.5 - 255 * location) * width
    b = (level - 0.5 - 255 * location) * width
    below_a = jnp.where(level < 255, -jax.nn.softplus(-a), 0)
    above_b = jnp.where(level > 0, -jax.nn.softplus(b), 0)
    ends = (level <= 0) | (level >= 255)
    between = jnp.where(ends, 0, _log_one_minus_exp(width, -log_scale - math.log(255)))
    return below_a + above_b + between


def cdf_of_levels(
    location: Float[Array, "*shape"], log_scale: Float[Array, "*shape"]
) -> Float[Array, "*shape 255"]:
    """Compute P(level <= k) of k = 0, ..., 254 under logistics rounded to a level.

        P(level <= k) = F((k + 1/2) / 255) = sigmoid((k + 1/2 - 255 location) w)

    with the width w of `log_prob_of_level`.

    Args:
      location: of pixels in [0, 1].
      log_scale: logarithms of the scales.

    Returns:
      The probabilities; P(level <= 255) is 1.
    """
    ends = jnp.arange(255, dtype=location.dtype) + 0.5
    _, width = _width(log_scale)
    return jax.nn.sigmoid((ends - 255 * location[..., None]) * width[..., None])


def _width(
    log_scale: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return log scales of at least -80, and the width of a level over the scale."""
    # For smaller scales the width overflows in float32.
    log_scale = jnp.where(log_scale < -80, -80, log_scale)
    return log_scale, jnp.exp(-log_scale) / 255


def _log_one_minus_exp(
    w: Float[Array, "*shape"], log_w: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Compute log(1 - e^-w) for w > 0, given log w, which is finite where w rounds to 0.

        log(1 - e^-w) = log w + log((1 - e^-w) / w)

    For small w the derivatives of the left side would be differences of numbers near 1 / w^2.
    """
    near = w < 1
    small, large = jnp.where(near, w, 0), jnp.where(near, 1, w)
    return jnp.where(near, log_w + series(-small), jnp.log1p(-jnp.exp(-large)))


def series(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Evaluate log((e^x - 1) / x) for |x| < 1 by its Taylor series.

        x/2 + x^2/24 - x^4/2880 + x^6/181440 - x^8/9676800 + x^10/479001600 - ...

    The error is below 1e-10.
    """
    even = [1 / 479001600, -1 / 9676800, 1 / 181440, -1 / 2880, 1 / 24, 0]
    return x / 2 + jnp.polyval(jnp.array(even, x.dtype), x**2)


def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute 1 / (1 + e^-x), with derivatives that do not round to 0 at large x.

    JAX's derivative is s (1 - s), which is 0 in float32 for x > 17, where s rounds to 1.
    """
    positive = x > 0
    tail = jax.nn.sigmoid(jnp.where(positive, -x, x))
    return jnp.where(positive, 1 - tail, tail)


def soft_maximum(x: Float[Array, "*shape"], least: float) -> Float[Array, "*shape"]:
    """Compute a smooth maximum of x and `least`, which is always above `least`."""
    return least + jax.nn.softplus(x - least)
