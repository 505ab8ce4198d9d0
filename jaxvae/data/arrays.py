"""Arrays of numbers from files that may be anything: IDX, .npy and .npz.

What a file says of itself is checked before memory is taken for it, nothing is unpickled, and
what an archive holds is never written anywhere.
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
    """Whatever goes wrong in decoding `name` ends as InputError, in one line.

    To be wrapped around decoders alone, as they raise nearly anything.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read: {reason}") from None


def read_idx(file: BinaryIO) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8: bytes), the rank, the sides, the data.

    Raises ValueError, or what a file that decompresses does.
    """
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise ValueError("not an IDX file of bytes: expected .npz, .npy, or IDX as MNIST's")
    sides = file.read(4 * magic[3])
    if len(sides) < 4 * magic[3]:
        raise ValueError("its header is cut off")
    return _rest(file, struct.unpack(f">{magic[3]}I", sides), np.dtype(np.uint8))


def read_npy(file: BinaryIO) -> np.ndarray:
    """An .npy file of numbers or booleans. Raises ValueError, or what NumPy and the file do."""
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
    if dtype.kind not in "biuf":
        raise ValueError(f"not an array of numbers, but of {dtype}")
    return _rest(file, shape, dtype, "F" if by_columns else "C")


def read_npz(file: BinaryIO, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz file holds; of others it may hold anything.

    Raises ValueError, or what zipfile and NumPy do.
    """
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        held = [member.filename.removesuffix(".npy") for member in members]
        for name in set(names) & set(held):
            if held.count(name) > 1:
                raise ValueError(f"it holds {name} more than once")
            member = members[held.index(name)]
            # As numpy.savez and numpy.savez_compressed write; others expand without bound.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in another way than by NumPy")
            with reading(f"its {name}"), archive.open(member) as array:
                arrays[name] = read_npy(array)  # type: ignore[arg-type]
    if not arrays:
        raise ValueError(
            f"it holds {', '.join(held[:10]) or 'nothing'}: expected arrays named "
            f"{', '.join(names)}"
        )
    return arrays


def expect_memory(size: int) -> None:
    """Raises ValueError if so many bytes are more than this machine's memory."""
    there = memory()
    if there is not None and size > there:
        raise ValueError(
            f"it would take {size:,} bytes: expected at most this machine's memory, {there:,}"
        )


def _rest(
    file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """What follows in a file, which is to be exactly the numbers of an array of this shape."""
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    size = math.prod(shape) * dtype.itemsize
    expect_memory(size)
    data = np.empty(size, np.uint8)  # memory is taken page by page, as it is written to
    view, done = data.data, 0
    while done < size and (count := file.readinto(view[done : done + _CHUNK])):  # type: ignore[attr-defined]
        done += count
    if done < size or file.read(1):
        raise ValueError(f"it is damaged: expected {size} bytes for shape {shape}")
    return data.view(dtype).reshape(shape, order=order)
