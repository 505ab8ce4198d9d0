"""Random-access sources in Python, such as data sets of Hugging Face, PyTorch and Grain."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxvae.data.arrays import expect_memory, reading
from jaxvae.data.dataset import as_examples, number_classes
from jaxvae.errors import InputError


def is_source(data: Any) -> bool:
    """Whether data are a source: they have `__len__` and `__getitem__`, and are no array."""
    if isinstance(data, list | tuple | str | Mapping) or hasattr(data, "__array__"):
        return False
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def read_source(source: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read all items of a source into memory.

    An item is an array (or a picture of Pillow); a tuple of an array and a label; or a dict with an
    array, as "image" or as the only entry beside "label", and perhaps a "label".

    Args:
      source: items 0 to `len(source)` - 1.
      name: name of the data in error messages.

    Returns:
      The examples, [N, ...], and the labels: int64 [N], or None without labels.

    Raises:
      InputError: there are no items, an item is of another form, or the items differ in shape or
        type.
    """
    with reading(name):
        count = len(source)
    if not count:
        raise InputError(f"{name} has no items: expected at least one")
    labels = []
    for i in range(count):
        with reading(f"{name}, item {i}"):
            array, label = _array_and_label(source[i])
            if not i:
                first = array
                expect_memory(count * array.nbytes)
                examples = np.empty((count, *array.shape), array.dtype)
            if (array.shape, array.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"it has shape {array.shape} and type {array.dtype}: expected {first.shape} "
                    f"and {first.dtype}, as item 0"
                )
            examples[i] = array
        if label is not None:
            labels.append(np.asarray(label))
    if not labels:
        return as_examples(examples, name), None
    if len(labels) < count:
        raise InputError(f"{name} has labels for {len(labels)} of {count} items: expected all")
    return as_examples(examples, name), number_classes(np.stack(labels), name)


def _array_and_label(item: Any) -> tuple[np.ndarray, Any]:
    label = None
    if isinstance(item, Mapping):
        label = item.get("label")
        others = ["image"] if "image" in item else [key for key in item if key != "label"]
        if len(others) != 1:
            raise ValueError(
                f"it has {', '.join(map(repr, item))}: expected an array, as 'image' or as the "
                "only entry beside 'label'; map the source to such items first"
            )
        item = item[others[0]]
    elif isinstance(item, tuple):
        if len(item) not in (1, 2):
            raise ValueError(f"it is a tuple of {len(item)}: expected (array, label)")
        item, label = item[0], item[1] if len(item) == 2 else None
    array = np.asarray(item)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"it is of type {array.dtype}: expected an array of numbers")
    return array, label
