"""The figures of a run."""

from pathlib import Path

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.files import (
    read_metrics,
)


def draw(run_dir: Path, data: Dataset, params: Params, kind: str = "png") -> list[Path]:
    """Draw the figures of a run's model into its directory; returns their paths.

    kind: "png", "svg" or "pdf".

    Raises InputError if they cannot be written.
    """
    # matplotlib takes as long to import as JAX, so only what draws pays for it.
    from jaxvae.figures import draw_all
    from jaxvae.figures.animation import draw_film

    _, key = run_keys(read_config(run_dir, params.config.own_network))
    try:
        paths = draw_all(run_dir / "figures", params, data, read_metrics(run_dir), key, kind)
        return paths + draw_film(run_dir)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{run_dir / 'figures'} cannot be written: {reason}") from None
