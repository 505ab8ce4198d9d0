"""Code books of discrete latents, and the uniform distribution over their codes.

The latents of a discrete model are n codes, each an integer from 0 to K - 1. Encoder and decoder
use them as z, [..., latent], in which a code takes `dim` consecutive latents: latent = n * dim.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxvae.devices.convolution import in_blocks
from jaxvae.errors import InputError
from jaxvae.models.protocols import Learned

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

_DISTANCES = 2**24  # between latents and codes, at once, which bounds memory


@runtime_checkable
class Codebook(Protocol):
    """K codes and their latents: a pytree."""

    @property
    def num_codes(self) -> int:
        """K, the number of codes."""

    @property
    def dim(self) -> int:
        """Number of latents of one code."""

    def codes(self, z: Float[Array, "*batch latent"]) -> Int[Array, "*batch n"]:
        """Return the code nearest to each group of latents."""

    def one_hot(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch n codes"]:
        """Return the codes of latents, one-hot."""

    def embed(self, codes: Int[Array, "*batch n"]) -> Float[Array, "*batch latent"]:
        """Return the latents of codes."""


class CodebookFamily(Protocol):
    """What the family of a posterior over codes has besides `init` and `bind`.

    Attributes:
      num_codes: K, the number of codes.
      dim: number of latents of one code.
    """

    num_codes: int
    dim: int

    def codebook(self, learned: Learned) -> Codebook:
        """Return the code book, given the parameters of the posterior."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Grid:
    """The points of a grid in [-1, 1]^d, with L_i levels along axis i.

        z_i = 2 l_i / (L_i - 1) - 1,    l_i in {0, ..., L_i - 1}

    The code of a point is sum_i l_i prod_{j<i} L_j.

    Attributes:
      levels: L, the number of levels along each axis.
    """

    levels: tuple[int, ...]

    @property
    def num_codes(self) -> int:
        """K, the number of points."""
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        """d, the number of latents of one code."""
        return len(self.levels)

    def nearest(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch latent"]:
        """Return the point of the grid nearest to each group of latents."""
        return self._points(self._levels(z)).reshape(z.shape)

    def codes(self, z: Float[Array, "*batch latent"]) -> Int[Array, "*batch n"]:
        """Return the code nearest to each group of latents."""
        levels = self._levels(z).astype(jnp.int32)
        return jnp.sum(levels * self._strides, axis=-1, dtype=jnp.int32)

    def one_hot(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch n codes"]:
        """Return the codes of latents, one-hot."""
        return jax.nn.one_hot(self.codes(z), self.num_codes, dtype=z.dtype)

    def embed(self, codes: Int[Array, "*batch n"]) -> Float[Array, "*batch latent"]:
        """Return the latents of codes."""
        levels = codes[..., None] // self._strides % np.array(self.levels, np.int32)
        return self._points(levels.astype(jnp.float32)).reshape(*codes.shape[:-1], -1)

    @property
    def _strides(self) -> Int[np.ndarray, " d"]:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    def _levels(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch n d"]:
        last = np.array(self.levels, np.float32) - 1
        grouped = z.reshape(*z.shape[:-1], -1, self.dim)
        return jnp.clip(jnp.round((grouped + 1) / 2 * last), 0, last)

    def _points(self, levels: Float[Array, "*batch n d"]) -> Float[Array, "*batch n d"]:
        return 2 * levels / (np.array(self.levels, np.float32) - 1) - 1


class CodeVectors(NamedTuple):
    """K vectors, the nearest of which is the code.

    Attributes:
      vectors: the latents of each code.
    """

    vectors: Float[Array, "codes dim"]

    @property
    def num_codes(self) -> int:
        """K, the number of vectors."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """Number of latents of one code."""
        return self.vectors.shape[1]

    def codes(self, z: Float[Array, "*batch latent"]) -> Int[Array, "*batch n"]:
        """Return the code nearest to each group of latents."""

        def nearest(z: Float[Array, "rows dim"]) -> Int[Array, " rows"]:
            # From the differences: of close vectors, the product z . e is rounded to the same.
            squares = jnp.sum((z[:, None] - self.vectors) ** 2, axis=-1)
            return jnp.argmin(squares, axis=-1).astype(jnp.int32)

        rows = z.reshape(-1, self.dim)
        shape = (*z.shape[:-1], z.shape[-1] // self.dim)
        if isinstance(rows.shape[0], int):  # an exported function has a symbolic batch size
            block = max(1, _DISTANCES // self.num_codes)
            return in_blocks(nearest, rows, block).reshape(shape)
        return nearest(rows).reshape(shape)

    def one_hot(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch n codes"]:
        """Return the codes of latents, one-hot."""
        return jax.nn.one_hot(self.codes(z), self.num_codes, dtype=z.dtype)

    def embed(self, codes: Int[Array, "*batch n"]) -> Float[Array, "*batch latent"]:
        """Return the latents of codes."""
        return self.vectors[codes].reshape(*codes.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UniformCodes:
    """The uniform distribution over n codes.

        log p(z) = -n log K

    Attributes:
      book: the code book.
      n: number of codes.
    """

    book: Codebook
    n: int = field(metadata={"static": True})

    def log_prob(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z), in nats."""
        return jnp.full(z.shape[:-1], -self.n * math.log(self.book.num_codes), z.dtype)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n latent"]:
        """Draw n latents."""
        return self.book.embed(jax.random.randint(key, (n, self.n), 0, self.book.num_codes))


@dataclass(frozen=True)
class Uniform:
    """The uniform distribution over codes, for posteriors over codes."""

    over_codes = True

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError if the posterior is not over codes."""
        expect_codes_of_posterior(config)

    def init(self, key: jax.Array, config: "ModelConfig") -> Learned:
        """Return no parameters: nothing is learned."""
        return {}

    def bind(self, learned: Learned, params: "Params") -> UniformCodes:
        """Return the distribution."""
        book = codebook_of(params)
        return UniformCodes(book, params.config.latent_dim // book.dim)


def is_discrete(config: "ModelConfig") -> bool:
    """Return whether the latents of a model are codes."""
    return hasattr(config.posterior, "codebook")


def codebook_of(params: "Params") -> Codebook:
    """Return the code book of a model.

    Raises:
      InputError: the latents of the model are continuous.
    """
    if not is_discrete(params.config):
        raise InputError(
            f"the posterior {params.config.specs()['posterior']!r} has no codes: expected a model "
            "with a posterior over codes, such as 'fsq'"
        )
    return params.config.posterior.codebook(params.posterior)


def expect_codes_of_posterior(config: "ModelConfig") -> None:
    """Raise InputError unless the posterior, too, is over codes."""
    if not is_discrete(config):
        names = config.specs()
        raise InputError(
            f"prior is {names['prior']!r}, which is over codes, but the posterior "
            f"{names['posterior']!r} is not: expected a posterior over codes, such as 'fsq'"
        )


def expect_codes_of_prior(config: "ModelConfig") -> None:
    """Raise InputError unless the prior, too, is over codes, and the latents are whole codes."""
    names, dim = config.specs(), config.posterior.dim
    if not getattr(config.prior, "over_codes", False):
        raise InputError(
            f"posterior is {names['posterior']!r}, which is over codes, but the prior "
            f"{names['prior']!r} is not: expected prior='uniform_codes' or 'autoregressive'"
        )
    if config.latent_dim % dim:
        raise InputError(
            f"latent_dim is {config.latent_dim}: expected a multiple of {dim}, as a code of the "
            f"posterior {names['posterior']!r} has {dim} latents"
        )


def straight_through(
    hard: Float[Array, "*shape"], soft: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Return `hard`, with the gradient of `soft`.

    References:
      Bengio, Leonard and Courville (2013), Estimating or Propagating Gradients Through Stochastic
      Neurons for Conditional Computation.
    """
    # soft - soft is exactly 0, while soft + (hard - soft) may be rounded to another number.
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))
