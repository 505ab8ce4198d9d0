"""What each ingredient of the model `hour` is worth: one change at a time to a smaller model.

    python -m experiments.likelihood.ingredients MNIST OUT [NAME...]

Run it in the root of the repository. MNIST is a folder with the four IDX files. Every model is a
run directory in OUT, so that a killed call goes on where it was; the results are written to
OUT/ingredients.json and printed as a table.
"""

import math
from pathlib import Path

import jaxvae
from experiments.resumable import compare
from jaxvae.runs import evaluation

BASE = {
    "network": "residual:width=8",
    "latent_dim": 40,
    "prior": "realnvp",
    "binarization": "dynamic",
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "schedule": "cosine",
    "batch_size": 128,
    "warmup": "linear:steps=500",
    "epochs": 3,
}
MODEL = ("network", "latent_dim", "prior", "posterior")
CHANGES: dict[str, dict] = {
    "base": {},
    "base, seed 1": {"seed": 1},
    "base, seed 2": {"seed": 2},
    "prior: standard normal": {"prior": "standard_normal"},
    "prior: mixture": {"prior": "mixture"},
    "posterior: iaf": {"posterior": "iaf"},
    "width 16": {"network": "residual:width=16"},
    "depth: two blocks": {"network": "residual:width=8,blocks=2"},
    "Adam, 2e-3": {"optimizer": "adam", "learning_rate": 2e-3},
    "constant rate": {"schedule": "constant"},
    "constant rate, EMA 0.99": {"schedule": "constant", "ema": 0.99},
    "EMA 0.99": {"ema": 0.99},
    "no warm-up": {"warmup": "none"},
    # Free bits need a prior with a KL in closed form: they are compared with the row before them.
    "standard normal, no warm-up": {"prior": "standard_normal", "warmup": "none"},
    "standard normal, no warm-up, free bits 0.5": {
        "prior": "standard_normal",
        "warmup": "none",
        "objective": "elbo:free_bits=0.5",
    },
    "batch 32": {"batch_size": 32, "warmup": "linear:steps=2000"},
    "batch 64": {"batch_size": 64, "warmup": "linear:steps=1000"},
    "batch 256": {"batch_size": 256, "warmup": "linear:steps=250"},
    "IWAE, 5 samples": {"objective": "iwae:num_samples=5"},
    "IWAE, 5 samples, gradient of one": {"objective": "iwae:num_samples=5,backward=1"},
    "20 latents": {"latent_dim": 20},
    "80 latents": {"latent_dim": 80},
    "rate 2.5e-3": {"learning_rate": 2.5e-3},
    "rate 1e-2": {"learning_rate": 1e-2},
    "three steps of Newton and Schulz": {"optimizer": "muon:ns_steps=3"},
    "twice as long": {"epochs": 6},
    "twice as long, rate 2.5e-3": {"epochs": 6, "learning_rate": 2.5e-3},
}
KEPT = ("elbo", "log_p_x", "kl", "active_units")


def measure(name: str, mnist: str, out: Path) -> dict[str, dict]:
    """Train one model and evaluate it with 50 importance samples, in nats per image."""
    settings = BASE | CHANGES[name]
    seed = settings.pop("seed", 0)
    model = jaxvae.ModelConfig(**{k: v for k, v in settings.items() if k in MODEL})
    train = jaxvae.TrainConfig(**{k: v for k, v in settings.items() if k not in MODEL})
    run_dir = out / "".join(c if c.isalnum() else "-" for c in name)
    history = jaxvae.fit(mnist, model, train, seed=seed, run_dir=run_dir, progress=False).history
    found = evaluation.measure(run_dir, 50)
    row = {key: found[key] for key in KEPT} | {"seconds": sum(x["seconds"] for x in history)}
    print(f"{name}: log p(x) {row['log_p_x']:.2f}, {row['seconds']:.0f} s", flush=True)
    return {name: row}


def table(results: dict[str, dict]) -> str:
    """Markdown: every model, and its log p(x) above that of the base."""
    lines = [
        "| change | log p(x) | over base | ELBO | KL | active units | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = results.get("base", {}).get("log_p_x", math.nan)
    for name, row in ((name, results[name]) for name in CHANGES if name in results):
        lines.append(
            f"| {name} | {row['log_p_x']:.2f} | {row['log_p_x'] - base:+.2f} | {row['elbo']:.2f} "
            f"| {row['kl']:.1f} | {row['active_units']:.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    compare(__doc__, CHANGES, measure, table, "ingredients.json")
