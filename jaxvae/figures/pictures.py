"""Figures that are grids of images: samples, reconstructions, traversals, interpolations."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvae.data import Dataset
from jaxvae.figures.grid import (
    coordinate_prior,
    coordinates,
    draws_of,
    in_turn,
    latent_grid,
    means,
    plane,
)
from jaxvae.figures.style import image_grid
from jaxvae.models.distributions import UnitGaussian
from jaxvae.models.protocols import Posterior
from jaxvae.models.vae import (
    Params,
    encode_observed,
    known_classes,
)
from jaxvae.validation import scale_images

_ROWS = 10  # classes or latents drawn, at most
_ENCODED = 10_000  # test images, at most; more points would only hide each other
_NUMBERS = 1_000_000  # latents of all encoded images, about


def manifold(params: Params, n: int = 15) -> Figure:
    """Draw the decoder's mean on an n by n grid of the first two latents.

    Args:
      params: the model.
      n: number of columns, and of rows; the grid is computed by `figures.grid.plane`.

    Returns:
      The figure.
    """
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
    """Draw test images above their reconstructions.

    Args:
      params: the model.
      data: its test images are reconstructed.
      n: number of images; with labels there is one of each class, for at most n classes.

    Returns:
      The figure.
    """
    chosen = _one_of_each(data.test_labels, len(data.test_images), n)
    originals = scale_images(data.test_images[chosen])
    decoded = means(params, _coordinates_of(params, data, chosen), labels_of(params, data, chosen))
    pairs = np.concatenate([originals, decoded])
    figure, axes = image_grid(pairs, 2, "Test images and their reconstructions")
    _name_rows(axes, params, ["image", "reconstruction"])
    return figure


def unusual(params: Params, most: np.ndarray, least: np.ndarray) -> Figure:
    """Draw the most unusual images of a data set above the least unusual ones.

    Args:
      params: the model.
      most: the most unusual images, in order, [n, H, W, C].
      least: the least unusual ones, [n, H, W, C].

    Returns:
      The figure.
    """
    images = scale_images(np.concatenate([most, least]))
    figure, axes = image_grid(images, 2, "The most and the least unusual images")
    _name_rows(axes, params, ["most", "least"])
    return figure


def samples(params: Params, key: jax.Array, data: Dataset, rows: int = 10) -> Figure:
    """Draw the decoder's means of samples from the prior.

    Args:
      params: the model.
      key: PRNG key of the samples.
      data: with covariates, the samples have those of its first test images.
      rows: number of rows, and of columns.

    Returns:
      The figure.
    """
    labels = in_turn(params, data.conditions(params.config, "test"), rows * rows)
    images = means(params, draws_of(coordinate_prior(params), key, rows * rows), labels)
    title = f"{rows * rows} samples from the prior (decoder means)"
    return image_grid(images, rows, title)[0]


def levels(params: Params, key: jax.Array, rows: int = 8) -> Figure:
    """Draw what each group of a ladder decides: a row per sample, a column per group.

    In column g the groups 1 to g, from the top down, are samples; those below are at their means.

    Args:
      params: a model with the network "ladder".
      key: PRNG key of the samples.
      rows: number of samples.

    Returns:
      The figure.
    """
    groups = params.model.groups  # type: ignore[attr-defined]
    noise = np.asarray(jax.random.normal(key, (rows, 1, params.config.latent_dim)))
    group_of = np.repeat(np.arange(len(groups)), [group.size for group in groups])
    z = noise * (group_of <= np.arange(len(groups))[:, None])
    classes = params.config.num_classes
    labels = np.repeat(np.arange(rows) % classes, len(groups)) if classes else None
    images = means(params, z.reshape(-1, params.config.latent_dim), labels)
    title = "Samples with the groups up to the column's drawn, the others at their means"
    figure, axes = image_grid(images, rows, title)
    _, width, _ = params.config.image_shape
    places = [f"{g}\n{group.rows}x{group.columns}" for g, group in enumerate(groups, start=1)]
    axes.set_xticks((np.arange(len(groups)) + 0.5) * width, places)
    axes.set_xlabel("groups drawn, from the top down, and the resolution of the last")
    return figure


def classes(params: Params, key: jax.Array, columns: int = 10) -> Figure:
    """Draw the decoder's means of a conditional model: a row per class, a column per sample.

    All rows have the same samples from the prior, so only the class differs within a column.

    Args:
      params: the model.
      key: PRNG key of the samples.
      columns: number of samples.

    Returns:
      The figure, of at most ten classes.
    """
    rows = min(params.config.num_classes, _ROWS)
    z = np.tile(draws_of(coordinate_prior(params), key, columns), (rows, 1))
    images = means(params, z, np.repeat(np.arange(rows), columns))
    title = "Samples by class (decoder means); each column is one latent sample"
    figure, axes = image_grid(images, rows, title)
    _name_rows(axes, params, [f"class {label}" for label in range(rows)])
    return figure


def traversals(params: Params, data: Dataset, columns: int = 11) -> Figure:
    """Draw latent traversals: in each row one latent changes and the others stay fixed.

    The latents are those of `traversed`.

    Args:
      params: the model.
      data: its test images are encoded.
      columns: number of images in a row.

    Returns:
      The figure.
    """
    quantiles = np.linspace(0.01, 0.99, columns)
    decoded, shown = traversed(params, data, columns)
    title = "Latent traversals: one latent varies, the others are those of a test image"
    figure, axes = image_grid(decoded, len(shown), title)
    width = params.config.image_shape[1]
    ticks = np.linspace(0, columns - 1, 3).round().astype(int)
    axes.set_xticks((ticks + 0.5) * width, [f"{quantiles[i]:.2f}" for i in ticks])
    axes.set_xlabel("quantile of the latent's prior")
    _name_rows(axes, params, [f"z{latent + 1}" for latent in shown])
    return figure


def traversed(params: Params, data: Dataset, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode latent traversals: in each row one latent changes and the others stay fixed.

    The fixed latents are the posterior mean of the first test image. Rows are the ten latents whose
    posterior means have the largest variance over the test images, in decreasing order. Along a
    row the latent takes the quantiles 0.01 to 0.99 of its prior. In a hierarchy the noise of the
    latent's prior changes (`figures.grid.coordinates`).

    Args:
      params: the model.
      data: its test images are encoded.
      columns: number of quantiles.

    Returns:
      The decoder's means, [rows * columns, ...], and the index of each row's latent.
    """
    p_z, (mean, variance) = coordinate_prior(params), activity(encode_test_images(params, data))
    shown = np.argsort(-variance, kind="stable")[:_ROWS]
    z = np.tile(coordinates(params, mean[:1])[0], (len(shown), columns, 1))
    for row, latent in enumerate(shown):
        z[row, :, latent] = latent_grid(p_z, latent, columns, tail=0.01)
    z = z.reshape(-1, params.config.latent_dim)
    labels = labels_of(params, data, np.zeros(len(z), int))
    return means(params, z, labels), shown


@jax.jit
def slerp(start: jax.Array, end: jax.Array, t: jax.Array) -> jax.Array:
    """Interpolate between two vectors on the sphere, at constant angular speed.

        slerp(p, q; t) = sin((1 - t) w) / sin(w) p + sin(t w) / sin(w) q
        cos(w)         = <p, q> / (|p| |q|)

    w is the angle between them. Samples of N(0, I) in high dimensions lie near a sphere, which
    linear interpolation leaves. Vectors that are parallel, opposite or 0 are interpolated linearly.

    Args:
      start: p, [latent].
      end: q, [latent].
      t: from 0, which gives p, to 1, which gives q: [steps].

    Returns:
      The interpolated vectors, [steps, latent].

    References:
      Shoemake (1985), Animating rotation with quaternion curves.
      White (2016), Sampling Generative Networks, section 2.
    """
    t = t[:, None]
    lengths = jnp.linalg.norm(start) * jnp.linalg.norm(end)
    cosine = jnp.vdot(start, end) / jnp.where(lengths > 0, lengths, 1)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    turns = (jnp.sin(angle) > 1e-3) & (lengths > 0)
    angle = jnp.where(turns, angle, jnp.pi / 2)  # any angle: the result is not used
    round_ = (jnp.sin((1 - t) * angle) * start + jnp.sin(t * angle) * end) / jnp.sin(angle)
    return jnp.where(turns, round_, lerp(start, end, t[:, 0]))


@jax.jit
def lerp(start: jax.Array, end: jax.Array, t: jax.Array) -> jax.Array:
    """Interpolate linearly: (1 - t) start + t end.

    Args:
      start: [latent].
      end: [latent].
      t: [steps].

    Returns:
      The interpolated vectors, [steps, latent].
    """
    return (1 - t[:, None]) * start + t[:, None] * end


def interpolations(params: Params, data: Dataset, pairs: int = 4, columns: int = 11) -> Figure:
    """Draw interpolations between the latents of two test images, which are at both ends.

    Each pair has a row of linear interpolation, and if the prior is N(0, I) in two or more
    dimensions a row of spherical interpolation (`slerp`). The images of a pair are of different
    classes, but for a conditional model of the same class.

    Args:
      params: the model.
      data: its test images are encoded.
      pairs: number of pairs.
      columns: number of images in a row.

    Returns:
      The figure.
    """
    ways = {"straight": lerp}
    if isinstance(coordinate_prior(params), UnitGaussian) and params.config.latent_dim > 1:
        ways["spherical"] = slerp
    ends = _pairs(data.test_labels, len(data.test_images), pairs, bool(params.config.num_classes))
    images = np.asarray(scale_images(data.test_images[ends.ravel()]))
    labels = labels_of(params, data, ends.ravel())
    center = _coordinates_of(params, data, ends.ravel())
    t = np.linspace(0, 1, columns - 2, dtype=np.float32)
    names = [*ways] * len(ends)
    z = [way(*center[i : i + 2], t) for i in range(0, ends.size, 2) for way in ways.values()]
    of_rows = None if labels is None else np.repeat(labels[::2], len(ways) * len(t), axis=0)
    between = means(params, np.concatenate(z), of_rows).reshape(
        len(names), len(t), *images[0].shape
    )
    first, last = (np.repeat(images[i::2], len(ways), axis=0)[:, None] for i in (0, 1))
    rows = np.concatenate([first, between, last], axis=1)
    title = "Interpolations between the latents of two test images"
    figure, axes = image_grid(rows.reshape(-1, *images[0].shape), len(names), title)
    width = params.config.image_shape[1]
    axes.set_xticks(np.array([0.5, columns / 2, columns - 0.5]) * width,
                    ["image", "decoder means", "image"])  # fmt: skip
    _name_rows(axes, params, names)
    return figure


def encode_test_images(params: Params, data: Dataset) -> Posterior:
    """Encode the test images.

    Args:
      params: the model.
      data: its test images are encoded, at most 10,000, and fewer with more than 100 latents.

    Returns:
      Their posteriors, of batch size N.
    """
    return _encode(params, data, np.arange(_encoded(params, data)))


def _encoded(params: Params, data: Dataset) -> int:
    """Return how many test images are encoded at once."""
    limit = min(_ENCODED, max(500, _NUMBERS // params.config.latent_dim))
    return min(limit, len(data.test_images))


def _encode(params: Params, data: Dataset, chosen: np.ndarray) -> Posterior:
    return encode_observed(params, data.test_images[chosen], labels_of(params, data, chosen))


def _coordinates_of(params: Params, data: Dataset, chosen: np.ndarray) -> np.ndarray:
    """Return the coordinates of the posteriors' centers of some test images.

    Many images take less time than another compiled program: the chosen ones are repeated.
    """
    posterior = _encode(params, data, np.resize(chosen, max(len(chosen), _encoded(params, data))))
    return np.asarray(coordinates(params, np.asarray(posterior.center)[: len(chosen)]))


def activity(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior means of images, and their variances over the images.

    Args:
      posterior: of batch size N.

    Returns:
      The means [N, latent], or the centers of posteriors without a mean; their variances [latent],
      NaN for latents with a mean that is NaN or infinite.
    """
    mean = np.asarray(posterior.center)
    with np.errstate(invalid="ignore"):
        return mean, np.var(np.float64(mean), axis=0)  # large squares overflow float32


def labels_of(params: Params, data: Dataset, chosen: np.ndarray) -> np.ndarray | None:
    """Return the classes or covariates of some test images, as a conditional model takes them.

    Args:
      params: the model.
      data: the data set.
      chosen: indices of the test images, [N].

    Returns:
      The labels; None if the model is unconditional or there are no labels.
    """
    labels = data.conditions(params.config, "test")
    if labels is None:
        return None
    return np.asarray(known_classes(params, data.test_images[chosen], labels[chosen]))


def _coordinate(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 1e4 else f"{x:.1e}"  # large if the prior diverged


def _name_rows(axes: Axes, params: Params, names: Sequence[str]) -> None:
    axes.set_yticks((np.arange(len(names)) + 0.5) * params.config.image_shape[0], names)


def _one_of_each(labels: np.ndarray | None, images: int, n: int) -> np.ndarray:
    """Return indices of up to n test images: the first of each class, if there are labels."""
    if labels is None:
        return np.arange(min(n, images))
    _, first = np.unique(labels, return_index=True)
    return first[:n]


def _pairs(labels: np.ndarray | None, images: int, n: int, same: bool) -> np.ndarray:
    """Choose up to n pairs of test images of the same or of different classes: [pairs, 2]."""
    if same and labels is not None:
        of_each = [np.flatnonzero(labels == label)[[0, -1]] for label in np.unique(labels)]
        return np.stack(of_each[:n])
    chosen = _one_of_each(labels, images, 2 * n)
    if len(chosen) < 2:  # there is one class only
        chosen = np.arange(min(2 * n, images))
    if len(chosen) < 2:
        chosen = np.zeros(2, int)
    return chosen[: len(chosen) // 2 * 2].reshape(-1, 2)
