"""What was measured: figures with axes and numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.evaluation.metrics import ACTIVE, log_aggregate, variance_of_means
from jaxvae.figures.grid import latent_grid
from jaxvae.figures.pictures import activity, labels_of
from jaxvae.figures.style import COLOURS, DARK, LIGHT, STYLE, WARM, Picture
from jaxvae.models.likelihoods import Gaussian
from jaxvae.models.priors import Mixture, StandardNormal
from jaxvae.models.vae import Params, Posterior, Prior, encode, prior

_SPLITS = {"train": LIGHT, "test": DARK}
_SCATTERED = 10_000  # points beyond this only hide each other
_PANELS = 8  # latents of which the aggregate posterior is drawn
_MASSES = (0.9, 0.5)  # of the contours


def latents(params: Params, data: Dataset) -> Figure:
    """The posterior of every test image, coloured by class.

    The first two posterior means; with one latent, its posterior mean and standard deviation. Of a
    flow, where it takes the mean, and the standard deviation before it. A class's number stands at
    its median.
    """
    images = jnp.asarray(data.test_images[:_SCATTERED])
    posterior = encode(params, images, labels_of(params, data, np.arange(len(images))))
    x, y = posterior.center[:, 0], jnp.exp(posterior.log_var[:, 0] / 2)
    mean = _center(params)
    names = (f"posterior {mean} of z1", "posterior standard deviation of z1")
    if params.config.latent_dim > 1:
        y, names = posterior.center[:, 1], (f"posterior {mean} of z1", f"posterior {mean} of z2")
    points = np.stack([x, y], axis=1)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.2, 6.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=names[0], ylabel=names[1], title=f"Latents of {len(points):,} test images")
        if data.test_labels is None:
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=6,
                alpha=0.5,
                color=COLOURS[0],
                linewidths=0,
                rasterized=True,
            )
            return figure
        classes, index = np.unique(data.test_labels[: len(points)], return_inverse=True)
        colours = np.array(COLOURS)[index % len(COLOURS)]
        # In the order of the data, so that no class lies on top of the others.
        size = 6 if len(points) > 2000 else 14
        axes.scatter(
            points[:, 0], points[:, 1], s=size, alpha=0.6, c=colours, linewidths=0, rasterized=True
        )
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
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(10.5, 3.6), layout="constrained")
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


def units(
    params: Params, data: Dataset, threshold: float = ACTIVE, *, key: jax.Array | None = None
) -> Figure:
    """How much every latent's posterior mean varies over the test images, largest first.

    Above the threshold a latent counts as active: `jaxvae.evaluation.metrics.active_units`.

    Args:
      key: PRNG key of the samples that a flow's means are estimated from; others need none.

    Raises:
      InputError: no key for the posterior of a flow.
    """
    if params.config.posterior == "gaussian":
        _, variance = activity(params, data)
    elif key is None:
        raise InputError("key is None: expected a PRNG key, as the posterior is a flow")
    else:
        images = jnp.asarray(data.test_images[:_SCATTERED])
        posterior = encode(params, images, labels_of(params, data, np.arange(len(images))))
        variance = np.asarray(variance_of_means(posterior, key))
    order = np.argsort(-variance, kind="stable")
    active = int(np.sum(variance > threshold))
    count = len(variance)
    width = 0.8 * min(1, count / 8)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        colours = [DARK if variance[i] > threshold else LIGHT for i in order]
        axes.bar(np.arange(1, count + 1), variance[order], width, color=colours)
        axes.axhline(threshold, color=WARM, linewidth=1.2, linestyle="--")
        axes.set_yscale("log")
        low = min(threshold, max(variance.min(), 1e-6)) / 3
        axes.set_ylim(low, max(variance.max(), threshold) * 3)
        axes.set_xlim(0.3, count + 0.7)
        axes.annotate(f"{threshold:g}", (1, threshold), xycoords=("axes fraction", "data"),
                      xytext=(4, 0), textcoords="offset points", va="center",
                      color=WARM)  # fmt: skip
        if count <= 30:
            axes.set_xticks(np.arange(1, count + 1), [f"z{i + 1}" for i in order])
        axes.grid(visible=False, axis="x")
        axes.set(
            title=f"Active units: {active} of {count} latents vary with the image",
            xlabel="latent, by its variance",
            ylabel="variance of the posterior mean",
        )
    return figure


def aggregate(params: Params, data: Dataset, key: jax.Array) -> Figure:
    """The aggregate posterior q(z) = 1/N sum_n q(z|x_n) of the test images, and the prior p(z).

    A histogram of one draw of every image's posterior for each latent, of more than eight those
    whose means vary most, with the prior's density. Two latents also together: regions that hold
    half and nine tenths of either; of a flow, whose density is not known at a given point, the
    draws themselves.
    """
    images = jnp.asarray(data.test_images[:_SCATTERED])
    posterior = encode(params, images, labels_of(params, data, np.arange(len(images))))
    z = np.asarray(_draws(posterior, key))
    p_z = prior(params)
    _, variance = activity(params, data)
    shown = np.sort(np.argsort(-variance, kind="stable")[:_PANELS])
    panels = len(shown) + (len(variance) == 2)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(3.1 * columns + 0.5, 3.0 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, latent in zip(grid, shown, strict=False):
            reach = _reach(p_z, latent, z[:, latent])
            axes.hist(z[:, latent], 40, range=reach, density=True, color=LIGHT, label="q(z), drawn")
            x = np.linspace(*reach, 300)
            density = _density(_of_latent(p_z, latent), x[:, None])
            axes.plot(x, density, color=WARM, label="p(z)")
            axes.set(xlabel=f"z{latent + 1}", xlim=reach)
        for axes in grid[::columns]:
            axes.set_ylabel("density")
        top = 1.1 * max(axes.get_ylim()[1] for axes in grid[: len(shown)])
        for axes in grid[: len(shown)]:
            axes.set_ylim(0, top)
        grid[0].legend(loc="upper left", fontsize=8, handlelength=1.2)
        if len(variance) == 2:
            _contours(grid[2], p_z, posterior, z)
        for axes in grid[panels:]:
            axes.remove()
        figure.suptitle(
            f"Aggregate posterior of {len(images):,} test images, and the prior",
            x=0.01,
            ha="left",
            size=STYLE["axes.titlesize"],
        )
    return figure


def _contours(axes: Axes, p_z: Prior, posterior: Any, z: np.ndarray) -> None:
    x, y = (np.linspace(*_reach(p_z, latent, z[:, latent]), 121) for latent in (0, 1))
    points = np.float32(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
    shape = len(y), len(x)
    if isinstance(posterior, Gaussian):
        density = np.exp(np.asarray(log_aggregate(posterior, points))).reshape(shape)
        levels = [*(level_of(density, mass) for mass in _MASSES), density.max() * 1.01]
        axes.contourf(x, y, density, levels, colors=[LIGHT, DARK], alpha=0.75)
    else:
        axes.scatter(z[:, 0], z[:, 1], s=3, color=LIGHT, linewidths=0, rasterized=True)
    density = np.asarray(_density(p_z, points)).reshape(shape)
    levels = [level_of(density, mass) for mass in _MASSES]
    axes.contour(x, y, density, levels, colors=WARM, linewidths=1.2)
    axes.set(xlabel="z1", ylabel="z2", title="regions of 50% and 90%")


def level_of(density: np.ndarray, mass: float) -> float:
    """The density above which so much of the mass lies; `density` is of equal cells."""
    falling = np.sort(density, axis=None)[::-1]
    held = np.cumsum(falling) / falling.sum()
    return float(falling[np.searchsorted(held, mass)])


@jax.jit
def _draws(posterior: Posterior, key: jax.Array) -> jax.Array:
    """One of every image's posterior, [N, latent]."""
    keys = jax.random.split(key, len(posterior.mean))
    return posterior.sample_and_log_prob(keys)[0]


@jax.jit
def _density(p_z: Prior, z: jax.Array) -> jax.Array:
    return jnp.exp(p_z.log_prob(z))


def _of_latent(p_z: Prior, latent: int) -> Prior:
    """The prior of one of the latents alone."""
    if isinstance(p_z, StandardNormal):
        return StandardNormal(1)
    at = slice(latent, latent + 1)
    return Mixture(p_z.logits, p_z.mean[:, at], p_z.log_var[:, at])


def _reach(p_z: Prior, latent: int, z: np.ndarray) -> tuple[float, float]:
    """What of a latent's axis is worth drawing: of prior and draws, all but 1 in 1,000."""
    low, _, high = latent_grid(p_z, int(latent), 3, tail=0.0005)
    seen = np.quantile(z, [0.0005, 0.9995])
    left, right = min(float(low), seen[0]), max(float(high), seen[1])
    margin = (right - left) / 20
    return left - margin, right + margin


def _center(params: Params) -> str:
    return "mean" if params.config.posterior == "gaussian" else "center"


def _is_outlier(curves: dict[str, list[float]]) -> bool:
    """Whether the first epoch's training mean is far from all else.

    RMSprop's first steps can throw it off by orders of magnitude, which would flatten the rest.
    """
    kept = [*curves["test"], *curves["train"][1:]]
    reach = max(kept) - min(kept)
    return not min(kept) - reach <= curves["train"][0] <= max(kept) + reach
