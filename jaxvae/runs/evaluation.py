"""The test metrics of a run."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvae.devices.sharding import devices_for, replicated, share
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
from jaxvae.runs.files import (
    write_json,
)


def measure(
    run_dir: Path,
    num_samples: int,
    which: Which = "latest",
    data_name: str | None = None,
    **own: Any,
) -> dict[str, float | str]:
    """Measure a run's model on its test images; `write_evaluation` writes the result.

    Returns:
      `step`, `images` and `num_samples`; `elbo`, `log_likelihood`, `kl` and `log_p_x`, means in
      nats per image; `bits_per_dimension`, of log_p_x, where pixels are grey levels; what
      `jaxvae.evaluation.evaluate.examine` finds; `seconds` and `devices`.
    """
    began = time.perf_counter()
    config = read_config(run_dir, **own)
    data = load_run_data(config, data_name)
    warn_of_other_data(run_dir, config, data)
    # Of images on disk, as many as a probe of the latents needs.
    rows = np.linspace(
        0, len(data.train_images) - 1, min(len(data.train_images), 10_000), dtype=int
    )
    train_images = data.train_images
    if not isinstance(train_images, np.ndarray):
        train_images = train_images[rows]
        if data.train_labels is not None:
            data = data._replace(train_labels=data.train_labels[rows])
    if config.train.binarization == "dynamic":  # as the model has seen them
        train_images = binarized(binarization_keys()[0], train_images)
    data = data._replace(train_images=train_images)
    params, step = load_with_step(run_dir, which, **own)
    _, key = run_keys(config)
    devices = devices_for(len(data.test_images))
    images = model_inputs(data.test_images, data.test_labels, config.model)
    test = jax.device_put((params, key, *images), replicated(devices))
    terms = share(evaluate, devices)(*test)
    terms["log_p_x"] = share(partial(mean_log_likelihood, num_samples=num_samples), devices)(*test)
    del terms["loss"]
    if config.model.likelihood.support == "levels":
        shape = config.model.image_shape
        terms["bits_per_dimension"] = bits_per_dimension(terms["log_p_x"], shape)
    record: dict[str, float | str] = {
        "step": step,
        "images": len(data.test_images),
        "num_samples": num_samples,
        **{name: float(value) for name, value in terms.items()},
        **examine(params, key, data),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{devices.size} x {devices.devices.flat[0].device_kind}",
    }
    return record


def write_evaluation(run_dir: Path, found: Mapping[str, float | str]) -> Path:
    """Write what `measure` found as evaluation.json, and return its path.

    Raises InputError if the directory cannot be written.
    """
    path = run_dir / "evaluation.json"
    write_json(path, found)
    return path
