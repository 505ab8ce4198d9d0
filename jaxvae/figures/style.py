"""Style and file formats of all figures."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvae.errors import NotDrawn
from jaxvae.figures.grid import Array, pixels, tile
from jaxvae.storage import write_atomic

STYLE = {
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
# Paul Tol's "muted" scheme and black: ten colours that colour-blind readers can distinguish.
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
COLOURS += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000"]
DARK, LIGHT, WARM = COLOURS[0], COLOURS[1], COLOURS[6]
_DPI = 150
# For vector formats: text stays text, and the bytes do not depend on the date.
_FILES = {"pdf.fonttype": 42, "svg.hashsalt": "jaxvae"}
_UNDATED = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


class Picture(Figure):
    """A figure that Jupyter displays without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        with BytesIO() as file:
            self.savefig(file, format="png", dpi=self.dpi, bbox_inches="tight")
            return file.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix."""
    about = _UNDATED.get(path.suffix)
    how: dict[str, Any] = {"dpi": _DPI, "bbox_inches": "tight", "pad_inches": 0.15}
    how |= {"format": path.suffix[1:], "metadata": about}
    with mpl.rc_context(_FILES):
        write_atomic(path, lambda file: figure.savefig(file, **how))


@contextmanager
def warn_on_failure(path: Path) -> Iterator[None]:
    """Convert an exception to a NotDrawn warning, so that the other figures are drawn.

    Args:
      path: path of the figure.

    Yields:
      Nothing.

    Raises:
      OSError: the figure cannot be written; the others could not be written either.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not path.is_dir():
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"{path} was not drawn, but the other figures are: {reason}"
        warnings.warn(message, NotDrawn, stacklevel=3)


def image_grid(images: Array, rows: int, title: str) -> tuple[Figure, Axes]:
    """Draw a grid of images, with a whole number of dots for each pixel.

    Args:
      images: float in [0, 1], [rows * columns, H, W, C].
      rows: number of rows.
      title: title of the figure.

    Returns:
      The figure and its axes, in which a pixel of the images has length 1.
    """
    picture = pixels(tile(images, rows))
    height, width = picture.shape[:2]
    scale = max(1, round(900 / max(height, width)))
    left, right, below, above = (0.95, 0.25, 0.65, 0.45)  # inches
    size = (width * scale / _DPI + left + right, height * scale / _DPI + below + above)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Picture(figsize=size)
        shares = (left, below, width * scale / _DPI, height * scale / _DPI)
        axes = figure.add_axes(tuple(np.divide(shares, size * 2)))
        extent = (0, width, height, 0)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
        axes.set(title=title, xticks=[], yticks=[])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, axes
