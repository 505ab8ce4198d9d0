"""What a trained model has made of its latents, and how far its reconstructions are off."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxvae.devices.convolution import in_blocks
from jaxvae.errors import InputError
from jaxvae.models.likelihoods import Gaussian, at_least_float32, scale_images
from jaxvae.models.vae import Posterior

ACTIVE = 0.01  # variance of the posterior's mean above which a latent counts as active

_BLOCK = 100  # samples at once: [100, N] densities, 4 MB of float32 at N = 10,000

_PROBED = 10_000  # training images that a probe learns from, at most


@jax.jit
def active_units(mean: jax.Array, threshold: float = ACTIVE) -> jax.Array:
    """How many latents vary with the image: an integer.

        A_u = Var_x(E_q(u|x)[u]) > threshold

    mean: of the posteriors of N images, [N, latent]. Of a flow's, `mean` is of the Gaussian that
      it starts from, not of u: `variance_of_means` estimates the variance.

    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.
    """
    return jnp.sum(jnp.var(mean, axis=0) > threshold)


@partial(jax.jit, static_argnames="num_samples")
def variance_of_means(posterior: Posterior, key: jax.Array, num_samples: int = 100) -> jax.Array:
    """Compute how much the posterior's mean of every latent varies with the image.

        Var_x(E_q(u|x)[u])

    For a Gaussian posterior it is exact. For a flow it is the covariance over the images of two
    means of independent samples. That is right in expectation, and may be negative; the variance
    of one mean of S samples would be larger by 1/S of the posterior's own variance.

    Args:
      posterior: of N images.
      key: PRNG key of the samples.
      num_samples: of each posterior, in both means together; the two have half of them each.

    Returns:
      [latent].
    """
    if isinstance(posterior, Gaussian):
        return jnp.var(posterior.mean, axis=0)
    half = num_samples // 2

    def add(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return total + posterior.sample(key), None

    nothing = jnp.zeros_like(posterior.mean)
    keys = jax.random.split(key, (2, half))
    one, other = (lax.scan(add, nothing, keys[i])[0] / half for i in range(2))
    return jnp.mean((one - jnp.mean(one, axis=0)) * (other - jnp.mean(other, axis=0)), axis=0)


class Surgery(NamedTuple):
    """The parts of the mean KL, nats per image: KL = mutual_information + marginal_kl."""

    mutual_information: jax.Array
    marginal_kl: jax.Array


@jax.jit
def elbo_surgery(posterior: Gaussian, z: jax.Array, log_p_z: jax.Array) -> Surgery:
    """The mean KL of N images taken apart, estimated with one sample of each posterior.

        1/N sum_n KL(q(z|x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))

        I(n; z)          = 1/N sum_n E_q(z|x_n)[log q(z|x_n) - log q(z)]
        KL(q(z) || p(z)) = 1/N sum_n E_q(z|x_n)[log q(z) - log p(z)]

    with q(z) of `log_aggregate`. I is the information about which of the N images it was, so at
    most log N: near that it says no more than that the posteriors hardly overlap. With q* the
    aggregate of all images there could be, of which the N are drawn,

        E[I(n; z)] = I(x; z) - E[KL(q(z) || q*(z))]

    so the mutual information of images and latents is underestimated, the KL to the prior
    overestimated by as much, and both by less the larger N is.

    Args:
      posterior: of N images.
      z: one sample of each, [N, latent].
      log_p_z: the prior's density there, [N].

    Hoffman and Johnson (2016), ELBO surgery: yet another way to carve up the variational evidence
    lower bound.
    """
    log_q_z = log_aggregate(posterior, z)
    return Surgery(jnp.mean(posterior.log_prob(z) - log_q_z), jnp.mean(log_q_z - log_p_z))


@jax.jit
def log_aggregate(posterior: Gaussian, z: jax.Array) -> jax.Array:
    """The aggregate posterior's density, in nats.

        log q(z) = log 1/N sum_n q(z|x_n)

    Memory grows with N, not with the number of z.

    Args:
      posterior: of N images.
      z: [batch, latent].
    Returns:
      [batch].
    """
    count = len(posterior.mean)
    per_latent = jax.tree.map(lambda x: x.T[:, :, None], posterior)  # [latent, N, 1]

    def block(z: jax.Array) -> jax.Array:
        # Differences, not a matrix product of z^2 and z with the precisions: where posteriors
        # are narrow its terms are of the order 1e6 and cancel, which in float32 is off by nats.
        # Latent by latent, as [batch, N, latent] fits into no cache.
        def add(log_q: jax.Array, latent: tuple[Gaussian, jax.Array]) -> tuple[jax.Array, None]:
            q_j, z_j = latent
            return log_q + q_j.log_prob(z_j[:, None, None]), None

        nothing = jnp.zeros((len(z), count), z.dtype)
        log_q, _ = lax.scan(add, nothing, (per_latent, z.T))
        return jax.nn.logsumexp(log_q, axis=1) - math.log(count)

    return in_blocks(block, z, _BLOCK)


def reconstruction_error(images: jax.Array, means: jax.Array) -> jax.Array:
    """The mean squared error of every reconstruction: [batch], in squares of the full scale.

        MSE = mean over pixels and channels of (x - mean)^2,    x in [0, 1]

    Its mean over a data set is the data set's, and the root of that its RMSE: 0.1 is 25.5 of 255
    grey levels.

    Args:
      images: [batch, height, width, channels], uint8 or floats in [0, 1].
      means: of p(x|z), that shape.
    Raises:
      InputError: two shapes.
    """
    if images.shape != means.shape:
        raise InputError(
            f"images have shape {images.shape}: expected the reconstructions' {means.shape}"
        )
    error = at_least_float32(scale_images(images)) - at_least_float32(means)
    return jnp.mean(error**2, axis=(-3, -2, -1))


class LatentProbe(NamedTuple):
    """The accuracies of two classifiers of the latents, from 0 to 1."""

    logistic_regression: float
    nearest_neighbors: float


def latent_probe(
    train_mean: np.ndarray,
    train_labels: np.ndarray,
    test_mean: np.ndarray,
    test_labels: np.ndarray,
) -> LatentProbe:
    """How well the posterior means tell the classes apart, on images not learned from.

    Logistic regression sees every latent scaled to mean 0 and variance 1, with scikit-learn's
    own weight decay (C = 1). The 5 nearest neighbors vote by Euclidean distance between the means
    as they are, where a latent that the model does not use does not count.

    Of more than 10,000 training images both learn from 10,000: in the order of their classes,
    those at even distances. That keeps the classes' shares, in whatever order the images come.

    Args:
      train_mean, test_mean: [N, latent].
      train_labels, test_labels: [N], their classes.
    Raises:
      InputError: means that are not finite, or training images all of one class.

    Alain and Bengio (2016), Understanding Intermediate Layers Using Linear Classifier Probes.
    """
    # It takes as long to import as JAX, so only what probes pays for it.
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
    rows = _spread(np.asarray(train_labels))
    train, labels = train[rows], np.asarray(train_labels)[rows]
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"the training images are all of class {labels[0]}: expected two classes or more"
        )
    # Scaled and decayed it converges within some ten steps, a hundred with outliers.
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbors = KNeighborsClassifier(n_neighbors=min(5, len(labels)))
    return LatentProbe(
        *(float(probe.fit(train, labels).score(test, test_labels)) for probe in (linear, neighbors))
    )


def _spread(labels: np.ndarray) -> np.ndarray:
    """The rows that a probe learns from."""
    count = min(len(labels), _PROBED)
    return np.argsort(labels, kind="stable")[np.arange(count) * len(labels) // count]
