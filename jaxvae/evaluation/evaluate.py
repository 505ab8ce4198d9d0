"""Metrics of a test set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Num, UInt32

from jaxvae.data import Dataset
from jaxvae.devices.convolution import in_blocks
from jaxvae.devices.sharding import own_part
from jaxvae.errors import InputError
from jaxvae.evaluation.metrics import (
    ACTIVE,
    Surgery,
    elbo_surgery,
    latent_probe,
    probed,
    reconstruction_error,
    variance_of_means,
)
from jaxvae.models.codebooks import codebook_of, is_discrete
from jaxvae.models.discrete import perplexity
from jaxvae.models.distributions import Gaussian
from jaxvae.models.vae import (
    Labels,
    Params,
    decode,
    encode_observed,
    expected_images,
    expected_labels,
    known_classes,
    labels_of_bound,
    log_classes,
    prior,
    with_size_of,
)
from jaxvae.objectives import draw, elbo, example_keys
from jaxvae.validation import as_floats, jit, support_of

_BLOCK = 1000  # images at once, which bounds memory


@jit(static_argnames="axis_name", missing=True, unlabelled=True)
def evaluate(
    params: Params,
    key: Key[Array, "..."] | UInt32[ArrayLike, "..."],
    images: Num[ArrayLike, " n *shape"],
    labels: Labels = None,
    *,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Compute mean metrics over a test set, with one posterior sample per image.

    Of a model with a classifier they are those of log p(x), whether there are labels or not.

    Args:
      params: the model.
      key: PRNG key.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.
      axis_name: axis of the `pmap` or `shard_map` over which the images are split. Each device is
        given all images and takes its own part, n / devices of them.

    Returns:
      `loss` (the negative ELBO), `elbo`, `log_likelihood` and `kl`, in nats per image.

    Raises:
      InputError: images of another shape than the model's.
    """
    images = expected_images(params, images)
    labels = labels_of_bound(params, labels, len(images))
    examples = own_part((example_keys(key, len(images)), images, labels), axis_name)
    terms = in_blocks(lambda block: elbo(params, *block), examples, _BLOCK)
    means = {name: jnp.mean(values) for name, values in terms._asdict().items()}
    if axis_name:
        means = lax.pmean(means, axis_name)
    value = means.pop("value")
    return {"loss": -value, "elbo": value, **means}


@jit(missing=True)
def kl_per_group(
    params: Params,
    key: Key[Array, "..."] | UInt32[ArrayLike, "..."],
    images: Num[ArrayLike, " n *shape"],
    labels: Labels = None,
) -> Float[Array, " groups"]:
    """Compute the mean KL of every group of a hierarchy, given samples of the groups above.

    Args:
      params: a model with the network "ladder".
      key: PRNG key.
      images: float32 in [0, 1], or uint8.
      labels: classes or covariates of the images, if the model is conditional.

    Returns:
      E[KL(q(z_g | z_<g, x) || p(z_g | z_<g))] of each group, from the top down, in nats per image.
    """
    images = expected_images(params, images)
    labels = expected_labels(params, labels, len(images))

    def of_block(block: tuple[Array, Array, Array | None]) -> Float[Array, "block groups"]:
        kl = draw(params, *block).kl_per_group
        if kl is None:
            raise InputError("the model has no groups of latents: expected the network 'ladder'")
        return kl[0]

    examples = example_keys(key, len(images)), images, labels
    return jnp.mean(in_blocks(of_block, examples, _BLOCK), axis=0)


def examine(params: Params, key: Key[Array, ""], data: Dataset) -> dict[str, Any]:
    """Compute the metrics of the latents and the reconstruction error of a test set.

    Args:
      params: the model.
      key: PRNG key.
      data: training and test images; only a probe of the latents uses the training images.

    Returns:
      `mutual_information` and `marginal_kl`, in nats per image, if the posterior is Gaussian;
      `active_units`, or of a hierarchy `kl_per_group`, in nats per image, or of discrete latents
      `code_perplexity`, the effective number of codes in use; `reconstruction_error`, the mean
      square per pixel; `classification_error` of a model with a classifier, on the test images with
      a label; and, if there are labels of at least two classes, the accuracies
      of `jaxvae.evaluation.metrics.latent_probe`.
    """
    images = jnp.asarray(data.test_images)
    labels, train_labels = (data.conditions(params.config, split) for split in ("test", "train"))
    labels = known_classes(params, images, labels)
    posterior = encode_observed(params, images, labels)
    found: dict[str, Any] = {}
    if isinstance(posterior, Gaussian):
        parts = _surgery(params, posterior, key)._asdict()
        found |= {name: float(part) for name, part in parts.items()}
    if hasattr(params.model, "groups"):
        kl = kl_per_group(params, jax.random.fold_in(key, 2), images, labels)
        found["kl_per_group"] = np.asarray(kl).tolist()
    elif is_discrete(params.config):
        book = codebook_of(params)
        found["code_perplexity"] = float(perplexity(book.codes(posterior.center), book.num_codes))
    else:
        variance = variance_of_means(posterior, jax.random.fold_in(key, 1))
        found["active_units"] = int(np.sum(np.asarray(variance) > ACTIVE))
    found["reconstruction_error"] = float(_error(params, posterior.center, images, labels))
    if data.train_labels is None or data.test_labels is None:
        return found
    test_known = data.test_labels >= 0
    if params.config.classifier and test_known.any():
        wrong = jnp.argmax(log_classes(params, images), axis=1) != data.test_labels
        found["classification_error"] = float(np.mean(wrong[test_known]))
    rows = np.flatnonzero(data.train_labels >= 0)
    rows = rows[probed(data.train_labels[rows])]  # without a class that is rare, there may be one
    if test_known.any() and len(np.unique(data.train_labels[rows])) > 1:
        train_images = jnp.asarray(data.train_images[rows])
        train_labels = None if train_labels is None else train_labels[rows]
        train_mean = encode_observed(params, train_images, train_labels).center
        probe = latent_probe(
            np.asarray(train_mean),
            data.train_labels[rows],
            np.asarray(posterior.center)[test_known],
            data.test_labels[test_known],
        )
        found |= probe._asdict()
    return found


@jax.jit
def _surgery(params: Params, posterior: Gaussian, key: Key[Array, ""]) -> Surgery:
    z = posterior.sample(key)
    return elbo_surgery(posterior, z, prior(params).log_prob(z))


@jax.jit
def _error(
    params: Params, z: Float[Array, "n latent"], images: Num[Array, " n *shape"], labels: Labels
) -> Float[Array, ""]:
    """Compute the mean squared error of the decoder's means at z."""
    means = with_size_of(images, decode(params, z, labels)).mean
    return jnp.nanmean(reconstruction_error(as_floats(support_of(params), images), means))
