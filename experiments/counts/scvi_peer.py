"""One model of scvi-tools, trained on counts and measured on test examples: see run.py.

Called as ours.py, by the Python of an environment that has scvi-tools.
"""

import json
import math
import sys
import time
import warnings

import anndata
import numpy as np
import scvi
import torch
from scvi.distributions import ZeroInflatedNegativeBinomial


def train(
    data, *, seed, batch_size, epochs, eps, dropout_rate, norm, draws, num_samples, weight_decay=0.0
):
    """Train a model, and measure its bounds on the test examples, in nats per example."""
    arrays = np.load(data)
    scvi.settings.seed = seed
    cells = anndata.AnnData(arrays["x_train"])
    scvi.model.SCVI.setup_anndata(cells)
    began, used = time.perf_counter(), time.process_time()
    model = scvi.model.SCVI(
        cells,
        n_hidden=128,
        n_layers=1,
        n_latent=10,
        dropout_rate=dropout_rate,
        dispersion="gene",
        gene_likelihood="zinb",
        use_observed_lib_size=True,
        use_batch_norm="both" if norm == "batch" else "none",
        use_layer_norm="both" if norm == "layer" else "none",
    )
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        train_size=1.0,
        batch_size=batch_size,
        enable_progress_bar=False,
        plan_kwargs={
            "lr": 1e-3,
            "eps": eps,
            "weight_decay": weight_decay,
            "n_epochs_kl_warmup": None,  # and no steps: the weight of the KL is 1
            "n_steps_kl_warmup": None,
        },
    )
    seconds, used = time.perf_counter() - began, time.process_time() - used
    module = model.module.eval()
    torch.manual_seed(1)
    with torch.inference_mode():
        x = torch.tensor(arrays["x_test"])
        bounds, kl = zip(*(elbo(module, x) for _ in range(draws)), strict=True)
        log_w = torch.stack([log_weight(module, x) for _ in range(num_samples)])
    log_p = torch.logsumexp(log_w, 0) - math.log(num_samples)
    return {
        "negative_elbo": -torch.stack(bounds).mean().item(),
        "kl": torch.stack(kl).mean().item(),
        "log_p_x": log_p.mean().item(),
        "train_negative_elbo": float(model.history["elbo_train"].iloc[-1, 0]),
        "seconds": seconds,
        "processor_seconds": used,
        "parameters": sum(p.numel() for p in module.parameters()),
        "own_negative_elbo": own_elbo(model, arrays["x_test"]),
    }


def drawn(module, x):
    """q(z|x), a sample of it, p(z) and p(x|z) of each example."""
    batch = torch.zeros(len(x), 1)
    found = module.inference(x, batch)
    made = module.generative(found["z"], found["library"], batch)
    return found["qz"], found["z"], made["pz"], made["px"]


def elbo(module, x):
    """The ELBO of each example with one sample of z, and its KL."""
    qz, _, pz, px = drawn(module, x)
    kl = torch.distributions.kl_divergence(qz, pz).sum(-1)
    return px.log_prob(x).sum(-1) - kl, kl


def log_weight(module, x):
    """log p(x|z) + log p(z) - log q(z|x) of each example with one sample of z."""
    qz, z, pz, px = drawn(module, x)
    return px.log_prob(x).sum(-1) + (pz.log_prob(z) - qz.log_prob(z)).sum(-1)


def own_elbo(model, x):
    """The negative ELBO from scvi-tools' own function, with one sample of z."""
    return -float(model.get_elbo(anndata.AnnData(x)))


def log_prob(parameters, out):
    """Write log ZINB(x; m, theta, pi) of every entry."""
    p = {name: torch.tensor(value[:, None]) for name, value in np.load(parameters).items()}
    zinb = ZeroInflatedNegativeBinomial(
        mu=p["log_mean"].exp(), theta=p["log_theta"].exp(), zi_logits=p["zero_logits"]
    )
    np.save(out, zinb.log_prob(p["x"])[:, 0].numpy())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "train":
        print(json.dumps(train(sys.argv[2], **json.loads(sys.argv[3]))))
    else:
        log_prob(*sys.argv[2:])
