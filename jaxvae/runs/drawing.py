"""Drawing of the figures of a run."""

from pathlib import Path
from typing import Any

from jaxvae.data import Dataset
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.runs.callbacks import Callback, Training
from jaxvae.runs.checkpoints import load
from jaxvae.runs.config import RunConfig, components, run_keys
from jaxvae.runs.divergence import DIVERGED
from jaxvae.runs.files import read_metrics
from jaxvae.runs.progress import working
from jaxvae.storage import make_folder


def draw(
    run_dir: Path, config: RunConfig, data: Dataset, params: Params, kind: str = "png"
) -> list[Path]:
    """Draw the figures of a run into RUN_DIR/figures.

    A figure that fails is left out, with a warning of the category `jaxvae.errors.NotDrawn`.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      data: the data set.
      params: the parameters of the model.
      kind: "png", "svg" or "pdf".

    Returns:
      The paths of the figures.

    Raises:
      InputError: the directory cannot be written.
    """
    # Imported here because matplotlib is as slow to import as JAX.
    from jaxvae.figures import draw_all
    from jaxvae.figures.animation import draw_animation
    from jaxvae.figures.style import warn_on_failure

    _, key = run_keys(config)
    folder = run_dir / "figures"
    try:
        folder, history = make_folder(run_dir, "figures"), list[dict[str, Any]]()
        with warn_on_failure(folder / f"training.{kind}"):
            history = read_metrics(run_dir)
        paths = draw_all(folder, params, data, history, key, kind)
        with warn_on_failure(folder / "manifold.gif"):
            paths += draw_animation(run_dir)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
    return paths


class Figures(Callback):
    """Draw the figures of a run, or of each model of a sweep, at the end of the training.

    Attributes:
      paths: the paths of the figures.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def start(self, training: Training) -> None:
        """Keep configuration and data."""
        if training.run_dir is None:
            raise InputError("figures are drawn in the run directory: expected a run_dir")
        self._run_dir, self._data, self._configs = training.run_dir, training.data, training.configs

    def end(self, params: Params | None) -> None:
        """Draw the figures, unless an error or a signal ended the training."""
        if params is None:
            return
        for name, config in self._configs.items():
            folder = self._run_dir / name
            if name and (folder / DIVERGED).is_file():
                continue
            # In a sweep, params are those of all models.
            own = load(folder, **components(config)) if name else params
            with working(f"drawing {folder}" if name else "drawing"):
                self.paths += draw(folder, config, self._data, own)
