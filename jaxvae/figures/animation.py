"""A film of the manifold: a frame for every epoch, kept while a model trains.

    manifolds/0000.png, ...  the decoded plane of latents before training, after epoch 1, ...

A frame is written before its epoch's checkpoint, so that what a kill cuts off, the resumed run
writes again. A frame that is missing all the same, or damaged, or of another shape than most, is
missing in the film.
"""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxvae.data.arrays import reading
from jaxvae.data.pictures import read_picture
from jaxvae.errors import InputError
from jaxvae.figures.grid import pixels, plane, tile
from jaxvae.models.vae import Params
from jaxvae.storage import make_folder, write_atomic

_FRAMES = 64  # kept at most; half of them are let go when they would become more
_SIDE = 480  # pixels of a frame, about
_SECONDS = 8.0  # a film takes, at most
_STRIP = 26  # pixels above a frame, for what it says


def keep_frame(run_dir: Path, record: dict[str, Any], params: Params) -> None:
    """Write the frame of an epoch, if it is one to keep; `record` has its number."""
    epoch = record["epoch"]
    if not is_kept(epoch):
        return
    n = int(np.clip(_SIDE // max(params.config.image_shape[:2]), 3, 15))
    images, _, down = plane(params, n)
    frame = Image.fromarray(pixels(tile(images, len(down))))
    folder = make_folder(run_dir, "manifolds")
    write_atomic(folder / f"{epoch:04}.png", lambda file: frame.save(file, format="png"))
    for path, other in _frames(run_dir):
        if other % _stride(epoch):
            path.unlink(missing_ok=True)


def draw_film(run_dir: Path) -> list[Path]:
    """Make figures/manifold.gif of a run's frames; returns its path, or none of fewer than two."""
    found = _frames(run_dir)
    pictures: dict[int, np.ndarray] = {}
    for path, epoch in found:
        if epoch % _stride(found[-1][1]):  # of others a run keeps none, and so at most _FRAMES
            continue
        with contextlib.suppress(InputError), reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it then reads or refuses
            with path.open("rb") as file:
                pictures[epoch] = read_picture(file)
    shapes = [picture.shape for picture in pictures.values()]
    usual = max(shapes, key=shapes.count, default=None)
    frames = [
        _titled(Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture), epoch)
        for epoch, picture in pictures.items()
        if picture.shape == usual
    ]
    if len(frames) < 2:
        return []
    each = int(1000 * min(0.5, _SECONDS / len(frames)))
    path = make_folder(run_dir, "figures") / "manifold.gif"
    durations = [each] * (len(frames) - 1) + [2000]
    how: dict[str, Any] = {"save_all": True, "duration": durations, "loop": 0}
    write_atomic(
        path, lambda file: frames[0].save(file, format="gif", append_images=frames[1:], **how)
    )
    return [path]


def is_kept(epoch: int) -> bool:
    """Whether there is a frame of an epoch, at the time when it is over."""
    return epoch % _stride(epoch) == 0


def _stride(epoch: int) -> int:
    """Every how many epochs there is a frame: a function of the epoch alone, for resumed runs."""
    stride = 1
    while epoch >= _FRAMES * stride:
        stride *= 2
    return stride


def _frames(run_dir: Path) -> list[tuple[Path, int]]:
    paths = sorted((run_dir / "manifolds").glob("*.png"))
    own = [path for path in paths if path.stem.isdecimal() and path.is_file()]
    named = [(path, int(path.stem)) for path in own if path.stem == f"{int(path.stem):04}"]
    return sorted(named, key=lambda one: one[1])


def _titled(picture: Image.Image, epoch: int) -> Image.Image:
    import matplotlib  # the typeface of the other figures

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    white = "white" if picture.mode == "L" else (255, 255, 255)
    whole = Image.new(picture.mode, (picture.width, picture.height + _STRIP), white)
    whole.paste(picture, (0, _STRIP))
    where = (2, (_STRIP - 16) // 2)
    ImageDraw.Draw(whole).text(where, f"epoch {epoch}", 0, font=ImageFont.truetype(font, 14))
    return whole
