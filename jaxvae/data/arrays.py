"""Numeric arrays from untrusted IDX, .npy and .npz files.

Sizes in a header are checked before memory is allocated, nothing is unpickled, and archives are
never extracted to disk.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np

from jaxvae.devices.processes import memory
from jaxvae.errors import InputError

_CHUNK = 2**20  # bytes
_MOST_HEADER = 10_000  # bytes, NumPy's own limit


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Convert every exception of a decoder to an InputError of one line.

    Use it around decoders only: they raise nearly any exception.

    Args:
      name: name of the decoded data in error messages.

    Yields:
      Nothing.

    Raises:
      InputError: the decoder failed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read: {reason}") from None


def read_idx(file: BinaryIO) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, the type (8: bytes), the rank, the sides, the data.

    Args:
      file: open at its start; it may decompress while it is read.

    Returns:
      The array, uint8.

    Raises:
      ValueError: the file is damaged or not an IDX file of bytes.
    """
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise ValueError("not an IDX file of bytes: expected .npz, .npy, or IDX as MNIST's")
    sides = file.read(4 * magic[3])
    if len(sides) < 4 * magic[3]:
        raise ValueError("its header is truncated")
    return _rest(file, struct.unpack(f">{magic[3]}I", sides), np.dtype(np.uint8))


def read_npy(file: BinaryIO, kinds: str = "biuf") -> np.ndarray:
    """Read an .npy file of numbers or booleans.

    Args:
      file: open at its start.
      kinds: the kinds of types that are allowed, as of `numpy.dtype.kind`.

    Returns:
      The array, of the file's shape and type.

    Raises:
      ValueError: the file is damaged, or holds something other than numbers. NumPy's parser of
        headers raises other exceptions too.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError("not a NumPy file of version 1 or 2")
    length = file.read(2 if start[6] == 1 else 4)
    if (size := int.from_bytes(length, "little")) > _MOST_HEADER:
        raise ValueError(f"its header has {size} bytes: expected at most {_MOST_HEADER}")
    header = io.BytesIO(start + length + file.read(size))
    one = np.lib.format.read_magic(header) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(header)
    if dtype.kind not in kinds:
        raise ValueError(f"not an array of numbers, but of {dtype}")
    return _rest(file, shape, dtype, "F" if by_columns else "C")


def read_npz(
    file: BinaryIO, names: tuple[str, ...], texts: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Read the named arrays of an .npz file, and ignore its other members.

    Args:
      file: open at its start.
      names: names of arrays of numbers.
      texts: names of arrays that may also be of text.

    Returns:
      The arrays that the file holds, by name.

    Raises:
      ValueError: the file holds none of the arrays, one of them twice, or compressed by another
        method than NumPy's. zipfile raises other exceptions too.
    """
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        held = [member.filename.removesuffix(".npy") for member in members]
        for name in {*names, *texts} & set(held):
            if held.count(name) > 1:
                raise ValueError(f"it holds {name} more than once")
            member = members[held.index(name)]
            # The methods of numpy.savez and savez_compressed; others have no bound on expansion.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed by another method than NumPy's")
            with reading(f"its {name}"), archive.open(member) as array:
                kinds = "biufU" if name in texts else "biuf"
                arrays[name] = read_npy(array, kinds)  # type: ignore[arg-type]
    if not arrays:
        raise ValueError(
            f"it holds {', '.join(held[:10]) or 'nothing'}: expected arrays named "
            f"{', '.join(names)}"
        )
    return arrays


def expect_memory(size: int) -> None:
    """Check that `size` bytes fit into this machine's memory.

    Raises:
      ValueError: they do not.
    """
    available = memory()
    if available is not None and size > available:
        raise ValueError(
            f"it would take {size:,} bytes: expected at most this machine's memory, {available:,}"
        )


def _rest(
    file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Read the rest of a file, which must be exactly the numbers of an array of this shape."""
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    size = math.prod(shape) * dtype.itemsize
    expect_memory(size)
    data = np.empty(size, np.uint8)  # allocated page by page, when written
    view, done = data.data, 0
    while done < size and (count := file.readinto(view[done : done + _CHUNK])):  # type: ignore[attr-defined]
        done += count
    if done < size or file.read(1):
        raise ValueError(f"it is damaged: expected {size} bytes for shape {shape}")
    return data.view(dtype).reshape(shape, order=order)
