"""Gaussian distributions of the latents, and the reparameterization of a draw."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.errors import InputError
from jaxvae.validation import as_array, as_key

LOG_2_PI = math.log(2 * math.pi)


def reparameterize(key: jax.Array, mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """Draw z ~ N(mean, exp(log_var)) as a differentiable function of its parameters.

        z = mean + exp(log_var / 2) * eps,    eps ~ N(0, I)

    Args:
      key: PRNG key.
      mean, log_var: any one shape.
    Returns:
      z, of that shape.
    Raises:
      InputError: mean and log_var of different shapes, or not of floats.

    Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 2.4.
    """
    mean, log_var = as_array("mean", mean), as_array("log_var", log_var)
    for name, x in (("mean", mean), ("log_var", log_var)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{name} is of type {x.dtype}: expected floats")
    if mean.shape != log_var.shape:
        raise InputError(
            f"mean has shape {mean.shape}, log_var {log_var.shape}: expected one shape"
        )
    return mean + jnp.exp(log_var / 2) * jax.random.normal(as_key(key), mean.shape, mean.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class UnitGaussian:
    """N(0, I) of so many latents."""

    latent_dim: int

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; 0, I) in nats: z is [..., latent], the result [...]."""
        return -0.5 * jnp.sum(z**2 + LOG_2_PI, axis=-1)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """n draws, [n, latent]."""
        return jax.random.normal(key, (n, self.latent_dim), jnp.float32)

    @property
    def weights(self) -> jax.Array:
        """The weights of its components: [1], as it is one."""
        return jnp.ones(1)

    def sample_component(self, key: jax.Array, k: jax.Array) -> jax.Array:
        """Draw from component k: [latent]."""
        return self.sample(key, 1)[0]

    def marginal(self, latent: int) -> "UnitGaussian":
        """Return the distribution of one latent alone."""
        return UnitGaussian(1)


class GaussianMixture(NamedTuple):
    """sum_k softmax(logits)_k N(mean_k, diag(exp(log_var_k))), of K Gaussians.

    logits: [K].
    mean, log_var: [K, latent].
    """

    logits: jax.Array
    mean: jax.Array
    log_var: jax.Array

    def log_prob(self, z: jax.Array) -> jax.Array:
        """The log-density in nats: z is [..., latent], the result [...].

        One latent after the other, and once more when differentiated, so that memory is [..., K].
        Multiplying out (z - mean)^2, to have it in one matrix product, would cost half a nat at
        40 latents of log_var -8, where the squares are large and their sum is small.
        """

        # Without checkpoint, every latent's difference [..., K] is kept for the gradient.
        @jax.checkpoint
        def add(square: jax.Array, latent: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            z_j, mean_j, scale_j = latent
            return square + ((z_j[..., None] - mean_j) * scale_j) ** 2, None

        nothing = jnp.zeros((*z.shape[:-1], len(self.logits)), jnp.result_type(z, *self))
        latents = jnp.moveaxis(z, -1, 0), self.mean.T, jnp.exp(-self.log_var / 2).T
        square, _ = lax.scan(add, nothing, latents)
        log_p_z_k = -0.5 * (square + jnp.sum(self.log_var + LOG_2_PI, axis=-1))
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + log_p_z_k, axis=-1)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """n draws, [n, latent]."""
        which_key, key = jax.random.split(key)
        k = jax.random.categorical(which_key, self.logits, shape=(n,))
        return reparameterize(key, self.mean[k], self.log_var[k])

    @property
    def weights(self) -> jax.Array:
        """The weights of its components: [K], of sum 1."""
        return jax.nn.softmax(self.logits)

    def sample_component(self, key: jax.Array, k: jax.Array) -> jax.Array:
        """Draw from component k: [latent]."""
        return reparameterize(key, self.mean[k], self.log_var[k])

    def marginal(self, latent: int) -> "GaussianMixture":
        """Return the distribution of one latent alone."""
        at = slice(latent, latent + 1)
        return GaussianMixture(self.logits, self.mean[:, at], self.log_var[:, at])


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_var))): `mean` and `log_var` are [batch, latent]."""

    mean: jax.Array
    log_var: jax.Array

    @property
    def center(self) -> jax.Array:
        """The mean, the point that stands for it."""
        return self.mean

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; mean, exp(log_var)) summed over the last axis, in nats."""
        return jnp.sum(self.log_prob_per_latent(z), axis=-1)

    def log_prob_per_latent(self, z: jax.Array) -> jax.Array:
        """log N(z_j; mean_j, exp(log_var_j)), in nats."""
        square = (z - self.mean) ** 2 * jnp.exp(-self.log_var)
        return -0.5 * (jnp.log(2 * jnp.pi) + self.log_var + square)

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw for every mean."""
        return reparameterize(key, self.mean, self.log_var)

    def sample_and_log_prob(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A draw for every row by a key of its own, [batch, latent], and log q of it, [batch]."""
        z = jax.vmap(reparameterize)(keys, self.mean, self.log_var)
        return z, self.log_prob(z)

    def kl(self, prior: Any = None) -> jax.Array | None:
        """Compute the KL divergence to N(0, I), summed over the last axis.

        Args:
          prior: the prior, where it may be another than N(0, I).

        Returns:
          [batch], in nats; None for another prior, to which it is not known in closed form.
        """
        if prior is None or isinstance(prior, UnitGaussian):
            return jnp.sum(self.kl_per_latent(), axis=-1)
        return None

    def kl_per_latent(self) -> jax.Array:
        """The KL of every latent to N(0, 1), in nats.

            KL_j = -1/2 (1 + log_var_j - mean_j^2 - exp(log_var_j))

        Kingma and Welling (2014), appendix B.
        """
        return -0.5 * (1 + self.log_var - self.mean**2 - jnp.exp(self.log_var))
