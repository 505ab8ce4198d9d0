"""Animation of the decoded latent plane over the epochs of training.

    manifolds/0000.png, ...  frames: before training, after epoch 1, ...

A frame is written before its epoch's checkpoint, so a resumed run writes again the frames that a
crash interrupted. The animation skips frames that are missing, damaged or of another shape than
most.
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
from jaxvae.models.codebooks import is_discrete
from jaxvae.models.vae import Params
from jaxvae.storage import make_folder, write_atomic
from jaxvae.validation import is_image

_FRAMES = 64  # at most; every second frame is deleted when there would be more
_SIDE = 480  # approximate side of a frame, in pixels
_SECONDS = 8.0  # duration of the animation, at most
_STRIP = 26  # height of a frame's title, in pixels


def keep_frame(run_dir: Path, record: dict[str, Any], params: Params) -> None:
    """Write the frame of an epoch, and delete frames if there are too many.

    A model with discrete latents has no latent plane, and so no frames; nor has one of other
    examples than images.

    Args:
      run_dir: the run directory.
      record: the epoch's line of metrics.jsonl, with its number as "epoch".
      params: the model after that epoch.
    """
    epoch = record["epoch"]
    config = params.config
    if not is_kept(epoch) or is_discrete(config) or not is_image(config.image_shape):
        return
    n = int(np.clip(_SIDE // max(config.image_shape[:2]), 3, 15))
    images, _, down = plane(params, n)
    frame = Image.fromarray(pixels(tile(images, len(down))))
    folder = make_folder(run_dir, "manifolds")
    write_atomic(folder / f"{epoch:04}.png", lambda file: frame.save(file, format="png"))
    for path, other in _frames(run_dir):
        if other % _stride(epoch):
            path.unlink(missing_ok=True)


def draw_animation(run_dir: Path) -> list[Path]:
    """Combine a run's frames into figures/manifold.gif.

    Args:
      run_dir: the run directory.

    Returns:
      The path of the animation in a list, which is empty if there are fewer than two frames.
    """
    found = _frames(run_dir)
    pictures: dict[int, np.ndarray] = {}
    for path, epoch in found:
        if epoch % _stride(found[-1][1]):  # not written by this run; limits them to _FRAMES
            continue
        with contextlib.suppress(InputError), reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about files, then reads or refuses them
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
    """Return whether a frame is written at the end of this epoch."""
    return epoch % _stride(epoch) == 0


def _stride(epoch: int) -> int:
    """Return the number of epochs between frames. It depends on the epoch only: runs resume."""
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
    import matplotlib  # for the font of the other figures

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    white = "white" if picture.mode == "L" else (255, 255, 255)
    whole = Image.new(picture.mode, (picture.width, picture.height + _STRIP), white)
    whole.paste(picture, (0, _STRIP))
    where = (2, (_STRIP - 16) // 2)
    ImageDraw.Draw(whole).text(where, f"epoch {epoch}", 0, font=ImageFont.truetype(font, 14))
    return whole
