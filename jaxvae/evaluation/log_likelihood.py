"""An estimate of log p(x) by importance sampling."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.models.vae import Params, encode, expected_images, prior
from jaxvae.objectives import example_keys, log_likelihood_at, numbered_samples
from jaxvae.validation import jit, whole_number


@jit(static_argnames="num_samples")
def log_likelihood(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    num_samples: int = 5000,
    labels: jax.Array | None = None,
) -> jax.Array:
    """An importance-weighted estimate of log p(x), with the posterior as the proposal.

        log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)],    z_k ~ q(z|x)

    Memory does not grow with the number of samples.

    Args:
      key: a PRNG key, or [batch] keys, one for each image.
      images: [batch, height, width, channels], float32 in [0, 1] or uint8.
      num_samples: K.
      labels: [batch], the images' classes, where the model is conditional.
    Returns:
      [batch], nats per image.
    Raises:
      InputError: images of another shape than the model's, or num_samples below 1.

    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """
    num_samples = whole_number("num_samples", num_samples)
    images = expected_images(params, images)
    posterior, p_z = encode(params, images, labels), prior(params)
    batch = images.shape[0]
    keys = example_keys(key, batch)

    def log_weights(k: jax.Array) -> jax.Array:
        z, log_q = numbered_samples(posterior, keys, k)
        return log_likelihood_at(params, z, images, labels) + p_z.log_prob(z) - log_q

    # Enough samples at once to fill the machine when there are few images.
    at_once = min(num_samples, max(1, 1024 // batch))

    def add(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        k = first + jnp.arange(at_once)
        weights = jnp.where(k[:, None] < num_samples, log_weights(k), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(weights, axis=0)), None

    nothing = jnp.full(batch, -jnp.inf, posterior.mean.dtype)
    total, _ = lax.scan(add, nothing, jnp.arange(0, num_samples, at_once))
    return total - jnp.log(num_samples)
