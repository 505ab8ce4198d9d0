"""What every source of images gives."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxvae.errors import InputError


@runtime_checkable
class Images(Protocol):
    """Images that can be had by their numbers: an array, or what reads them from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray: ...


class Dataset(NamedTuple):
    """Images to learn from and images held out, as they were stored.

    Images are uint8 [N, H, W, C] and labels int64 [N], or None where there are no labels.
    Training images too many for memory are read from disk as they are asked for.
    """

    train_images: Images
    train_labels: np.ndarray | None
    test_images: np.ndarray
    test_labels: np.ndarray | None


def split_every_tenth(images: np.ndarray, labels: np.ndarray | None) -> Dataset:
    """Holds out the first image and every tenth after it.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N] or None.

    Returns:
        A Dataset of N - ceil(N / 10) training images and ceil(N / 10) test images, in order.
    """
    held_out = np.arange(len(images)) % 10 == 0
    if labels is None:
        return Dataset(images[~held_out], None, images[held_out], None)
    return Dataset(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def as_images(array: np.ndarray, name: object) -> np.ndarray:
    """An array as [N, H, W, C], or InputError."""
    if array.ndim not in (3, 4):
        raise InputError(
            f"{name} holds images of shape {array.shape}: expected (images, height, width) or "
            "(images, height, width, channels)"
        )
    if not array.size:  # before anything is made for each of its rows, which may be many
        raise InputError(f"{name} holds no images, but an array of shape {array.shape}")
    if array.ndim == 4:
        expect_channels_last(array.shape[1:], name)
    return array if array.ndim == 4 else array[..., None]


def expect_channels_last(shape: tuple[int, ...], name: object) -> None:
    """Raise InputError if an image of this shape begins with what look like its channels."""
    if shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
        raise InputError(
            f"{name} holds images of shape {shape}, whose channels seem to come first: expected "
            "(height, width, channels), as numpy.moveaxis(images, -3, -1) gives"
        )


def expect_labels(images: Images, labels: np.ndarray | None, subject: str, split: str = "") -> None:
    """Raise InputError unless there is a label for each image, or none at all."""
    if labels is not None and len(labels) != len(images):
        raise InputError(
            f"{subject} {len(images)} {split}images and {len(labels)} labels: "
            "expected a label for each"
        )


def as_labels(array: np.ndarray, name: object) -> np.ndarray:
    """An array as int64 [N], or InputError."""
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name} holds labels of shape {array.shape} and type {array.dtype}: "
            "expected one whole number for each image"
        )
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds the label {array.max()}: expected at most 2**63 - 1")
    return array.astype(np.int64)
