"""Figures of a trained model, drawn with matplotlib."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from jaxvae.data import Dataset
from jaxvae.figures.charts import aggregate, latents, training, traversal_lines, units
from jaxvae.figures.grid import has_plane
from jaxvae.figures.pictures import (
    classes,
    interpolations,
    levels,
    manifold,
    reconstructions,
    samples,
    traversals,
)
from jaxvae.figures.style import save, warn_on_failure
from jaxvae.models.codebooks import is_discrete
from jaxvae.models.vae import Params
from jaxvae.validation import is_image

__all__ = [
    "aggregate",
    "classes",
    "draw_all",
    "interpolations",
    "latents",
    "levels",
    "manifold",
    "reconstructions",
    "samples",
    "save",
    "training",
    "traversal_lines",
    "traversals",
    "units",
]

FORMATS = ("png", "svg", "pdf")


def draw_all(
    folder: Path,
    params: Params,
    data: Dataset,
    history: Sequence[dict[str, Any]],
    key: jax.Array,
    kind: str = "png",
) -> list[Path]:
    """Draw every figure of a run into a folder.

    A figure that fails is skipped with a warning of the category `jaxvae.errors.NotDrawn`. Figures
    that need continuous latents are left out for a model with discrete ones, and grids of images
    for a model of other examples. Grids that have no test images to take covariates from are left
    out for a model with covariates.

    Args:
      folder: created if it does not exist.
      params: the trained model.
      data: the data set; the figures show its test images.
      history: lines of metrics.jsonl. Without any, the curves of training are not drawn.
      key: PRNG key of the samples.
      kind: the file format, one of FORMATS.

    Returns:
      The paths of the figures.

    Raises:
      OSError: the folder cannot be written.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if has_plane(params):
        figures = {f"manifold_{n}": partial(manifold, params, n) for n in (15, 20)}
    figures |= {
        "reconstructions": partial(reconstructions, params, data),
        "samples": partial(samples, params, key, data),
        "traversals": partial(traversals, params, data),
        "interpolations": partial(interpolations, params, data),
        "latents": partial(latents, params, data),
        "aggregate": partial(aggregate, params, data, key),
        "units": partial(units, params, data, key=key),
    }
    if is_discrete(params.config):  # nothing lies between codes
        figures = {name: figures[name] for name in ("reconstructions", "samples")}
    image = is_image(params.config.image_shape)
    if not image:
        drawn = [name for name in ("latents", "aggregate", "units") if name in figures]
        figures = {name: figures[name] for name in drawn}
        if drawn:
            figures["traversals"] = partial(traversal_lines, params, data)
    if hasattr(params.model, "groups") and not params.config.num_covariates:
        figures["levels"] = partial(levels, params, key)
    if params.config.num_classes and params.config.conditional("decoder") and image:
        figures["classes"] = partial(classes, params, key)
    if history:
        figures["training"] = partial(training, history, params.config.noun)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        path = folder / f"{name}.{kind}"
        with warn_on_failure(path):
            save(draw(), path)
            paths.append(path)
    return paths
