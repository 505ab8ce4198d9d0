"""Pictures from untrusted files: PNG, JPEG, ..."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from jaxvae.errors import InputError, shown

if TYPE_CHECKING:
    from PIL import Image

# The formats that Pillow may decode, and the suffixes that mark the pictures in a folder. Other
# formats are not safe: for EPS, Pillow starts Ghostscript.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}

# Conversions of pictures that the user is warned about.
SCALED_INTEGERS = "scaled from 16 bits to 8"
SCALED_FLOATS = "scaled from floats to 8 bits"
COMPOSED = "composed on white, as they are transparent"
ROTATED = "rotated, as their EXIF orientation says"
COLOURED = "grey among colour, and got three equal channels"

_MOST_PIXELS = 2**24
_MOST_SCANS = 100  # in a progressive JPEG; each takes as long to decode as the whole picture
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF


@contextmanager
def open_picture(file: BinaryIO) -> Iterator["Image.Image"]:
    """Open a picture of one of FORMATS, within limits on the time to decode it.

    Args:
      file: the picture's bytes.

    Yields:
      The picture.

    Raises:
      OSError: the file cannot be read or is damaged. Pillow raises other exceptions too.
      ValueError: the file has another format, or more than 2^24 pixels or 100 scans.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(file, formats=list(FORMATS))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture: expected {', '.join(FORMATS)}") from None
    with opened as picture:
        width, height = picture.size
        if width * height > _MOST_PIXELS:
            raise ValueError(f"it is {width} by {height}: expected at most {_MOST_PIXELS:,} pixels")
        if picture.format in ("JPEG", "MPO"):
            file.seek(0)
            if (scans := file.read().count(b"\xff\xda")) > _MOST_SCANS:
                raise ValueError(f"it has {scans:,} scans: expected at most {_MOST_SCANS}")
        yield picture


def read_picture(file: BinaryIO, changes: set[str] | None = None) -> np.ndarray:
    """Read a picture, or the first of several: uint8 [height, width, 1 or 3].

    Integers of 16 bits and floats from 0 to 1 are scaled to 8 bits, a transparent picture is
    composed on white, and the picture is rotated according to its EXIF orientation.

    Args:
      file: the picture's bytes.
      changes: set to which the conversions are added: SCALED_INTEGERS, COMPOSED, ...

    Returns:
      The pixels, uint8 [height, width, 1 or 3].

    Raises:
      OSError: the file cannot be read or is damaged. Pillow raises other exceptions too.
      ValueError: the file has another format, is too large, or has pixels of another type.
    """
    from PIL import Image

    changes = set() if changes is None else changes
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    with open_picture(file) as picture:
        # Pillow itself scales colour, while it loads the picture.
        if any(";16" in str(tile[-1]) for tile in getattr(picture, "tile", ())):
            changes.add(SCALED_INTEGERS)
        tags = {tag: getattr(picture, "tag_v2", {}).get(tag) for tag in (_BITS, _PHOTOMETRIC)}
        if _orientation(picture) in turns:
            changes.add(ROTATED)
        picture.load()  # rotates a TIFF and removes its orientation
        turn = turns.get(_orientation(picture))
        upright = picture if turn is None else picture.transpose(turn)
        if upright.mode[0] in "IF":
            image = _scaled(upright, tags, changes)
        elif upright.has_transparency_data:
            image = _composed(upright, changes)
        else:
            image = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    return image if image.ndim == 3 else image[..., None]


@dataclass(frozen=True)
class Resize:
    """Scale a picture to a size, with the Lanczos filter of Pillow.

    Attributes:
      height: height after scaling.
      width: width after scaling.
      crop: whether to keep the proportions: what is left over is cut off at both sides, or at top
        and bottom. Otherwise the whole picture is stretched.
    """

    height: int
    width: int
    crop: bool

    @classmethod
    def parse(cls, resize: str | tuple[int, int] | None, crop: bool) -> Self | None:
        """Return the operation, or None if `resize` is None.

        Args:
          resize: (height, width), or a text such as "64x48".
          crop: as in the attributes.

        Returns:
          The operation.

        Raises:
          InputError: wrong numbers, or `crop` without `resize`.
        """
        if resize is None:
            if crop:
                raise InputError("crop needs the size: expected resize too, such as 64x64")
            return None
        text = "x".join(map(str, resize)) if isinstance(resize, tuple | list) else str(resize)
        found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
        if found is None:
            raise InputError(f"resize is {shown(resize)}: expected HEIGHTxWIDTH, such as 64x64")
        return cls(int(found[1]), int(found[2]), crop)

    def __call__(self, image: np.ndarray, changes: set[str]) -> np.ndarray:
        """Return the resized picture, and add what was done to `changes`.

        Args:
          image: uint8 [height, width, 1 or 3].
          changes: set to which the conversion is added.

        Returns:
          The picture, uint8 [self.height, self.width, 1 or 3].
        """
        from PIL import Image, ImageOps

        height, width, _ = image.shape
        if (height, width) == (self.height, self.width):
            return image
        same = height * self.width == width * self.height
        how = "resized" if same else "cropped and resized" if self.crop else "stretched"
        changes.add(f"{how} to {self.height}x{self.width}")
        picture = Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)
        size, method = (self.width, self.height), Image.Resampling.LANCZOS
        fit = ImageOps.fit if self.crop else Image.Image.resize
        return np.asarray(fit(picture, size, method)).reshape(self.height, self.width, -1)


def _orientation(picture: "Image.Image") -> int:
    """Return a picture's EXIF orientation, by default 1: no rotation."""
    try:
        orientation = picture.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises nearly any exception on damaged metadata
        return 1
    return orientation if isinstance(orientation, int) else 1


def _composed(picture: "Image.Image", changes: set[str]) -> np.ndarray:
    """Compose a transparent picture of 8 bits on white."""
    from PIL import Image

    grey = picture.mode in ("1", "L", "LA", "La")
    picture = picture.convert("RGBA")
    if picture.getchannel("A").getextrema() != (255, 255):
        changes.add(COMPOSED)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("L" if grey else "RGB"))


def _scaled(picture: "Image.Image", tags: dict[int, Any], changes: set[str]) -> np.ndarray:
    """Scale a grey picture of more than 8 bits to 8 bits.

    Args:
      picture: of mode F, I or I;16.
      tags: the TIFF tags _BITS and _PHOTOMETRIC; the latter is 0 if white is stored as 0.
      changes: set to which the conversions are added.
    """
    image = np.asarray(picture)
    if picture.mode == "F":
        if not (image.min() >= 0 and image.max() <= 1):  # also true of NaN
            raise ValueError(
                f"its pixels are floats from {image.min():g} to {image.max():g}: "
                "expected 0 to 1; scale them first"
            )
        changes.add(SCALED_FLOATS)
        levels = 1
    elif picture.mode.startswith("I;16"):
        changes.add(SCALED_INTEGERS)
        levels = 2 ** (tags[_BITS] or (16,))[0] - 1
    else:
        raise ValueError(
            "its pixels are integers of 32 bits, or with a sign: expected 8 or 16 bits, or floats "
            "from 0 to 1; scale them first"
        )
    scaled = np.rint(image * (255 / levels)).astype(np.uint8)
    if tags[_PHOTOMETRIC] == 0:  # Pillow ignores it in these modes
        scaled = 255 - scaled
    if (key := picture.info.get("transparency")) is not None:
        changes.add(COMPOSED)
        scaled[image == key] = 255
    return scaled
