"""Images that do not fit into memory, read from disk when they are indexed."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxvae.data.arrays import read_npy, reading
from jaxvae.data.dataset import expect_channels_last
from jaxvae.data.pictures import read_picture
from jaxvae.errors import InputError


class Records:
    """Images on disk, uint8 [N, height, width, channels], indexed as an array.

    Pickling leaves out the open files; the copy opens them again.

    Attributes:
      dtype: uint8.
      shape: (N, height, width, channels).
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, name: str, source: Callable[[], Any], decode: Callable[[Any], np.ndarray]
    ) -> None:
        """Open the source and read its first image.

        Args:
          name: name of the data in error messages.
          source: opens the records, an object with `__len__` and `__getitems__`.
          decode: converts a record to an image. Its exceptions become an InputError.

        Raises:
          InputError: there are no images, or the first one cannot be read.
        """
        self._name, self._source, self._decode = name, source, decode
        self._opened: Any = None
        with reading(name):
            self._count = len(self._open())
        if not self._count:
            raise InputError(f"{name} has no images: expected at least one")
        self.shape = (self._count, *self._image(self._items([0])[0], 0).shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        images = np.empty((len(rows), *self.shape[1:]), self.dtype)
        items = self._items([int(row) for row in rows])
        for i, (row, item) in enumerate(zip(rows, items, strict=True)):
            image = self._image(item, row)
            if image.shape != self.shape[1:]:
                raise InputError(
                    f"image {row} of {self._name} has shape {image.shape}: expected "
                    f"{self.shape[1:]}, that of the first image; resize them first"
                )
            images[i] = image
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def _open(self) -> Any:
        if self._opened is None:
            with reading(self._name):
                self._opened = self._source()
        return self._opened

    def _items(self, rows: list[int]) -> Sequence[Any]:
        with reading(self._name):
            items = self._open().__getitems__(rows)
            if len(items) != len(rows):
                raise ValueError(f"it returned {len(items)} of {len(rows)} records")
        return items

    def _image(self, item: Any, row: int) -> np.ndarray:
        with reading(f"image {row} of {self._name}"):
            image = self._decode(item)
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise InputError(
                f"image {row} of {self._name} has shape {image.shape} and type {image.dtype}: "
                "expected uint8 of (height, width) or (height, width, channels)"
            )
        if image.ndim == 3:
            expect_channels_last(image.shape, self._name)
        return image if image.ndim == 3 else image[..., None]


def array_records(files: Sequence[Path], changes: set[str] | None = None) -> Records:
    """Open ArrayRecord files, whose records are the bytes of PNG, JPEG or .npy files.

    Args:
      files: paths of the files.
      changes: set to which conversions of pictures are added, as in `read_picture`.

    Returns:
      The images, in the order of the sorted paths.

    Raises:
      InputError: there are no images, or the first one cannot be read.
    """
    names = [str(file) for file in sorted(files)]
    return Records(names[0], partial(_opened, names), partial(_from_bytes, changes=changes))


def _opened(names: list[str]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(names)


def _from_bytes(record: bytes, changes: set[str] | None) -> np.ndarray:
    file = io.BytesIO(record)
    return read_npy(file) if record.startswith(b"\x93NUMPY") else read_picture(file, changes)
