"""Images from files: IDX, NumPy arrays, and folders of pictures."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxvae.data.dataset import Dataset, split_every_tenth
from jaxvae.errors import InputError

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_SPLITS = {"train": ("train",), "test": ("t10k", "test")}


def load_path(path: Path) -> Dataset:
    """The images of a file or folder.

    - an .npz file: `x_train`, `x_test` (and `y_train`, `y_test`), or `images` (and `labels`);
    - an .npy file or one IDX file: images;
    - a folder of IDX files with MNIST's names, gzipped or not;
    - a folder of ArrayRecord files, train*.array_record* and test*.array_record*, whose records
      are PNG, JPEG or .npy files, with the labels in train_labels.npy and test_labels.npy: the
      training images stay on disk until they are needed;
    - a folder of pictures, all of one size: `train/` and `test/` where there are such folders;
      where pictures lie in folders of their own, these are the classes.

    Every tenth image is held out where the source itself does not split.

    Raises:
      InputError: the path is missing, or is not what it says it is.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist: expected mnist-5k, mnist, tfds:NAME, "
            "or the path of an .npz, .npy or IDX file or of a folder of images"
        )
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.suffix in (".npz", ".npy"):
            return _load_numpy(path)
        return split_every_tenth(_as_images(_read_idx(path), path), None)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _load_numpy(path: Path) -> Dataset:
    try:
        # Opened here, as np.load leaves a file open that turns out to be damaged.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a NumPy file of numbers: {reason}") from None
    labels = {name: _as_labels(arrays[name], path) for name in arrays if name[0] in "ly"}
    if {"x_train", "x_test"} <= set(arrays):
        return Dataset(
            _as_images(arrays["x_train"], path),
            labels.get("y_train"),
            _as_images(arrays["x_test"], path),
            labels.get("y_test"),
        )
    if "images" in arrays:
        return split_every_tenth(_as_images(arrays["images"], path), labels.get("labels"))
    raise InputError(
        f"{path} holds {', '.join(arrays) or 'nothing'}: expected arrays named "
        "x_train and x_test, or images"
    )


def _load_folder(folder: Path) -> Dataset:
    if any(folder.glob("*.array_record*")):
        return _load_records(folder)
    files = sorted(file for file in folder.iterdir() if "idx" in file.name)
    if not files:
        return _load_pictures(folder)

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
        parts.append(_as_images(_read_idx(file), file))
        parts.append(_as_labels(_read_idx(label_file), label_file) if label_file else None)
    return Dataset(*parts)


def _load_records(folder: Path) -> Dataset:
    from jaxvae.data.records import array_records

    parts: list[Any] = []
    for split in ("train", "test"):
        files = list(folder.glob(f"{split}*.array_record*"))
        if not files:
            raise InputError(f"{folder} has no {split} images: expected {split}*.array_record")
        images = array_records(files)
        parts.append(images if split == "train" else images[:])
        path = folder / f"{split}_labels.npy"
        labels = _as_labels(np.load(path, allow_pickle=False), path) if path.exists() else None
        if labels is not None and len(labels) != len(images):
            raise InputError(
                f"{path} holds {len(labels)} labels: expected {len(images)}, one for each image"
            )
        parts.append(labels)
    return Dataset(*parts)


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8: bytes), the rank, the sides, the data."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
            raise InputError(
                f"{path} is not an IDX file of bytes: expected .npz, .npy, or IDX as MNIST's"
            )
        rank = magic[3]
        sides = file.read(4 * rank)
        shape = struct.unpack(f">{rank}I", sides) if len(sides) == 4 * rank else (0,)
        size = int(np.prod(shape, dtype=object))
        data = bytearray()
        # Never more than the header says, however much a gzip file expands to.
        while len(data) <= size and (chunk := file.read(1 << 20)):
            data += chunk
    if not size or len(data) != size:
        raise InputError(f"{path} is damaged: expected {size} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _load_pictures(folder: Path) -> Dataset:
    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        return Dataset(*_read_pictures(train), *_read_pictures(test))
    return split_every_tenth(*_read_pictures(folder))


def _read_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The pictures under a folder, in order of their paths, and their classes if any."""
    from PIL import Image, UnidentifiedImageError

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise InputError(f"{folder} holds no images: expected IDX files, or PNG or JPEG pictures")
    images = []
    for file in files:
        try:
            with Image.open(file) as picture:
                grey = picture.mode in ("1", "L", "I", "I;16", "F", "LA")
                image = np.asarray(picture.convert("L" if grey else "RGB"))
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        images.append(image if image.ndim == 3 else image[..., None])
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"{file} has shape {images[-1].shape}, {files[0]} {images[0].shape}: "
                "expected pictures of one size; resize them first"
            )
    classes = sorted({file.parent for file in files})
    index = {parent: i for i, parent in enumerate(classes)}
    labels = np.array([index[file.parent] for file in files]) if len(classes) > 1 else None
    return np.stack(images), labels


def _as_images(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim not in (3, 4):
        raise InputError(
            f"{path} holds images of shape {array.shape}: expected (images, height, width) or "
            "(images, height, width, channels)"
        )
    return array if array.ndim == 4 else array[..., None]


def _as_labels(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{path} holds labels of shape {array.shape} and type {array.dtype}: "
            "expected one whole number for each image"
        )
    return array.astype(np.int64)
