"""What a run drew: finished figures of a trained model, as matplotlib Figures."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from jaxvae.data import Dataset
from jaxvae.distributions import scale_images
from jaxvae.errors import InputError
from jaxvae.model import Params, Prior, decode, encode, prior, reconstruct, sample
from jaxvae.priors import StandardNormal

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# Paul Tol's "muted" scheme and black: ten classes that colour-blind readers can tell apart.
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
COLOURS += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000"]
_SPLITS = {"train": COLOURS[1], "test": COLOURS[0]}
_DPI = 150
_SCATTERED = 10_000  # points beyond this only hide each other


def draw_all(
    folder: Path, params: Params, data: Dataset, history: Sequence[dict[str, Any]], key: jax.Array
) -> list[Path]:
    """Draw every figure of a run into a folder, as PNG files; returns their paths."""
    figures = {
        "manifold_15": partial(manifold, params, 15),
        "manifold_20": partial(manifold, params, 20),
        "reconstructions": partial(reconstructions, params, data),
        "samples": partial(samples, params, key),
        "latents": partial(latents, params, data),
    }
    if history:
        figures["training"] = partial(training, history)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        paths.append(folder / f"{name}.png")
        save(draw(), paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the format follows from the path's suffix."""
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.15)


def save_images(images: jax.Array, path: Path) -> None:
    """Write images [n, H, W, C] side by side, nearly square, as a PNG without any frame.

    Raises InputError if the file cannot be written.
    """
    n = len(images)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    empty = jnp.zeros((rows * columns - n, *images.shape[1:]))
    try:
        Image.fromarray(pixels(tile(jnp.concatenate([images, empty]), rows))).save(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def latent_grid(p_z: Prior, latent: int, n: int) -> jax.Array:
    """n coordinates of an axis of the manifold: the prior's quantiles from 0.05 to 0.95.

    Equal steps of probability of that latent alone, so that the grid is denser where the prior is.
    """
    quantiles = jnp.linspace(0.05, 0.95, n)
    if isinstance(p_z, StandardNormal):
        return jax.scipy.special.ndtri(quantiles)
    mean, scale = p_z.mean[:, latent], jnp.exp(p_z.log_var[:, latent] / 2)
    x = jnp.linspace(jnp.min(mean - 4 * scale), jnp.max(mean + 4 * scale), 10_001)
    below = jax.scipy.special.ndtr((x[:, None] - mean) / scale) @ jax.nn.softmax(p_z.logits)
    return jnp.interp(quantiles, below, x)


def manifold(params: Params, n: int = 15) -> Figure:
    """The decoder's mean on an n by n grid of the first two latents, any others at 0.

    The first latent grows to the right and the second upwards; a model of one latent gets one
    row. A conditional model shows its class 0.
    """
    p_z = prior(params)
    grid = latent_grid(p_z, 0, n)
    latent_dim = params.config.latent_dim
    down = latent_grid(p_z, 1, n)[::-1] if latent_dim > 1 else jnp.zeros(1)
    second, first = (axis.ravel() for axis in jnp.meshgrid(down, grid, indexing="ij"))
    z = jnp.zeros((first.size, latent_dim)).at[:, 0].set(first)
    if latent_dim > 1:
        z = z.at[:, 1].set(second)
    labels = jnp.zeros(len(z), int) if params.config.num_classes else None
    images = decode(params, z, labels).mean
    title = f"Decoder means over the latent {'plane' if latent_dim > 1 else 'line'}"
    title += " of class 0" if params.config.num_classes else ""
    if latent_dim > 2:
        title += f" (z3 to z{latent_dim} at 0)"
    figure, axes = _mosaic(images, len(down), title)
    height, width, _ = params.config.image_shape
    shown = np.linspace(0, n - 1, 5).round().astype(int)
    axes.set_xticks((shown + 0.5) * width, [f"{grid[i]:.2f}" for i in shown])
    axes.set_xlabel("z1 (quantiles 0.05 to 0.95 of the prior)")
    if latent_dim > 1:
        axes.set_yticks((shown + 0.5) * height, [f"{down[i]:.2f}" for i in shown])
        axes.set_ylabel("z2")
    return figure


def reconstructions(params: Params, data: Dataset, n: int = 10) -> Figure:
    """Test images above their reconstructions, one of each class where there are classes."""
    chosen = _one_of_each(data.test_labels, len(data.test_images), n)
    originals = jnp.asarray(data.test_images[chosen])
    decoded = reconstruct(params, originals, _labels(params, data, chosen))
    pairs = jnp.concatenate([scale_images(originals), decoded])
    figure, axes = _mosaic(pairs, 2, "Test images and their reconstructions")
    height = params.config.image_shape[0]
    axes.set_yticks([height / 2, height * 3 / 2], ["image", "reconstruction"])
    return figure


def samples(params: Params, key: jax.Array, rows: int = 10) -> Figure:
    """Decoder means of rows * rows draws from the prior."""
    images = sample(params, key, rows * rows)
    return _mosaic(images, rows, f"{rows * rows} samples: decoder means of draws from the prior")[0]


def latents(params: Params, data: Dataset) -> Figure:
    """The posterior of every test image, coloured by class.

    The first two posterior means; with one latent, its posterior mean and standard deviation. Of a
    flow, where it takes the mean, and the standard deviation before it. A class's number stands at
    its median.
    """
    images = jnp.asarray(data.test_images[:_SCATTERED])
    posterior = encode(params, images, _labels(params, data, np.arange(len(images))))
    x, y = posterior.center[:, 0], jnp.exp(posterior.log_var[:, 0] / 2)
    mean = "mean" if params.config.posterior == "gaussian" else "center"
    names = (f"posterior {mean} of z1", "posterior standard deviation of z1")
    if params.config.latent_dim > 1:
        y, names = posterior.center[:, 1], (f"posterior {mean} of z1", f"posterior {mean} of z2")
    points = np.stack([x, y], axis=1)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=names[0], ylabel=names[1], title=f"Latents of {len(points):,} test images")
        if data.test_labels is None:
            axes.scatter(points[:, 0], points[:, 1], s=6, alpha=0.5, color=COLOURS[0], linewidths=0)
            return figure
        classes, index = np.unique(data.test_labels[: len(points)], return_inverse=True)
        colours = np.array(COLOURS)[index % len(COLOURS)]
        # In the order of the data, so that no class lies on top of the others.
        size = 6 if len(points) > 2000 else 14
        axes.scatter(points[:, 0], points[:, 1], s=size, alpha=0.6, c=colours, linewidths=0)
        halo = [withStroke(linewidth=3, foreground="white")]
        for i, label in enumerate(classes[: 2 * len(COLOURS)]):
            where = np.median(points[index == i], axis=0)
            colour = COLOURS[i % len(COLOURS)]
            style: dict[str, Any] = {
                "color": colour,
                "size": 15,
                "weight": "bold",
                "path_effects": halo,
            }
            axes.text(where[0], where[1], str(label), ha="center", va="center", **style)
    return figure


def training(history: Sequence[dict[str, Any]]) -> Figure:
    """The ELBO and its two terms after each epoch; `history` holds the lines of metrics.jsonl."""
    epochs = [record["epoch"] for record in history]
    panels = {
        "elbo": "ELBO",
        "log_likelihood": "log-likelihood, E[log p(x|z)]",
        "kl": "KL to the prior",
    }
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            curves = {split: [record[split][name] for record in history] for split in _SPLITS}
            hidden = _is_outlier(curves)
            for split, colour in _SPLITS.items():
                first = 1 if hidden and split == "train" else 0
                style = {"markersize": 3.5, "color": colour, "label": split}
                axes.plot(epochs[first:], curves[split][first:], "o-", **style)
            note = f"\noff the scale: train, epoch {epochs[0]}, {curves['train'][0]:.3g}"
            axes.set(title=title, xlabel="epoch" + note * hidden)
            axes.set_xlim(epochs[0] - 0.3, epochs[-1] + 0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].set_ylabel("nats per image")
        figure.axes[0].legend(loc="center right")
    return figure


def tile(images: jax.Array | np.ndarray, rows: int) -> np.ndarray:
    """Images [rows * columns, H, W, C] side by side: [rows * H, columns * W, C]."""
    n, height, width, channels = images.shape
    grid = np.asarray(images).reshape(rows, n // rows, height, width, channels)
    return grid.swapaxes(1, 2).reshape(rows * height, n // rows * width, channels)


def _mosaic(images: jax.Array, rows: int, title: str) -> tuple[Figure, Axes]:
    """A figure of tiled images, each pixel drawn as a whole number of dots."""
    mosaic = pixels(tile(images, rows))
    height, width = mosaic.shape[:2]
    scale = max(1, round(900 / max(height, width)))
    left, right, below, above = (0.95, 0.25, 0.65, 0.45)  # inches
    size = (width * scale / _DPI + left + right, height * scale / _DPI + below + above)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=size)
        shares = (left, below, width * scale / _DPI, height * scale / _DPI)
        axes = figure.add_axes(tuple(np.divide(shares, size * 2)))
        extent = (0, width, height, 0)
        axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
        axes.set(title=title, xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, axes


def pixels(image: np.ndarray) -> np.ndarray:
    """uint8 grey [H, W] or colour [H, W, 3]; of other numbers of channels, their mean."""
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    return np.round(image * 255).astype(np.uint8)


def _labels(params: Params, data: Dataset, chosen: np.ndarray) -> jax.Array | None:
    """The classes of some test images, where the model is conditional."""
    if not params.config.num_classes or data.test_labels is None:
        return None
    return jnp.asarray(data.test_labels[chosen], jnp.int32)


def _one_of_each(labels: np.ndarray | None, images: int, n: int) -> np.ndarray:
    """Indices of up to n test images: the first of each class, or the first ones."""
    if labels is None:
        return np.arange(min(n, images))
    _, first = np.unique(labels, return_index=True)
    return first[:n]


def _is_outlier(curves: dict[str, list[float]]) -> bool:
    """Whether the first epoch's training mean is far from all else.

    RMSprop's first steps can throw it off by orders of magnitude, which would flatten the rest.
    """
    kept = [*curves["test"], *curves["train"][1:]]
    reach = max(kept) - min(kept)
    return not min(kept) - reach <= curves["train"][0] <= max(kept) + reach
