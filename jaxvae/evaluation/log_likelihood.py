"""Importance-sampling estimate of log p(x)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Num

from jaxvae.models.vae import Labels, Params, encode, expected_images, expected_labels
from jaxvae.objectives import draw_at, example_keys, numbered_keys
from jaxvae.validation import AnyKey, jit, whole_number


@jit(static_argnames="num_samples", missing=True)
def log_likelihood(
    params: Params,
    key: AnyKey,
    images: Num[ArrayLike, " batch *shape"],
    num_samples: int = 5000,
    labels: Labels = None,
) -> Float[Array, " batch"]:
    """Estimate log p(x) by importance sampling, with the posterior as the proposal.

        log p(x) >= E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)],    z_k ~ q(z|x)

    The estimate is a lower bound in expectation, which grows with K. Memory does not grow with K.
    NaN marks missing entries, and the estimate is of log p of the others. Of a conditional model it
    is of log p(x|y). Of a model with a classifier and without labels it is of

        log p(x) = log sum_y p(y) p(x|y),    p(y) = 1 / classes

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image.
      images: float32 in [0, 1], or uint8.
      num_samples: K.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      log p(x) of each image, in nats.

    Raises:
      InputError: images of another shape than the model's, or num_samples below 1.

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
    """
    num_samples = whole_number("num_samples", num_samples)
    images = expected_images(params, images)
    if params.config.classifier and labels is None:
        classes = params.config.num_classes

        def of_class(y: Int[Array, ""]) -> Float[Array, " batch"]:
            return log_likelihood(params, key, images, num_samples, jnp.full(len(images), y))

        log_p_x_y = lax.map(of_class, jnp.arange(classes)) - jnp.log(classes)
        return jax.nn.logsumexp(log_p_x_y, axis=0)
    labels = expected_labels(params, labels, len(images))
    posterior = encode(params, images, labels)
    batch = images.shape[0]
    keys = example_keys(key, batch)

    def log_weights(k: Int[Array, " samples"]) -> Float[Array, "samples batch"]:
        drawn = draw_at(params, posterior, numbered_keys(keys, k), images, labels)
        return drawn.log_likelihood - drawn.log_ratio

    # With few images, several samples at once keep the device busy.
    at_once = min(num_samples, max(1, 1024 // batch))

    def add(
        total: Float[Array, " batch"], first: Int[Array, ""]
    ) -> tuple[Float[Array, " batch"], None]:
        k = first + jnp.arange(at_once)
        weights = jnp.where(k[:, None] < num_samples, log_weights(k), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(weights, axis=0)), None

    nothing = jnp.full(batch, -jnp.inf, jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    total, _ = lax.scan(add, nothing, jnp.arange(0, num_samples, at_once))
    return total - jnp.log(num_samples)
