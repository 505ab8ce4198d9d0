"""The notebook's own reading of the VAE, choice by choice.

    python experiments/notebook/run.py --data FOLDER --run-dir DIR [--batch-size N] [--epochs N]
        [--seed N] [--loss notebook|elbo] [--sampling notebook|log_var] [--resume]

Trains as `jaxvae train` does, with another objective, and writes DIR/result.json: the test ELBO
under both readings of the second head, and log p(x) by importance sampling, which hardly
depends on the reading.
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae import Params, decode, encode
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.objectives import Elbo
from jaxvae.runs import checkpoints, directory, loop
from jaxvae.runs.config import configured, resumed, run_keys
from jaxvae.runs.data import load_run_data
from jaxvae.runs.inference import Opened, bound_all
from jaxvae.runs.progress import Progress


@dataclass(frozen=True)
class Reading:
    """An objective: the loss of each image, and the ELBO's terms with z sampled as it says.

    Attributes:
      loss: "elbo": -log p(x|z) + KL, in nats; "notebook": the cross-entropy averaged over the
        pixels, plus 5e-4 times the negative mean over the latents of
        1 + log_var - mean^2 - exp(log_var). Times the number of pixels that is
        -log p(x|z) + beta KL, with beta = 2 * 784 * 5e-4 / latent_dim = 0.392.
      sampling: "log_var": z = mean + exp(log_var / 2) eps; "notebook": z = mean + exp(log_var) eps.
    """

    loss: str
    sampling: str

    def __call__(self, params, keys, images):
        posterior = encode(params, images)
        mean, log_var = posterior.mean, posterior.log_var
        scale = jnp.exp(log_var if self.sampling == "notebook" else log_var / 2)
        z = mean + scale * jax.vmap(partial(jax.random.normal, shape=mean.shape[1:]))(keys)
        log_likelihood, kl = decode(params, z).log_prob(images), posterior.kl()
        terms = Elbo(log_likelihood - kl, log_likelihood, kl)
        if self.loss == "elbo":
            return -terms.value, terms
        cross_entropy = -log_likelihood / math.prod(images.shape[1:])
        negative_mean = -jnp.mean(1 + log_var - mean**2 - jnp.exp(log_var), axis=1)
        return cross_entropy + 5e-4 * negative_mean, terms


def reading_log_sigma(params: Params) -> Params:
    """The same model with its second head h read as log sigma: log sigma^2 = 2 h."""
    doubled = jax.tree.map(lambda weight: 2 * weight, params.encoder["log_var"])
    return replace(params, encoder={**params.encoder, "log_var": doubled})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist-5k")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--loss", choices=("notebook", "elbo"), default="notebook")
    parser.add_argument("--sampling", choices=("notebook", "log_var"), default="notebook")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = vars(parser.parse_args())
    run_dir, resume = options.pop("run_dir"), options.pop("resume")
    choices = {name: options.pop(name) for name in ("loss", "sampling")}
    options["objective"] = Reading(**choices)

    config = resumed(run_dir, options) if resume else configured(options)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    loop.train(run_dir, config, data, callbacks=[Progress()])
    params = checkpoints.load(run_dir)
    images = jax.device_put(data.test_images)
    _, key = run_keys(config)
    doubled = reading_log_sigma(params)
    proposal = doubled if choices["sampling"] == "notebook" else params
    log_p_x = bound_all(Opened(proposal, key, data.test_images), 100)
    result = {
        **choices,
        "elbo, exp(log_var / 2)": float(evaluate(params, key, images)["elbo"]),
        "elbo, exp(log_var)": float(evaluate(doubled, key, images)["elbo"]),
        "log p(x), 100 samples": float(np.mean(log_p_x["log_likelihood"])),
    }
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
