"""Images from files: what is read, and what is refused in one line."""

import gzip
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image

import jaxvae.errors
from jaxvae import InputError, load_data
from jaxvae.data.files import write_images
from jaxvae.data.pictures import read_picture

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


def save_classes(folder, **splits):
    """A picture for each class of each split, as split/class/0.png."""
    for split, classes in splits.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(PIXELS[0]).save(folder / split / name / "0.png")


def labels_of(folder):
    (_, train_labels), (_, test_labels) = load_data(str(folder), labels=True)
    return [None if labels is None else list(labels) for labels in (train_labels, test_labels)]


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        ("01234567", "37", [[0, 1, 2, 3, 4, 5, 6, 7], [3, 7]]),
        ("37", "0123", [[3, 4], [0, 1, 2, 3]]),
        ("3", "37", [[0], [0, 1]]),
        ("3", "3", [None, None]),
    ],
)
def test_classes_are_numbered_over_both_splits_together(tmp_path, train, test, labels):
    save_classes(tmp_path, train=train, test=test)
    assert labels_of(tmp_path) == labels


def test_a_split_without_classes_does_not_shift_the_others_numbers(tmp_path):
    save_classes(tmp_path, train="012")
    save_pictures(tmp_path / "test", mode="L")
    assert labels_of(tmp_path) == [[0, 1, 2], None]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("TRAIN", "TEST"),
        ("Train", "Val"),
        ("train", "valid"),
        ("training", "validation"),
        ("train", "testing"),
    ],
)
def test_splits_by_other_names(tmp_path, train, test):
    save_classes(tmp_path, **{train: "0123", test: "13"})
    assert labels_of(tmp_path) == [[0, 1, 2, 3], [1, 3]]


def test_the_test_images_are_held_out_where_there_is_a_validation_split_too(tmp_path):
    save_classes(tmp_path, train="0123", val="01", test="123")
    assert labels_of(tmp_path) == [[0, 1, 2, 3], [1, 2, 3]]


def test_two_folders_of_one_split_are_refused(tmp_path):
    save_classes(tmp_path, train="01", test="01", Test="01")
    if not (tmp_path / "test").samefile(tmp_path / "Test"):  # as on a Mac
        with pytest.raises(InputError, match="holds Test and test: expected one of them"):
            load_data(str(tmp_path))


def test_what_is_hidden_is_no_class_and_no_picture(tmp_path):
    save_classes(tmp_path, train="012", test="012")
    for folder in (tmp_path / "train", tmp_path / "train" / "0"):
        save_pictures(folder / ".ipynb_checkpoints", size=(7, 7))
    (tmp_path / "test" / "0" / "._0.png").write_bytes(b"not a picture")
    (tmp_path / "test" / ".DS_Store").touch()
    (tmp_path / "._train.array_record").touch()
    assert labels_of(tmp_path) == [[0, 1, 2], [0, 1, 2]]


def test_a_hidden_folder_is_read_where_it_is_named_itself(tmp_path):
    save_classes(tmp_path / ".data", train="012", test="012")
    assert labels_of(tmp_path / ".data") == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("name", ["idx_1.png", "idx1.png", "train-idx3-ubyte.png", "idx.txt"])
def test_a_picture_by_any_name_is_no_idx_file(tmp_path, name):
    save_pictures(tmp_path / "all", mode="L")
    picture = (tmp_path / "all" / "0.png").read_bytes()
    (tmp_path / "all" / name).write_bytes(picture)
    train, test = load_data(str(tmp_path / "all"))
    assert len(train) + len(test) == 10 + name.endswith("png")


GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
SHARE = GREY / np.float32(255)
TAGS = {262: 0}  # of a TIFF whose white is 0


def encoded(picture, kind="png", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def transparent(pixels, alpha, mode="LA"):
    picture = Image.fromarray(pixels).convert(mode)
    picture.putalpha(Image.fromarray(np.full(pixels.shape, alpha, np.uint8)))
    return picture


def rotated(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    blocks = Image.fromarray(np.kron(GREY, np.ones((16, 16), np.uint8)))  # as JPEG stores them
    return encoded(blocks, kind, exif=exif)


OF_16_BITS = Image.fromarray(GREY.astype(np.uint16) * 257)
CONVERTED = {
    "a PNG of 16 bits": (encoded(OF_16_BITS), GREY, "scaled from 16 bits to 8"),
    "a TIFF of 16 bits": (encoded(OF_16_BITS, "tiff"), GREY, "scaled from 16 bits to 8"),
    "a TIFF of 16 bits, white is 0": (
        encoded(OF_16_BITS, "tiff", tiffinfo=TAGS), 255 - GREY, "scaled from 16 bits to 8"
    ),
    "a TIFF of floats": (
        encoded(Image.fromarray(SHARE), "tiff"), GREY, "scaled from floats to 8 bits"
    ),
    "black on transparent": (
        encoded(transparent(np.zeros((2, 3), np.uint8), 0)), np.full((2, 3), 255), "composed on wh"
    ),
    "half transparent": (encoded(transparent(GREY, 51)), 204 + GREY / 5, "composed on white"),
    "half transparent in colour": (
        encoded(transparent(GREY, 51, "RGBA")), 204 + GREY / 5, "composed on white"
    ),
    "half transparent WebP": (
        encoded(transparent(GREY, 51, "RGBA"), "webp", lossless=True), 204 + GREY / 5, "composed on"
    ),
    "one transparent grey": (
        encoded(Image.fromarray(GREY), transparency=51), np.where(GREY == 51, 255, GREY), "composed"
    ),
    "one transparent grey of 16 bits": (
        encoded(OF_16_BITS, transparency=51 * 257), np.where(GREY == 51, 255, GREY), "composed"
    ),
    "one transparent entry of a palette": (
        encoded(Image.fromarray(GREY).quantize(6), "gif", transparency=0), None, "composed"
    ),
    "opaque": (encoded(transparent(GREY, 255)), GREY, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED)
def test_what_is_not_8_bits_and_opaque_is_converted_and_said(case):
    content, pixels, says = CONVERTED[case]
    changes = set()
    image = read_picture(io.BytesIO(content), changes)
    if pixels is not None:
        np.testing.assert_allclose(image, np.broadcast_to(pixels[..., None], image.shape), atol=1)
    else:
        assert image.max() == 255
    assert image.dtype == np.uint8
    assert (says or "") in " ".join(changes)
    assert bool(changes) == bool(says)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_rotated_as_its_exif_orientation_says(kind, orientation):
    changes = set()
    image = read_picture(io.BytesIO(rotated(kind, orientation)), changes)
    # Where the stored rows begin, and where the stored columns do, as the standard has it.
    upright = GREY if orientation < 5 else GREY.T
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    upright = np.flip(upright, flips.get(orientation, ()))
    np.testing.assert_allclose(image[8::16, 8::16, 0], upright, atol=4)
    assert bool(changes) == (orientation != 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_rotate_nothing():
    content = rotated("jpeg", 6)
    at = content.index(b"Exif\0\0") + 6
    for change in (b"XX", b"II*\0\xff\xff\xff\xff"):
        damaged = content[:at] + change + content[at + len(change) :]
        assert read_picture(io.BytesIO(damaged)).shape == (32, 48, 1)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (GREY.astype(np.int32), "integers of 32 bits, or with a sign: expected 8 or 16 bits"),
        (GREY.astype(np.float32), "floats from 0 to 255: expected 0 to 1; scale them first"),
        (-SHARE, "floats from -1 to -0: expected 0 to 1"),
        (SHARE * np.float32(np.nan), "floats from nan to nan: expected 0 to 1"),
    ],
)
def test_pixels_of_no_known_scale_are_refused(tmp_path, pixels, says):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif cannot be read: its pixels are {says}"):
        load_data(str(tmp_path))


def test_a_warning_says_in_one_line_what_was_done_to_pictures(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(CONVERTED["black on transparent"][0])
    (tmp_path / "x.png").write_bytes(CONVERTED["a PNG of 16 bits"][0])
    says = (
        f"{tmp_path} has pictures that were composed on white, as they are transparent; "
        "and some that were scaled from 16 bits to 8"
    )
    with pytest.warns(jaxvae.errors.Converted, match=f"^{re.escape(says)}$") as warned:
        load_data(str(tmp_path))
    assert len(warned) == 1


def test_pictures_of_several_sizes_are_stretched_or_cropped_around_their_middle(tmp_path):
    stripes = np.repeat(np.uint8([0, 100, 255]), [2, 4, 2])  # of a picture of 4 by 8
    Image.fromarray(np.tile(stripes, (4, 1))).save(tmp_path / "a.png")
    halves = np.repeat(np.uint8([0, 255]), 8)  # of a picture of 16 by 16
    Image.fromarray(np.tile(halves[:, None], (1, 16))).save(tmp_path / "b.png")
    with pytest.warns(
        jaxvae.errors.Converted,
        match="pictures that were cropped and resized to 4x4; and some that were resized to 4x4$",
    ):
        (halves,), (stripes,) = load_data(str(tmp_path), resize=(4, 4), crop=True)
    assert stripes.shape == (4, 4, 1)
    assert (stripes == 100).all()  # the middle, of which no pixel is scaled
    assert np.ptp(halves, axis=1).max() == 0
    assert list(halves[[0, 3], 0, 0]) == [0, 255]
    assert halves.mean() == pytest.approx(127.5, abs=1)
    with pytest.warns(
        jaxvae.errors.Converted, match="resized to 4x4; and some that were stretched"
    ):
        _, (stripes,) = load_data(str(tmp_path), resize="4x4")
    assert np.ptp(stripes, axis=0).max() == 0  # the whole picture, at half the width
    np.testing.assert_allclose(stripes[0, :, 0], [0, 100, 100, 255], atol=25)


@pytest.mark.parametrize("grey", ["0", "7"])
def test_grey_pictures_among_colour_get_three_equal_channels(tmp_path, grey):
    save_pictures(tmp_path / "all")
    Image.fromarray(PIXELS[0]).save(tmp_path / "all" / f"{grey}.png")
    with pytest.warns(jaxvae.errors.Converted, match="grey among colour, and got three equal chan"):
        train, test = load_data(str(tmp_path / "all"))
    images = np.concatenate([test, train])
    assert images.shape == (10, 6, 5, 3)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "all" / f"{i}.png") as picture:
            np.testing.assert_array_equal(image, picture.convert("RGB"))


def test_a_grey_split_beside_one_in_colour_gets_three_equal_channels(tmp_path):
    save_pictures(tmp_path / "train")
    save_pictures(tmp_path / "test", mode="L")
    with pytest.warns(jaxvae.errors.Converted, match="grey among colour"):
        train, test = load_data(str(tmp_path))
    assert train.shape == test.shape == (10, 6, 5, 3)
    assert np.ptp(test, axis=3).max() == 0


def test_colour_of_16_bits_is_said_to_be_scaled(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2**16, (2, 3, 3), np.uint16).astype(">u2")
    chunks = (b"IHDR", struct.pack(">2I5B", 3, 2, 16, 2, 0, 0, 0)), (
        b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    ), (b"IEND", b"")  # fmt: skip
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    changes = set()
    image = read_picture(io.BytesIO(png), changes)
    np.testing.assert_allclose(image, rows / 257, atol=1)
    assert changes == {"scaled from 16 bits to 8"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": True}, "crop needs the size: expected resize too, such as 64x64"),
        ({"resize": "64"}, "resize is '64': expected HEIGHTxWIDTH, such as 64x64"),
        ({"resize": (0, 5)}, "resize is (0, 5): expected HEIGHTxWIDTH"),
        ({"resize": 64}, "resize is 64: expected HEIGHTxWIDTH"),
        (
            {"resize": (5, 6)},
            "a.npy is not a folder of pictures and has examples of shape (6, 5, 1)",
        ),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path, options, says):
    np.save(tmp_path / "a.npy", PIXELS)
    with refused(says):
        load_data(str(tmp_path / "a.npy"), **options)
    assert len(load_data(str(tmp_path / "a.npy"), resize=(6, 5))[0]) == 18  # as they are


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
    "cut header": (lambda d: write(d / "x", idx(PIXELS)[:9]), "its header is truncated"),
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
    "flat images": (lambda d: save(d / "x.npz", images=PIXELS[0, 0]), "images of shape \\(5,\\)"),
    "integers": (lambda d: save(d / "x.npz", images=PIXELS.astype(int)), "of type int64: expected"),
    "floats to 255": (lambda d: save(d / "x.npz", images=PIXELS * 1.0), "expected floats between"),
    "NaN": (lambda d: save(d / "x.npz", images=PIXELS * np.nan), "image 0 holds NaN"),
    "no images": (lambda d: save(d / "x.npz", images=PIXELS[:0]), "holds no images, but"),
    "one image": (lambda d: save(d / "x.npz", images=PIXELS[:1]), "has no train images: expected"),
    "labels short": (
        lambda d: save(d / "x.npz", x_train=PIXELS, y_train=LABELS[:3], x_test=PIXELS),
        "has 20 train images and 3 labels",
    ),
    "few labels": (
        lambda d: save(d / "x.npz", images=PIXELS, labels=LABELS[:3]),
        "x.npz has 20 images and 3 labels: expected one label for each image",
    ),
    "many labels": (
        lambda d: save(d / "x.npz", images=PIXELS[:10], labels=LABELS),
        "x.npz has 10 images and 20 labels: expected one label for each image",
    ),
    "channels first": (
        lambda d: save(d / "x.npz", images=np.zeros((10, 3, 8, 9), np.uint8)),
        "images of shape \\(3, 8, 9\\), whose channels seem to come first: expected \\(height, w",
    ),
    "one channel first": (
        lambda d: write(d / "x", idx(np.zeros((10, 1, 28, 28)))),
        "images of shape \\(1, 28, 28\\), whose channels seem to come first",
    ),
    "labels of letters": (
        lambda d: save(d / "x.npz", images=PIXELS, labels=np.array(["a"] * 20)),
        "its labels cannot be read: not an array of numbers, but of <U1",
    ),
    "two shapes": (
        lambda d: save(d / "x.npz", x_train=PIXELS, x_test=PIXELS[:, :5]),
        "train images of shape \\(6, 5, 1\\) and test images of shape \\(5, 5, 1\\)",
    ),
    "two sizes": (
        pictures_of_two_sizes,
        r"b/0.png is 7x7, .*a/0.png 6x5: expected pictures of one size; .* with --resize 7x7",
    ),
    "not a picture": (lambda d: write(d / "a.png", b"hello").parent, "a.png cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_images_is_refused_in_one_line(tmp_path, case):
    make, says = WRONG[case]
    with pytest.raises(InputError, match=says) as error:
        load_data(str(make(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["images.npz", "images.npy", "pictures"])
def test_written_images_are_read_again(tmp_path, name, channels):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4, channels), np.uint8)
    write_images(tmp_path / name, images)
    train_images, test_images = load_data(str(tmp_path / name))
    np.testing.assert_array_equal(test_images, images[::10])
    np.testing.assert_array_equal(train_images, np.delete(images, [0, 10], axis=0))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_images_are_not_written_where_they_would_be_lost_or_mixed(tmp_path):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    (tmp_path / "mine.txt").touch()
    with refused("exists already: expected a new folder"):
        write_images(tmp_path, images)
    with refused("mine.txt exists already"):
        write_images(tmp_path / "mine.txt", images)
    with refused("images have 2 channels", "ending in .npz or .npy"):
        write_images(tmp_path / "new", np.zeros((2, 4, 4, 2), np.uint8))
    with refused("no/x.npy cannot be written: No such file or directory"):
        write_images(tmp_path / "no" / "x.npy", images)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
