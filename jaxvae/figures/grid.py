"""Images side by side: mosaics as arrays and as plain PNG files."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxvae.errors import InputError
from jaxvae.models.distributions import GaussianMixture, UnitGaussian
from jaxvae.models.protocols import Prior
from jaxvae.models.vae import Params, decode, prior
from jaxvae.storage import write_atomic


def tile(images: jax.Array | np.ndarray, rows: int) -> np.ndarray:
    """Images [rows * columns, H, W, C] side by side: [rows * H, columns * W, C]."""
    n, height, width, channels = images.shape
    grid = np.asarray(images).reshape(rows, n // rows, height, width, channels)
    return grid.swapaxes(1, 2).reshape(rows * height, n // rows * width, channels)


def pixels(image: np.ndarray) -> np.ndarray:
    """uint8 grey [H, W] or colour [H, W, 3]; of other numbers of channels, their mean.

    A pixel that is NaN, as a diverging decoder may give, is black.
    """
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    return np.round(np.nan_to_num(image) * 255).astype(np.uint8)


def save_images(images: jax.Array, path: Path) -> None:
    """Write images [n, H, W, C] side by side, nearly square, as a PNG without any frame.

    Raises InputError if the file cannot be written.
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


@partial(jax.jit, static_argnames="n")
def latent_grid(p_z: Prior, latent: int, n: int, tail: float = 0.05) -> jax.Array:
    """n coordinates of a latent's axis: the prior's quantiles from `tail` to 1 - `tail`.

    Equal steps of probability of that latent alone, so that the grid is denser where the prior is.
    """
    quantiles = jnp.linspace(tail, 1 - tail, n)
    if isinstance(p_z, UnitGaussian):
        return jax.scipy.special.ndtri(quantiles)
    if not isinstance(p_z, GaussianMixture):
        # Quantiles of draws: of a fixed key, so that the axis is the same every time.
        return jnp.quantile(p_z.sample(jax.random.key(0), 10_000)[:, latent], quantiles)
    mean, scale = p_z.mean[:, latent], jnp.exp(p_z.log_var[:, latent] / 2)
    x = jnp.linspace(jnp.min(mean - 4 * scale), jnp.max(mean + 4 * scale), 10_001)
    below = jax.scipy.special.ndtr((x[:, None] - mean) / scale) @ jax.nn.softmax(p_z.logits)
    return jnp.interp(quantiles, below, x)


def plane(params: Params, n: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """The decoder's mean on an n by n grid of the first two latents, any others at 0.

    The first latent grows to the right and the second upwards; a model of one latent gets one
    row. A conditional model shows its class 0.

    Returns:
      The images [rows * n, H, W, C], the coordinates to the right [n], and those down [rows].
    """
    p_z = prior(params)
    latent_dim = params.config.latent_dim
    right = np.asarray(latent_grid(p_z, 0, n))
    down = np.asarray(latent_grid(p_z, 1, n))[::-1] if latent_dim > 1 else np.zeros(1)
    z = np.zeros((len(down), n, latent_dim), np.float32)
    z[:, :, 0] = right
    if latent_dim > 1:
        z[:, :, 1] = down[:, None]
    labels = np.zeros(len(down) * n, int) if params.config.num_classes else None
    return decode(params, z.reshape(-1, latent_dim), labels).mean, right, down
