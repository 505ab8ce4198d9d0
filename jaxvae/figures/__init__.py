"""What a run drew: finished figures of a trained model, as matplotlib Figures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxvae.data import Dataset
from jaxvae.figures.charts import aggregate, latents, training, units
from jaxvae.figures.pictures import (
    classes,
    interpolations,
    manifold,
    reconstructions,
    samples,
    traversals,
)
from jaxvae.figures.style import save
from jaxvae.models.vae import Params

FORMATS = ("png", "svg", "pdf")


def draw_all(
    folder: Path,
    params: Params,
    data: Dataset,
    history: Sequence[dict[str, Any]],
    key: jax.Array,
    kind: str = "png",
) -> list[Path]:
    """Draw every figure of a run into a folder, as files of one of FORMATS; returns their paths."""
    figures = {
        "manifold_15": partial(manifold, params, 15),
        "manifold_20": partial(manifold, params, 20),
        "reconstructions": partial(reconstructions, params, data),
        "samples": partial(samples, params, key),
        "traversals": partial(traversals, params, data),
        "interpolations": partial(interpolations, params, data),
        "latents": partial(latents, params, data),
        "aggregate": partial(aggregate, params, data, key),
        "units": partial(units, params, data, key=key),
    }
    if params.config.num_classes:
        figures["classes"] = partial(classes, params, key)
    if history:
        figures["training"] = partial(training, history)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        paths.append(folder / f"{name}.{kind}")
        save(draw(), paths[-1])
    return paths
