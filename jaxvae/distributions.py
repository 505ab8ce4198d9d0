"""Gaussian posteriors, Bernoulli likelihoods and the reparameterization between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvae.errors import InputError


def reparameterize(key: jax.Array, mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """Draw z ~ N(mean, exp(log_var)) as a differentiable function of its parameters.

        z = mean + exp(log_var / 2) * eps,    eps ~ N(0, I)

    Args:
      key: PRNG key.
      mean, log_var: any one shape.
    Returns:
      z, of that shape.

    Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 2.4.
    """
    return mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape, mean.dtype)


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_var))): `mean` and `log_var` are [batch, latent]."""

    mean: jax.Array
    log_var: jax.Array

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; mean, exp(log_var)) summed over the last axis, in nats."""
        square = (z - self.mean) ** 2 * jnp.exp(-self.log_var)
        return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + self.log_var + square, axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw for every mean."""
        return reparameterize(key, self.mean, self.log_var)

    def kl(self) -> jax.Array:
        """KL(N(mean, exp(log_var)) || N(0, I)) summed over the last axis, in nats.

            KL = -1/2 sum_j (1 + log_var_j - mean_j^2 - exp(log_var_j))

        Kingma and Welling (2014), appendix B.
        """
        terms = 1 + self.log_var - self.mean**2 - jnp.exp(self.log_var)
        return -0.5 * jnp.sum(terms, axis=-1)


class Bernoulli(NamedTuple):
    """Independent Bernoulli pixels; `logits` are [batch, height, width, channels]."""

    logits: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The probability of each pixel being 1: float32 [batch, height, width, channels]."""
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log p(images): [batch], nats per image.

        A grey level x in [0, 1] counts as the probability of a 1, so that this is the
        negative cross-entropy, with l the logits:

            sum_pixels x log sigmoid(l) + (1 - x) log sigmoid(-l) = sum_pixels x l - softplus(l)

        Raises InputError for images of another shape than the logits'.
        """
        if images.shape != self.logits.shape:
            raise InputError(
                f"images have shape {images.shape}: expected the decoder's {self.logits.shape}"
            )
        x = scale_images(images)
        return jnp.sum(x * self.logits - jax.nn.softplus(self.logits), axis=(-3, -2, -1))

    def sample(self, key: jax.Array) -> jax.Array:
        """Pixels of 0 or 1 drawn from the distribution: float32, the logits' shape."""
        return jax.random.bernoulli(key, self.mean).astype(self.logits.dtype)


def scale_images(images: jax.Array) -> jax.Array:
    """Images as floats in [0, 1]: uint8 is divided by 255, floats are taken as they are.

    Raises InputError for any other type.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if images.dtype == jnp.bool_:
        return images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(images)
    raise InputError(
        f"images are of type {images.dtype}: expected uint8, or floats between 0 and 1"
    )
