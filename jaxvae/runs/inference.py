"""A trained model applied to a whole data set, batch by batch."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.data import Images
from jaxvae.devices.sharding import (
    AXIS,
    LEAST,
    data_parallel,
    devices_for,
    divisible,
    replicated,
)
from jaxvae.evaluation.impute import impute
from jaxvae.evaluation.log_likelihood import log_likelihood
from jaxvae.evaluation.metrics import reconstruction_error
from jaxvae.models.codebooks import codebook_of, is_discrete
from jaxvae.models.distributions import Gaussian
from jaxvae.models.vae import (
    Params,
    classify,
    encode_observed,
    known_classes,
    labels_of_bound,
    reconstruct_observed,
)
from jaxvae.objectives import elbo, example_keys
from jaxvae.runs.checkpoints import Which, load
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import (
    as_examples_of,
    examples_of,
    load_run_data,
    warn_of_other_data,
)
from jaxvae.validation import expect_one_of, whole_number

_BATCH = 1000  # images at once, which bounds memory
# Decoder outputs in one call, which an interrupt cannot end. On several CPU devices, XLA's memory
# grows during a call by up to 3 MB for every 1,000 outputs.
_DECODED = 2**15
_SAMPLES = 2**26  # numbers, 256 MB

SCORES = ("log_likelihood", "elbo", "reconstruction_error")

Arrays = dict[str, np.ndarray]
Named = OrderedDict[str, jax.Array]  # of which JAX keeps the order
Counter = Callable[[int, int], None]


class Opened(NamedTuple):
    """A trained model, and the examples to which it is applied.

    Attributes:
      params: the model.
      key: PRNG key of evaluation.
      images: images or other examples, read when they are indexed.
      labels: their labels, int64 [N], or None.
      conditions: what the model takes as labels: classes, covariates or None.
      columns: names of the features, if the data are a table.
      label_column: name of the column of classes, if one was given.
      covariate_columns: the columns of covariates, [N], by name, as they are in the data.
    """

    params: Params
    key: jax.Array
    images: Images
    labels: np.ndarray | None = None
    conditions: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    label_column: str | None = None
    covariate_columns: Mapping[str, np.ndarray] = MappingProxyType({})


def open_run(
    run_dir: Path,
    data_name: str | None = None,
    split: str = "all",
    which: Which = "latest",
    *,
    missing: bool = False,
    **own: Any,
) -> Opened:
    """Load the model of a run, and the examples to which it is applied.

    Args:
      run_dir: the run directory.
      data_name: name or path of another data set than the recorded one.
      split: "all", "train" or "test", in the order of `jaxvae.runs.data.examples_of`.
      which: "latest", or "best" by test ELBO.
      missing: as in `jaxvae.runs.data.load_run_data`.
      own: custom components of the model, by field.

    Returns:
      Model and examples.

    Raises:
      InputError: the run, its data or its checkpoints cannot be read; the data lack the classes or
        covariates of a conditional model.
    """
    config = read_config(run_dir, **own)
    data = load_run_data(config, data_name, missing=missing)
    name = data_name or config.data
    if data_name is None:
        warn_of_other_data(run_dir, config, data)
    data = as_examples_of(name, data, config.model)
    examples = examples_of(data, config, split)
    params = load(run_dir, which, **own)
    key = run_keys(config)[1]
    rows = data.split_rows(split)
    columns = {name: x[rows] for name, x in data.covariate_columns.items()}
    return Opened(params, key, *examples, data.columns, config.label_column, columns)


def encode_all(opened: Opened, progress: Counter | None = None) -> Arrays:
    """Encode examples.

    Args:
      opened: model and examples.
      progress: called with the number of examples that are done, and that of all.

    Returns:
      `mean` and `log_var`, [N, latent], of a Gaussian posterior or of the groups of a hierarchy;
      or `codes`, [N, n], of a discrete model; or `center`, [N, latent], of any other posterior,
      such as a flow. `probabilities`, [N, classes], of a model with a classifier. `labels`, [N], if
      there are any.

    Raises:
      InputError: examples of another shape than the model's.
    """

    def encoded(params: Params, keys: Any, images: Any, labels: Any) -> Named:
        posterior = encode_observed(params, images, labels)
        if is_discrete(params.config):
            return Named(codes=codebook_of(params).codes(posterior.center))
        probabilities = {}
        if params.config.classifier:
            probabilities["probabilities"] = classify(params, images)
        if isinstance(posterior, Gaussian) or hasattr(params.model, "groups"):
            return Named(mean=posterior.mean, log_var=posterior.log_var, **probabilities)
        return Named(center=posterior.center, **probabilities)

    return _in_batches(encoded, opened, progress) | _labels(opened)


def bound_all(opened: Opened, num_samples: int, progress: Counter | None = None) -> Arrays:
    """Estimate ELBO and log p(x) of examples.

    Args:
      opened: model and examples.
      num_samples: importance samples for log p(x).
      progress: called with the number of examples that are done, and that of all.

    Returns:
      Arrays [N], in nats: `log_likelihood`, an estimate of log p(x), and `elbo`, which is
      `expected_log_likelihood`, E[log p(x|z)] under q(z|x), minus `kl`. Of a model with a
      classifier log p(x) is the sum over the classes, whether there are labels or not.

    Raises:
      InputError: examples of another shape than the model's; num_samples below 1.
    """
    return _in_batches(partial(_bounds, num_samples), opened, progress, _most(num_samples))


def _bounds(num_samples: int, params: Params, keys: Any, images: Any, labels: Any) -> Named:
    labels = labels_of_bound(params, labels, len(images))
    terms = elbo(params, keys, images, labels)
    return Named(
        log_likelihood=log_likelihood(params, keys, images, num_samples, labels),
        elbo=terms.value,
        expected_log_likelihood=terms.log_likelihood,
        kl=terms.kl,
    )


def _most(num_samples: int) -> int:
    """Return the number of images at once for which an interrupt takes effect soon."""
    whole_number("num_samples", num_samples)
    return max(_DECODED // num_samples, LEAST * jax.device_count())


def score_all(
    opened: Opened,
    num_samples: int = 100,
    by: str = "log_likelihood",
    progress: Counter | None = None,
) -> Arrays:
    """Score examples by how unusual they are under the model.

    Args:
      opened: model and examples.
      num_samples: importance samples for log p(x).
      by: the order: "log_likelihood" or "elbo", the smallest first, or "reconstruction_error", the
        largest first.
      progress: called with the number of examples that are done, and that of all.

    Returns:
      Arrays [N], the most unusual example first: `index`, the place of the example, from 0; those
      of `bound_all`; `reconstruction_error`, the mean square per pixel, of a model with a
      classifier by the known or most probable class; and `labels`, if there are any.

    Raises:
      InputError: examples of another shape than the model's; another order; num_samples below 1.
    """
    expect_one_of("by", by, SCORES)

    def scored(params: Params, keys: Any, images: Any, labels: Any) -> Named:
        means = reconstruct_observed(params, images, labels)
        return Named(
            **_bounds(num_samples, params, keys, images, labels),
            reconstruction_error=reconstruction_error(images, means),
        )

    found = _in_batches(scored, opened, progress, _most(num_samples)) | _labels(opened)
    order = np.argsort(-found[by] if by == "reconstruction_error" else found[by], kind="stable")
    return {"index": order, **{name: x[order] for name, x in found.items()}}


def reconstruct_all(opened: Opened, progress: Counter | None = None) -> Arrays:
    """Reconstruct examples, as `jaxvae.reconstruct`.

    Args:
      opened: model and examples.
      progress: called with the number of examples that are done, and that of all.

    Returns:
      `images`, [N, ...], and `labels`, [N], if there are any.

    Raises:
      InputError: examples of another shape than the model's.
    """

    def reconstructed(params: Params, keys: Any, images: Any, labels: Any) -> Named:
        return Named(images=reconstruct_observed(params, images, labels))

    return _in_batches(reconstructed, opened, progress) | _labels(opened)


def impute_all(
    opened: Opened, num_samples: int = 1000, num_draws: int = 0, progress: Counter | None = None
) -> Arrays:
    """Fill in missing entries, NaN, by `jaxvae.impute`.

    Args:
      opened: model and examples.
      num_samples: importance samples.
      num_draws: number of draws.
      progress: called with the number of examples that are done, and that of all.

    Returns:
      `images`, [N, ...], with the conditional means in missing entries; `draws`,
      [num_draws, N, ...], with samples of p(x_m | x_o), if any are asked for; `missing`, [N], the
      number of missing entries of each example; `effective_sample_size`, [N], of the importance
      weights; and `labels`, [N], if there are any.

    Raises:
      InputError: examples of another shape than the model's; num_samples below 1, or num_draws
        below 0.
    """
    num_samples = whole_number("num_samples", num_samples)
    num_draws = whole_number("num_draws", num_draws, 0)

    def imputed(params: Params, keys: Any, images: Any, labels: Any) -> Named:
        found = impute(params, keys, images, num_samples, labels, num_draws=max(1, num_draws))
        draws = {"draws": jnp.moveaxis(found.draws, 0, 1)} if num_draws else {}
        return Named(
            images=found.mean,
            **draws,
            missing=jnp.sum(jnp.isnan(images), tuple(range(1, images.ndim))),
            effective_sample_size=found.effective_sample_size,
        )

    # All samples of the latents are kept.
    most = min(_SAMPLES // (num_samples * opened.params.config.latent_dim), _most(num_samples))
    found = _in_batches(imputed, opened, progress, most) | _labels(opened)
    if num_draws:
        found["draws"] = np.moveaxis(found["draws"], 1, 0)
    return found


def by_columns(opened: Opened, found: Arrays) -> Arrays:
    """Return vectors `images`, their `labels` and covariates as the columns of a table."""
    x = found["images"]
    names = opened.columns or tuple(str(i + 1) for i in range(x.shape[1]))
    columns = dict(zip(names, x.T, strict=True))
    if "labels" in found:
        columns[opened.label_column or "labels"] = found["labels"]
    return columns | dict(opened.covariate_columns)


def _labels(opened: Opened) -> Arrays:
    return {} if opened.labels is None else {"labels": opened.labels}


def _in_batches(
    f: Callable[..., Named], opened: Opened, progress: Counter | None, most: int = 2**31
) -> Arrays:
    """Compute f(params, keys, images, labels), arrays [batch, ...], on all examples.

    Every batch, of about `most` examples, is split over the devices, and has a key for each
    example. The last batch is filled up with copies of the last example, so that one compiled
    function serves all.
    """
    params, key, images, _, labels, *_ = opened
    n = len(images)
    size = divisible(max(1, min(n, most, _BATCH)))
    mesh, rows = devices_for(size), jax.P(AXIS)

    def of_batch(params: Params, keys: Any, images: Any, labels: Any, *, axis_name: Any) -> Named:
        return f(params, keys, images, known_classes(params, images, labels))

    compute = data_parallel(
        of_batch,
        mesh,
        in_specs=(jax.P(), rows, rows, rows),
        out_specs=rows,
    )
    params = jax.device_put(params, replicated(mesh))
    found: Arrays = {}
    for first in range(0, n, size):
        chosen = np.minimum(np.arange(first, first + size), n - 1)
        keys = example_keys(key, size, first)
        batch = images[chosen], None if labels is None else labels[chosen]
        for name, values in compute(params, keys, *batch).items():
            part = np.asarray(values)[: n - first]
            whole = found.setdefault(name, np.empty((n, *part.shape[1:]), part.dtype))
            whole[first : first + size] = part
        if progress is not None:
            progress(min(first + size, n), n)
    return found
