"""Grids of images, as arrays and PNG files, and grids of latents."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from PIL import Image

from jaxvae.errors import InputError
from jaxvae.models.codebooks import is_discrete
from jaxvae.models.distributions import GaussianMixture, UnitGaussian
from jaxvae.models.protocols import Likelihood, Prior
from jaxvae.models.vae import Params, decode, prior
from jaxvae.storage import write_atomic
from jaxvae.validation import is_image

Array = jax.Array | np.ndarray
_DECODED = 100  # images at once


def tile(images: Array, rows: int) -> np.ndarray:
    """Arrange images in a grid.

    Args:
      images: [rows * columns, H, W, C], row by row.
      rows: number of rows.

    Returns:
      One image, [rows * H, columns * W, C].
    """
    n, height, width, channels = images.shape
    grid = np.asarray(images).reshape(rows, n // rows, height, width, channels)
    return grid.swapaxes(1, 2).reshape(rows * height, n // rows * width, channels)


def pixels(image: np.ndarray) -> np.ndarray:
    """Convert an image to 8 bits.

    NaN, as from a decoder that diverged, becomes black.

    Args:
      image: float in [0, 1], [H, W, C].

    Returns:
      uint8: [H, W, 3] for three channels, otherwise the mean over the channels, [H, W].
    """
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    return np.round(np.nan_to_num(image) * 255).astype(np.uint8)


def save_images(images: Array, path: Path) -> None:
    """Write images as a nearly square grid in a PNG file.

    Args:
      images: float in [0, 1], [n, H, W, C].
      path: path of the file.

    Raises:
      InputError: the file cannot be written.
    """
    n = len(images)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    empty = jnp.zeros((rows * columns - n, *images.shape[1:]))
    try:
        picture = Image.fromarray(pixels(tile(jnp.concatenate([images, empty]), rows)))
        write_atomic(path, lambda file: picture.save(file, format="png"))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def latent_grid(p_z: Prior, latent: int, n: int, tail: float = 0.05) -> np.ndarray:
    """Compute quantiles of a latent under the prior, at n equal steps from `tail` to 1 - `tail`.

    They are quantiles of the marginal distribution. For a prior that is neither N(0, I) nor a
    mixture of Gaussians they are estimated from 10,000 samples.

    Args:
      p_z: the prior.
      latent: index of the latent.
      n: number of quantiles.
      tail: probability below the first quantile and above the last.

    Returns:
      The quantiles in increasing order, [n].
    """
    quantiles = np.linspace(tail, 1 - tail, n)
    if isinstance(p_z, UnitGaussian):
        return scipy.special.ndtri(quantiles)
    if not isinstance(p_z, GaussianMixture):
        # A fixed key, so that the axis is the same in every figure.
        draws = np.asarray(draws_of(p_z, jax.random.key(0), 10_000))
        return np.quantile(draws[:, latent], quantiles)
    with np.errstate(all="ignore"):  # a prior that diverged
        mean = np.asarray(p_z.mean, float)[:, latent]
        scale = np.exp(np.asarray(p_z.log_var, float)[:, latent] / 2)
        x = np.linspace(np.min(mean - 4 * scale), np.max(mean + 4 * scale), 10_001)
        weights = scipy.special.softmax(np.float64(p_z.logits))
        below = scipy.special.ndtr((x[:, None] - mean) / scale) @ weights
    return np.interp(quantiles, below, x)


@partial(jax.jit, static_argnames="n")
def draws_of(p_z: Prior, key: jax.Array, n: int) -> jax.Array:
    """Draw n latents from a prior."""
    return p_z.sample(key, n)


def coordinates(params: Params, z: Array) -> Array:
    """Return the coordinates that figures and explorer change, of latents [batch, latent].

    They are the latents themselves, but in a hierarchy the noise of which its prior makes them: if
    one latent changed by itself, the groups below would become improbable.
    """
    return _noise_of(params, z) if hasattr(params.model, "noise_of") else z


@jax.jit
def _noise_of(params: Params, z: jax.Array) -> jax.Array:
    noise: jax.Array = params.model.noise_of(params, z)  # type: ignore[attr-defined]
    return noise


def decode_coordinates(params: Params, z: jax.Array, labels: jax.Array | None = None) -> Likelihood:
    """Return p(x|z) of `coordinates`, [batch, latent]."""
    if hasattr(params.model, "likelihood_of_noise"):
        found: Likelihood = params.model.likelihood_of_noise(params, z, labels)
        return found
    return decode(params, z, labels)


def coordinate_prior(params: Params) -> Prior:
    """Return the distribution that the prior gives `coordinates`."""
    if hasattr(params.model, "noise_of"):
        return UnitGaussian(params.config.latent_dim)
    return prior(params)


def means(params: Params, z: Array, labels: Array | None = None) -> np.ndarray:
    """Decode `coordinates` [batch, latent] to the means of p(x|z).

    All figures decode the same number at once, so they share one compiled program.
    """
    n = len(z)
    padded = -(-n // _DECODED) * _DECODED
    rows = [
        np.resize(x, (padded, *x.shape[1:])).reshape(-1, _DECODED, *x.shape[1:])
        for x in (z, labels)
        if x is not None
    ]
    return np.concatenate([_means(params, *block) for block in zip(*rows, strict=True)])[:n]


@jax.jit
def _means(params: Params, z: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    return decode_coordinates(params, z, labels).mean


def in_turn(params: Params, labels: Any, n: int) -> jax.Array | None:
    """Return n labels for samples: all classes or the given covariates in turn, or None."""
    if params.config.num_classes:
        return jnp.arange(n) % params.config.num_classes
    if not params.config.num_covariates:
        return None
    return jnp.asarray(labels[np.arange(n) % len(labels)])


def has_plane(params: Params) -> bool:
    """Return whether to draw the plane of the first two latents.

    Codes and hierarchies have none that is of use, examples other than images are not drawn, and a
    model with covariates has a plane for each value of them.
    """
    config = params.config
    if config.num_covariates:
        return False
    continuous = not is_discrete(config) and not hasattr(params.model, "groups")
    return continuous and is_image(config.image_shape)


def plane(params: Params, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode an n by n grid of the first two latents, with the others at 0.

    The first latent increases to the right and the second upwards. A model with one latent has one
    row. A conditional model decodes class 0.

    Args:
      params: the model.
      n: number of columns, and of rows.

    Returns:
      The decoder's means [rows * n, H, W, C]; z1 of each column [n]; z2 of each row [rows].
    """
    p_z = prior(params)
    latent_dim = params.config.latent_dim
    right = latent_grid(p_z, 0, n)
    down = latent_grid(p_z, 1, n)[::-1] if latent_dim > 1 else np.zeros(1)
    z = np.zeros((len(down), n, latent_dim), np.float32)
    z[:, :, 0] = right
    if latent_dim > 1:
        z[:, :, 1] = down[:, None]
    labels = np.zeros(len(down) * n, int) if params.config.num_classes else None
    return means(params, z.reshape(-1, latent_dim), labels), right, down
