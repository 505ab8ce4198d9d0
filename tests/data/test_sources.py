"""Random-access sources in Python: what items may be, and what is refused in one line."""

import grain
import numpy as np
import pytest
from conftest import refused
from PIL import Image

from jaxvae.data import Dataset, as_dataset

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 5), np.uint8)
VECTORS = RNG.normal(size=(20, 3)).astype("f")
LABELS = [*range(5)] * 4


class Source:
    """A source as PyTorch's and Hugging Face's data sets are: no array, no sequence."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def paired(arrays):
    return list(zip(arrays, LABELS, strict=True))


SOURCES = {
    "arrays": (Source(list(VECTORS)), VECTORS, None),
    "tuples": (Source(paired(VECTORS)), VECTORS, LABELS),
    "tuples of one": (Source([(x,) for x in VECTORS]), VECTORS, None),
    "dicts": (Source([{"x": x, "label": i} for x, i in paired(VECTORS)]), VECTORS, LABELS),
    "dicts of an image and more": (
        Source([{"id": "a", "image": x, "label": i} for x, i in paired(PIXELS)]),
        PIXELS[..., None],
        LABELS,
    ),
    "pictures with named labels": (
        Source([(Image.fromarray(x), "abcde"[i]) for x, i in paired(PIXELS)]),
        PIXELS[..., None],
        LABELS,
    ),
    "Grain": (grain.MapDataset.source(list(VECTORS)).map(lambda x: 2 * x), 2 * VECTORS, None),
}


@pytest.mark.parametrize("case", SOURCES)
def test_items_are_arrays_with_or_without_labels(case):
    source, examples, labels = SOURCES[case]
    data = as_dataset(source)
    assert data.every_tenth
    np.testing.assert_array_equal(data.test_images, examples[::10])
    np.testing.assert_array_equal(data.train_images, np.delete(examples, [0, 10], axis=0))
    assert data.train_images.dtype == examples.dtype
    assert labels is None if data.test_labels is None else [*data.test_labels] == labels[::10]


def test_a_pair_of_sources_is_training_and_test_data():
    data = as_dataset((Source(paired(VECTORS)), Source(paired(VECTORS)[:4])))
    assert not data.every_tenth
    np.testing.assert_array_equal(data.test_images, VECTORS[:4])
    np.testing.assert_array_equal(data.train_labels, LABELS)


WRONG = {
    "nothing": ([], "the data has no items"),
    "words": (["a"] * 3, "item 0 cannot be read: it is of type <U1"),
    "two shapes": ([VECTORS[0], VECTORS[0, :2]], "item 1", "it has shape (2,)", "as item 0"),
    "two types": ([PIXELS[0], PIXELS[0] / 255], "item 1", "float64"),
    "many entries": ([{"a": 1, "b": 2}], "it has 'a', 'b'", "map the source"),
    "three parts": ([(1, 2, 3)], "it is a tuple of 3: expected (array, label)"),
    "single numbers": ([1.0, 2.0], "the data holds images of shape (2,)"),
    "some labels": ([(VECTORS[0], 1), (VECTORS[0],)], "labels for 1 of 2 items"),
    "labels that are no classes": ([(VECTORS[0], 0.5)] * 2, "float64", "expected one whole number"),
    "channels first": ([np.zeros((3, 8, 8), np.uint8)] * 2, "channels seem to come first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_items_are_refused(case):
    items, *says = WRONG[case]
    with refused(*says):
        as_dataset(Source(items))


def test_an_error_of_the_source_names_the_item():
    def broken(i):
        raise OSError("no such record")

    source = grain.MapDataset.source([0, 1]).map(broken)
    with refused("the data, item 0 cannot be read", "no such record"):
        as_dataset(source)


def test_arrays_of_any_rank_are_examples():
    for shape in ((20, 3), (20, 2, 2, 2, 2)):
        data = as_dataset(RNG.integers(-5, 5, shape))
        assert data.train_images.dtype == np.float32
        assert data.train_images.shape == (18, *shape[1:])
    x = RNG.normal(size=(4, 3, 2))
    assert as_dataset(x.astype("f") * 0).train_images.shape == (3, 3, 2, 1)  # grey images
    assert as_dataset(Dataset(x, None, x, None)).train_images.shape == (4, 3, 2)
    with refused("expected numbers"):
        as_dataset(np.full((20, 3), "a"))
