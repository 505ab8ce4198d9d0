"""Files from strangers: read, or refused in one line, soon and in little memory."""

import contextlib
import gzip
import io
import os
import struct
import tracemalloc
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvae import InputError
from jaxvae.data import Dataset, files, load_dataset, tfds

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 5), np.uint8)
LABELS = np.arange(20)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_that_says(fields, data=b"", version=b"\1\0"):
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(fields))
    return b"\x93NUMPY" + version + length + fields.encode() + data


def of_shape(shape, data=b"", dtype="|u1"):
    return npy_that_says(
        f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}\n", data
    )


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def archive(*members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members:
            made.writestr(name, content)
    return file.getvalue()


def parquet(**columns):
    file = io.BytesIO()
    pa.parquet.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), file)
    return file.getvalue()


def h5ad(**arrays):
    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        for name, array in arrays.items():
            made[name] = array
    return file.getvalue()


def idx(array, shape=None):
    shape = shape or array.shape
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()


def picture(kind, size=(5, 6), mode="RGB", **options):
    file = io.BytesIO()
    levels = 256 if size[0] < 100 else 1
    pixels = np.random.default_rng(1).integers(0, levels, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_that_says(width, height):
    content = picture("png")
    return content[:16] + struct.pack(">II", width, height) + content[24:]


def jpeg_of_many_scans():
    content = picture("jpeg", (64, 64), progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 200 + content[-2:]


def in_a_folder(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder

    return make


def in_a_file(name, content):
    def make(folder):
        in_a_folder(name, content)(folder)
        return folder / name

    return make


def marked_as_encrypted(content):
    content = bytearray(content)
    for magic, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.index(magic) + flags] |= 1
    return bytes(content)


def of_unknown_compression(content):
    content = bytearray(content)
    for magic, method in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
        content[content.index(magic) + method] = 99
    return bytes(content)


def a_pipe(folder):
    os.mkfifo(folder / "x.npz")
    return folder / "x.npz"


ZEROS = bytes(2**26)
IMAGES_NPY = npy(IMAGES)
HOSTILE = {
    # More than is said, or said to be more than there is.
    "gzip that expands": (in_a_file("x.gz", gzip.compress(idx(IMAGES) + ZEROS)), "is damaged"),
    "npz that expands": (
        in_a_file("x.npz", archive(("images.npy", IMAGES_NPY + ZEROS))),
        "its images cannot be read: it is damaged: expected 600 bytes",
    ),
    "a header that expands": (
        in_a_file("x.npz", archive(("images.npy", b"\x93NUMPY\2\0\0\0\0\4" + ZEROS))),
        "its header has 67108864 bytes: expected at most 10000",
    ),
    "an entry that is not read": (
        in_a_file("x.npz", archive(("images.npy", IMAGES_NPY), ("more.npy", ZEROS))),
        None,
    ),
    "IDX of 2**40 bytes": (
        in_a_file("x", idx(IMAGES, (2**20, 2**10, 2**10))),
        "would take 1,099,511,627,776 bytes: expected at most this machine's memory",
    ),
    "npy of 2**60 bytes": (in_a_file("x.npy", of_shape((2**20,) * 3)), "at most this machine's"),
    "npy of no size": (in_a_file("x.npy", of_shape((0, 2**70, 1))), "cannot be read: "),
    "2**32 images of nothing": (
        in_a_file("x", idx(IMAGES[:0], (2**32 - 1, 0, 5))),
        "holds no images, but an array of shape (4294967295, 0, 5)",
    ),
    "npy of negative size": (in_a_file("x.npy", of_shape((-1, -6, 5))), "its shape is (-1, -6, 5)"),
    "npy cut off": (in_a_file("x.npy", IMAGES_NPY[:-1]), "expected 600 bytes for shape (20, 6, 5)"),
    "npy of nested brackets": (in_a_file("x.npy", npy_that_says("(" * 9000)), "cannot be read: "),
    "npy of no fields": (in_a_file("x.npy", npy_that_says("{}\n")), "cannot be read: "),
    "npy of 65 axes": (in_a_file("x.npy", of_shape((1,) * 65, b"1")), "cannot be read: "),
    "npz cut off": (in_a_file("x.npz", npz(images=IMAGES)[:-30]), "cannot be read: "),
    "npz with a bit turned": (
        in_a_file("x.npz", archive(("images.npy", IMAGES_NPY), compression=0).replace(
            IMAGES.tobytes()[:9], bytes(9))),
        "its images cannot be read: Bad CRC-32",
    ),
    "a large GIF": (
        in_a_folder("x.gif", picture("gif", (4097, 4097), "1")), "expected at most 16,777,216 pix"
    ),
    "a large WebP": (in_a_folder("x.webp", picture("webp", (16383, 1025))), "16383 by 1025: exp"),
    "PNG of 2**62 pixels": (in_a_folder("x.png", png_that_says(2**31 - 1, 2**31 - 1)), "x.png"),
    "PNG of 2**28 pixels": (in_a_folder("x.png", png_that_says(2**14, 2**14)), "x.png cannot be"),
    "a JPEG of many scans": (in_a_folder("x.jpg", jpeg_of_many_scans()), "scans: expected at most"),
    # Other kinds.
    "PostScript": (in_a_folder("x.png", picture("eps")), "x.png cannot be read: not a picture"),
    "a folder as a file": (lambda d: (d / "x.npz").mkdir() or d / "x.npz", "holds no images"),
    "a pipe": (a_pipe, "is neither a file nor a folder"),
    "a pipe among pictures": (lambda d: os.mkfifo(d / "x.png") or d, "holds no images"),
    "a broken link": (lambda d: (d / "x").symlink_to("x") or d / "x", ": "),
    "a name too long": (lambda d: d / ("x" * 5000), "File name too long"),
    "a name of two lines": (in_a_file("a\nb\x1b[2J.npy", b""), "a\\nb\\x1b[2J.npy cannot be read"),
    "a name with a zero": (lambda d: d / "x\0.npy", "x\\x00.npy"),
    # Archives.
    "encrypted": (in_a_file("x.npz", marked_as_encrypted(npz(images=IMAGES))), "encrypted"),
    "of compression 99": (
        in_a_file("x.npz", of_unknown_compression(npz(images=IMAGES))), "by another method than"
    ),
    "of bzip2": (
        in_a_file("x.npz", archive(("images.npy", IMAGES_NPY), compression=zipfile.ZIP_BZIP2)),
        "images is compressed by another method than NumPy's",
    ),
    "two of one name": (
        in_a_file("x.npz", archive(("images.npy", IMAGES_NPY), ("images", IMAGES_NPY))),
        "it holds images more than once",
    ),
    "of names with ..": (
        in_a_file("x.npz", archive(("../../escaped.npy", IMAGES_NPY), ("/escaped", IMAGES_NPY))),
        "it holds ../../escaped.npy, /escaped: expected arrays named x_train, "
        .replace("escaped.npy", "escaped"),
    ),
    "of nothing": (in_a_file("x.npz", archive()), "it holds nothing: expected arrays named"),
    # Types and ranges.
    "0-d": (in_a_file("x.npy", npy(np.uint8(3))), "images of shape (): expected"),
    "complex": (in_a_file("x.npy", npy(IMAGES * 1j)), "not an array of numbers, but of complex128"),
    "structured": (in_a_file("x.npy", npy(np.zeros(9, "i4,f4"))), "not an array of numbers"),
    "dates": (in_a_file("x.npy", npy(np.zeros((1, 2, 3), "M8[s]"))), "not an array of numbers"),
    "letters": (in_a_file("x.npy", npy(np.full((1, 2, 3), "a"))), "not an array of numbers"),
    "nothing wide": (in_a_file("x.npy", of_shape((9, 9, 9), dtype="|V0")), "not an array of numbe"),
    "big-endian shorts": (in_a_file("x.npy", npy(IMAGES.astype(">u2"))), "images of type >u2: exp"),
    "no rows": (in_a_file("x.npy", npy(IMAGES[:0])), "holds no images"),
    "no columns": (in_a_file("x.npy", npy(IMAGES[:, :, :0])), "holds no images"),
    "infinity": (in_a_file("x.npy", npy(np.full((9, 2, 3), np.inf))), "holds NaN or infinity"),
    "labels of 2**63": (
        in_a_file("x.npz", npz(images=IMAGES, labels=LABELS.astype("u8") + np.uint64(2**63))),
        "holds the label 9223372036854775827: expected at most 2**63 - 1",
    ),
    "labels of floats": (in_a_file("x.npz", npz(images=IMAGES, labels=LABELS / 2)), "one whole nu"),
    "labels of booleans": (in_a_file("x.npz", npz(images=IMAGES, labels=LABELS > 2)), "one whole"),
    "labels of two axes": (in_a_file("x.npz", npz(images=IMAGES, labels=IMAGES)), "one whole num"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_strangers_file_is_refused_in_one_line_and_in_little_memory(tmp_path, case):
    make, says = HOSTILE[case]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    try:
        if says is None:
            assert isinstance(load_dataset(str(path)), Dataset)
        else:
            with refused(says):
                load_dataset(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.parent.glob("escaped*"))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux has such a file")  # noqa: PTH110
def test_a_file_that_cannot_be_read_is_refused():
    with refused("/proc/self/mem cannot be read: Input/output error"):
        load_dataset("/proc/self/mem")


@pytest.mark.parametrize("name", [None, 3, b"mnist-5k", ["mnist-5k"]])
def test_data_are_named_by_a_string(name):
    with refused(f"the data are {name!r}: expected a name"):
        load_dataset(name)


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_floats_of_every_width_and_order_are_read(tmp_path, kind):
    (tmp_path / "x.npy").write_bytes(npy((IMAGES / 255).astype(kind)))
    data = load_dataset(str(tmp_path / "x.npy"))
    assert data.train_images.dtype == np.float32
    np.testing.assert_allclose(data.test_images[..., 0], IMAGES[::10] / 255, atol=1e-3)


def test_arrays_are_read_by_rows_and_by_columns(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(np.asfortranarray(IMAGES)))
    np.testing.assert_array_equal(
        load_dataset(str(tmp_path / "x.npy")).test_images[..., 0], IMAGES[::10]
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npz(train_images=IMAGES),
        npz(train_images=IMAGES, test_images=IMAGES[0]),
        npz(train_images=IMAGES, test_images=IMAGES, test_labels=LABELS / 2),
        npz(train_images=IMAGES, test_images=IMAGES, train_labels=LABELS[:3]),
        marked_as_encrypted(npz(train_images=IMAGES, test_images=IMAGES)),
    ],
    ids=["empty", "one split", "a flat split", "labels of floats", "few labels", "encrypted"],
)
def test_a_damaged_cache_is_no_cache(tmp_path, content):
    (tmp_path / "jaxvae.npz").write_bytes(content)
    assert tfds._read_cache(tmp_path / "jaxvae.npz") is None


VALID = {
    "x.npy": IMAGES_NPY,
    "x.npz": npz(images=IMAGES, labels=LABELS),
    "x": idx(IMAGES),
    "x.gz": gzip.compress(idx(IMAGES)),
    "x.png": picture("png"),
    "x.jpg": picture("jpeg", (9, 9)),
    "x.gif": picture("gif"),
    "x.webp": picture("webp"),
    "x.bmp": picture("bmp"),
    "x.tif": picture("tiff"),
    "x.csv": b"a,b\n" + b"1,2.5\n" * 20,
    "x.parquet": parquet(a=[1.5] * 20, b=range(20)),
    "x.h5ad": h5ad(X=np.ones((20, 3), np.float32)),
}
ARRAYS = ("", ".gz", ".npy", ".npz", ".csv", ".parquet", ".h5ad")


@st.composite
def mutated(draw, content):
    """Content that was cut, or whose bytes were changed, left out or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["cut", "change", "leave out", "put in", "repeat"]))
        some = draw(st.binary(min_size=1, max_size=4))
        end = at + draw(st.integers(1, 16))
        content = {
            "cut": content[:at],
            "change": content[:at] + some + content[at + len(some) :],
            "leave out": content[:at] + content[end:],
            "put in": content[:at] + some + content[at:],
            "repeat": content[:end] + content[at:],
        }[how]
    return content


@pytest.mark.parametrize("name", VALID)
@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.draw(mutated(VALID[name])))
    is_picture = name[1:] not in ARRAYS
    # One picture alone leaves none to train on; a second is whole.
    if is_picture:
        (tmp_path / f"y{name[1:]}").write_bytes(VALID[name])
    with contextlib.suppress(InputError):  # which is one line, whatever it quotes
        assert isinstance(load_dataset(str(tmp_path if is_picture else path)), Dataset)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    (tmp_path / "x.npy").write_bytes(IMAGES_NPY)

    def without_memory(*arguments):
        raise MemoryError

    for name, says in (("split_every_tenth", "does not fit into memory"), ("read_npy", "MemoryEr")):
        with monkeypatch.context() as patch, refused("x.npy", says):
            patch.setattr(files, name, without_memory)
            load_dataset(str(tmp_path / "x.npy"))
