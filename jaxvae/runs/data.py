"""The data set of a run."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.components import imported, is_dotted_path
from jaxvae.data import Dataset, Images, as_dataset, load_dataset
from jaxvae.data.covariates import Covariate, Covariates
from jaxvae.data.files import ENDINGS
from jaxvae.errors import InputError, OtherData
from jaxvae.models.config import ModelConfig
from jaxvae.models.likelihoods import binarize
from jaxvae.runs.config import DataRecord, RunConfig
from jaxvae.runs.files import IN_PYTHON, read_json
from jaxvae.training.config import labelled_slots
from jaxvae.validation import expect_support, is_image, scale_images

SPLITS = ("all", "train", "test")
_HASHED_WHOLE = 2**30  # bytes of images in memory, which take about a second
_HASHED_IMAGES = 256  # of images on disk, and of larger arrays


def load_run_data(config: RunConfig, typed: str | None = None, *, missing: bool = False) -> Dataset:
    """Load the data set of a run.

    With binarization, the test images are 0/1 pixels, drawn once and equal in every run; with
    fixed binarization, so are the training images.

    Args:
      config: the configuration of the run.
      typed: a name or path that the user typed, instead of the recorded one. It may be the dotted
        path of a custom function; a dotted path in a file is never imported.
      missing: whether entries may be missing, NaN, although the objective does not take them.

    Returns:
      The data set.

    Raises:
      InputError: the data cannot be loaded, or as for `prepared`.
    """
    name = config.data if typed is None else typed
    missing = missing or takes_missing(config)
    if is_dotted_path(name) and not Path(name).exists() and not name.endswith(ENDINGS):
        if typed is None:
            raise InputError(
                f"the data of this run come from the custom function {name}: pass it again with "
                f"--data {name}"
            )
        try:
            made = imported("data", name)
        except InputError as error:
            raise InputError(f"{name} is not a file, and {error}") from None
        data = as_dataset(made() if callable(made) else made, name, missing=missing)
        return prepared(data, config, name, missing=missing)
    if name == IN_PYTHON:
        raise InputError(
            "the data of this run were passed as arrays in Python: name a data set with --data"
        )
    try:
        data = load_dataset(
            name,
            data_dir=config.data_dir,
            manual_dir=config.manual_dir,
            label_column=config.label_column,
            covariate_columns=_covariates(config),
            resize=config.resize,
            crop=config.crop,
            missing=missing,
            unlabelled=config.model.classifier,
        )
    except InputError as error:
        if typed is not None:
            raise
        raise InputError(f"{error}; if the data have moved, pass their path with --data") from None
    return prepared(data, config, name, missing=missing)


def _covariates(config: RunConfig) -> Covariates:
    """Return the covariates of a run, or of the run that it starts from, or the columns' names."""
    if config.covariates or config.start_from is None or not config.covariate_columns:
        return config.covariates or config.covariate_columns

    def parse(content: dict[str, Any]) -> Covariates:
        same = content.get("covariate_columns") == config.covariate_columns
        found = content.get("covariates", ()) if same else ()
        return tuple(map(Covariate.from_dict, found)) or config.covariate_columns

    return read_json(Path(config.start_from) / "config.json", parse)


def train_conditions(data: Dataset, config: RunConfig) -> np.ndarray | None:
    """Return the labels or covariates with which a run is trained.

    With `labelled` only so many labels are kept, of each class equally many, drawn by the seed; the
    others are -1.

    Args:
      data: the data set.
      config: the configuration of the run.

    Returns:
      `Dataset.conditions` of the training examples.

    Raises:
      InputError: fewer labels of a class than are to be kept, or a number of labels that is no
        multiple of the number of classes.
    """
    labels, classes = data.conditions(config.model, "train"), config.model.num_classes
    if not config.labelled or labels is None:
        return labels
    each, rest = divmod(config.labelled, classes)
    if rest:
        raise InputError(
            f"labelled is {config.labelled}: expected a multiple of num_classes, {classes}"
        )
    rng, kept = np.random.default_rng(config.seed), np.full_like(labels, -1)
    for k in range(classes):
        of_class = np.flatnonzero(labels == k)
        if len(of_class) < each:
            raise InputError(
                f"labelled is {config.labelled}, {each} of each class, but class {k} has "
                f"{len(of_class)} training labels: expected at most {classes * len(of_class)}"
            )
        kept[rng.permutation(of_class)[:each]] = k
    return kept


def labelled_counts(data: Dataset, config: RunConfig) -> tuple[int, int, float] | None:
    """Describe how training examples with a label are repeated by `jaxvae.training.step.shuffle`.

    Args:
      data: the data set.
      config: the configuration of the run.

    Returns:
      The number of training examples with a label, their least number in a batch, and how often
      each comes in an epoch; None if they are not repeated.
    """
    labels, slots = train_conditions(data, config), labelled_slots(config.train)
    count = 0 if labels is None or not slots else int(np.sum(labels >= 0))
    times = len(data.train_images) // config.train.batch_size * slots / max(1, count)
    return (count, slots, times) if count and times > 1 else None


def takes_missing(config: RunConfig) -> bool:
    """Return whether the objective of a run takes missing entries, NaN."""
    return getattr(config.train.objective, "missing", False)


def prepared(
    data: Dataset, config: RunConfig, name: str = "the data", *, missing: bool = False
) -> Dataset:
    """Binarize images as the configuration says, and check the values of other examples.

    Args:
      data: the data set.
      config: the configuration of the run.
      name: name of the data in error messages.
      missing: as in `load_run_data`.

    Returns:
      The data set.

    Raises:
      InputError: fixed binarization of images that are read from disk one by one; binarization
        of other examples, or values outside of the likelihood's support.
    """
    kind = config.train.binarization
    if not is_image(data.train_images.shape[1:]):
        if kind != "none":
            raise InputError(
                f"binarization is {kind!r}, but {name} does not hold images: expected 'none'"
            )
        for examples in (data.train_images, data.test_images):
            support = config.model.likelihood.support
            allowed = missing or takes_missing(config)
            expect_support(support, examples, f"{name} has", missing=allowed)
    train_key, test_key = binarization_keys()
    if kind == "fixed":
        if not isinstance(data.train_images, np.ndarray):
            raise InputError(
                f"binarization is 'fixed', but {name} is read from disk image by image: "
                "expected 'dynamic' or 'none'"
            )
        data = data._replace(train_images=binarized(train_key, data.train_images))
    if kind != "none":
        data = data._replace(test_images=binarized(test_key, data.test_images))
    return data


def describe(data: Dataset) -> DataRecord:
    """Return the numbers of images of a data set, and a digest of its arrays.

    The digest is the SHA-256 of shape, dtype and content of every array. Of images on disk, and of
    more than 1 GiB in memory, only 256 evenly spaced images are hashed.

    Args:
      data: the data set.

    Returns:
      The record.
    """
    digest = hashlib.sha256()
    covariates = [x for x in (data.train_covariates, data.test_covariates) if x is not None]
    for x in (*data[:4], *covariates):
        if x is None:
            digest.update(b"none")
            continue
        digest.update(f"{x.shape} {np.dtype(x.dtype).str}".encode())
        if not isinstance(x, np.ndarray) or (x.ndim > 1 and x.nbytes > _HASHED_WHOLE):
            rows = np.linspace(0, len(x) - 1, min(len(x), _HASHED_IMAGES), dtype=int)
            x = x[rows]
        digest.update(np.ascontiguousarray(x).data)
    return DataRecord(len(data.train_images), len(data.test_images), digest.hexdigest())


def difference(record: DataRecord, trained_on: DataRecord) -> str | None:
    """Return how a data set differs from the one that a run was trained on, or None.

    Args:
      record: of the data set.
      trained_on: of the data set of the run.

    Returns:
      The difference as part of a sentence.
    """
    if record.sha256 == trained_on.sha256:
        return None
    now, then = (f"{r.train_images:,} training and {r.test_images:,} test images"
                 for r in (record, trained_on))  # fmt: skip
    if now != then:
        return f"it has {now} instead of {then}"
    return f"it also has {now}, but with other pixels or labels"


def warn_of_other_data(
    run_dir: Path, config: RunConfig, data: Dataset, typed: str | None = None
) -> None:
    """Warn, with the category `OtherData`, if a run was not trained on this data set.

    Args:
      run_dir: the run directory.
      config: the configuration of the run.
      data: the data set.
      typed: its name or path, if it is not the recorded one.
    """
    if config.data_seen and (found := difference(describe(data), config.data_seen[-1])):
        subject = typed or ("this" if config.data == IN_PYTHON else config.data)
        warnings.warn(
            f"{subject} is not the data set that {run_dir} was trained on: {found}",
            OtherData,
            stacklevel=2,
        )


def binarization_keys() -> jax.Array:
    """Return the PRNG keys for binarizing training and test images: [2].

    They do not depend on the seed of the run, so that all runs are compared on the same images.
    """
    return jax.random.split(jax.random.key(0))


def binarized(key: jax.Array, images: np.ndarray) -> np.ndarray:
    """Return images as uint8 0 or 255, drawn with the grey levels as probabilities.

    With missing entries, NaN, they are float32 0 or 1.
    """
    binary = np.asarray(binarize(key, jnp.asarray(images)))
    return binary if np.isnan(binary).any() else (255 * binary).astype(np.uint8)


@dataclass(frozen=True)
class _Joined:
    """Training and test images as one array, read by index.

    Attributes:
      parts: training and test images.
      places: of each image, its index in the training images followed by the test images.
    """

    parts: tuple[Images, Images]
    places: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        places, (train, test) = self.places[rows], self.parts
        images = np.empty((len(places), *self.shape[1:]), self.dtype)
        in_train = places < len(train)
        images[in_train] = train[places[in_train]]
        images[~in_train] = test[places[~in_train] - len(train)]
        return images


def examples_of(
    data: Dataset, config: RunConfig, split: str
) -> tuple[Images, np.ndarray | None, np.ndarray | None]:
    """Return the images of a split, their labels and conditions, in the order of the data.

    Data without a split of their own are in the order of their source. Of others, the training
    images come before the test images. With dynamic binarization the training images are binarized
    as the test images are, by a fixed key.

    Args:
      data: the data set.
      config: the configuration of the run.
      split: one of `SPLITS`.

    Returns:
      The images, which are read when they are indexed; their labels, if all have one; and their
      `Dataset.conditions`.
    """
    train_images, test_images = data.train_images, data.test_images
    if config.train.binarization == "dynamic" and split != "test":
        train_images = binarized(binarization_keys()[0], train_images[:])
    if split == "test":
        return test_images, data.test_labels, data.conditions(config.model, "test")
    if split == "train":
        return train_images, data.train_labels, data.conditions(config.model, "train")
    if train_images.dtype != test_images.dtype:  # uint8 and float32
        train_images, test_images = (
            np.asarray(scale_images(x[:])) for x in (train_images, test_images)
        )
    test = data.split_rows("test")
    places = np.where(test, len(train_images) + np.cumsum(test), np.cumsum(~test)) - 1

    def joined(*parts: np.ndarray | None) -> np.ndarray | None:
        known = [part for part in parts if part is not None]
        return np.concatenate(known)[places] if len(known) == 2 else None

    return (
        _Joined((train_images, test_images), places),
        joined(data.train_labels, data.test_labels),
        joined(*(data.conditions(config.model, split) for split in ("train", "test"))),
    )


def as_examples_of(name: str, data: Dataset, model: ModelConfig) -> Dataset:
    """Return a data set to which a trained model is applied.

    Args:
      name: name of the data in error messages.
      data: the data set.
      model: the model.

    Returns:
      The data set. For a model with a classifier, missing labels are -1, no label.

    Raises:
      InputError: examples of another shape, or as for `expect_conditions`.
    """
    if (shape := data.train_images.shape[1:]) != model.image_shape:
        raise InputError(
            f"{name} holds {model.noun}s of shape {shape}: expected {model.image_shape}, the shape "
            "of those that the model was trained on"
        )
    if model.classifier and data.train_labels is None:
        data = data._replace(train_labels=np.full(len(data.train_images), -1))
    if model.classifier and data.test_labels is None:
        data = data._replace(test_labels=np.full(len(data.test_images), -1))
    expect_conditions(name, data, model)
    return data


def expect_conditions(name: str, data: Dataset, model: ModelConfig) -> None:
    """Raise InputError unless a data set has the classes or covariates of a conditional model.

    Args:
      name: name of the data in error messages.
      data: the data set.
      model: the model; if it is unconditional, nothing is checked.

    Raises:
      InputError: labels are missing or out of range; covariates are missing or of another number.
    """
    found = 0 if data.train_covariates is None else data.train_covariates.shape[1]
    if model.num_covariates not in (0, found):
        has = f"{found} covariates" if found else "no covariates"
        raise InputError(
            f"{name} has {has}: expected {model.num_covariates}, as num_covariates is "
            f"{model.num_covariates}; name their columns with --covariate-columns, or pass them as "
            "labels in Python"
        )
    least = -1 if model.classifier else 0  # -1: no label
    for split in ("train", "test") if model.num_classes else ():
        labels = getattr(data, f"{split}_labels")
        if labels is None or not least <= labels.min() <= labels.max() < model.num_classes:
            has = f"no {split} labels"
            if labels is not None:
                has = f"{split} labels from {labels.min()} to {labels.max()}"
            raise InputError(
                f"{name} has {has}: expected classes from 0 to {model.num_classes - 1}, "
                f"as num_classes is {model.num_classes}"
            )
