"""Test metrics."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxvae.convolution import in_blocks
from jaxvae.model import Params
from jaxvae.objectives import elbo, example_keys, log_likelihood
from jaxvae.parallel import own_part

_BLOCK = 1000  # images at once: bounds memory, whatever the size of the test set


@partial(jax.jit, static_argnames="axis_name")
def evaluate(
    params: Params, key: jax.Array, images: jax.Array, *, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Mean metrics over a test set, one posterior sample per image.

    Args:
      key: PRNG key.
      images: [N, height, width, channels], float32 in [0, 1] or uint8.
      axis_name: of the `pmap` whose devices share the images; each is handed all of them and
        takes its own part, N / devices.
    Returns:
      `loss` (the negative ELBO), `elbo`, `log_likelihood` and `kl`, nats per image.
    Raises:
      InputError: images of another shape than the model's.
    """
    keys, images = own_part((example_keys(key, len(images)), jnp.asarray(images)), axis_name)
    terms = in_blocks(lambda block: elbo(params, *block), (keys, images), _BLOCK)
    means = {name: jnp.mean(values) for name, values in terms._asdict().items()}
    if axis_name:
        means = lax.pmean(means, axis_name)
    value = means.pop("value")
    return {"loss": -value, "elbo": value, **means}


@partial(jax.jit, static_argnames=("num_samples", "axis_name"))
def mean_log_likelihood(
    params: Params,
    key: jax.Array,
    images: jax.Array,
    *,
    num_samples: int,
    axis_name: str | None = None,
) -> jax.Array:
    """The mean of `jaxvae.log_likelihood` over a test set, in constant memory: nats per image.

    axis_name: as of `evaluate`.
    """
    keys, images = own_part((example_keys(key, len(images)), jnp.asarray(images)), axis_name)
    estimate = partial(log_likelihood, num_samples=num_samples)
    mean = jnp.mean(in_blocks(lambda block: estimate(params, *block), (keys, images), _BLOCK))
    return lax.pmean(mean, axis_name) if axis_name else mean
