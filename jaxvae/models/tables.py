"""Likelihoods of tables: Student's t, categories, and columns of several kinds."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln
from jaxtyping import Array, Float

from jaxvae.errors import InputError, either, shown
from jaxvae.models.pixels import Images, Pixels, expected_pixels, soft_maximum, sum_observed
from jaxvae.models.protocols import Likelihood
from jaxvae.validation import AnyKey, as_floats, at_least_float32, is_image, whole_number


class StudentTNumbers(NamedTuple):
    """Independent entries with Student's t distribution.

        p(x) = (1 + y^2 / nu)^(-(nu + 1) / 2) / (s sqrt(nu) B(1/2, nu / 2))
        y = (x - location) / s

    Attributes:
      location: [batch, ..., features].
      log_scale: log s, [features].
      degrees: degrees of freedom nu, above 1, so that the mean exists: [features].
    """

    location: Pixels
    log_scale: Float[Array, "..."]
    degrees: Float[Array, "..."]

    @property
    def mean(self) -> Pixels:
        """The location."""
        return self.location

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(x).

        Args:
          images: numbers, of the shape of the location.

        Returns:
          The log-density of each example, in nats.

        Raises:
          InputError: another shape than that of the location.
        """

        def log_p(x: Array, location: Array, log_scale: Array, nu: Array) -> Array:
            y = (x - location) * jnp.exp(-log_scale)
            normaliser = betaln(jnp.full_like(nu, 0.5), nu / 2) + jnp.log(nu) / 2 + log_scale
            return -(nu + 1) / 2 * jnp.log1p(y**2 / nu) - normaliser

        x = expected_pixels(images, self.location.shape, "real", bounded=False)
        return sum_observed(log_p, x, *self)

    def sample(self, key: AnyKey) -> Pixels:
        """Draw numbers."""
        nu = jnp.broadcast_to(self.degrees, self.location.shape)
        noise = jax.random.t(key, nu, dtype=self.location.dtype)
        return self.location + jnp.exp(self.log_scale) * noise


@dataclass(frozen=True)
class StudentT:
    """Independent Student's t, with a learned scale and degrees of freedom for each feature.

    A feature is a place on the last axis. Outliers have less influence than with `gaussian`.

        location = outputs    log_scale >= -6, by a smooth maximum    nu = 1 + exp(log_excess)
    """

    outputs_per_channel: ClassVar[int] = 1
    support: ClassVar[str] = "real"

    def init(self, channels: int) -> dict[str, Array]:
        """Return a scale of 1 and 10 degrees of freedom for every feature."""
        return {
            "log_scale": jnp.zeros(channels, jnp.float32),
            "log_excess": jnp.full(channels, math.log(9), jnp.float32),
        }

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> StudentTNumbers:
        """Return the likelihood of a batch."""
        log_scale = soft_maximum(shared["log_scale"], -6)
        return StudentTNumbers(outputs, log_scale, 1 + jnp.exp(shared["log_excess"]))


class Categories(NamedTuple):
    """Independent categorical variables, each of K one-hot columns that are adjacent.

        log p(x) = sum_k x_k log softmax(logits)_k

    All columns of a missing variable are NaN.

    Attributes:
      logits: [batch, ..., variables, K].
    """

    logits: Float[Array, "batch *shape variables classes"]

    @property
    def mean(self) -> Pixels:
        """The probabilities of the classes."""
        return self._columns(jax.nn.softmax(self.logits))

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(x).

        Args:
          images: one-hot columns, [batch, ..., variables * K].

        Returns:
          The log-probability of each example, in nats.

        Raises:
          InputError: another shape, or values outside [0, 1].
        """
        log_p = self._columns(jax.nn.log_softmax(at_least_float32(self.logits)))
        x = expected_pixels(images, log_p.shape, "one_hot")
        return sum_observed(lambda x, log_p: x * log_p, x, log_p)

    def sample(self, key: AnyKey) -> Pixels:
        """Draw one-hot columns."""
        k = jax.random.categorical(key, self.logits)
        return self._columns(jax.nn.one_hot(k, self.logits.shape[-1], dtype=self.logits.dtype))

    def _columns(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1)


@dataclass(frozen=True)
class Categorical:
    """Independent categorical variables of one-hot columns.

    Attributes:
      classes: K, the columns of one variable; 0: all places of the last axis are one variable.
    """

    classes: int = 0

    outputs_per_channel: ClassVar[int] = 1
    support: ClassVar[str] = "one_hot"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", whole_number("classes", self.classes, least=0))

    def init(self, channels: int) -> dict[str, Array]:
        """Return no parameters: there are no shared ones.

        Raises:
          InputError: a number of channels that is no multiple of K.
        """
        if self.classes and channels % self.classes:
            raise InputError(
                f"classes is {self.classes}, but there are {channels} channels: expected a multiple"
            )
        return {}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Array]
    ) -> Categories:
        """Return the likelihood of a batch."""
        classes = self.classes or outputs.shape[-1]
        return Categories(outputs.reshape(*outputs.shape[:-1], -1, classes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Blocks of columns, adjacent on the last axis, each with its own likelihood.

    Attributes:
      parts: the likelihoods.
      support: of the blocks, with their numbers of columns.
    """

    parts: tuple[Likelihood, ...]
    support: tuple[tuple[str, int], ...] = field(metadata={"static": True})

    @property
    def mean(self) -> Pixels:
        """The means."""
        return jnp.concatenate([part.mean for part in self.parts], axis=-1)

    def log_prob(self, images: Images) -> Float[Array, " batch"]:
        """Compute log p(x), the sum over the blocks.

        Args:
          images: numbers, [batch, ..., columns].

        Returns:
          The log-density of each example, in nats.

        Raises:
          InputError: another shape, or values outside the support of their column.
        """
        *ends, columns = accumulate(columns for _, columns in self.support)
        x = as_floats(self.support, images)
        if x.shape[-1] != columns:
            raise InputError(f"images have shape {x.shape}: expected {columns} columns")
        blocks = jnp.split(x, ends, axis=-1)
        log_ps = [part.log_prob(x) for part, x in zip(self.parts, blocks, strict=True)]
        return jnp.sum(jnp.stack(log_ps), axis=0)

    def sample(self, key: AnyKey) -> Pixels:
        """Draw examples."""
        keys = jax.random.split(key, len(self.parts))
        drawn = [part.sample(key) for part, key in zip(self.parts, keys, strict=True)]
        return jnp.concatenate(drawn, axis=-1)


@dataclass(frozen=True)
class MixedColumns:
    """Columns of several kinds, each with its own likelihood.

        log p(x|z) = sum of log p(x_j|z) over the columns

    `columns:of=gaussianx3+categorical4+poisson` has three Gaussian columns, four one-hot columns of
    one variable with four classes, and one of counts, in this order. Gaussian and Student's t
    columns have a learned scale each, and counts no library size.

    Attributes:
      of: kinds of adjacent columns, KIND or KINDxCOUNT, joined by "+". A KIND is gaussian,
        student_t, bernoulli, poisson, negative_binomial, zero_inflated_negative_binomial, or
        categoricalK, which takes K one-hot columns.
      kinds: the likelihood of one column of each kind. A subclass has them, such as
        `jaxvae.models.config.Columns`, or one with kinds of a user's own.
    """

    of: str
    kinds: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        _ = self._blocks

    @property
    def _blocks(self) -> list[tuple[Any, int]]:
        """The likelihood of each block, and its number of columns."""
        blocks: list[tuple[Any, int]] = []
        for part in str(self.of).split("+"):
            found = re.fullmatch(r"([a-z_]+?)([1-9]\d{0,5})?(?:x([1-9]\d{0,5}))?", part)
            kind, classes, count = found.groups() if found else ("", None, None)
            if kind == "categorical" and classes:
                family: Any = Categorical(int(classes))
            elif kind in self.kinds and not classes:
                family = self.kinds[kind]
            else:
                raise InputError(
                    f"of is {shown(self.of)}: expected kinds such as gaussianx3+categorical4, not "
                    f"{part!r} in it; a kind is {either((*self.kinds, 'categoricalK'))}"
                )
            blocks.append((family, int(count or 1) * int(classes or 1)))
        return blocks

    @property
    def support(self) -> tuple[tuple[str, int], ...]:
        """The support of each block, and its number of columns."""
        return tuple((family.support, columns) for family, columns in self._blocks)

    def outputs_per_pixel(self, channels: int) -> int:
        """Return the number of outputs for all columns.

        Raises:
          InputError: another number of channels than columns.
        """
        columns = sum(columns for _, columns in self._blocks)
        if channels != columns:
            raise InputError(
                f"the likelihood is of {columns} columns, {self.of}, but the data have {channels}: "
                "expected the kind of every column"
            )
        return sum(self._outputs())

    def _outputs(self) -> list[int]:
        return [family.outputs_per_channel * columns for family, columns in self._blocks]

    def init(self, channels: int) -> dict[str, Any]:
        """Return the parameters of each block, by its number."""
        learned = [family.init(columns) for family, columns in self._blocks]
        return {str(i): block for i, block in enumerate(learned) if block}

    def from_outputs(
        self, outputs: Float[Array, " batch *outputs"], shared: Mapping[str, Any]
    ) -> Blocks:
        """Return the likelihood of a batch; the last axis of the outputs has the blocks in turn."""
        if is_image(outputs.shape[1:]):
            raise InputError("the likelihood 'columns' is of tables, but the examples are images")
        *ends, _ = accumulate(self._outputs())
        blocks = jnp.split(outputs, ends, axis=-1)
        parts = [
            family.from_outputs(block, shared.get(str(i), {}))
            for i, ((family, _), block) in enumerate(zip(self._blocks, blocks, strict=True))
        ]
        return Blocks(tuple(parts), self.support)
