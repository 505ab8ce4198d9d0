"""Posteriors that give each image one sequence of codes: scalar and vector quantization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxvae.errors import InputError, shown
from jaxvae.models.codebooks import CodeVectors, Grid, expect_codes_of_prior, straight_through
from jaxvae.models.protocols import Learned, Prior
from jaxvae.validation import at_least_float32, is_number, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig


class PointMass(NamedTuple):
    """All probability on one sequence of codes: log q(z|x) = 0, with respect to counting codes.

    Attributes:
      mean: the latents of the codes.
      penalty: losses that train encoder and code book, added to every objective.
    """

    mean: Float[Array, "batch latent"]
    penalty: Float[Array, " batch"]

    @property
    def log_var(self) -> Float[Array, "batch latent"]:
        """The log variance: -inf."""
        return jnp.full_like(self.mean, -jnp.inf)

    @property
    def center(self) -> Float[Array, "batch latent"]:
        """The latents of the codes, which `reconstruct` decodes."""
        return self.mean

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Return the latents of the codes and log q = 0; the keys are not used."""
        return self.mean, jnp.zeros_like(self.penalty)

    def kl(self, prior: Prior) -> None:
        """Return None: log q(z|x) - log p(z) at the only z is already exact."""
        return


# Enough for all latents of an image to be at the outermost of up to 11 levels at once.
_MAX_RMS = 1.5


@dataclass(frozen=True)
class FiniteScalarQuantization:
    """Finite scalar quantization (FSQ): every latent is bounded and rounded to one of L levels.

        z = 2 round((L - 1) (tanh(u) + 1) / 2) / (L - 1) - 1,    u = mean / max(1, rms(mean) / 1.5)

    The gradient is that of tanh(u). Nothing is learned besides the encoder, so no code can be
    left unused for lack of a gradient. Two things differ from the paper. With an even L the levels
    are symmetric about 0, where the paper shifts them by half a level. And the root mean square of
    the latents of an image is at most 1.5: without this limit the first steps, in which the decoder
    learns the mean image, drive the latents of all images to the same ends of tanh, where the
    encoder has no gradient.

    Attributes:
      levels: L of each latent of a code, joined by "x": "8x5x5x5" has codes of four latents and
        K = 1000.

    References:
      Mentzer, Minnen, Agustsson and Tschannen (2024), Finite Scalar Quantization: VQ-VAE Made
      Simple, section 3.1.
    """

    levels: str = "5"

    def __post_init__(self) -> None:
        text = "x".join(map(str, self.levels)) if isinstance(self.levels, tuple) else self.levels
        parts = str(text).split("x")
        if not all(part.isdecimal() and 2 <= int(part) <= 256 for part in parts):
            raise InputError(
                f"levels is {shown(self.levels)}: expected numbers from 2 to 256 joined by x, such "
                "as 8x5x5x5"
            )
        object.__setattr__(self, "levels", "x".join(str(int(part)) for part in parts))
        if self.num_codes >= 2**31:
            raise InputError(
                f"levels is {self.levels!r}, which is {self.num_codes} codes: expected fewer than "
                f"{2**31}"
            )

    @property
    def num_codes(self) -> int:
        """K, the product of the levels."""
        return self.codebook({}).num_codes

    @property
    def dim(self) -> int:
        """Number of latents of one code."""
        return self.codebook({}).dim

    def codebook(self, learned: Learned) -> Grid:
        """Return the grid of all codes."""
        return Grid(tuple(map(int, self.levels.split("x"))))

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for a prior that is not over codes, or latents that are no codes."""
        expect_codes_of_prior(config)

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return no parameters: the encoder learns everything."""
        return {}

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> PointMass:
        """Return the codes of a batch."""
        mean = encoded[0]
        limit = _MAX_RMS * jax.lax.rsqrt(jnp.mean(mean**2, axis=-1, keepdims=True) + 1e-12)
        bounded = jnp.tanh(mean * jnp.minimum(1.0, limit))
        z = straight_through(self.codebook(learned).nearest(bounded), bounded)
        return PointMass(z, jnp.zeros_like(z[:, 0]))


@dataclass(frozen=True)
class VectorQuantization:
    """Vector quantization (VQ): every group of latents is replaced by the nearest code vector.

        z = e_k,    k = argmin_j |u - e_j|^2,    u = mean / |mean|

    The gradient of z is that of u. Encoder and code vectors are trained by a penalty, summed over
    the codes of an image, with sg for a constant:

        penalty = |sg(u) - e_k|^2 + commitment |u - sg(e_k)|^2

    Two measures keep codes in use. Neither has a state outside of the parameters:

    - u and e have length 1, so no code is out of reach because of its scale (Yu et al. 2022).
    - e_j = W c_j / |W c_j|, with c_j ~ N(0, I) fixed and W learned, so a gradient of one code moves
      all of them (Zhu et al. 2024).

    Attributes:
      codes: K, the number of code vectors.
      dim: number of latents of one code.
      commitment: weight of the term that keeps the encoder close to the code vectors.

    References:
      van den Oord, Vinyals and Kavukcuoglu (2017), Neural Discrete Representation Learning,
      equation 3. Yu et al. (2022), Vector-quantized Image Modeling with Improved VQGAN, section
      3.2. Zhu et al. (2024), Addressing Representation Collapse in Vector Quantized Models with One
      Linear Layer, section 4.
    """

    codes: int = 256
    dim: int = 8
    commitment: float = 0.25

    def __post_init__(self) -> None:
        for name in ("codes", "dim"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=2))
        if not is_number(self.commitment) or not 0 <= self.commitment < 1e6:
            raise InputError(
                f"commitment is {shown(self.commitment)}: expected a number of at least 0, "
                "below 1e+06"
            )
        object.__setattr__(self, "commitment", float(self.commitment))

    @property
    def num_codes(self) -> int:
        """K, the number of code vectors."""
        return self.codes

    def codebook(self, learned: Learned) -> CodeVectors:
        """Return the code vectors."""
        fixed = jax.lax.stop_gradient(at_least_float32(learned["vectors"]))
        return CodeVectors(_normalized(fixed @ at_least_float32(learned["kernel"])))

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for a prior that is not over codes, or latents that are no codes."""
        expect_codes_of_prior(config)

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return random vectors c, which stay as they are, and W, at first the identity."""
        return {
            "kernel": jnp.eye(self.dim, dtype=jnp.float32),
            "vectors": jax.random.normal(key, (self.codes, self.dim), jnp.float32),
        }

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> PointMass:
        """Return the codes of a batch."""
        mean = encoded[0]
        book = self.codebook(learned)
        u = _normalized(mean.reshape(mean.shape[0], -1, self.dim))
        fixed = jax.lax.stop_gradient(u)
        nearest = book.embed(book.codes(fixed.reshape(mean.shape))).reshape(u.shape)
        to_code = jnp.sum((fixed - nearest) ** 2, axis=(1, 2))
        to_encoder = jnp.sum((u - jax.lax.stop_gradient(nearest)) ** 2, axis=(1, 2))
        z = straight_through(nearest, u).reshape(mean.shape)
        return PointMass(z, to_code + self.commitment * to_encoder)


def _normalized(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """Scale vectors to length 1; the gradient at 0 is finite."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)
