"""Metrics of the latents, and the reconstruction error."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num, Shaped

from jaxvae.devices.convolution import in_blocks
from jaxvae.errors import InputError
from jaxvae.models.distributions import Gaussian
from jaxvae.models.protocols import Posterior
from jaxvae.validation import at_least_float32, scale_images

ACTIVE = 0.01  # variance of the posterior's mean above which a latent counts as active

_BLOCK = 100  # samples at once: [100, N] densities, 4 MB of float32 at N = 10,000

_PROBED = 10_000  # training images of a probe, at most


@jax.jit
def active_units(
    mean: Float[ArrayLike, "n latent"], threshold: Float[ArrayLike, ""] = ACTIVE
) -> Int[Array, ""]:
    """Count the latents that vary with the image.

        A_u = Var_x(E_q(u|x)[u]) > threshold

    Args:
      mean: posterior means of n images. The `mean` of a flow is that of its base Gaussian, not of
        u: use `variance_of_means` instead.
      threshold: variance above which a latent is active.

    Returns:
      The number of active latents.

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.
    """
    return jnp.sum(jnp.var(mean, axis=0) > threshold)


@partial(jax.jit, static_argnames="num_samples")
def variance_of_means(
    posterior: Posterior, key: Key[Array, ""], num_samples: int = 100
) -> Float[Array, " latent"]:
    """Compute the variance over the images of the posterior mean of every latent.

        Var_x(E_q(u|x)[u])

    For a Gaussian posterior it is exact. For a flow it is estimated by the covariance over the
    images of two means of independent samples. This estimate is unbiased, and may be negative; the
    variance of one mean of S samples would be biased by 1/S of the posterior's own variance.

    Args:
      posterior: posteriors of n images.
      key: PRNG key of the samples.
      num_samples: samples of each posterior; each of the two means has half of them.

    Returns:
      The variance of each latent.
    """
    if isinstance(posterior, Gaussian):
        return jnp.var(posterior.mean, axis=0)
    half = num_samples // 2

    def add(
        total: Float[Array, "n latent"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "n latent"], None]:
        return total + posterior.sample_and_log_prob(jax.random.split(key, len(total)))[0], None

    nothing = jnp.zeros_like(posterior.mean)
    keys = jax.random.split(key, (2, half))
    one, other = (lax.scan(add, nothing, keys[i])[0] / half for i in range(2))
    return jnp.mean((one - jnp.mean(one, axis=0)) * (other - jnp.mean(other, axis=0)), axis=0)


class Surgery(NamedTuple):
    """The two parts of the mean KL, in nats per image: KL = mutual_information + marginal_kl.

    Attributes:
      mutual_information: I(n; z), of the index of the image and the latents.
      marginal_kl: KL(q(z) || p(z)), of the aggregate posterior and the prior.
    """

    mutual_information: Float[Array, ""]
    marginal_kl: Float[Array, ""]


@jax.jit
def elbo_surgery(
    posterior: Gaussian, z: Float[Array, "n latent"], log_p_z: Float[Array, " n"]
) -> Surgery:
    """Decompose the mean KL of N images, estimated with one sample of each posterior.

        1/N sum_n KL(q(z|x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))

        I(n; z)          = 1/N sum_n E_q(z|x_n)[log q(z|x_n) - log q(z)]
        KL(q(z) || p(z)) = 1/N sum_n E_q(z|x_n)[log q(z) - log p(z)]

    with the aggregate posterior q(z) of `log_aggregate`. I is the information about the index n, so
    it is at most log N; a value near log N only means that the posteriors hardly overlap. With q*
    the aggregate posterior of the distribution from which the N images are drawn,

        E[I(n; z)] = I(x; z) - E[KL(q(z) || q*(z))]

    so I(n; z) underestimates the mutual information I(x; z) of images and latents, and the KL to
    the prior is overestimated by the same amount, which shrinks as N grows.

    Args:
      posterior: posteriors of N images.
      z: one sample of each posterior.
      log_p_z: log density of the prior at z, in nats.

    Returns:
      The two parts.

    References:
      Hoffman and Johnson (2016), ELBO surgery: yet another way to carve up the variational
      evidence lower bound.
    """
    log_q_z = log_aggregate(posterior, z)
    return Surgery(jnp.mean(posterior.log_prob(z) - log_q_z), jnp.mean(log_q_z - log_p_z))


@jax.jit
def log_aggregate(posterior: Gaussian, z: Float[Array, "batch latent"]) -> Float[Array, " batch"]:
    """Compute the log density of the aggregate posterior.

        log q(z) = log 1/N sum_n q(z|x_n)

    Memory grows with N, not with the number of z.

    Args:
      posterior: posteriors of N images.
      z: latents.

    Returns:
      log q(z), in nats.
    """
    count = len(posterior.mean)
    per_latent = jax.tree.map(lambda x: x.T[:, :, None], posterior)  # [latent, N, 1]

    def block(z: Float[Array, "block latent"]) -> Float[Array, " block"]:
        # From the differences z - mean. A matrix product of z^2 and z with the precisions would
        # have terms of the order 1e6 that cancel if posteriors are narrow, an error of nats in
        # float32. One latent at a time, because [batch, N, latent] does not fit into the cache.
        def add(
            log_q: Float[Array, "block n"], latent: tuple[Gaussian, Float[Array, " block"]]
        ) -> tuple[Float[Array, "block n"], None]:
            q_j, z_j = latent
            return log_q + q_j.log_prob(z_j[:, None, None]), None

        nothing = jnp.zeros((len(z), count), z.dtype)
        log_q, _ = lax.scan(add, nothing, (per_latent, z.T))
        return jax.nn.logsumexp(log_q, axis=1) - math.log(count)

    return in_blocks(block, z, _BLOCK)


def reconstruction_error(
    images: Num[Array, " batch *shape"],
    means: Float[Array, " batch *shape"],
) -> Float[Array, " batch"]:
    """Compute the mean squared error of every reconstruction.

        MSE = mean over pixels and channels of (x - mean)^2

    The root of its mean over a data set is the RMSE of the data set; that of images in [0, 1] is
    25.5 of 255 grey levels where it is 0.1.

    Args:
      images: images, floats in [0, 1] or uint8; or other examples, as they are. Missing entries,
        NaN, are left out of the mean.
      means: means of p(x|z), of images in [0, 1].

    Returns:
      The error of each image.

    Raises:
      InputError: images and means of different shapes.
    """
    if images.shape != means.shape:
        raise InputError(
            f"images have shape {images.shape}: expected the reconstructions' {means.shape}"
        )
    x = at_least_float32(scale_images(images))
    error = x - at_least_float32(means)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)), where=~jnp.isnan(x))


class LatentProbe(NamedTuple):
    """The accuracies of two classifiers of the latents, from 0 to 1.

    Attributes:
      logistic_regression: accuracy of logistic regression.
      nearest_neighbors: accuracy of the 5 nearest neighbors.
    """

    logistic_regression: float
    nearest_neighbors: float


def latent_probe(
    train_mean: Float[np.ndarray, "train latent"],
    train_labels: Shaped[np.ndarray, " train"],
    test_mean: Float[np.ndarray, "test latent"],
    test_labels: Shaped[np.ndarray, " test"],
) -> LatentProbe:
    """Measure how well two classifiers predict the class from the posterior mean.

    The first is logistic regression on latents scaled to mean 0 and variance 1, with
    scikit-learn's default regularisation (C = 1). The second are the 5 nearest neighbors by
    Euclidean distance between the unscaled means, to which unused latents hardly contribute.

    Of more than 10,000 training images, 10,000 are used: sorted by class and evenly spaced, which
    keeps the proportions of the classes.

    Args:
      train_mean: posterior means of the training images.
      train_labels: classes of the training images.
      test_mean: posterior means of the test images.
      test_labels: classes of the test images.

    Returns:
      The accuracies on the test images.

    Raises:
      InputError: means that are not finite, or training images all of one class.

    References:
      Alain and Bengio (2016), Understanding Intermediate Layers Using Linear Classifier Probes.
    """
    # Imported here: it takes as long as importing JAX.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (np.asarray(mean, np.float64) for mean in (train_mean, test_mean))
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise InputError(
            "the posterior means are not finite: expected numbers; train again, with a smaller "
            "learning rate"
        )
    rows = probed(np.asarray(train_labels))
    train, labels = train[rows], np.asarray(train_labels)[rows]
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"the training images are all of class {labels[0]}: expected two classes or more"
        )
    # It converges within about ten iterations, with outliers about a hundred.
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbors = KNeighborsClassifier(n_neighbors=min(5, len(labels)))
    return LatentProbe(
        *(float(probe.fit(train, labels).score(test, test_labels)) for probe in (linear, neighbors))
    )


def probed(labels: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " rows"]:
    """Return the rows of the training images that a probe uses."""
    count = min(len(labels), _PROBED)
    return np.argsort(labels, kind="stable")[np.arange(count) * len(labels) // count]
