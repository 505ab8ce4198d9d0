"""Priors p(z), and what the learned ones start from."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.models.likelihoods import reparameterize, sigmoid

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

    @property
    def weights(self) -> jax.Array:
        """Return the weights of its components: [1], as it is one."""
        return jnp.ones(1, jnp.float32)

    def sample_component(self, key: jax.Array, k: jax.Array) -> jax.Array:
        """Draw from component k: [latent]."""
        return self.sample(key, 1)[0]


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

    @property
    def weights(self) -> jax.Array:
        """Return the weights of its components: [K], of sum 1."""
        return jax.nn.softmax(self.logits)

    def sample_component(self, key: jax.Array, k: jax.Array) -> jax.Array:
        """Draw from component k: [latent]."""
        return reparameterize(key, self.mean[k], self.log_var[k])


def init_mixture(key: jax.Array, components: int, latent_dim: int) -> dict[str, jax.Array]:
    """The fields of a `Mixture` of equal parts that is close to N(0, I).

    mean_k ~ N(0, I/4) and variances 3/4 make it N(0, I) on average over the means; the means
    differ, so that the components can go different ways.
    """
    shape = components, latent_dim
    return {
        "logits": jnp.zeros(components),
        "mean": 0.5 * jax.random.normal(key, shape),
        "log_var": jnp.full(shape, math.log(0.75)),
    }


def init_pseudo_inputs(
    key: jax.Array, components: int, image_shape: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """What `pseudo_images` makes images of: smooth ones, dark with bright spots.

    In short trials on digits these did as well as images of the data, and as well as or better
    than independent pixels, grey or dark. With all of them it took a warm-up of beta to get there.
    """
    height, width, channels = image_shape
    spots = jax.random.normal(key, (components, -(-height // 4), -(-width // 4), channels))
    shape = components, height, width, channels
    return {"pseudo_inputs": 3.5 * jax.image.resize(spots, shape, "cubic") - 2}


def pseudo_images(learned: dict[str, jax.Array]) -> jax.Array:
    """The pseudo-inputs of a VampPrior as images: [components, height, width, channels] in [0, 1].

    A sigmoid, where Tomczak and Welling (2018) clip: its gradient vanishes nowhere.
    """
    return sigmoid(learned["pseudo_inputs"])
