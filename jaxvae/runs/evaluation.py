"""Evaluation of a run on its test images."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, replicated
from jaxvae.evaluation.ais import ais, bidirectional_ais
from jaxvae.evaluation.evaluate import examine
from jaxvae.evaluation.log_likelihood import log_likelihood
from jaxvae.models.likelihoods import bits_per_dimension
from jaxvae.models.vae import Params, known_classes
from jaxvae.objectives import elbo, example_keys
from jaxvae.runs.checkpoints import Which, load_with_step
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import (
    binarization_keys,
    binarized,
    load_run_data,
    warn_of_other_data,
)
from jaxvae.runs.files import write_json
from jaxvae.runs.inference import Counter, Opened, bound_all

_METRICS = {
    "elbo": "ELBO",
    "log_likelihood": "log-likelihood E[log p(x|z)]",
    "kl": "KL(q(z|x) || p(z))",
    "mutual_information": "  mutual information I(n; z)",
    "marginal_kl": "  KL(q(z) || p(z))",
    "log_p_x": "log p(x), {num_samples} samples",
    "bits_per_dimension": "bits per dimension, of log p(x)",
    "active_units": "active units",
    "code_perplexity": "codes in use (perplexity)",
    "reconstruction_error": "mean squared error of a {value}",
    "classification_error": "classification error of q(y|x)",
    "logistic_regression": "accuracy of logistic regression",
    "nearest_neighbors": "accuracy of 5 nearest neighbors",
}


def measure(
    run_dir: Path,
    num_samples: int,
    which: Which = "latest",
    data_name: str | None = None,
    progress: Counter | None = None,
    **own: Any,
) -> dict[str, Any]:
    """Evaluate the model of a run on its test images.

    Args:
      run_dir: the run directory.
      num_samples: importance samples for log p(x).
      which: "latest", or "best" by test ELBO.
      data_name: name or path of another data set than the recorded one.
      progress: called with the number of images whose log p(x) is estimated, and that of all.
      own: custom components of the model, by field.

    Returns:
      `step`, `data` (the name), `images` and `num_samples`; `elbo`, `log_likelihood`, `kl` and
      `log_p_x`, means in nats per image, of log p(x|y) if the model is conditional, but of log p(x)
      if it has a classifier; `bits_per_dimension` of log_p_x, if the likelihood is over
      grey levels; the metrics of `jaxvae.evaluation.evaluate.examine`; `seconds` and `devices`.

    Raises:
      InputError: the run, its data or its checkpoints cannot be read.
    """
    began = time.perf_counter()
    config = read_config(run_dir, **own)
    data = load_run_data(config, data_name)
    warn_of_other_data(run_dir, config, data, data_name)
    # Of images on disk, read only as many as the probes of the latents need.
    rows = np.linspace(
        0, len(data.train_images) - 1, min(len(data.train_images), 10_000), dtype=int
    )
    train_images = data.train_images
    if not isinstance(train_images, np.ndarray):
        train_images = train_images[rows]
        labels, covariates = (
            None if x is None else x[rows] for x in (data.train_labels, data.train_covariates)
        )
        data = data._replace(train_labels=labels, train_covariates=covariates)
    if config.train.binarization == "dynamic":  # the model was trained on 0/1 pixels
        train_images = binarized(binarization_keys()[0], train_images)
    data = data._replace(train_images=train_images)
    params, step = load_with_step(run_dir, which, **own)
    _, key = run_keys(config)
    test = Opened(params, key, data.test_images, conditions=data.conditions(config.model, "test"))
    means = {
        name: float(np.mean(values, dtype=np.float64))
        for name, values in bound_all(test, num_samples, progress).items()
    }
    terms = {
        "elbo": means["elbo"],
        "kl": means["kl"],
        "log_likelihood": means["expected_log_likelihood"],
        "log_p_x": means["log_likelihood"],
    }
    if config.model.likelihood.support == "levels":
        log_p_x = jnp.asarray(terms["log_p_x"])
        terms["bits_per_dimension"] = float(bits_per_dimension(log_p_x, config.model.image_shape))
    return {
        "step": step,
        "data": config.data if data_name is None else data_name,
        "images": len(data.test_images),
        "num_samples": num_samples,
        **terms,
        **examine(params, key, data),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def described(metrics: Mapping[str, Any], noun: str) -> list[tuple[str, str, str]]:
    """Describe the result of `measure`, for display.

    Args:
      metrics: the result, or a part of it, such as the test metrics of an epoch.
      noun: what an example is called, `ModelConfig.noun`.

    Returns:
      Name, description and value of each metric.
    """
    value = "pixel" if noun == "image" else "feature"
    rows = []
    for name, says in _METRICS.items():
        if name in metrics:
            digits = 0 if name == "active_units" else 4 if "error" in name else 3
            rows.append((name, says.format(**metrics, value=value), f"{metrics[name]:.{digits}f}"))
    return rows


def measure_bounds(
    run_dir: Path,
    num_samples: int,
    which: Which = "latest",
    data_name: str | None = None,
    *,
    num_images: int = 100,
    num_steps: int = 500,
    num_chains: int = 4,
    **own: Any,
) -> dict[str, Any]:
    """Bound log p(x) of test images, and of images simulated from the model of a run.

    Of a conditional model, also with a classifier, it is log p(x|y).

    Args:
      run_dir: the run directory.
      num_samples: importance samples for log p(x).
      which: "latest", or "best" by test ELBO.
      data_name: name or path of another data set than the recorded one.
      num_images: number of test images, the first ones, and of simulated images.
      num_steps: steps of annealed importance sampling.
      num_chains: its chains for each image and direction.
      own: custom components of the model, by field.

    Returns:
      `step`, `images`, `num_samples`, `num_steps` and `num_chains`; `test` and `simulated`, with
      the means `elbo`, `importance_sampling`, `lower` and, of simulated images, `upper`, in nats
      per image; `seconds` and `devices`.

    Raises:
      InputError: the run, its data or its checkpoints cannot be read; latents that are codes.
    """
    began = time.perf_counter()
    config = read_config(run_dir, **own)
    data = load_run_data(config, data_name)
    warn_of_other_data(run_dir, config, data, data_name)
    params, step = load_with_step(run_dir, which, **own)
    num_images = min(num_images, len(data.test_images))
    images, labels = data.test_images[:num_images], data.conditions(config.model, "test")
    labels = None if labels is None else known_classes(params, images, labels[:num_images])
    classes = config.model.num_classes
    simulated_labels = np.arange(num_images, dtype=np.int32) % classes if classes else labels
    _, key = run_keys(config)
    test_keys, simulated_keys = (example_keys(k, num_images) for k in jax.random.split(key))
    devices = devices_for(num_images)
    numbers: dict[str, Any] = {
        "num_samples": num_samples,
        "num_steps": num_steps,
        "num_chains": num_chains,
    }

    def means(*of_images: Any) -> dict[str, float]:
        bounds = data_parallel(
            partial(_bounds, **numbers),
            devices,
            in_specs=(jax.P(), *[jax.P(AXIS)] * len(of_images)),
            out_specs=jax.P(AXIS),
        )
        found = bounds(*jax.device_put((params, *of_images), replicated(devices)))
        return {name: float(np.mean(values)) for name, values in found.items()}

    return {
        "step": step,
        "images": num_images,
        **numbers,
        "test": means(test_keys, labels, images),
        "simulated": means(simulated_keys, simulated_labels),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{devices.size} x {devices.devices.flat[0].device_kind}",
    }


def _bounds(
    params: Params,
    keys: jax.Array,
    labels: jax.Array | None,
    images: jax.Array | None = None,
    *,
    num_samples: int,
    num_steps: int,
    num_chains: int,
    axis_name: str,
) -> dict[str, jax.Array]:
    """Bound log p(x) of these images, or of as many simulated ones, on one device."""
    ais_keys, elbo_keys, sample_keys = jax.vmap(lambda key: jax.random.split(key, 3), 0, 1)(keys)
    if images is None:
        sandwich = bidirectional_ais(
            params, ais_keys, len(keys), num_steps, labels, num_chains=num_chains
        )
        images = sandwich.images
        bounds = {"lower": sandwich.lower, "upper": sandwich.upper}
    else:
        bounds = {"lower": ais(params, ais_keys, images, num_steps, labels, num_chains=num_chains)}
    return {
        "elbo": elbo(params, elbo_keys, images, labels).value,
        "importance_sampling": log_likelihood(params, sample_keys, images, num_samples, labels),
        **bounds,
    }


def write_evaluation(
    run_dir: Path, metrics: Mapping[str, Any], name: str = "evaluation.json"
) -> Path:
    """Write the result of `measure` or `measure_bounds` to a file of the run directory.

    Args:
      run_dir: the run directory.
      metrics: the result.
      name: of the file.

    Returns:
      The path of the file.

    Raises:
      InputError: the directory cannot be written.
    """
    path = run_dir / name
    write_json(path, metrics)
    return path
