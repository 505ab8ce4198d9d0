"""The figures of a run."""

from pathlib import Path

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

    Raises InputError if they cannot be written.
    """
    # matplotlib takes as long to import as JAX, so only what draws pays for it.
    from jaxvae.figures import draw_all
    from jaxvae.figures.animation import draw_film

    _, key = run_keys(config)
    try:
        folder = own_folder(run_dir, "figures")
        paths = draw_all(folder, params, data, read_metrics(run_dir), key, kind)
        return paths + draw_film(run_dir)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{run_dir / 'figures'} cannot be written: {reason}") from None
