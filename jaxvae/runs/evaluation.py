"""Evaluation of a run on its test images."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvae.devices.sharding import data_parallel, devices_for, replicated
from jaxvae.evaluation.evaluate import evaluate, examine, mean_log_likelihood
from jaxvae.models.likelihoods import bits_per_dimension
from jaxvae.runs.checkpoints import Which, load_with_step
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import (
    binarization_keys,
    binarized,
    load_run_data,
    model_inputs,
    warn_of_other_data,
)
from jaxvae.runs.files import write_json


def measure(
    run_dir: Path,
    num_samples: int,
    which: Which = "latest",
    data_name: str | None = None,
    **own: Any,
) -> dict[str, Any]:
    """Evaluate the model of a run on its test images.

    Args:
      run_dir: the run directory.
      num_samples: importance samples for log p(x).
      which: "latest", or "best" by test ELBO.
      data_name: name or path of another data set than the recorded one.
      own: custom components of the model, by field.

    Returns:
      `step`, `images` and `num_samples`; `elbo`, `log_likelihood`, `kl` and `log_p_x`, means in
      nats per image; `bits_per_dimension` of log_p_x, if the likelihood is over grey levels; the
      metrics of `jaxvae.evaluation.evaluate.examine`; `seconds` and `devices`.

    Raises:
      InputError: the run, its data or its checkpoints cannot be read.
    """
    began = time.perf_counter()
    config = read_config(run_dir, **own)
    data = load_run_data(config, data_name)
    warn_of_other_data(run_dir, config, data)
    # Of images on disk, read only as many as the probes of the latents need.
    rows = np.linspace(
        0, len(data.train_images) - 1, min(len(data.train_images), 10_000), dtype=int
    )
    train_images = data.train_images
    if not isinstance(train_images, np.ndarray):
        train_images = train_images[rows]
        if data.train_labels is not None:
            data = data._replace(train_labels=data.train_labels[rows])
    if config.train.binarization == "dynamic":  # the model was trained on 0/1 pixels
        train_images = binarized(binarization_keys()[0], train_images)
    data = data._replace(train_images=train_images)
    params, step = load_with_step(run_dir, which, **own)
    _, key = run_keys(config)
    devices = devices_for(len(data.test_images))
    images = model_inputs(data.test_images, data.test_labels, config.model)
    test = jax.device_put((params, key, *images), replicated(devices))
    terms = data_parallel(evaluate, devices)(*test)
    terms["log_p_x"] = data_parallel(
        partial(mean_log_likelihood, num_samples=num_samples), devices
    )(*test)
    del terms["loss"]
    if config.model.likelihood.support == "levels":
        shape = config.model.image_shape
        terms["bits_per_dimension"] = bits_per_dimension(terms["log_p_x"], shape)
    return {
        "step": step,
        "images": len(data.test_images),
        "num_samples": num_samples,
        **{name: float(value) for name, value in terms.items()},
        **examine(params, key, data),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{devices.size} x {devices.devices.flat[0].device_kind}",
    }


def write_evaluation(run_dir: Path, metrics: Mapping[str, Any]) -> Path:
    """Write the result of `measure` to evaluation.json.

    Args:
      run_dir: the run directory.
      metrics: as returned by `measure`.

    Returns:
      The path of evaluation.json.

    Raises:
      InputError: the directory cannot be written.
    """
    path = run_dir / "evaluation.json"
    write_json(path, metrics)
    return path
