"""Charts: latents, training curves, active units, aggregate posterior, traversals of vectors."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.evaluation.metrics import ACTIVE, log_aggregate, variance_of_means
from jaxvae.figures.grid import draws_of, latent_grid
from jaxvae.figures.pictures import activity, encode_test_images, traversed
from jaxvae.figures.style import COLOURS, DARK, LIGHT, STYLE, WARM, Picture
from jaxvae.models.distributions import Gaussian, GaussianMixture, UnitGaussian
from jaxvae.models.posteriors import DiagonalGaussian
from jaxvae.models.protocols import Posterior, Prior
from jaxvae.models.vae import Params, prior

_SPLITS = {"train": LIGHT, "test": DARK}
_PANELS = 8  # latents in the figure of the aggregate posterior, at most
_MASSES = (0.9, 0.5)  # probability within each contour
_STEPS, _CELLS = 300, 120  # grid cells along an axis, for a curve and for contours


def latents(params: Params, data: Dataset) -> Figure:
    """Draw the posterior of each test image, coloured by class.

    The axes are the first two posterior means, or with one latent its posterior mean and standard
    deviation. A flow shows the posterior's center, and the standard deviation before the flow. The
    label of a class is written at the median of its points.

    Args:
      params: the model.
      data: its test images are encoded.

    Returns:
      The figure.
    """
    posterior = encode_test_images(params, data)
    center, log_var = (np.asarray(x, float) for x in (posterior.center, posterior.log_var))
    with np.errstate(over="ignore"):
        x, y = center[:, 0], np.exp(log_var[:, 0] / 2)
    mean = _center(params)
    names = (f"posterior {mean} of z1", "posterior standard deviation of z1")
    if params.config.latent_dim > 1:
        y, names = center[:, 1], (f"posterior {mean} of z1", f"posterior {mean} of z2")
    points = np.stack([x, y], axis=1)
    seen = np.all(np.isfinite(points), axis=1)
    title = f"Latents of {len(points):,} test {params.config.noun}s{_unseen(seen)}"
    labels = None if data.test_labels is None else data.test_labels[: len(points)][seen]
    points = points[seen]
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.2, 6.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=names[0], ylabel=names[1], title=title)
        if labels is None:
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
        classes, index = np.unique(labels, return_inverse=True)
        colours = np.array(COLOURS)[index % len(COLOURS)]
        # In the order of the data: drawn by class, the last class would cover the others.
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


def training(history: Sequence[dict[str, Any]], noun: str = "image") -> Figure:
    """Draw the ELBO and its two terms after each epoch.

    Args:
      history: lines of metrics.jsonl.
      noun: what an example is called.

    Returns:
      The figure.
    """
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
        figure.axes[0].set_ylabel(f"nats per {noun}")
        figure.axes[0].legend(loc="center right")
    return figure


def units(
    params: Params, data: Dataset, threshold: float = ACTIVE, *, key: jax.Array | None = None
) -> Figure:
    """Draw the variance of each latent's posterior mean over the test images, largest first.

    A latent is active if the variance is above the threshold, as in
    `jaxvae.evaluation.metrics.active_units`.

    Args:
      params: the model.
      data: its test images are encoded.
      threshold: variance above which a latent is active.
      key: PRNG key of the samples from which the means of a non-Gaussian posterior are estimated.

    Returns:
      The figure.

    Raises:
      InputError: `key` is None and the posterior is not Gaussian.
    """
    if isinstance(params.config.posterior, DiagonalGaussian):
        _, variance = activity(encode_test_images(params, data))
    elif key is None:
        raise InputError("key is None: expected a PRNG key, as the posterior is not Gaussian")
    else:
        variance = np.asarray(variance_of_means(encode_test_images(params, data), key))
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
        bounded = variance[np.isfinite(variance)]
        low = min(threshold, max(bounded.min(initial=threshold), 1e-6)) / 3
        axes.set_ylim(low, bounded.max(initial=threshold) * 3)
        axes.set_xlim(0.3, count + 0.7)
        axes.annotate(f"{threshold:g}", (1, threshold), xycoords=("axes fraction", "data"),
                      xytext=(4, 0), textcoords="offset points", va="center",
                      color=WARM)  # fmt: skip
        if count <= 30:
            axes.set_xticks(np.arange(1, count + 1), [f"z{i + 1}" for i in order])
        axes.grid(visible=False, axis="x")
        axes.set(
            title=f"Active units: {active} of {count} latents vary with the {params.config.noun}",
            xlabel=f"latent, in decreasing order of variance{_unseen(np.isfinite(variance))}",
            ylabel="variance of the posterior mean",
        )
    return figure


def traversal_lines(params: Params, data: Dataset, columns: int = 11) -> Figure:
    """Draw latent traversals of examples that are not images: a panel for each latent.

    The latents are those of `pictures.traversed`. Each line is the decoder's mean of all features
    at one quantile of the latent.

    Args:
      params: the model.
      data: its test examples are encoded.
      columns: number of quantiles.

    Returns:
      The figure.
    """
    means, shown = traversed(params, data, columns)
    lines = np.asarray(means, np.float64).reshape(len(shown), columns, -1)
    features = np.arange(1, lines.shape[2] + 1)
    colours = LinearSegmentedColormap.from_list("quantiles", [LIGHT, DARK])
    scale = ScalarMappable(Normalize(0.01, 0.99), colours)
    wide = min(len(shown), 2)
    with mpl.rc_context(STYLE):
        rows = -(-len(shown) // wide)
        figure = Picture(figsize=(5 * wide + 0.8, 2.2 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, wide, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, latent, curves in zip(grid, shown, lines, strict=False):
            for quantile, curve in zip(np.linspace(0.01, 0.99, columns), curves, strict=True):
                axes.plot(features, curve, ".-", color=scale.to_rgba(quantile), linewidth=1)
            axes.set(ylabel="decoder mean", title=f"z{latent + 1}")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[len(shown) :]:
            axes.remove()
        for axes in grid[len(shown) - wide : len(shown)]:
            axes.set_xlabel("feature")
            axes.tick_params(labelbottom=True)
        figure.colorbar(scale, ax=grid[: len(shown)].tolist(), label="quantile of the prior")
        figure.suptitle(
            "Latent traversals: one latent varies, the others are those of a test example",
            x=0.01,
            ha="left",
            size=STYLE["axes.titlesize"],
        )
    return figure


def aggregate(params: Params, data: Dataset, key: jax.Array) -> Figure:
    """Draw the aggregate posterior of the test images and the prior.

        q(z) = 1/N sum_n q(z|x_n)

    Each latent has a histogram of one sample per image, with the density of the prior. With more
    than eight latents, those are shown whose posterior means vary most. A model of two latents has
    another panel with the regions that hold 50% and 90% of q(z) and of p(z); a flow, whose density
    cannot be evaluated at a given point, shows the samples instead. Samples that are NaN or
    infinite are not drawn; the title has their number.

    Args:
      params: the model.
      data: its test images are encoded.
      key: PRNG key of the samples.

    Returns:
      The figure.
    """
    posterior = encode_test_images(params, data)
    z = np.asarray(_draws(posterior, key), np.float64)
    seen = np.all(np.isfinite(z), axis=1)
    z = z[seen]
    p_z = prior(params)
    marginal = getattr(p_z, "marginal", None)
    drawn = np.zeros((0, 0)) if marginal else np.asarray(draws_of(p_z, key, len(seen)))
    _, variance = activity(posterior)
    shown = np.sort(np.argsort(-variance, kind="stable")[:_PANELS])

    def reach_of(latent: int) -> tuple[float, float]:
        if marginal:
            return _reach(latent_grid(p_z, latent, 2, tail=0.005), z[:, latent])
        return _reach(np.quantile(drawn[:, latent], [0.005, 0.995]), z[:, latent])

    panels = len(shown) + (len(variance) == 2)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(3.1 * columns + 0.5, 3.0 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, latent in zip(grid, shown.tolist(), strict=False):
            reach = reach_of(latent)
            if len(z):
                how: dict[str, Any] = {"density": True, "color": LIGHT, "label": "q(z), samples"}
                axes.hist(z[:, latent], 40, range=reach, **how)
            if marginal:
                x, low, step = np.linspace(*reach, _STEPS + 1), reach[:1], np.diff(reach) / _STEPS
                density = _prior_density(marginal(latent), low, step, _points(1, _STEPS))
                axes.plot(x, density / step, color=WARM, label="p(z)")
            else:
                style = {"histtype": "step", "color": WARM, "label": "p(z), samples"}
                axes.hist(drawn[:, latent], 40, range=reach, density=True, **style)
            axes.set(xlabel=f"z{latent + 1}", xlim=reach)
        for axes in grid[::columns]:
            axes.set_ylabel("density")
        top = 1.1 * max(axes.get_ylim()[1] for axes in grid[: len(shown)])
        for axes in grid[: len(shown)]:
            axes.set_ylim(0, top)
        grid[0].legend(loc="upper left", fontsize=8, handlelength=1.2)
        if len(variance) == 2:
            gaussian = isinstance(posterior, Gaussian)
            of_draws = jax.tree.map(lambda x: np.asarray(x)[seen], posterior) if gaussian else None
            _contours(grid[2], p_z, of_draws, z, [reach_of(0), reach_of(1)])
        for axes in grid[panels:]:
            axes.remove()
        figure.suptitle(
            f"Aggregate posterior of {len(seen):,} test {params.config.noun}s{_unseen(seen)}, and "
            "the prior",
            x=0.01,
            ha="left",
            size=STYLE["axes.titlesize"],
        )
    return figure


def _contours(
    axes: Axes,
    p_z: Prior,
    posterior: Gaussian | None,
    z: np.ndarray,
    reach: list[tuple[float, float]],
) -> None:
    """Draw contours of q(z), or samples `z` if `posterior` is None, and contours of p(z)."""
    low, high = np.transpose(reach)
    x, y = np.linspace(low, high, _CELLS + 1).T
    cell, points = (high - low) / _CELLS, _points(2, _CELLS)
    if posterior is None:
        axes.scatter(z[:, 0], z[:, 1], s=3, color=LIGHT, linewidths=0, rasterized=True)
    elif len(z):
        density = np.exp(log_aggregate(_on_grid(posterior, low, cell), points))
        density = density.reshape(len(y), len(x))
        levels = [*(level_of(density, mass) for mass in _MASSES), density.max() * 1.01]
        axes.contourf(x, y, density, levels, colors=[LIGHT, DARK], alpha=0.75)
    density = _prior_density(p_z, low, cell, points).reshape(len(y), len(x))
    levels = [level_of(density, mass) for mass in _MASSES]
    if levels[0] < levels[1]:  # false if the density is NaN or 0
        axes.contour(x, y, density, levels, colors=WARM, linewidths=1.2)
    axes.set(xlabel="z1", ylabel="z2", title="50% and 90% regions")


def _on_grid(gaussians: Gaussian, low: np.ndarray, cell: np.ndarray) -> Gaussian:
    """Convert Gaussians to units of a grid's cells, and widen the narrow ones to a cell.

        mean' = (mean - low) / cell,    variance' = max(variance / cell^2, 1)

    The density of a narrower one could be 0 at all points of the grid.
    """
    mean = np.clip((np.float64(gaussians.mean) - low) / cell, -1e9, 1e9)  # fits in float32
    log_var = np.maximum(np.float64(gaussians.log_var) - 2 * np.log(cell), 0)
    return Gaussian(*jax.device_put((np.float32(mean), np.float32(log_var))))


def _prior_density(p_z: Prior, low: Any, cell: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Compute the prior's density per cell at points of a grid whose first point is `low`."""
    if isinstance(p_z, UnitGaussian):
        standard = np.zeros((1, len(cell)), np.float32)
        p_z = GaussianMixture(*jax.device_put((np.zeros(1, np.float32), standard, standard)))
    if not isinstance(p_z, GaussianMixture):
        return np.asarray(_density(p_z, low + cell * points)) * np.prod(cell)
    parts = _on_grid(Gaussian(p_z.mean, p_z.log_var), low, cell)
    return np.asarray(_density(GaussianMixture(p_z.logits, *parts), points))


def _points(axes: int, cells: int) -> np.ndarray:
    """Return the points of a grid with `cells` cells along each axis, in cells: [points, axes]."""
    lines = np.meshgrid(*[np.arange(cells + 1, dtype=np.float32)] * axes)
    return np.stack(lines, axis=-1).reshape(-1, axes)


def level_of(density: np.ndarray, mass: float) -> float:
    """Find the level above which a region of the given probability lies.

    Args:
      density: density on cells of equal size, of any shape.
      mass: the probability, from 0 to 1.

    Returns:
      The level.
    """
    falling = np.sort(density, axis=None)[::-1]
    held = np.cumsum(falling, dtype=np.float64)
    return float(falling[np.searchsorted(held, mass * held[-1])])


@jax.jit
def _draws(posterior: Posterior, key: jax.Array) -> jax.Array:
    """Draw one sample of each image's posterior: [N, latent]."""
    keys = jax.random.split(key, len(posterior.mean))
    return posterior.sample_and_log_prob(keys)[0]


@jax.jit
def _density(p_z: Prior, z: jax.Array) -> jax.Array:
    return jnp.exp(p_z.log_prob(z))


def _reach(of_prior: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """Return the range of a latent's axis.

    Args:
      of_prior: quantiles 0.005 and 0.995 of the prior.
      z: samples of the aggregate posterior.

    Returns:
      A range that holds 99% of the prior and of the samples.
    """
    ends = np.array([*of_prior, *(np.quantile(z, [0.005, 0.995]) if len(z) else ())], np.float64)
    ends = ends[np.isfinite(ends)]
    left, right = (ends.min(), ends.max()) if len(ends) else (-1.0, 1.0)
    margin = (right - left) / 20 or 1.0  # all samples are equal
    return left - margin, right + margin


def _unseen(seen: np.ndarray) -> str:
    """Return a note with the number of points that are NaN or infinite, or ""."""
    lost = len(seen) - int(np.sum(seen))
    return f" ({lost:,} NaN or infinite)" if lost else ""


def _center(params: Params) -> str:
    return "mean" if isinstance(params.config.posterior, DiagonalGaussian) else "center"


def _is_outlier(curves: dict[str, list[float]]) -> bool:
    """Return whether the first epoch's training mean is far from all other values.

    RMSprop's first steps can change it by orders of magnitude, which would flatten the curves.
    """
    kept = [*curves["test"], *curves["train"][1:]]
    if len(curves["train"]) == 1:  # no other epoch to flatten
        return False
    reach = max(kept) - min(kept)
    return not min(kept) - reach <= curves["train"][0] <= max(kept) + reach
