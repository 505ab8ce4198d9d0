"""The test metrics of a run."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvae.devices.sharding import devices_for, everywhere, share
from jaxvae.evaluation.evaluate import evaluate, examine, mean_log_likelihood
from jaxvae.models.likelihoods import bits_per_dimension
from jaxvae.runs.checkpoints import (
    Which,
    restore,
)
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import binarization_keys, binarized, load_run_data, model_inputs
from jaxvae.runs.files import (
    write_json,
)


def measure(
    run_dir: Path, num_samples: int, which: Which = "latest", network: Any = None
) -> dict[str, float | str]:
    """Measure a run's model on its test images; what comes out is written as evaluation.json too.

    network: the modules (encoder, decoder), where the model was given some of its own.

    Returns:
      `step`, `images` and `num_samples`; `elbo`, `log_likelihood`, `kl` and `log_p_x`, means in
      nats per image; `bits_per_dimension`, of log_p_x, where pixels are grey levels; what
      `jaxvae.evaluation.evaluate.examine` finds; `seconds` and `devices`.
    """
    began = time.perf_counter()
    config = read_config(run_dir, network)
    data = load_run_data(config)
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
    state = restore(run_dir, which, network)
    _, key = run_keys(config)
    devices = devices_for(len(data.test_images))
    images = model_inputs(data.test_images, data.test_labels, config.model)
    test = jax.device_put((state.params, key, *images), everywhere(devices))
    terms = share(evaluate, devices)(*test)
    terms["log_p_x"] = share(partial(mean_log_likelihood, num_samples=num_samples), devices)(*test)
    del terms["loss"]
    if config.model.likelihood == "discretized_logistic":
        shape = config.model.image_shape
        terms["bits_per_dimension"] = bits_per_dimension(terms["log_p_x"], shape)
    record: dict[str, float | str] = {
        "step": int(state.step),
        "images": len(data.test_images),
        "num_samples": num_samples,
        **{name: float(value) for name, value in terms.items()},
        **examine(state.params, key, data),
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{devices.size} x {devices.devices.flat[0].device_kind}",
    }
    write_json(run_dir / "evaluation.json", record)
    return record
