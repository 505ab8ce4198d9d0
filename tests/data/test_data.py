"""The embedded data set."""

import hashlib

import numpy as np

from jaxvae import load_data


def test_mnist_5k_is_balanced_by_class():
    (train, train_labels), (test, test_labels) = load_data("mnist-5k", labels=True)
    assert train.shape == (4500, 28, 28, 1)
    assert test.shape == (500, 28, 28, 1)
    assert train.dtype == test.dtype == np.uint8
    assert list(np.bincount(train_labels)) == [450] * 10
    assert list(np.bincount(test_labels)) == [50] * 10


def test_mnist_5k_is_split_the_same_way_for_ever():
    train, test = load_data("mnist-5k")
    digest = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()
    assert digest.startswith("0d157c4ba70645ef")
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
