"""The evidence lower bound and the importance-weighted estimate of log p(x)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.distributions import Gaussian, reparameterize
from jaxvae.errors import InputError
from jaxvae.model import Params, decode, encode


class Elbo(NamedTuple):
    """The bound and its two terms, each [batch], nats per image: value = log_likelihood - kl."""

    value: jax.Array
    log_likelihood: jax.Array
    kl: jax.Array


@jax.jit
def elbo(params: Params, key: jax.Array, images: jax.Array) -> Elbo:
    """The evidence lower bound on log p(x), estimated with one sample per image.

        ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

    Args:
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
    Returns:
      Elbo, each field [batch], nats per image.
    Raises:
      InputError: images of another shape than the model's.

    Kingma and Welling (2014), Auto-Encoding Variational Bayes, equation 10.
    """
    posterior = encode(params, images)
    keys = example_keys(key, posterior.mean.shape[0])
    z = jax.vmap(reparameterize)(keys, posterior.mean, posterior.log_var)
    log_likelihood = decode(params, z).log_prob(jnp.asarray(images))
    kl = posterior.kl()
    return Elbo(log_likelihood - kl, log_likelihood, kl)


def negative_elbo(
    params: Params, key: jax.Array, images: jax.Array, beta: jax.Array | float = 1.0
) -> tuple[jax.Array, Elbo]:
    """The loss that training minimises, [batch], nats per image, and the terms of the ELBO.

        loss = -(E_q(z|x)[log p(x|z)] - beta KL(q(z|x) || p(z)))

    Higgins et al. (2017), beta-VAE, equation 4; at beta 1 the negative ELBO.
    """
    terms = elbo(params, key, images)
    return -(terms.log_likelihood - beta * terms.kl), terms


@partial(jax.jit, static_argnames="num_samples")
def log_likelihood(
    params: Params, key: jax.Array, images: jax.Array, num_samples: int = 5000
) -> jax.Array:
    """An importance-weighted estimate of log p(x), with the posterior as the proposal.

        log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)],    z_k ~ q(z|x)

    Memory does not grow with the number of samples.

    Args:
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      num_samples: K.
    Returns:
      [batch], nats per image.
    Raises:
      InputError: images of another shape than the model's, or num_samples below 1.

    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}: expected at least 1")
    images = jnp.asarray(images)
    posterior = encode(params, images)
    batch = images.shape[0]
    keys = example_keys(key, batch)
    prior = Gaussian(jnp.zeros_like(posterior.mean), jnp.zeros_like(posterior.log_var))

    def log_weights(k: jax.Array) -> jax.Array:
        sample_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        z = jax.vmap(reparameterize)(sample_keys, posterior.mean, posterior.log_var)
        log_p_x = decode(params, z).log_prob(images)
        return log_p_x + prior.log_prob(z) - posterior.log_prob(z)

    # Enough samples at once to fill the machine when there are few images.
    at_once = min(num_samples, max(1, 1024 // batch))

    def add(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        k = first + jnp.arange(at_once)
        weights = jnp.where(k[:, None] < num_samples, jax.vmap(log_weights)(k), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(weights, axis=0)), None

    nothing = jnp.full(batch, -jnp.inf, posterior.mean.dtype)
    total, _ = lax.scan(add, nothing, jnp.arange(0, num_samples, at_once))
    return total - jnp.log(num_samples)


def example_keys(key: jax.Array, batch: int, first: jax.Array | int = 0) -> jax.Array:
    """One key for each example, by its index: [batch] keys.

    An example's noise then depends neither on the device nor on the block that computes it.

    Args:
      key: one PRNG key; [batch] keys are handed back as they are.
      batch: number of examples.
      first: index of the first of them.
    Raises:
      InputError: another number of keys than one or `batch`.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == (batch,):
        return key
    if key.shape:
        raise InputError(f"there are {key.shape} keys: expected one, or one for each of {batch}")
    return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(batch))
