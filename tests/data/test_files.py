"""Images from files: what is read, and what is refused in one line."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxvae import InputError, load_data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 5), np.uint8)
LABELS = RNG.integers(0, 3, 20)
MNIST = Path(__file__).parents[2].parent / "shared/data/mnist"


def idx(array):
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist_like(folder, *, zipped):
    for name, images, labels in (("train", PIXELS, LABELS), ("t10k", PIXELS[:4], LABELS[:4])):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_of_idx_files_with_mnists_names(tmp_path, zipped):
    write_mnist_like(tmp_path, zipped=zipped)
    (train, train_labels), (test, test_labels) = load_data(str(tmp_path), labels=True)
    np.testing.assert_array_equal(train, PIXELS[..., None])
    np.testing.assert_array_equal(train_labels, LABELS)
    np.testing.assert_array_equal(test, PIXELS[:4, ..., None])
    np.testing.assert_array_equal(test_labels, LABELS[:4])


@pytest.mark.skipif(not MNIST.exists(), reason="the canonical MNIST files are not at hand")
def test_the_canonical_mnist_files():
    (train, train_labels), (test, test_labels) = load_data(str(MNIST), labels=True)
    assert train.shape == (60_000, 28, 28, 1)
    assert test.shape == (10_000, 28, 28, 1)
    assert list(train_labels[:8]) == [5, 0, 4, 1, 9, 2, 1, 3]
    assert np.bincount(test_labels)[1] == 1135


def test_one_idx_file_holds_out_every_tenth_image(tmp_path):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(idx(PIXELS))
    train, test = load_data(str(path))
    np.testing.assert_array_equal(test[..., 0], PIXELS[::10])
    assert len(train) == 18


def test_npz_as_keras_lays_it_out(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:3], y_test=LABELS[:3])
    (train, train_labels), (test, _) = load_data(str(path), labels=True)
    assert train.shape == (20, 6, 5, 1)
    assert test.shape == (3, 6, 5, 1)
    np.testing.assert_array_equal(train_labels, LABELS)


def test_npz_of_images_and_labels_and_npy_of_images(tmp_path):
    np.savez(tmp_path / "data.npz", images=PIXELS, labels=LABELS)
    (train, train_labels), (test, test_labels) = load_data(str(tmp_path / "data.npz"), labels=True)
    assert (len(train), len(train_labels), len(test), len(test_labels)) == (18, 18, 2, 2)
    np.save(tmp_path / "data.npy", PIXELS)
    np.testing.assert_array_equal(load_data(str(tmp_path / "data.npy"))[0], train)


def test_floats_between_0_and_1_stay_floats_and_booleans_become_black_and_white(tmp_path):
    np.save(tmp_path / "floats.npy", PIXELS / 255)
    train, _ = load_data(str(tmp_path / "floats.npy"))
    assert train.dtype == np.float32
    np.save(tmp_path / "booleans.npy", PIXELS > 127)
    train, _ = load_data(str(tmp_path / "booleans.npy"))
    assert train.dtype == np.uint8
    assert set(np.unique(train)) == {0, 255}


def save_pictures(folder, mode="RGB", size=(5, 6)):
    folder.mkdir(parents=True)
    for i in range(10):
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def test_a_folder_of_pictures_in_folders_of_classes(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog", "owl"):
            save_pictures(tmp_path / split / name)
    (train, train_labels), (test, _) = load_data(str(tmp_path), labels=True)
    assert train.shape == test.shape == (30, 6, 5, 3)
    assert train.dtype == np.uint8
    np.testing.assert_array_equal(train_labels, np.repeat([0, 1, 2], 10))
    with Image.open(tmp_path / "test" / "dog" / "0.png") as picture:
        np.testing.assert_array_equal(test[10], picture)


def test_a_flat_folder_of_grey_pictures(tmp_path):
    save_pictures(tmp_path / "all", mode="L")
    (train, labels), (test, _) = load_data(str(tmp_path / "all"), labels=True)
    assert train.shape == (9, 6, 5, 1)
    assert test.shape == (1, 6, 5, 1)
    assert labels is None


def write(path, content):
    path.write_bytes(content)
    return path


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def pictures_of_two_sizes(folder):
    save_pictures(folder / "a")
    save_pictures(folder / "b", size=(7, 7))
    return folder


def without_test_images(folder):
    write(folder / "train-images-idx3-ubyte", idx(PIXELS))
    return folder


HUGE = struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2**31)
WRONG = {
    "nothing there": (lambda d: d / "nowhere", "does not exist: expected mnist-5k, mnist, tfds:"),
    "empty folder": (lambda d: d, "holds no images: expected IDX files, or PNG or JPEG"),
    "no test images": (without_test_images, "has no test images: expected a file t10k-images"),
    "not IDX": (
        lambda d: write(d / "x", b"hello, world"),
        "not an IDX file of bytes",
    ),
    "empty file": (lambda d: write(d / "x", b""), "not an IDX file of bytes"),
    "cut IDX": (lambda d: write(d / "x", idx(PIXELS)[:-1]), "is damaged: expected 600 bytes"),
    "cut header": (lambda d: write(d / "x", idx(PIXELS)[:9]), "its header is cut off"),
    "long IDX": (lambda d: write(d / "x", idx(PIXELS) + b"1"), "is damaged: expected 600 bytes"),
    "IDX of no size": (lambda d: write(d / "x", HUGE), "at most this machine's memory"),
    "not gzip": (lambda d: write(d / "x.gz", b"hello"), "cannot be read: Not a gzipped file"),
    "cut gzip": (lambda d: write(d / "x.gz", gzip.compress(idx(PIXELS))[:-9]), "cannot be read"),
    "not npz": (lambda d: write(d / "x.npz", b"hello"), "not a NumPy file of version 1 or 2"),
    "not npy": (lambda d: write(d / "x.npy", b"\x93NUMPY"), "not a NumPy file of version"),
    "pickled": (
        lambda d: save(d / "x.npz", images=np.array([{}])),
        "not an array of numbers",
    ),
    "other names": (lambda d: save(d / "x.npz", a=PIXELS), "holds a: expected arrays named x_tr"),
    "flat images": (lambda d: save(d / "x.npz", images=PIXELS[0]), "images of shape \\(6, 5\\)"),
    "integers": (lambda d: save(d / "x.npz", images=PIXELS.astype(int)), "of type int64: expected"),
    "floats to 255": (lambda d: save(d / "x.npz", images=PIXELS * 1.0), "expected floats between"),
    "NaN": (lambda d: save(d / "x.npz", images=PIXELS * np.nan), "image 0 holds NaN"),
    "no images": (lambda d: save(d / "x.npz", images=PIXELS[:0]), "holds no images, but"),
    "one image": (lambda d: save(d / "x.npz", images=PIXELS[:1]), "has no train images: expected"),
    "labels short": (
        lambda d: save(d / "x.npz", x_train=PIXELS, y_train=LABELS[:3], x_test=PIXELS),
        "has 20 train images and 3 labels",
    ),
    "labels of letters": (
        lambda d: save(d / "x.npz", images=PIXELS, labels=np.array(["a"] * 20)),
        "its labels cannot be read: not an array of numbers, but of <U1",
    ),
    "two shapes": (
        lambda d: save(d / "x.npz", x_train=PIXELS, x_test=PIXELS[:, :5]),
        "train images of shape \\(6, 5, 1\\) and test images of shape \\(5, 5, 1\\)",
    ),
    "two sizes": (pictures_of_two_sizes, "expected pictures of one size; resize them first"),
    "not a picture": (lambda d: write(d / "a.png", b"hello").parent, "a.png cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_images_is_refused_in_one_line(tmp_path, case):
    make, says = WRONG[case]
    with pytest.raises(InputError, match=says) as error:
        load_data(str(make(tmp_path)))
    assert "\n" not in str(error.value)
