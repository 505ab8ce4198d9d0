"""Image data sets of TensorFlow Datasets (TFDS), by name, read without TensorFlow.

A child process prepares a data set once, as only preparing needs TensorFlow. MNIST and two data
sets of the same form are not prepared: their four IDX files are read directly.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import operator
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from jaxvae.data.arrays import read_npy, read_npz, reading
from jaxvae.data.dataset import (
    Dataset,
    as_images,
    as_labels,
    expect_channels_last,
    expect_labels,
    split_every_tenth,
)
from jaxvae.data.files import load_idx
from jaxvae.data.pictures import open_picture
from jaxvae.data.records import Records
from jaxvae.errors import InputError
from jaxvae.storage import open_regular, write_atomic

_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
_PORTS = {"http": 80, "https": 443, "ftp": 21}
_IDX = ("mnist", "fashion_mnist", "kmnist")  # each has the four files of MNIST
_IN_MEMORY = 2**30  # bytes of training images; larger data sets stay on disk
_TIMEOUT = 10.0  # seconds for a server to answer
_EXPLAINED = 3  # exit code of a child whose last line of output is the reason
_FEATURES = "tensorflow_datasets.core.features."  # the package of TFDS's own features
_ONLY_OWN: ContextVar[bool] = ContextVar("only_own", default=False)

PathLike = str | os.PathLike[str]


def load(
    name: str, *, data_dir: PathLike | None = None, manual_dir: PathLike | None = None
) -> Dataset:
    """Load an image data set of TensorFlow Datasets, and prepare it the first time.

    The test images are the split "test", else "validation", else every tenth of "train".
    "mnist", "fashion_mnist" and "kmnist" are read from their four files unless they are prepared;
    the images and their order are the same.

    Args:
      name: a TFDS name, with or without config and version: "mnist", "cifar10:3.0.2".
      data_dir: folder of prepared data sets; None is TFDS's own, ~/tensorflow_datasets.
      manual_dir: folder of manually downloaded files, used in place of downloads.

    Returns:
      Images uint8 [N, H, W, C] and labels int64 [N], or None without labels.

    Raises:
      InputError: the data set cannot be prepared or read, or does not hold uint8 images of one
        size.
    """
    with _quiet(), _own_features():
        builder = _builder(name, data_dir)
        if not builder.is_prepared():
            manual = None if manual_dir is None else Path(manual_dir).expanduser()
            if manual is not None and not manual.is_dir():
                raise InputError(
                    f"manual_dir is {manual}: expected a folder of manually downloaded files"
                )
            if builder.name in _IDX:
                return _load_idx(builder, name, manual)
            _prepare(builder, name, manual)
            builder = _builder(name, data_dir)
        cache = Path(builder.data_dir) / "jaxvae.npz"
        dataset = _read_cache(cache)
        if dataset is None:
            dataset = _decode(builder, name)
            if isinstance(dataset.train_images, np.ndarray):
                _write_cache(cache, dataset)
    return dataset._replace(every_tenth=_held_out(builder) is None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import tensorflow_datasets  # noqa: F401  # absl must create its logger first

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_features() -> Iterator[None]:
    """Refuse data sets whose features.json names features of other packages than TFDS.

    TFDS imports any module that this file names.
    """
    _guard_features()
    token = _ONLY_OWN.set(True)
    try:
        yield
    finally:
        _ONLY_OWN.reset(token)


@functools.cache
def _guard_features() -> None:
    """Patch TFDS to check a class before importing it, within `_own_features` only."""
    from tensorflow_datasets.core.features import FeatureConnector

    find = FeatureConnector.cls_from_name

    def guarded(name: str) -> Any:
        # Registered features are already imported.
        own = name.startswith(_FEATURES) and name in FeatureConnector._registered_features
        if _ONLY_OWN.get() and not own:
            raise InputError(
                f"its features.json names the class {name!r}: expected only features of "
                f"TensorFlow Datasets itself, {_FEATURES}*"
            )
        return find(name)

    FeatureConnector.cls_from_name = staticmethod(guarded)


def _builder(name: str, data_dir: PathLike | None) -> Any:
    import tensorflow_datasets as tfds

    # A namespace ("huggingface:mnist") would look for code on the network.
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a data set name: expected NAME, NAME/CONFIG or NAME:VERSION,"
            ' such as "mnist" or "mnist:3.0.1"'
        )
    root = None if data_dir is None else Path(data_dir).expanduser()
    try:
        return tfds.builder(name, data_dir=root, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise InputError(
            f"no data set {name!r} in TensorFlow Datasets or {root or 'its data folder'}:"
            " expected a name of its catalog, such as mnist, fashion_mnist or cifar10"
        ) from None
    except InputError as error:
        raise InputError(f"cannot use the data set {name!r}: {error}") from None
    except Exception as error:
        raise InputError(f"cannot use the data set {name!r}: {_one_line(error)}") from error


def _load_idx(builder: Any, name: str, manual: Path | None) -> Dataset:
    """Load MNIST, or a data set of the same form, from its four files, gzipped or not.

    The order of the images is that of the data set as TFDS prepares it: by the MD5 hash of the
    split's name and the index.

    Args:
      builder: of TFDS, which knows the addresses of the files.
      name: name of the data in error messages.
      manual: folder of the files; None: download them, unless that was done before.
    """
    folder = manual or Path(builder.data_dir_root) / "downloads" / builder.name
    if manual is None:
        missing = {url: file for url in builder.url_infos
                   if not (folder / (file := _file_name(url))).exists()}  # fmt: skip
        _expect_answer(builder, name, missing)
        for url, file in missing.items():
            _download(url, builder.url_infos[url], folder / file)
    try:
        data = load_idx(folder)
    except InputError as error:
        raise InputError(
            f"{error} (the files of {name} are at {_sources(builder.url_infos)})"
        ) from None
    parts: list[Any] = []
    for split, (images, labels) in (("train", data[:2]), ("test", data[2:4])):
        hashes = [hashlib.md5(f"{split}{i}".encode(), usedforsecurity=False).digest()
                  for i in range(len(images))]  # fmt: skip
        expect_labels(images, labels, f"{folder} has", f"{split} ")
        order = np.array(sorted(range(len(images)), key=hashes.__getitem__))
        parts += [images[order], None if labels is None else labels[order]]
    return Dataset(*parts)


def _download(url: str, info: Any, path: Path) -> None:
    """Download a file, and check the size and SHA-256 that TFDS has recorded."""
    print(f"downloading {url} (once) ...", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            content = answer.read(info.size + 1)
        if hashlib.sha256(content).hexdigest() != info.checksum:
            raise OSError(f"it has changed: expected the SHA-256 {info.checksum}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(content))
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{url} cannot be downloaded to {path.parent}: {_one_line(error)}; correct that and "
            "run again, or download the files yourself and give their folder as manual_dir "
            "(--manual-dir)"
        ) from None


def _prepare(builder: Any, name: str, manual: Path | None) -> None:
    root = builder.data_dir_root
    if Path(builder.data_dir).exists():
        raise InputError(f"{builder.data_dir} is not a prepared data set: remove it to prepare it")
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"{name} is not prepared in {root} and preparing it needs TensorFlow: "
            "pip install tensorflow"
        )
    _expect_answer(builder, name, _missing_files(builder, manual))
    print(f"preparing {name} (once) ...", file=sys.stderr, flush=True)
    # TensorFlow would otherwise allocate the GPU memory that JAX needs.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, "-m", "jaxvae.data.tfds", name, str(root), str(manual or "")],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # The child also fails if another process prepared the data set meanwhile.
    if not builder.is_prepared():
        said = child.stdout if child.returncode == _EXPLAINED else child.stderr
        reason = [f"exit code {child.returncode}", *said.strip().splitlines()][-1]
        raise InputError(
            f"cannot prepare {name} in {root}: {reason} (correct that and run again, or give"
            " a folder of manually downloaded files as manual_dir, --manual-dir)"
        )


def _expect_answer(builder: Any, name: str, missing: dict[str, str]) -> None:
    """Raise InputError if files are missing and none of their servers answers."""
    proxied = urllib.request.getproxies().keys() & {"all", *_PORTS}
    if missing and not proxied and not _any_host_answers(missing):
        files = ", ".join(list(missing.values())[:4]) + (", ..." if len(missing) > 4 else "")
        raise InputError(
            f"{name} is not in {builder.data_dir_root} and cannot be downloaded, as no server "
            f"answers: connect to the network, or download {files} from {_sources(missing)} on "
            "another machine and give their folder as manual_dir (--manual-dir)"
        )


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


def _sources(urls: Iterable[str]) -> str:
    """Return the folders of addresses, without repetition."""
    return ", ".join(sorted({url.removesuffix(_file_name(url)) for url in urls})[:4])


def _missing_files(builder: Any, manual: Path | None) -> dict[str, str]:
    """Return the file name of each download that is not on disk, by URL."""
    from tensorflow_datasets.core.download import resource

    missing = {}
    downloads = Path(builder.data_dir_root) / "downloads"
    for url, info in (builder.url_infos or {}).items():
        download = resource.get_dl_fname(url, info.checksum)
        places = [downloads / download, downloads / builder.name / download]
        if manual is not None and info.filename:
            places.append(manual / info.filename)
        if urlsplit(url).scheme in _PORTS and not any(place.exists() for place in places):
            missing[url] = info.filename or url
    return missing


def _any_host_answers(urls: Iterable[str], timeout: float = _TIMEOUT) -> bool:
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def connect(host: str, port: int) -> None:
        try:
            socket.create_connection((host, port), timeout).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    parts = [urlsplit(url) for url in urls]
    addresses = {(part.hostname or "", part.port or _PORTS[part.scheme]) for part in parts}
    for address in addresses:
        # A daemon thread: name resolution has no timeout and must not delay the exit.
        threading.Thread(target=connect, args=address, daemon=True).start()
    end = time.monotonic() + timeout
    try:
        return any(answers.get(timeout=max(0, end - time.monotonic())) for _ in addresses)
    except queue.Empty:
        return False


def _decode(builder: Any, name: str) -> Dataset:
    features, splits = builder.info.features, builder.info.splits
    held_out = _held_out(builder)
    if "train" not in splits:
        raise InputError(f"{name} has no split train, only {', '.join(splits) or 'none'}")
    try:
        image = features.get_tensor_info().get("image")
        if image is None or len(image.shape) != 3 or image.np_dtype != np.uint8:
            raise InputError(
                f'{name} has no uint8 images as its feature "image", but {_one_line(features)}:'
                " choose another data set"
            )
        train = functools.partial(_source, str(builder.data_dir), "train")
        if held_out and len(train()) * train()[0]["image"].nbytes > _IN_MEMORY:
            on_disk = Records(name, train, operator.itemgetter("image"))
            test = _read_split(builder, name, held_out, on_disk.shape[1:])
            return Dataset(on_disk, _read_labels(builder, train), *test)
        images, labels = _read_split(builder, name, "train")
        if held_out is None:
            return split_every_tenth(images, labels)
        return Dataset(images, labels, *_read_split(builder, name, held_out, images.shape[1:]))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"cannot read {name}: {_one_line(error)}; if its files are damaged, remove"
            f" {builder.data_dir} to prepare it again"
        ) from error


def _held_out(builder: Any) -> str | None:
    """Return the split of the test images; None: they are every tenth of "train"."""
    return next((s for s in ("test", "validation") if s in builder.info.splits), None)


class _Examples:
    """The images and labels of a split, by index; other features are not decoded.

    TFDS decodes the pictures that `open_picture` accepts.
    """

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        class Checked(tfds.decode.Decoder):  # type: ignore[misc]
            def decode_example(self, picture: bytes) -> np.ndarray:
                with open_picture(io.BytesIO(picture)):
                    return self.feature.decode_example_np(picture)

        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)
        features = builder.info.features
        kept = {"image": features["image"]}
        if _has_labels(builder):
            kept["label"] = features["label"]
        self._features = tfds.features.FeaturesDict(kept)
        is_picture = isinstance(features["image"], tfds.features.Image)
        self._decoders = {"image": Checked()} if is_picture else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._decoded(self._records[row])

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self._decoded(record) for record in self._records.__getitems__(rows)]

    def _decoded(self, record: bytes) -> dict[str, Any]:
        return self._features.deserialize_example_np(record, decoders=self._decoders)


def _source(folder: str, split: str) -> _Examples:
    import tensorflow_datasets as tfds

    with _quiet(), _own_features():
        return _Examples(tfds.builder_from_directory(folder), split)


def _read_labels(builder: Any, source: Callable[[], Any]) -> np.ndarray | None:
    """Read the labels of images that stay on disk, and cache them in a file."""
    if not _has_labels(builder):
        return None
    cache = Path(builder.data_dir) / "jaxvae-labels.npy"
    records = source()
    with (
        contextlib.suppress(InputError),
        reading(cache),
        open(cache, "rb", opener=open_regular) as file,
    ):
        labels = as_labels(read_npy(file), cache)
        if len(labels) == len(records):
            return labels
    labels = np.array([records[i]["label"] for i in range(len(records))], np.int64)
    _replace(cache, lambda file: np.save(file, labels))
    return labels


def _has_labels(builder: Any) -> bool:
    label = builder.info.features.get_tensor_info().get("label")
    return label is not None and label.shape == () and np.dtype(label.np_dtype).kind in "iu"


def _read_split(
    builder: Any, name: str, split: str, shape: Any = None
) -> tuple[np.ndarray, np.ndarray | None]:
    source = _Examples(builder, split)
    if shape is None:
        shape = source[0]["image"].shape
        expect_channels_last(shape, name)
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int64) if _has_labels(builder) else None
    for index in range(len(source)):
        record = source[index]
        if record["image"].shape != shape:
            raise InputError(
                f"{name} has images of different sizes, {shape} and {record['image'].shape}:"
                " expected one size; choose another data set or resize them and save them as files"
            )
        images[index] = record["image"]
        if labels is not None:
            labels[index] = record["label"]
    return images, labels


def _read_cache(path: Path) -> Dataset | None:
    with (
        contextlib.suppress(InputError),
        reading(path),
        open(path, "rb", opener=open_regular) as file,
    ):
        arrays = read_npz(file, Dataset._fields[:4])
        labels = {name: as_labels(arrays[name], path) for name in arrays if "labels" in name}
        images = {split: as_images(arrays[f"{split}_images"], path) for split in ("train", "test")}
        for split in images:
            expect_labels(images[split], labels.get(f"{split}_labels"), f"{path} has", f"{split} ")
        return Dataset(
            images["train"],
            labels.get("train_labels"),
            images["test"],
            labels.get("test_labels"),
        )
    return None  # absent or damaged


def _write_cache(path: Path, dataset: Dataset) -> None:
    arrays: dict[str, Any] = dataset._asdict()
    arrays = {key: value for key, value in arrays.items() if isinstance(value, np.ndarray)}
    _replace(path, lambda file: np.savez(file, **arrays))


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    # Without a cache, the images are decoded again next time.
    with contextlib.suppress(OSError):
        write_atomic(path, write)


def _one_line(what: object) -> str:
    prefix = f"{type(what).__name__}: " if isinstance(what, Exception) else ""
    return prefix + " ".join(str(what).split())[:400]


def _prepare_in_child(name: str, root: str, manual_dir: str) -> None:
    code = 0
    try:
        import requests
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader

        # TFDS has no timeout, and retries for minutes.
        socket.setdefaulttimeout(_TIMEOUT)
        limited = functools.partialmethod(requests.Session.request, timeout=_TIMEOUT)
        requests.Session.request = limited  # type: ignore[method-assign]
        downloader.MAX_RETRIES = 0
        config = tfds.download.DownloadConfig(manual_dir=manual_dir or None, try_download_gcs=False)
        with _own_features():
            builder = tfds.builder(name, data_dir=root, try_gcs=False)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # the parent raises an InputError with this line
        print(_one_line(error))
        code = _EXPLAINED
    sys.stdout.flush()
    os._exit(code)  # without waiting for downloads in other threads


if __name__ == "__main__":
    _prepare_in_child(*sys.argv[1:])
