"""Images that stay on disk: ArrayRecord files of one's own."""

import io
import pickle

import numpy as np
import pytest
from conftest import refused
from PIL import Image

import jaxvae.errors
from jaxvae import InputError
from jaxvae.data import load_dataset
from jaxvae.data.records import Records

array_record_module = pytest.importorskip("array_record.python.array_record_module")


def as_npy(image):
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def as_png(image):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "png")
    return file.getvalue()


def write(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), np.uint8)


@pytest.fixture
def folder(tmp_path, images):
    write(tmp_path / "train-00000-of-00002.array_record", map(as_npy, images[:6]))
    write(tmp_path / "train-00001-of-00002.array_record", map(as_png, images[6:15]))
    write(tmp_path / "test.array_record", map(as_png, images[15:]))
    np.save(tmp_path / "train_labels.npy", np.arange(15))
    return tmp_path


def test_training_images_are_read_by_their_numbers_and_test_images_at_once(folder, images):
    data = load_dataset(str(folder))
    assert isinstance(data.train_images, Records)
    assert data.train_images.shape == (15, 5, 4, 3)
    rows = np.array([14, 0, 7, 7])
    np.testing.assert_array_equal(data.train_images[rows], images[rows])
    np.testing.assert_array_equal(data.train_images[2:5], images[2:5])
    np.testing.assert_array_equal(data.test_images, images[15:])
    np.testing.assert_array_equal(data.train_labels, np.arange(15))
    assert data.test_labels is None


def test_grey_images_have_one_channel(tmp_path, images):
    for split in "train", "test":
        write(
            tmp_path / f"{split}.array_record",
            [as_png(images[0, ..., 0]), as_npy(images[1, ..., 0])],
        )
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.train_images[:], images[:2, ..., :1])


def test_what_reads_them_travels_to_other_processes(folder, images):
    records = load_dataset(str(folder)).train_images
    there = pickle.loads(pickle.dumps(records))
    np.testing.assert_array_equal(there[:], images[:15])


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([b"neither"], "image 0 of {train} cannot be read: not a picture: expected PNG, "),
        ([as_npy(np.zeros((5, 4)))], "has shape (5, 4) and type float64: expected uint8 of"),
        ([as_npy(np.zeros(5, np.uint8))], "has shape (5,) and type uint8: expected uint8 of"),
        ([as_npy(np.array([None]))], "image 0 of {train} cannot be read: not an array of numbers"),
        ([as_npy(np.zeros((5, 4), np.uint8))[:90]], "image 0 of {train} cannot be read: "),
        ([as_npy(np.zeros((3, 5, 6), np.uint8))], "{train} holds images of shape (3, 5, 6), whose"),
        ([], "{train} has no images: expected at least one"),
    ],
    ids=["bytes", "floats", "a row", "a pickle", "cut off", "channels first", "nothing"],
)
def test_records_that_are_no_images_are_refused(folder, records, says):
    path = folder / "train-00000-of-00002.array_record"
    (folder / "train-00001-of-00002.array_record").unlink()
    write(path, records)
    with refused(says.format(train=path)):
        load_dataset(str(folder))


def test_an_image_of_another_size_is_refused_when_it_comes(folder):
    write(folder / "train-00001-of-00002.array_record", [as_npy(np.zeros((5, 5, 3), np.uint8))])
    (folder / "train_labels.npy").unlink()
    records = load_dataset(str(folder)).train_images
    with refused("image 6 of", "has shape (5, 5, 3): expected (5, 4, 3), that of the first"):
        records[:]


def test_a_folder_without_test_images_or_with_other_labels_is_refused(folder):
    np.save(folder / "train_labels.npy", np.arange(14))
    with refused("train_labels.npy holds 14 labels: expected 15, one for each image"):
        load_dataset(str(folder))
    (folder / "test.array_record").unlink()
    (folder / "train_labels.npy").unlink()
    with refused("has no test images: expected test*.array_record"):
        load_dataset(str(folder))


def test_what_is_done_to_pictures_is_said(folder, images):
    record = io.BytesIO()
    transparent = Image.fromarray(images[0])
    transparent.putalpha(0)
    transparent.save(record, "png")
    write(folder / "test.array_record", [record.getvalue()])
    with pytest.warns(jaxvae.errors.Converted, match="composed on white"):
        assert load_dataset(str(folder)).test_images.min() == 255


def test_a_damaged_file_is_refused_where_it_is_read(folder, images):
    """In one line, whichever byte it is: the index, a record's header or its pixels."""
    path = folder / "test.array_record"
    whole = path.read_bytes()
    refusals = []
    for at in (0, 40, *range(1000, 3000, 100), len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:at] + bytes(b ^ 255 for b in whole[at : at + 8]) + whole[at + 8 :])
        try:
            np.testing.assert_array_equal(load_dataset(str(folder)).test_images, images[15:])
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 3
    assert all("test.array_record" in text and "\n" not in text for text in refusals)


def test_a_file_that_gives_too_few_records_is_refused(images):
    class Source:
        def __len__(self):
            return 3

        def __getitems__(self, rows):
            return [images[row] for row in rows if row < 2]

    records = Records("x", Source, lambda image: image)
    with refused("x cannot be read: it returned 2 of 3 records"):
        records[:]


def test_a_file_that_is_no_array_record_is_refused(folder):
    (folder / "test.array_record").write_bytes(b"something else" * 100)
    with refused("test.array_record"):
        load_dataset(str(folder))
