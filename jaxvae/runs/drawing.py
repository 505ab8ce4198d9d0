"""The figures of a run."""

from pathlib import Path
from typing import Any

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.config import RunConfig, run_keys
from jaxvae.runs.files import (
    read_metrics,
)
from jaxvae.storage import own_folder


def draw(
    run_dir: Path, config: RunConfig, data: Dataset, params: Params, kind: str = "png"
) -> list[Path]:
    """Draw the figures of a run's model into its directory; returns their paths.

    kind: "png", "svg" or "pdf".

    A figure that fails is left out, and a warning of the category `jaxvae.errors.NotDrawn` has the
    reason. Raises InputError if the directory cannot be written.
    """
    # matplotlib takes as long to import as JAX, so only what draws pays for it.
    from jaxvae.figures import draw_all
    from jaxvae.figures.animation import draw_animation
    from jaxvae.figures.style import warn_on_failure

    _, key = run_keys(config)
    folder = run_dir / "figures"
    try:
        folder, history = own_folder(run_dir, "figures"), list[dict[str, Any]]()
        with warn_on_failure(folder / f"training.{kind}"):
            history = read_metrics(run_dir)
        paths = draw_all(folder, params, data, history, key, kind)
        with warn_on_failure(folder / "manifold.gif"):
            paths += draw_animation(run_dir)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
    return paths
