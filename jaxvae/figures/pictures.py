"""What the decoder paints: figures that are images side by side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvae.data import Dataset
from jaxvae.figures.grid import latent_grid, plane
from jaxvae.figures.style import image_grid
from jaxvae.models.distributions import UnitGaussian
from jaxvae.models.likelihoods import scale_images
from jaxvae.models.vae import Params, decode, encode, prior, reconstruct, sample

_ROWS = 10  # more classes or latents than these get no row
_MEASURED = 10_000  # test images that say which latents vary


def manifold(params: Params, n: int = 15) -> Figure:
    """The decoder's mean on an n by n grid of the first two latents, as of `figures.grid.plane`."""
    images, right, down = plane(params, n)
    latent_dim = params.config.latent_dim
    title = f"Decoder means over the latent {'plane' if latent_dim > 1 else 'line'}"
    title += " of class 0" if params.config.num_classes else ""
    if latent_dim > 2:
        title += f" (z3 to z{latent_dim} at 0)" if latent_dim > 3 else " (z3 at 0)"
    figure, axes = image_grid(images, len(down), title)
    height, width, _ = params.config.image_shape
    shown = np.linspace(0, n - 1, 5).round().astype(int)
    axes.set_xticks((shown + 0.5) * width, [_coordinate(right[i]) for i in shown])
    axes.set_xlabel("z1 (quantiles 0.05 to 0.95 of the prior)")
    if latent_dim > 1:
        axes.set_yticks((shown + 0.5) * height, [_coordinate(down[i]) for i in shown])
        axes.set_ylabel("z2")
    return figure


def reconstructions(params: Params, data: Dataset, n: int = 10) -> Figure:
    """Test images above their reconstructions, one of each class where there are classes."""
    chosen = _one_of_each(data.test_labels, len(data.test_images), n)
    originals = jnp.asarray(data.test_images[chosen])
    decoded = reconstruct(params, originals, labels_of(params, data, chosen))
    pairs = jnp.concatenate([scale_images(originals), decoded])
    figure, axes = image_grid(pairs, 2, "Test images and their reconstructions")
    _name_rows(axes, params, ["image", "reconstruction"])
    return figure


def samples(params: Params, key: jax.Array, rows: int = 10) -> Figure:
    """Decoder means of rows * rows draws from the prior."""
    images = sample(params, key, rows * rows)
    title = f"{rows * rows} samples: decoder means of draws from the prior"
    return image_grid(images, rows, title)[0]


def classes(params: Params, key: jax.Array, columns: int = 10) -> Figure:
    """Decoder means of a conditional model: a row for every class, a column for every draw.

    All rows share their draws, so that what differs down a column is the class alone.
    """
    rows = min(params.config.num_classes, _ROWS)
    z = jnp.tile(prior(params).sample(key, columns), (rows, 1))
    images = decode(params, z, jnp.repeat(jnp.arange(rows), columns)).mean
    title = "Samples by class: decoder means, the same draw down each column"
    figure, axes = image_grid(images, rows, title)
    _name_rows(axes, params, [f"class {label}" for label in range(rows)])
    return figure


def traversals(params: Params, data: Dataset, columns: int = 11) -> Figure:
    """One latent after the other changed, the rest as in the posterior of the first test image.

    A row for each of the ten latents whose posterior means vary most over the test images, the
    first of them at the top; along it the latent takes the prior's quantiles from 0.01 to 0.99.
    """
    p_z, (mean, variance) = prior(params), activity(params, data)
    shown = np.argsort(-variance, kind="stable")[:_ROWS]
    z = np.tile(mean[0], (len(shown), columns, 1))
    for row, latent in enumerate(shown):
        z[row, :, latent] = latent_grid(p_z, latent, columns, tail=0.01)
    z = z.reshape(-1, params.config.latent_dim)
    labels = labels_of(params, data, np.zeros(len(z), int))
    title = "Traversals: one latent at a time, the others as of a test image"
    figure, axes = image_grid(decode(params, z, labels).mean, len(shown), title)
    width = params.config.image_shape[1]
    ticks = np.linspace(0, columns - 1, 3).round().astype(int)
    quantiles = np.linspace(0.01, 0.99, columns)
    axes.set_xticks((ticks + 0.5) * width, [f"{quantiles[i]:.2f}" for i in ticks])
    axes.set_xlabel("quantile of the latent's prior")
    _name_rows(axes, params, [f"z{latent + 1}" for latent in shown])
    return figure


@jax.jit
def slerp(start: jax.Array, end: jax.Array, t: jax.Array) -> jax.Array:
    """Points on the way from one vector to another that turns at a steady rate.

        slerp(p, q; t) = sin((1 - t) w) / sin(w) p + sin(t w) / sin(w) q
        cos(w)         = <p, q> / (|p| |q|)

    Of two vectors of one length the way is the arc between them. Draws of N(0, I) of many latents
    lie near a sphere, which the straight way leaves. Where the angle says no way, as of vectors
    that point the same way or opposite ways or are 0, it is the straight one.

    Args:
      start, end: p and q, [latent].
      t: from 0, which is p, to 1, which is q: [steps].
    Returns:
      [steps, latent].

    Shoemake (1985), Animating rotation with quaternion curves; White (2016), Sampling Generative
    Networks, section 2.
    """
    t = t[:, None]
    lengths = jnp.linalg.norm(start) * jnp.linalg.norm(end)
    cosine = jnp.vdot(start, end) / jnp.where(lengths > 0, lengths, 1)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    turns = (jnp.sin(angle) > 1e-3) & (lengths > 0)
    angle = jnp.where(turns, angle, jnp.pi / 2)  # any other, as it is not taken
    round_ = (jnp.sin((1 - t) * angle) * start + jnp.sin(t * angle) * end) / jnp.sin(angle)
    return jnp.where(turns, round_, lerp(start, end, t[:, 0]))


@jax.jit
def lerp(start: jax.Array, end: jax.Array, t: jax.Array) -> jax.Array:
    """Points on the straight way: (1 - t) start + t end, [steps, latent]; as of `slerp`."""
    return (1 - t[:, None]) * start + t[:, None] * end


def interpolations(params: Params, data: Dataset, pairs: int = 4, columns: int = 11) -> Figure:
    """From one test image to another, by way of their latents; the images are at both ends.

    Straight, and where the prior is N(0, I) below that on the sphere (`slerp`). The two are of
    different classes; of a conditional model they are of the same one, which it is told.
    """
    ways = {"straight": lerp}
    if isinstance(prior(params), UnitGaussian) and params.config.latent_dim > 1:
        ways["spherical"] = slerp
    ends = _pairs(data.test_labels, len(data.test_images), pairs, bool(params.config.num_classes))
    images = scale_images(jnp.asarray(data.test_images[ends.ravel()]))
    labels = labels_of(params, data, ends.ravel())
    center = encode(params, images, labels).center
    t = jnp.linspace(0, 1, columns - 2)
    rows, names = [], []
    for i in range(0, ends.size, 2):
        row_labels = None if labels is None else jnp.full(len(t), labels[i])
        for name, way in ways.items():
            between = decode(params, way(center[i], center[i + 1], t), row_labels).mean
            rows.append(jnp.concatenate([images[i : i + 1], between, images[i + 1 : i + 2]]))
            names.append(name)
    title = "From one test image to another, by way of their latents"
    figure, axes = image_grid(jnp.concatenate(rows), len(rows), title)
    width = params.config.image_shape[1]
    axes.set_xticks(np.array([0.5, columns / 2, columns - 0.5]) * width,
                    ["image", "decoder means", "image"])  # fmt: skip
    _name_rows(axes, params, names)
    return figure


def activity(params: Params, data: Dataset) -> tuple[jax.Array, np.ndarray]:
    """The posterior means of the test images, [N, latent], and their variances, [latent].

    A variance is NaN where a mean is NaN or infinite.
    """
    images = jnp.asarray(data.test_images[:_MEASURED])
    mean = encode(params, images, labels_of(params, data, np.arange(len(images)))).center
    with np.errstate(invalid="ignore"):
        return mean, np.var(np.float64(mean), axis=0)  # the squares of large ones overflow float32


def labels_of(params: Params, data: Dataset, chosen: np.ndarray) -> jax.Array | None:
    """The classes of some test images, where the model is conditional."""
    if not params.config.num_classes or data.test_labels is None:
        return None
    return jnp.asarray(data.test_labels[chosen], jnp.int32)


def _coordinate(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 1e4 else f"{x:.1e}"  # of a prior that diverges


def _name_rows(axes: Axes, params: Params, names: Sequence[str]) -> None:
    axes.set_yticks((np.arange(len(names)) + 0.5) * params.config.image_shape[0], names)


def _one_of_each(labels: np.ndarray | None, images: int, n: int) -> np.ndarray:
    """Indices of up to n test images: the first of each class, or the first ones."""
    if labels is None:
        return np.arange(min(n, images))
    _, first = np.unique(labels, return_index=True)
    return first[:n]


def _pairs(labels: np.ndarray | None, images: int, n: int, same: bool) -> np.ndarray:
    """Indices of up to n pairs of test images, [pairs, 2], of the same or of different classes."""
    if same and labels is not None:
        of_each = [np.flatnonzero(labels == label)[[0, -1]] for label in np.unique(labels)]
        return np.stack(of_each[:n])
    chosen = _one_of_each(labels, images, 2 * n)
    if len(chosen) < 2:  # of one class
        chosen = np.arange(min(2 * n, images))
    if len(chosen) < 2:
        chosen = np.zeros(2, int)
    return chosen[: len(chosen) // 2 * 2].reshape(-1, 2)
