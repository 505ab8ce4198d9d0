"""The file format of compressed images.

    magic, version        8 bytes and 1 byte
    header                shape of an image, numbers of images, chunks, heads and initial words, and
                          lengths of the two texts below
    SHA-256               of the model, and of the images
    chunks                number of images of each chunk, 1 byte each, compressed by zlib
    made by               what computed the probabilities, as text
    heads, words          of the stack
    CRC-32                of all of the above

Numbers are little-endian.
"""

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8, UInt32, UInt64

from jaxvae.data.arrays import expect_memory
from jaxvae.errors import InputError
from jaxvae.models.vae import Params
from jaxvae.storage import open_regular

_MAGIC = b"\x89jaxvae\n"
_VERSION = 1
_FIXED = struct.Struct("<8sBIIIIIHIIH32s32s")
_CRC = struct.Struct("<I")


def is_compressed(path: Path) -> bool:
    """Return whether a path is a file of compressed images."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class Header(NamedTuple):
    """What a file says of its images.

    Attributes:
      images: number of images.
      image_shape: (height, width, channels) of an image.
      initial_bits: random bits that the first images needed and that came back with the others;
        they are part of the file's size, however many images follow.
      made_by: JAX's version and the processor by which the probabilities were computed.
      model: SHA-256 of configuration and parameters of the model.
      content: SHA-256 of the images.
    """

    images: int
    image_shape: tuple[int, int, int]
    initial_bits: int
    made_by: str
    model: bytes
    content: bytes


class Body(NamedTuple):
    """The rest of a file.

    Attributes:
      chunks: number of images of each chunk.
      heads: of the stack.
      words: of the stack.
    """

    chunks: UInt8[np.ndarray, " chunks"]
    heads: UInt64[np.ndarray, " heads"]
    words: UInt32[np.ndarray, " words"]


def pack(header: Header, body: Body) -> bytes:
    """Return the content of a file."""
    chunks, made_by = zlib.compress(body.chunks.tobytes(), 9), header.made_by.encode()
    fixed = _FIXED.pack(
        _MAGIC,
        _VERSION,
        *header.image_shape,
        header.images,
        len(body.chunks),
        len(body.heads),
        header.initial_bits // 32,
        len(chunks),
        len(made_by),
        header.model,
        header.content,
    )
    arrays = body.heads.astype("<u8").tobytes(), body.words.astype("<u4").tobytes()
    data = b"".join((fixed, chunks, made_by, *arrays))
    return data + _CRC.pack(zlib.crc32(data))


def unpack(data: bytes) -> tuple[Header, Body]:
    """Parse the content of a file, which may be from anyone.

    Args:
      data: the content.

    Returns:
      The header and the rest.

    Raises:
      InputError: it is another file, damaged, or of a newer version.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise InputError("it is not a file of compressed images: expected one of jaxvae compress")
    if len(data) > len(_MAGIC) and data[len(_MAGIC)] != _VERSION:
        raise InputError(
            f"it is of format {data[len(_MAGIC)]}, and this version of jaxvae reads {_VERSION}: "
            "use the version that made it"
        )
    damaged = InputError("it is damaged: its checksum is wrong; restore it from a copy")
    if len(data) < _FIXED.size + _CRC.size:
        raise damaged
    data, crc = data[: -_CRC.size], data[-_CRC.size :]
    if _CRC.pack(zlib.crc32(data)) != crc:
        raise damaged
    _, _, *shape, images, chunks, heads, initial, packed, named, model, content = (
        _FIXED.unpack_from(data)
    )
    ends = np.cumsum([_FIXED.size, packed, named, 8 * heads])
    of_chunks, made_by, of_heads, of_words = (
        data[start:end] for start, end in zip(ends, [*ends[1:], len(data)], strict=True)
    )
    if not all(shape):  # any number of images without pixels would need no memory
        raise damaged
    try:
        expect_memory(images * math.prod(shape))
        sizes = zlib.decompressobj().decompress(of_chunks, images + 1)
        numbers = np.frombuffer(sizes, np.uint8)
        body = Body(
            numbers,
            np.frombuffer(of_heads, "<u8").astype(np.uint64),
            np.frombuffer(of_words, "<u4").astype(np.uint32),
        )
        header = Header(images, tuple(shape), 32 * initial, made_by.decode(), model, content)
    except (ValueError, zlib.error):
        raise damaged from None
    consistent = (
        ends[-1] <= len(data)
        and heads > 0
        and len(numbers) == chunks
        and np.all(numbers)
        and numbers.sum() == images
    )
    if not consistent:
        raise damaged
    return header, body


def digest_of_model(params: Params) -> bytes:
    """Return the SHA-256 of configuration and parameters of a model."""
    digest = hashlib.sha256(json.dumps(params.config.to_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype.str}".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.digest()


def digest_of_images(images: UInt8[np.ndarray, "*shape"]) -> bytes:
    """Return the SHA-256 of images."""
    return hashlib.sha256(np.ascontiguousarray(images).data).digest()
