"""Pictures from files that may be anything: PNG, JPEG, ..."""

from typing import BinaryIO

import numpy as np

# What Pillow may take a file for, and the ends of names by which a folder's pictures are known.
# Of its other formats, one has a program of the system draw the picture.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}

_MOST_PIXELS = 2**24
_MOST_SCANS = 100  # of a progressive JPEG, each of which takes as long as the whole picture


def read_picture(file: BinaryIO) -> np.ndarray:
    """A picture, or the first of several: uint8 [height, width, 1 or 3].

    Raises OSError, ValueError, or whatever else Pillow's decoders do.
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
                raise ValueError(f"it comes in {scans:,} scans: expected at most {_MOST_SCANS}")
        grey = picture.mode.split(";")[0] in ("1", "L", "I", "F", "LA")
        image = np.asarray(picture.convert("L" if grey else "RGB"))
    return image if image.ndim == 3 else image[..., None]
