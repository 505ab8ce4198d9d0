"""The data set of a run, as its model takes it."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.data import Dataset, load_dataset
from jaxvae.errors import InputError
from jaxvae.models.config import ModelConfig
from jaxvae.models.likelihoods import binarize
from jaxvae.runs.config import RunConfig

T = TypeVar("T")


def load_run_data(config: RunConfig) -> Dataset:
    """The data set that a run was told to use.

    With binarization, the test images are 0/1 pixels drawn once, the same ones in every run, and
    so are the training images where it is fixed.
    """
    data = load_dataset(config.data, data_dir=config.data_dir, manual_dir=config.manual_dir)
    kind = config.train.binarization
    train_key, test_key = binarization_keys()
    if kind == "fixed":
        if not isinstance(data.train_images, np.ndarray):
            raise InputError(
                f"{config.data} is read from disk image by image: "
                "expected the binarization 'dynamic' or 'none', not 'fixed'"
            )
        data = data._replace(train_images=binarized(train_key, data.train_images))
    if kind != "none":
        data = data._replace(test_images=binarized(test_key, data.test_images))
    return data


def binarization_keys() -> jax.Array:
    # Not of the run's seed: runs are compared on the same images.
    return jax.random.split(jax.random.key(0))


def binarized(key: jax.Array, images: np.ndarray) -> np.ndarray:
    return (255 * np.asarray(binarize(key, jnp.asarray(images)))).astype(np.uint8)


def model_inputs(
    images: T, labels: np.ndarray | None, model: ModelConfig
) -> tuple[T, np.ndarray | None]:
    """Images, and their labels where the model is conditional."""
    return images, labels.astype(np.int32) if model.num_classes and labels is not None else None
