"""A posterior of independent categorical codes, with relaxed or straight-through samples."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxvae.errors import InputError, shown
from jaxvae.models.codebooks import UniformCodes, expect_codes_of_prior, straight_through
from jaxvae.models.protocols import Learned, Prior
from jaxvae.validation import expect_bool, is_number, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig


@jax.tree_util.register_static
@dataclass(frozen=True)
class OneHot:
    """Codes whose latents are one-hot vectors.

    Attributes:
      num_codes: K, the number of codes and of latents of one code.
    """

    num_codes: int

    @property
    def dim(self) -> int:
        """Number of latents of one code."""
        return self.num_codes

    def codes(self, z: Float[Array, "*batch latent"]) -> Int[Array, "*batch n"]:
        """Return the code nearest to each group of latents."""
        return jnp.argmax(self.one_hot(z), axis=-1).astype(jnp.int32)

    def one_hot(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch n codes"]:
        """Return the codes of latents, one-hot, or relaxed if the latents are."""
        return z.reshape(*z.shape[:-1], -1, self.num_codes)

    def embed(self, codes: Int[Array, "*batch n"]) -> Float[Array, "*batch latent"]:
        """Return the latents of codes."""
        one_hot = jax.nn.one_hot(codes, self.num_codes, dtype=jnp.float32)
        return one_hot.reshape(*codes.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Categorical:
    """Independent codes, with one-hot samples whose gradient is that of their relaxation: a pytree.

        q(z|x) = prod_i softmax(logits_i)_{c_i}

    Attributes:
      logits: unnormalised log probabilities.
      temperature: of the relaxation.
      straight_through: whether training, too, takes one-hot samples.
    """

    logits: Float[Array, "batch n codes"]
    temperature: float = field(metadata={"static": True})
    straight_through: bool = field(metadata={"static": True})

    @property
    def mean(self) -> Float[Array, "batch latent"]:
        """The probabilities, which are the means of the one-hot latents."""
        return self._flat(jax.nn.softmax(self.logits))

    @property
    def log_var(self) -> Float[Array, "batch latent"]:
        """The log variances of the one-hot latents, log p (1 - p)."""
        return jnp.log(self.mean * (1 - self.mean))

    @property
    def center(self) -> Float[Array, "batch latent"]:
        """The most probable codes, which `reconstruct` decodes."""
        return self._flat(_one_hot(self.logits))

    @property
    def relaxation(self) -> "RelaxedCategorical | None":
        """The posterior that is sampled in training, or None if it is this one."""
        if self.straight_through:
            return None
        return RelaxedCategorical(self.logits, self.temperature, self.straight_through)

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw one-hot latents by a key for each row; also return log q of them, in nats."""
        scores = self._perturbed(keys)
        z = straight_through(_one_hot(scores), jax.nn.softmax(scores / self.temperature))
        return self._flat(z), self._log_prob(z)

    def kl(self, prior: Prior) -> Float[Array, " batch"] | None:
        """Compute the KL divergence to the uniform prior over codes, in nats.

            KL = sum_i (log K + sum_k p_ik log p_ik)

        Args:
          prior: the prior.

        Returns:
          The KL divergence; None for another prior, to which it has no closed form.
        """
        if not isinstance(prior, UniformCodes):
            return None
        log_p = jax.nn.log_softmax(self.logits)
        return jnp.sum(jnp.exp(log_p) * (log_p + math.log(log_p.shape[-1])), axis=(1, 2))

    def _perturbed(self, keys: Key[Array, " batch"]) -> Float[Array, "batch n codes"]:
        """Add Gumbel noise to the logits: the largest one is then a sample of the code."""
        _, *shape = self.logits.shape
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, self.logits.dtype))(keys)
        return self.logits + noise

    def _log_prob(self, z: Float[Array, "batch n codes"]) -> Float[Array, " batch"]:
        return jnp.sum(z * jax.nn.log_softmax(self.logits), axis=(1, 2))

    def _flat(self, z: Float[Array, "batch n codes"]) -> Float[Array, "batch latent"]:
        return z.reshape(z.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RelaxedCategorical(Categorical):
    """The Gumbel-softmax relaxation of independent codes: a pytree.

        z_i = softmax((logits_i + g_i) / temperature),    g_ik ~ Gumbel(0, 1)

    The log q of a sample is sum_i z_i . log softmax(logits_i), which is that of the codes if z is
    one-hot. It is no density of z.

    References:
      Jang, Gu and Poole (2017), Categorical Reparameterization with Gumbel-Softmax. Maddison, Mnih
      and Teh (2017), The Concrete Distribution.
    """

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw relaxed one-hot latents by a key for each row; also return log q as above."""
        z = jax.nn.softmax(self._perturbed(keys) / self.temperature)
        return self._flat(z), self._log_prob(z)


def _one_hot(scores: Float[Array, "batch n codes"]) -> Float[Array, "batch n codes"]:
    codes = jnp.argmax(scores, axis=-1)
    return jax.nn.one_hot(codes, scores.shape[-1], dtype=scores.dtype)


@dataclass(frozen=True)
class CategoricalFamily:
    """Independent categorical codes; the encoder's `mean` output is their logits.

    Training takes Gumbel-softmax samples, or with `straight_through` one-hot samples that have the
    gradient of the Gumbel-softmax. Everything else, such as `jaxvae.elbo` and
    `jaxvae.log_likelihood`, takes one-hot samples.

    Attributes:
      classes: K, the number of values of a code, and of its latents.
      temperature: of the Gumbel-softmax; low: close to one-hot, with gradients of more variance.
      straight_through: whether samples in training are one-hot.

    References:
      Jang, Gu and Poole (2017), Categorical Reparameterization with Gumbel-Softmax, section 2.
    """

    classes: int = 10
    temperature: float = 1.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", whole_number("classes", self.classes, least=2))
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {shown(self.temperature)}: expected a number above 0")
        object.__setattr__(self, "temperature", float(self.temperature))
        expect_bool("straight_through", self.straight_through)

    @property
    def num_codes(self) -> int:
        """K, the number of values of a code."""
        return self.classes

    @property
    def dim(self) -> int:
        """Number of latents of one code."""
        return self.classes

    def codebook(self, learned: Learned) -> OneHot:
        """Return the one-hot vectors."""
        return OneHot(self.classes)

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for a prior that is not over codes, or latents that are no codes."""
        expect_codes_of_prior(config)

    def init(self, key: jax.Array, encoded: tuple[jax.Array, ...]) -> Learned:
        """Return no parameters: the encoder learns everything."""
        return {}

    def bind(self, learned: Learned, encoded: tuple[jax.Array, ...]) -> Categorical:
        """Return the codes' distributions for a batch."""
        mean = encoded[0]
        logits = mean.reshape(mean.shape[0], -1, self.classes)
        return Categorical(logits, self.temperature, self.straight_through)
