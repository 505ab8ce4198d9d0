"""Priors p(z), and what the learned ones start from."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.distributions import reparameterize, scale_images

LOG_2_PI = math.log(2 * math.pi)


@jax.tree_util.register_static
@dataclass(frozen=True)
class StandardNormal:
    """N(0, I) of so many latents."""

    latent_dim: int

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; 0, I) in nats: z is [..., latent], the result [...]."""
        return -0.5 * jnp.sum(z**2 + LOG_2_PI, axis=-1)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """n draws, [n, latent]."""
        return jax.random.normal(key, (n, self.latent_dim))


class Mixture(NamedTuple):
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


def init_mixture(key: jax.Array, components: int, latent_dim: int) -> dict[str, jax.Array]:
    """Parameters of a `Mixture` near N(0, I): equal weights, unit variances, means apart by 1/4."""
    return {
        "logits": jnp.zeros(components),
        "mean": 0.25 * jax.random.normal(key, (components, latent_dim)),
        "log_var": jnp.zeros((components, latent_dim)),
    }


def init_pseudo_inputs(
    key: jax.Array, components: int, image_shape: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """The logits of a VampPrior's pseudo-inputs, [components, *image_shape]: dark noise.

    All look the same to a fresh encoder, and a model that starts so may never use its latents:
    let it start from images, by `like_images`.
    """
    return {"pseudo_inputs": jax.random.normal(key, (components, *image_shape)) - 3}


def like_images(images: jax.Array) -> dict[str, jax.Array]:
    """The logits of pseudo-inputs that are these images, but for pixels next to black and white."""
    x = jnp.clip(scale_images(images), 0.02, 0.98)
    return {"pseudo_inputs": jnp.log(x) - jnp.log1p(-x)}


def pseudo_images(prior: dict[str, jax.Array]) -> jax.Array:
    """A VampPrior's pseudo-inputs as images, [components, *image_shape] in (0, 1)."""
    return jax.nn.sigmoid(prior["pseudo_inputs"])
