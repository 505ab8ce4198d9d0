"""Data sets from files, images, NumPy arrays and tables, and images to files."""

import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxvae.data.arrays import expect_memory, read_idx, read_npy, read_npz, reading
from jaxvae.data.covariates import Covariates, column_names, with_covariates
from jaxvae.data.dataset import (
    Dataset,
    as_examples,
    as_images,
    as_labels,
    expect_labels,
    expect_no_columns,
    split_every_tenth,
)
from jaxvae.data.pictures import COLOURED, FORMATS, Resize, read_picture
from jaxvae.errors import InputError
from jaxvae.storage import write_atomic

_KERAS = ("x_train", "y_train", "x_test", "y_test")
_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
_IDX = re.compile(r"idx[134](-ubyte|(\.gz)?$)")
# Names of folders that hold a split, in any case. The first one that exists is used.
_TRAIN = ("train", "training")
_HELD_OUT = ("test", "testing", "val", "valid", "validation")
ENDINGS = (".npz", ".npy", ".csv", ".tsv", ".parquet", ".h5ad", ".gz")  # of files of data
_ENDS = frozenset[str]().union(*FORMATS.values())


def load_path(
    path: Path,
    changes: set[str],
    label_column: str | None = None,
    covariates: Covariates = None,
    *,
    missing: bool = False,
    unlabelled: bool = False,
    resize: Resize | None = None,
) -> Dataset:
    """Load the images, or other examples, of a file or folder.

    - an .npz file: `x_train`, `x_test` (and `y_train`, `y_test`), or `images` (and `labels`), and
      for each covariate NAME: `NAME_train`, `NAME_test`, or `NAME`;
    - an .npy file: images or other examples; one IDX file: images;
    - a .csv, .tsv or .parquet file: an example in each row (`tables.load_table`);
    - an .h5ad file: the rows of X (`anndata.load_h5ad`);
    - a folder of IDX files with MNIST's names, gzipped or not;
    - a folder of ArrayRecord files, train*.array_record* and test*.array_record*, whose records
      are PNG, JPEG or .npy files, with the labels in train_labels.npy and test_labels.npy: the
      training images are read from disk when they are needed;
    - a folder of pictures, which `read_picture` converts to uint8: of one size, or of any sizes
      with `resize`; grey ones among pictures in colour get three equal channels. Subfolders
      `train/` and `test/` (else `val/`), in any case, are the splits. Subfolders of these are the
      classes, numbered in the order of their names over both splits. Names that begin with a dot
      are skipped.

    Every tenth example becomes a test example where the source has no split of its own.

    Untrusted files are parsed safely: nothing is unpickled, extracted or executed, and memory is
    allocated only for data that the file holds.

    Args:
      path: the file or folder.
      changes: set to which conversions of pictures are added, as in `read_picture`.
      label_column: the column of classes of a table or AnnData file.
      covariates: columns of a table or AnnData file, or arrays of an .npz file, as for
        `covariates.with_covariates`.
      missing: whether numbers of a table or AnnData file may be missing, which makes them NaN.
      unlabelled: whether its classes may be missing, which makes the labels -1.
      resize: resizes the pictures of a folder; not used for other formats.

    Returns:
      The images, and the labels where there are any.

    Raises:
      InputError: the path does not exist or has another format; a picture has more than 2^24
        pixels; an array is larger than this machine's memory; `label_column` or `covariates` for
        another format.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist: expected mnist-5k, mnist, tfds:NAME, "
            "or the path of an .npz, .npy or IDX file or of a folder of images, or of a .csv, "
            ".tsv, .parquet or .h5ad file"
        )
    if path.is_file() and path.suffix in (".csv", ".tsv", ".parquet"):
        from jaxvae.data.tables import load_table

        return load_table(path, label_column, covariates, missing=missing, unlabelled=unlabelled)
    if path.is_file() and path.suffix == ".h5ad":
        from jaxvae.data.anndata import load_h5ad

        return load_h5ad(path, label_column, covariates, missing=missing, unlabelled=unlabelled)
    expect_no_columns(path, label_column=label_column)
    if path.is_file() and path.suffix == ".npz":
        return _load_numpy(path, covariates)
    expect_no_columns(path, covariate_columns=covariates)
    if path.is_dir():
        return _load_folder(path, changes, resize)
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder: expected one of them")
    if path.suffix == ".npy":
        return _load_numpy(path)
    return split_every_tenth(as_images(_read_idx(path), path), None)


def write_images(path: Path, images: np.ndarray) -> None:
    """Write images to a file or a new folder, which `load_path` reads.

    A kill leaves nothing or everything.

    Args:
      path: an .npz file, with the array `images`, an .npy file, or a folder of PNG files.
      images: uint8 [N, H, W, C].

    Raises:
      InputError: the folder exists and is not empty, PNG has no such number of channels, or the
        path cannot be written.
    """
    try:
        expect_free(path)
        if path.suffix == ".npz":
            write_atomic(path, lambda file: np.savez_compressed(file, images=images))
        elif path.suffix == ".npy":
            write_atomic(path, lambda file: np.save(file, images))
        else:
            _write_pictures(path, images)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def expect_free(path: Path) -> None:
    """Check that `write_images` may write to a path: a file, or a folder without files.

    Args:
      path: as in `write_images`.

    Raises:
      InputError: it is a folder with files.
    """
    if path.suffix in (".npz", ".npy"):
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"{path} exists already: expected a new folder, or a file name ending in .npz or .npy"
        )


def _write_pictures(folder: Path, images: np.ndarray) -> None:
    from PIL import Image

    if images.shape[-1] not in (1, 3):
        raise InputError(
            f"{folder} is a folder of PNG files, but images have {images.shape[-1]} channels: "
            "expected 1 or 3; choose a file name ending in .npz or .npy"
        )
    part = Path(tempfile.mkdtemp(prefix=".jaxvae-", suffix=".part", dir=folder.parent))
    try:
        part.chmod(0o755)
        digits = len(str(len(images) - 1))
        for i, image in enumerate(images):
            squeezed = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(squeezed).save(part / f"{i:0{digits}}.png")
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _load_numpy(path: Path, covariates: Covariates = None) -> Dataset:
    wanted = column_names(covariates)
    texts = [f"{name}{split}" for name in wanted for split in ("_train", "_test", "")]
    with reading(path), path.open("rb") as file:
        if file.read(2) != b"PK":  # the first bytes of a zip file
            file.seek(0)
            arrays = {"images": read_npy(file)}
        else:
            arrays = read_npz(file, (*_KERAS, "images", "labels"), tuple(texts))
        given = {name: np.array(arrays.pop(name).tolist()) for name in texts if name in arrays}
    labels = {name: as_labels(arrays[name], path) for name in arrays if name[0] in "ly"}

    def with_given(data: Dataset, splits: Mapping[str, int]) -> Dataset:
        columns = {}
        for name in wanted:
            for split, n in splits.items():
                shape = getattr(given.get(name + split), "shape", None)
                if shape != (n,):
                    raise InputError(
                        f"{path} has {f'shape {shape} of' if shape else 'no'} {name + split}: "
                        f"expected an array of shape ({n},), a covariate of each example"
                    )
            columns[name] = np.concatenate([given[name + split] for split in splits])
        return with_covariates(data, columns, covariates, path)

    if {"x_train", "x_test"} <= set(arrays):
        data = Dataset(
            as_examples(arrays["x_train"], path),
            labels.get("y_train"),
            as_examples(arrays["x_test"], path),
            labels.get("y_test"),
        )
        return with_given(data, {"_train": len(data.train_images), "_test": len(data.test_images)})
    if "images" in arrays:
        images = as_examples(arrays["images"], path)
        expect_labels(images, labels.get("labels"), f"{path} has")
        return with_given(split_every_tenth(images, labels.get("labels")), {"": len(images)})
    raise InputError(
        f"{path} holds {', '.join(sorted(arrays))}: expected arrays named "
        "x_train and x_test, or images"
    )


def load_idx(folder: Path) -> Dataset:
    """Load a folder of IDX files with MNIST's names, gzipped or not.

    Args:
      folder: the folder.

    Returns:
      The images, and the labels of the splits that have a file of labels.

    Raises:
      InputError: a file is damaged, or there are no images of a split.
    """
    files = _idx_files(folder)

    def find(split: str, rank: int) -> Path | None:
        names = [file for file in files if f"idx{rank}" in file.name]
        return next((file for file in names if file.name.startswith(_SPLITS[split])), None)

    parts: list[Any] = []
    for split in ("train", "test"):
        file = find(split, 3) or find(split, 4)
        if file is None:
            names = ", ".join(f"{prefix}-images-idx3-ubyte[.gz]" for prefix in _SPLITS[split])
            raise InputError(f"{folder} has no {split} images: expected a file {names}")
        label_file = find(split, 1)
        parts.append(as_images(_read_idx(file), file))
        parts.append(as_labels(_read_idx(label_file), label_file) if label_file else None)
    return Dataset(*parts)


def _idx_files(folder: Path) -> list[Path]:
    files = [file for file in _files(folder, "*") if _IDX.search(file.name)]
    return [file for file in files if file.suffix.lower() not in _ENDS]


def _load_folder(folder: Path, changes: set[str], resize: Resize | None) -> Dataset:
    if _files(folder, "*.array_record*"):
        return _load_records(folder, changes)
    return load_idx(folder) if _idx_files(folder) else _load_pictures(folder, changes, resize)


def _load_records(folder: Path, changes: set[str]) -> Dataset:
    from jaxvae.data.records import array_records

    parts: list[Any] = []
    for split in ("train", "test"):
        files = _files(folder, f"{split}*.array_record*")
        if not files:
            raise InputError(f"{folder} has no {split} images: expected {split}*.array_record")
        images = array_records(files, changes)
        parts.append(images if split == "train" else images[:])
        path = folder / f"{split}_labels.npy"
        labels = as_labels(_read(path, read_npy), path) if path.is_file() else None
        if labels is not None and len(labels) != len(images):
            raise InputError(
                f"{path} holds {len(labels)} labels: expected {len(images)}, one for each image"
            )
        parts.append(labels)
    return Dataset(*parts)


def _read(path: Path, decode: Callable[[BinaryIO], np.ndarray]) -> np.ndarray:
    with reading(path), path.open("rb") as file:
        return decode(file)


def _read_idx(path: Path) -> np.ndarray:
    if path.suffix != ".gz":
        return _read(path, read_idx)
    with reading(path), gzip.open(path) as file:
        return read_idx(file)  # type: ignore[arg-type]


def _load_pictures(folder: Path, changes: set[str], resize: Resize | None) -> Dataset:
    train, test = _split(folder, _TRAIN), _split(folder, _HELD_OUT)
    if train is None or test is None:
        images, classes = _read_pictures(folder, changes, resize)
        return split_every_tenth(images, _numbered(classes, sorted({*classes})))
    train_images, train_classes = _read_pictures(train, changes, resize)
    test_images, test_classes = _read_pictures(test, changes, resize)
    if train_images.shape[3] < test_images.shape[3]:
        train_images = _in_colour(train_images, changes)
    elif train_images.shape[3] > test_images.shape[3]:
        test_images = _in_colour(test_images, changes)
    names = sorted({*train_classes, *test_classes})  # one numbering for both
    return Dataset(
        train_images,
        _numbered(train_classes, names),
        test_images,
        _numbered(test_classes, names),
    )


def _split(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Find the subfolder with the first of the names that exists, in any case."""
    subfolders = [path for path in folder.iterdir() if path.is_dir()]
    for name in names:
        found = sorted(path for path in subfolders if path.name.lower() == name)
        if len(found) > 1:
            raise InputError(
                f"{folder} holds {found[0].name} and {found[1].name}: expected one of them"
            )
        if found:
            return found[0]
    return None


def _read_pictures(
    folder: Path, changes: set[str], resize: Resize | None
) -> tuple[np.ndarray, list[Path]]:
    """Read the pictures under a folder, in the order of their paths, and the class of each.

    The class of a picture is its subfolder; without subfolders there are no classes.
    """
    files = [file for file in _files(folder, "**/*") if file.suffix.lower() in _ENDS]
    if not files:
        raise InputError(f"{folder} holds no images: expected IDX files, or PNG or JPEG pictures")

    def decode(file: BinaryIO) -> np.ndarray:
        image = read_picture(file, changes)
        return image if resize is None else resize(image, changes)

    first = _read(files[0], decode)
    with reading(folder):
        expect_memory(len(files) * first.nbytes)
        images = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        image = _read(file, decode)
        height, width, channels = image.shape
        if image.shape[:2] != first.shape[:2]:
            raise InputError(
                f"{file} is {height}x{width}, {files[0]} {first.shape[0]}x{first.shape[1]}: "
                f"expected pictures of one size; resize all of them with --resize {height}x{width}"
                f" (in Python resize=({height}, {width})), to keep their proportions with --crop"
            )
        if channels > images.shape[3]:
            images = _in_colour(images, changes)
        elif channels < images.shape[3]:
            changes.add(COLOURED)
        images[i] = image
    classes = [file.parent.relative_to(folder) for file in files]
    return images, classes if set(classes) != {Path()} else []


def _in_colour(images: np.ndarray, changes: set[str]) -> np.ndarray:
    """Repeat the channel of grey images: [N, H, W, 1] to [N, H, W, 3]."""
    changes.add(COLOURED)
    with reading("grey images among images in colour"):
        expect_memory(3 * images.nbytes)
    return np.repeat(images, 3, axis=3)


def _numbered(classes: list[Path], names: list[Path]) -> np.ndarray | None:
    """Number each picture's class by its place among the names; None without classes."""
    if not classes or len(names) < 2:
        return None
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[name] for name in classes])


def _files(folder: Path, pattern: str) -> list[Path]:
    """List the regular files that are not hidden, sorted. Reading from a pipe might never end."""
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
