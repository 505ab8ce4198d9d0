"""Imputation of missing entries by importance sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num

from jaxvae.models.protocols import Likelihood
from jaxvae.models.vae import (
    Labels,
    Params,
    decode,
    encode,
    expected_images,
    expected_labels,
    with_size_of,
)
from jaxvae.objectives import draw_at, example_keys, numbered_keys
from jaxvae.validation import AnyKey, as_floats, jit, support_of, whole_number


class Imputation(NamedTuple):
    """Examples whose missing entries are filled in; observed entries are as they were.

    Attributes:
      mean: with the conditional mean E[x_m | x_o] in missing entries.
      draws: with samples of p(x_m | x_o).
      effective_sample_size: (sum_k w_k)^2 / sum_k w_k^2 of the importance weights of each example,
        from 1 to the number of samples. Where it is near 1, mean and draws rest on few samples.
    """

    mean: Float[Array, " batch *shape"]
    draws: Float[Array, "draws batch *shape"]
    effective_sample_size: Float[Array, " batch"]


@jit(static_argnames=("num_samples", "num_draws"), missing=True)
def impute(
    params: Params,
    key: AnyKey,
    images: Num[ArrayLike, " batch *shape"],
    num_samples: int = 1000,
    labels: Labels = None,
    *,
    num_draws: int = 1,
) -> Imputation:
    """Fill in missing entries, given the observed ones.

    With the observed entries x_o, the missing ones x_m and z_k ~ q(z|x_o),

        E[x_m | x_o] = sum_k v_k E[x_m | z_k],    v_k = w_k / sum_j w_j
        w_k = p(x_o|z_k) p(z_k) / q(z_k|x_o)

    and a draw of p(x_m | x_o) is one of p(x_m | z_k), where k is drawn with the probabilities v.
    Both are exact as the number of samples grows.

    Args:
      params: the model.
      key: a PRNG key, or [batch] keys, one for each image, of which the mean depends only on that
        of the image.
      images: as in `jaxvae.encode`, with NaN in place of missing entries: floats, of images in
        [0, 1].
      num_samples: number K of importance samples.
      labels: classes or covariates of the images, if the model is conditional.
      num_draws: number of draws.

    Returns:
      The mean, the draws and how many samples they rest on.

    Raises:
      InputError: images of another shape than the model's; num_samples or num_draws below 1.

    References:
      Mattei and Frellsen (2019), MIWAE: Deep Generative Modelling and Imputation of Incomplete Data
      Sets, section 3: single imputation by self-normalised importance sampling, and multiple
      imputation by sampling importance resampling.
    """
    num_samples = whole_number("num_samples", num_samples)
    num_draws = whole_number("num_draws", num_draws)
    images = expected_images(params, images)
    labels = expected_labels(params, labels, len(images))
    posterior = encode(params, images, labels)
    batch = len(images)
    keys, index_keys, draw_keys = jax.vmap(lambda key: jax.random.split(key, 3), 0, 1)(
        example_keys(key, batch)
    )

    def likelihood_at(z: Float[Array, "samples batch latent"]) -> Likelihood:
        """Return p(x|z) of all samples as one batch, with counts at the size of the images."""

        def repeated(x: Array) -> Array:
            return jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])

        of = None if labels is None else repeated(labels)
        return with_size_of(repeated(images), decode(params, z.reshape(-1, z.shape[-1]), of))

    at_once = min(num_samples, max(1, 1024 // batch))

    def add(
        carry: tuple[Array, Array], first: Int[Array, ""]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        total, mean = carry
        k = first + jnp.arange(at_once)
        drawn = draw_at(params, posterior, numbered_keys(keys, k), images, labels)
        log_w = drawn.log_likelihood - drawn.log_ratio
        log_w = jnp.where(k[:, None] < num_samples, log_w, -jnp.inf)
        means = likelihood_at(drawn.z).mean.reshape(at_once, *images.shape)
        # The mean so far counts as one more sample, whose weight is the total so far.
        together = jnp.concatenate([total[None], log_w])
        shares = jax.nn.softmax(together, axis=0).reshape(-1, batch, *(1,) * (images.ndim - 1))
        mean = jnp.sum(shares * jnp.concatenate([mean[None], means]), axis=0)
        return (jax.nn.logsumexp(together, axis=0), mean), (drawn.z, log_w)

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    nothing = jnp.full(batch, -jnp.inf, dtype), jnp.zeros(images.shape, dtype)
    (_, mean), found = lax.scan(add, nothing, jnp.arange(0, num_samples, at_once))
    z, log_w = (x.reshape(-1, *x.shape[2:]) for x in found)
    v = jax.nn.softmax(log_w, axis=0)

    def choose(key: Key[Array, ""], v: Float[Array, " samples"]) -> Int[Array, " draws"]:
        return jax.random.choice(key, len(v), (num_draws,), p=v)

    k = jax.vmap(choose, (0, 1), 1)(index_keys, v)
    draws = likelihood_at(z[k, jnp.arange(batch)]).sample(draw_keys[0])
    x = as_floats(support_of(params), images).astype(dtype)
    return Imputation(
        jnp.where(jnp.isnan(x), mean, x),
        jnp.where(jnp.isnan(x), draws.reshape(num_draws, *x.shape), x),
        1 / jnp.sum(v**2, axis=0),
    )
