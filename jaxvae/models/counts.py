"""Likelihoods of counts: Poisson, negative binomial and zero-inflated negative binomial."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, digamma, gammaln
from jaxtyping import Array, Float

from jaxvae.models.pixels import Images, Pixels, expected_pixels, sum_observed
from jaxvae.validation import AnyKey, as_key, at_least_float32, expect_one_of, whole_number

_LARGEST = math.log(2e9)  # log of the largest mean that samples have, near the largest int32


class Counts(NamedTuple):
    """Independent counts with the mean m of each entry.

        Poisson(x; m) = m^x e^-m / x!
        NB(x; m, theta) = Gamma(x + theta) / (Gamma(theta) x!)
                          (theta / (theta + m))^theta (m / (theta + m))^x
        ZINB(x; m, theta, pi) = pi [x = 0] + (1 - pi) NB(x; m, theta)

    NB has the variance m + m^2 / theta. Without a size the decoder's outputs are log means,
    m = exp(outputs). With one it is the library size l of an example, and the outputs are logits of
    the share of every entry:

        m = l rho,    rho = softmax(outputs) over all entries of an example

    `log_prob(x)` is then log p(x | z, l) with the l of x itself, its total: see `with_size_of`.
    `mean` and `sample` are at `log_size`.

    Attributes:
      outputs: log means, or logits, [batch, ...].
      log_size: log l, [] or [batch, 1, ...]; None: there is no size.
      log_theta: logarithm of the inverse dispersion theta, [features] or [batch, ..., features];
        None: Poisson.
      zero_logits: log-odds of pi, [batch, ...]; None: no excess of zeros.

    References:
      Lopez, Regier, Cole, Jordan and Yosef (2018), Deep generative modeling for single-cell
      transcriptomics, equations 1 to 4, with the observed library size.
    """

    outputs: Pixels
    log_size: Float[Array, "..."] | None = None
    log_theta: Float[Array, "..."] | None = None
    zero_logits: Pixels | None = None

    @property
    def mean(self) -> Pixels:
        """The mean, (1 - pi) m."""
        return _exp(self._log_mean()) * self._not_zeroed()

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(x | z), or with a size log p(x | z, l), where l is the total of x.

        Args:
          images: whole numbers of at least 0, of the shape of the outputs.

        Returns:
          The log-probability of each example, in nats.

        Raises:
          InputError: another shape than that of the outputs, or values that are no counts.
        """
        p = self._at_least_float32()
        x = expected_pixels(images, self.outputs.shape, "count")
        log_mean = p._with_size_of(x)._log_mean()
        if p.log_theta is None:
            return sum_observed(_log_poisson, x, log_mean)
        if p.zero_logits is None:
            return sum_observed(_log_negative_binomial, x, log_mean, p.log_theta)
        return sum_observed(_log_zero_inflated, x, log_mean, p.log_theta, p.zero_logits)

    def sample(self, key: AnyKey) -> Pixels:
        """Draw counts.

        A negative binomial is a Poisson variable whose mean is drawn from a Gamma distribution with
        the shape theta and the mean m.
        """
        p = self._at_least_float32()
        mean_key, count_key, zero_key = jax.random.split(as_key(key), 3)
        log_mean = p._log_mean()
        if p.log_theta is not None:
            log_theta = jnp.broadcast_to(p.log_theta, log_mean.shape)
            log_mean += jax.random.loggamma(mean_key, jnp.exp(log_theta)) - log_theta
        x = jax.random.poisson(count_key, jnp.exp(jnp.minimum(log_mean, _LARGEST)))
        kept = jax.random.bernoulli(zero_key, p._not_zeroed(), x.shape)
        return jnp.where(kept, x, 0).astype(self.outputs.dtype)

    def with_size_of(self, images: Images) -> "Counts":
        """Return the likelihood at the library size of examples, if it has one.

            l = sum_g x_g / sum_g rho_g

        The sums are over the observed entries. Without missing entries l is the total of x; with
        some, the means of the observed entries add up to their total. A total of 0 counts as 1e-6.

        Args:
          images: as in `log_prob`.

        Returns:
          The likelihood whose `mean` and `sample` are at that size.

        Raises:
          InputError: as in `log_prob`.
        """
        x = expected_pixels(images, self.outputs.shape, "count")
        return self._at_least_float32()._with_size_of(x)

    def _with_size_of(self, x: Pixels) -> "Counts":
        if self.log_size is None:
            return self
        axes = tuple(range(1, x.ndim))
        observed = ~jnp.isnan(x)
        some = jnp.any(observed, axes, keepdims=True)
        log_shares = jnp.where(observed, self._log_shares(), -jnp.inf)
        # Of an example without observed entries the sum would be 0, and its derivative NaN.
        log_share = jax.nn.logsumexp(jnp.where(some, log_shares, 0), axes, keepdims=True)
        total = jnp.sum(jnp.where(observed, x, 0), axes, keepdims=True)
        size = jnp.log(jnp.maximum(total, 1e-6)) - log_share
        return self._replace(log_size=jnp.where(some, size, self.log_size))

    def _log_shares(self) -> Pixels:
        return jax.nn.log_softmax(self.outputs, tuple(range(1, self.outputs.ndim)))

    def _log_mean(self) -> Pixels:
        return self.outputs if self.log_size is None else self._log_shares() + self.log_size

    def _not_zeroed(self) -> Pixels | float:
        return 1.0 if self.zero_logits is None else jax.nn.sigmoid(-self.zero_logits)

    def _at_least_float32(self) -> "Counts":
        return jax.tree.map(at_least_float32, self)


@dataclass(frozen=True)
class Poisson:
    """Independent Poisson counts.

    Attributes:
      size: total count of an example, the library size, at which `mean` and `sample` are; the
        log-probability of an example is at its own total, and the decoder gives the shares of the
        total. 0: there is no library size, and the decoder gives log means.
    """

    size: int = 10_000

    outputs_per_channel: ClassVar[int] = 1
    support: ClassVar[str] = "count"

    def __post_init__(self) -> None:
        _check_size(self)

    def init(self, channels: int) -> dict[str, Array]:
        """Return no parameters: there are no shared ones."""
        return {}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> Counts:
        """Return the likelihood of a batch."""
        return Counts(outputs, _log_size(self))


@dataclass(frozen=True)
class NegativeBinomial:
    """Independent counts with larger variance than Poisson's.

        log theta = 10 tanh(a / 10),    a is learned, and starts at 0

    Attributes:
      size: as of `poisson`.
      dispersion: "feature", one learned theta for each place on the last axis (gene); "entry", from
        the decoder for every entry of every example.

    References:
      Lopez, Regier, Cole, Jordan and Yosef (2018), Deep generative modeling for single-cell
      transcriptomics, equations 1 to 4.
    """

    size: int = 10_000
    dispersion: str = "feature"

    zero_inflated: ClassVar[bool] = False
    support: ClassVar[str] = "count"

    def __post_init__(self) -> None:
        _check_size(self)
        expect_one_of("dispersion", self.dispersion, ("feature", "entry"))

    @property
    def outputs_per_channel(self) -> int:
        """The mean and, where the decoder gives them, the dispersion and the excess of zeros."""
        return 1 + (self.dispersion == "entry") + self.zero_inflated

    def init(self, channels: int) -> dict[str, Array]:
        """Return theta = 1 for every feature, if the decoder does not give it."""
        if self.dispersion == "entry":
            return {}
        return {"log_theta": jnp.zeros(channels, jnp.float32)}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> Counts:
        """Return the likelihood of a batch.

        The last axis of the outputs has the log means or logits, then those of log theta and pi
        that there are.
        """
        mean, *others = jnp.split(outputs, self.outputs_per_channel, axis=-1)
        zero_logits = others.pop() if self.zero_inflated else None
        log_theta = others.pop() if self.dispersion == "entry" else shared["log_theta"]
        return Counts(mean, _log_size(self), 10 * jnp.tanh(log_theta / 10), zero_logits)


@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """A negative binomial with an excess of zeros, whose probability the decoder gives.

    Attributes:
      size: as of `poisson`.
      dispersion: as of `negative_binomial`.

    References:
      Lopez, Regier, Cole, Jordan and Yosef (2018), Deep generative modeling for single-cell
      transcriptomics, equations 1 to 4.
    """

    zero_inflated: ClassVar[bool] = True


def _check_size(family: Poisson | NegativeBinomial) -> None:
    object.__setattr__(family, "size", whole_number("size", family.size, least=0))


def _log_size(family: Poisson | NegativeBinomial) -> Float[Array, ""] | None:
    return jnp.log(jnp.float32(family.size)) if family.size else None


def _exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute e^x, continued by its tangent above 60: in float32 e^x overflows at 88."""
    return jnp.exp(jnp.minimum(x, 60)) * (1 + jnp.maximum(x - 60, 0))


def _log_poisson(
    x: Float[Array, "*shape"], log_mean: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Compute log Poisson(x; m) from log m.

        x log m - m - log x! = -x (e^u - 1 - u) - log(2 pi x) / 2 - 1 / (12 x) + 1 / (360 x^3) - ...

    with u = log(m / x), by Stirling's series, which is accurate to 1e-9 for x > 16. The terms of
    the left side nearly cancel for large x.
    """
    large = x > 16
    y = jnp.where(large, x, 17)
    u = log_mean - jnp.log(y)
    near = jnp.abs(u) < 1
    v = jnp.where(near, u, 0)
    from_mode = jnp.where(near, -y * (jnp.expm1(v) - v), y * (1 + u) - _exp(log_mean))
    stirling = from_mode - jnp.log(2 * math.pi * y) / 2 - 1 / (12 * y) + 1 / (360 * y**3)
    return jnp.where(large, stirling, x * log_mean - _exp(log_mean) - gammaln(x + 1))


def _log_negative_binomial(
    x: Float[Array, "*shape"],
    log_mean: Float[Array, "*shape"],
    log_theta: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Compute log NB(x; m, theta) from log m and log theta."""
    theta, odds = jnp.exp(log_theta), log_mean - log_theta
    ways = _log_ways(x, theta)
    return ways - theta * jax.nn.softplus(odds) - x * jax.nn.softplus(-odds)


@jax.custom_jvp
def _log_ways(x: Float[Array, "*shape"], theta: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute log(Gamma(x + theta) / (Gamma(theta) x!)) = -log((x + theta) B(theta, x + 1)).

    Its derivatives are given below, as that of `betaln` takes much longer on a CPU.
    """
    return -betaln(theta, x + 1) - jnp.log(x + theta)


_log_ways.defjvps(
    lambda dx, _, x, theta: (digamma(x + theta) - digamma(x + 1)) * dx,
    lambda dtheta, _, x, theta: _digamma_difference(x, theta) * dtheta,
)


def _digamma_difference(
    x: Float[Array, "*shape"], theta: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Compute digamma(x + theta) - digamma(theta).

    For theta > 8, where the two may be nearly equal, it is the difference of asymptotic series,

        digamma(t) = log t - 1 / (2 t) - 1 / (12 t^2) + 1 / (120 t^4) - ...

    whose next term is below 2e-8.
    """
    large = theta > 8
    a, small = jnp.where(large, theta, 8), jnp.where(large, 1, theta)
    b = x + a
    series = jnp.log1p(x / a) + x / (2 * a * b) + (a**-2 - b**-2) / 12 - (a**-4 - b**-4) / 120
    return jnp.where(large, series, digamma(x + small) - digamma(small))


def _log_zero_inflated(
    x: Float[Array, "*shape"],
    log_mean: Float[Array, "*shape"],
    log_theta: Float[Array, "*shape"],
    zero_logits: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Compute log ZINB(x; m, theta, pi) from the log-odds of pi."""
    log_p = _log_negative_binomial(x, log_mean, log_theta)
    with_zeros = jnp.where(x == 0, jnp.logaddexp(zero_logits, log_p), log_p)
    return with_zeros - jax.nn.softplus(zero_logits)
