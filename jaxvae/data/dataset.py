"""The Dataset type, and the checks that every source of examples shares."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxvae.errors import InputError

if TYPE_CHECKING:
    from jaxvae.data.covariates import Covariate


@runtime_checkable
class Images(Protocol):
    """Images [N, H, W, C] read by index: an array, or an object that reads them from disk.

    An array may also hold other examples, [N, ...].
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, height, width, channels)."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels: uint8 or float32."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray: ...


class Dataset(NamedTuple):
    """Training and test images, or other examples, with their labels.

    Training images that do not fit into memory are read from disk when they are indexed.

    Attributes:
      train_images: images, uint8 or float32 in [0, 1]: [N, H, W, C]; or other examples, float32
        [N, ...].
      train_labels: int64 [N], or None without labels.
      test_images: as `train_images`, an array.
      test_labels: as `train_labels`.
      every_tenth: whether the test images are every tenth of all, as the source has no split.
      columns: names of the features, if the data are a table.
      train_covariates: covariates of the training examples, float32 [N, covariates], on which a
        model is conditional; or None.
      test_covariates: as `train_covariates`.
      covariates: how columns of the source became the covariates.
      covariate_columns: these columns, [N], by name, of all examples in the order of `split_rows`.
    """

    train_images: Images
    train_labels: np.ndarray | None
    test_images: np.ndarray
    test_labels: np.ndarray | None
    every_tenth: bool = False
    columns: tuple[str, ...] | None = None
    train_covariates: np.ndarray | None = None
    test_covariates: np.ndarray | None = None
    covariates: "tuple[Covariate, ...]" = ()
    covariate_columns: Mapping[str, np.ndarray] = MappingProxyType({})

    def split_rows(self, split: str) -> np.ndarray:
        """Return which rows of the source belong to a split.

        Args:
          split: "all", "train" or "test".

        Returns:
          Booleans, [N]. A source with a split of its own has the training examples first.
        """
        rows = np.arange(len(self.train_images) + len(self.test_images))
        test = rows % 10 == 0 if self.every_tenth else rows >= len(self.train_images)
        return {"all": rows >= 0, "train": ~test, "test": test}[split]

    def conditions(self, model: Any, split: str) -> np.ndarray | None:
        """Return what a model takes as the labels of a split's examples.

        Args:
          model: the model's configuration.
          split: "train" or "test".

        Returns:
          The covariates, float32 [N, covariates]; the classes, int32 [N]; or None, of an
          unconditional model or without labels.
        """
        if model.num_covariates:
            covariates: np.ndarray | None = getattr(self, f"{split}_covariates")
            return covariates
        labels = getattr(self, f"{split}_labels") if model.num_classes else None
        return None if labels is None else labels.astype(np.int32)


def is_named(data: str) -> bool:
    """Return whether data are named, such as "mnist"; a path of that name is written "./mnist"."""
    return data in ("mnist-5k", "mnist") or data.startswith("tfds:")


def split_every_tenth(images: np.ndarray, labels: np.ndarray | None) -> Dataset:
    """Split off the first image and every tenth after it as test images.

    Args:
      images: [N, ...].
      labels: int64 [N], or None.

    Returns:
      A Dataset of N - ceil(N / 10) training images and ceil(N / 10) test images, in order.
    """
    held_out = np.arange(len(images)) % 10 == 0
    train, test = (None if labels is None else labels[rows] for rows in (~held_out, held_out))
    return Dataset(images[~held_out], train, images[held_out], test, every_tenth=True)


def as_examples(array: np.ndarray, name: object) -> np.ndarray:
    """Reshape images to [N, H, W, C], and return an array of another rank unchanged.

    Args:
      array: images [N, H, W] or [N, H, W, C], or other examples: [N, features], or [N, ...] of more
        than four axes.
      name: name of the data in error messages.

    Returns:
      The examples.

    Raises:
      InputError: the array is empty or has fewer than two axes, or as for `as_images`.
    """
    if array.ndim in (3, 4):
        return as_images(array, name)
    if array.ndim < 2:
        raise InputError(
            f"{name} holds images of shape {array.shape}: expected (images, height, width), "
            "(images, height, width, channels) or, if they are no images, (examples, features)"
        )
    if not array.size:
        raise InputError(f"{name} holds no examples, but an array of shape {array.shape}")
    return array


def as_images(array: np.ndarray, name: object) -> np.ndarray:
    """Reshape an array to [N, H, W, C].

    Args:
      array: [N, H, W] or [N, H, W, C].
      name: name of the data in error messages.

    Returns:
      The images, [N, H, W, C].

    Raises:
      InputError: the array is empty, has another shape, or has its channels first.
    """
    if array.ndim not in (3, 4):
        raise InputError(
            f"{name} holds images of shape {array.shape}: expected (images, height, width) or "
            "(images, height, width, channels)"
        )
    if not array.size:  # checked first, as an empty array may have any number of rows
        raise InputError(f"{name} holds no images, but an array of shape {array.shape}")
    if array.ndim == 4:
        expect_channels_last(array.shape[1:], name)
    return array if array.ndim == 4 else array[..., None]


def expect_channels_last(shape: tuple[int, ...], name: object) -> None:
    """Check that the first axis of an image's shape does not look like its channels.

    Args:
      shape: shape of an image, of three axes.
      name: name of the data in error messages.

    Raises:
      InputError: the channels seem to come first.
    """
    if shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
        raise InputError(
            f"{name} holds images of shape {shape}, whose channels seem to come first: expected "
            "(height, width, channels), as numpy.moveaxis(images, -3, -1) gives"
        )


def expect_labels(images: Images, labels: np.ndarray | None, subject: str, split: str = "") -> None:
    """Check that there is a label for each image, or none at all.

    Args:
      images: [N, H, W, C].
      labels: [N], or None.
      subject: start of the error message, such as "data.npz has".
      split: name of the split and a space, or nothing.

    Raises:
      InputError: there are more or fewer labels than images.
    """
    if labels is not None and len(labels) != len(images):
        raise InputError(
            f"{subject} {len(images)} {split}images and {len(labels)} labels: "
            "expected one label for each image"
        )


def as_labels(array: np.ndarray, name: object) -> np.ndarray:
    """Convert an array of labels to int64.

    Args:
      array: whole numbers of any type, [N].
      name: name of the data in error messages.

    Returns:
      The labels, int64 [N].

    Raises:
      InputError: the array has another shape or type, or a label larger than 2**63 - 1.
    """
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name} holds labels of shape {array.shape} and type {array.dtype}: "
            "expected one whole number for each image"
        )
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds the label {array.max()}: expected at most 2**63 - 1")
    return array.astype(np.int64)


def number_classes(classes: np.ndarray, name: object) -> np.ndarray:
    """Convert classes to labels: names are numbered in alphabetical order.

    Args:
      classes: text, whole numbers or booleans, [N].
      name: name of the data in error messages.

    Returns:
      The labels, int64 [N].

    Raises:
      InputError: classes of another type.
    """
    if classes.dtype.kind in "OSU":
        return np.unique(classes.astype(str), return_inverse=True)[1].astype(np.int64)
    return as_labels(classes.astype(np.int64) if classes.dtype.kind == "b" else classes, name)


def expect_no_columns(name: object, **columns: object) -> None:
    """Raise InputError if columns of classes or covariates are named for data without columns."""
    for field, given in columns.items():
        if given:
            what = repr(given) if isinstance(given, str) else ", ".join(c.name for c in given)  # type: ignore[attr-defined]
            raise InputError(
                f"{field} is {what}, but {name} is not a .csv, .tsv, .parquet or .h5ad file: leave "
                "it out"
            )
