"""Gaussian distributions of the latents, and the reparameterization of a draw."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num

from jaxvae.errors import InputError
from jaxvae.validation import AnyKey, as_array, as_key

LOG_2_PI = math.log(2 * math.pi)


def reparameterize(
    key: AnyKey,
    mean: Float[ArrayLike, "*shape"],
    log_var: Float[ArrayLike, "*shape"],
) -> Float[Array, "*shape"]:
    """Draw z ~ N(mean, exp(log_var)) as a differentiable function of its parameters.

        z = mean + exp(log_var / 2) * eps,    eps ~ N(0, I)

    Args:
      key: PRNG key.
      mean: of any shape.
      log_var: of the same shape.

    Returns:
      A draw of z, of that shape.

    Raises:
      InputError: mean and log_var of different shapes, or not of floats.

    References:
      Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 2.4.
    """
    mean, log_var = as_array("mean", mean), as_array("log_var", log_var)
    for name, x in (("mean", mean), ("log_var", log_var)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{name} is of type {x.dtype}: expected floats")
    if mean.shape != log_var.shape:
        raise InputError(
            f"mean has shape {mean.shape}, log_var {log_var.shape}: expected equal shapes"
        )
    return mean + jnp.exp(log_var / 2) * jax.random.normal(as_key(key), mean.shape, mean.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class UnitGaussian:
    """The standard normal distribution N(0, I).

    Attributes:
      latent_dim: number of latents.
    """

    latent_dim: int

    def log_prob(self, z: Num[ArrayLike, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log N(z; 0, I), in nats."""
        return -0.5 * jnp.sum(jnp.square(z) + LOG_2_PI, axis=-1)

    def sample(
        self, key: Key[Array, ""], n: int, temperature: float = 1.0
    ) -> Float[Array, "n latent"]:
        """Draw n latents, with the temperature as the factor of the standard deviation."""
        return temperature * jax.random.normal(key, (n, self.latent_dim), jnp.float32)

    @property
    def weights(self) -> Float[Array, "1"]:
        """The weight of its one component, as of a mixture."""
        return jnp.ones(1)

    def sample_component(
        self, key: Key[Array, ""], k: Int[ArrayLike, ""]
    ) -> Float[Array, " latent"]:
        """Draw from component k."""
        return self.sample(key, 1)[0]

    def marginal(self, latent: int) -> "UnitGaussian":
        """Return the distribution of one latent."""
        return UnitGaussian(1)


class GaussianMixture(NamedTuple):
    """A mixture of K Gaussians with diagonal covariances.

        p(z) = sum_k softmax(logits)_k N(z; mean_k, diag(exp(log_var_k)))

    Attributes:
      logits: unnormalised log weights.
      mean: means of the components.
      log_var: log variances of the components.
    """

    logits: Float[Array, " components"]
    mean: Float[Array, "components latent"]
    log_var: Float[Array, "components latent"]

    def log_prob(self, z: Float[ArrayLike, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z), in nats."""
        return jax.nn.logsumexp(self.log_joint(z), axis=-1)

    def log_joint(self, z: Float[ArrayLike, "*batch latent"]) -> Float[Array, "*batch components"]:
        """Compute log p(z, k) of every component k, in nats.

        The squares are summed over one latent at a time, and recomputed for the gradient, so that
        memory is [..., K]. Expanding (z - mean)^2 into a matrix product would cost half a nat of
        accuracy at 40 latents of log_var -8, where large squares cancel.
        """
        z = jnp.asarray(z)

        # Without checkpoint, the differences [..., K] of all latents are kept for the gradient.
        @jax.checkpoint
        def add(square: Array, latent: tuple[Array, ...]) -> tuple[Array, None]:
            z_j, mean_j, scale_j = latent
            return square + ((z_j[..., None] - mean_j) * scale_j) ** 2, None

        start = jnp.zeros((*z.shape[:-1], len(self.logits)), jnp.result_type(z, *self))
        latents = jnp.moveaxis(z, -1, 0), self.mean.T, jnp.exp(-self.log_var / 2).T
        square, _ = lax.scan(add, start, latents)
        log_p_z_k = -0.5 * (square + jnp.sum(self.log_var + LOG_2_PI, axis=-1))
        return jax.nn.log_softmax(self.logits) + log_p_z_k

    def sample(
        self, key: Key[Array, ""], n: int, temperature: float = 1.0
    ) -> Float[Array, "n latent"]:
        """Draw n latents, with the temperature as the factor of the standard deviations."""
        which_key, key = jax.random.split(key)
        k = jax.random.categorical(which_key, self.logits, shape=(n,))
        noise = jax.random.normal(key, self.mean[k].shape, self.mean.dtype)
        return self.mean[k] + temperature * jnp.exp(self.log_var[k] / 2) * noise

    @property
    def weights(self) -> Float[Array, " components"]:
        """The weights of the components, which sum to 1."""
        return jax.nn.softmax(self.logits)

    def sample_component(
        self, key: Key[Array, ""], k: Int[ArrayLike, ""]
    ) -> Float[Array, " latent"]:
        """Draw from component k."""
        return reparameterize(key, self.mean[k], self.log_var[k])

    def marginal(self, latent: int) -> "GaussianMixture":
        """Return the distribution of one latent."""
        at = slice(latent, latent + 1)
        return GaussianMixture(self.logits, self.mean[:, at], self.log_var[:, at])


class Gaussian(NamedTuple):
    """A Gaussian with a diagonal covariance, N(mean, diag(exp(log_var))).

    Attributes:
      mean: means of the latents.
      log_var: log variances of the latents.
    """

    mean: Float[Array, "*batch latent"]
    log_var: Float[Array, "*batch latent"]

    @property
    def center(self) -> Float[Array, "*batch latent"]:
        """The mean, which `reconstruct` decodes."""
        return self.mean

    def log_prob(self, z: Float[ArrayLike, "*samples latent"]) -> Float[Array, "..."]:
        """Compute log N(z; mean, exp(log_var)), summed over the latents, in nats.

        `z` and `mean` are broadcast together.
        """
        return jnp.sum(self.log_prob_per_latent(z), axis=-1)

    def log_prob_per_latent(
        self, z: Float[ArrayLike, "*samples latent"]
    ) -> Float[Array, "... latent"]:
        """Compute log N(z_j; mean_j, exp(log_var_j)), in nats."""
        # Scaled before it is squared: exp(-log_var) overflows for a log_var below -88.
        square = ((z - self.mean) * jnp.exp(-self.log_var / 2)) ** 2
        return -0.5 * (jnp.log(2 * jnp.pi) + self.log_var + square)

    def sample(self, key: AnyKey) -> Float[Array, "*batch latent"]:
        """Draw z once for every mean."""
        return reparameterize(key, self.mean, self.log_var)

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw z by a key for each row; also return log q(z), in nats."""
        z = jax.vmap(reparameterize)(keys, self.mean, self.log_var)
        return z, self.log_prob(z)

    def kl(self, prior: Any = None) -> Float[Array, "*batch"] | None:
        """Compute the KL divergence to N(0, I), summed over the latents.

        Args:
          prior: the prior; None: N(0, I).

        Returns:
          The KL divergence, in nats; None for a prior to which it has no closed form here.
        """
        if prior is None or isinstance(prior, UnitGaussian):
            return jnp.sum(self.kl_per_latent(), axis=-1)
        return None

    def kl_per_latent(self) -> Float[Array, "*batch latent"]:
        """Compute the KL divergence of every latent to N(0, 1), in nats.

            KL_j = -1/2 (1 + log_var_j - mean_j^2 - exp(log_var_j))

        References:
          Kingma and Welling (2014), Auto-Encoding Variational Bayes, appendix B.
        """
        return -0.5 * (1 + self.log_var - self.mean**2 - jnp.exp(self.log_var))
