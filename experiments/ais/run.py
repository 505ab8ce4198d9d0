"""Bounds on log p(x) by annealed importance sampling, for one small model of every kind.

    python -m experiments.ais.run MNIST OUT [NAME...]

Run it in the root of the repository. MNIST is a folder with the four IDX files. Every model is a
run directory in OUT, so that a killed call goes on where it was; the results are written to
OUT/results.json and printed as a table.
"""

from pathlib import Path
from typing import Any

import jaxvae
from experiments.resumable import compare
from jaxvae.runs.evaluation import measure_bounds

FLAT = {"network": "mlp:width=200", "latent_dim": 32}
LADDER = {"network": "ladder:groups=4x2+2x2,width=16"}
# The fields of each model, and the epochs of its training.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "gaussian": (FLAT, 6),
    "iaf": ({**FLAT, "posterior": "iaf"}, 6),
    "mixture": ({**FLAT, "prior": "mixture"}, 6),
    "realnvp": ({**FLAT, "prior": "realnvp"}, 6),
    "ladder": (LADDER, 1),
}
SIZE = {"num_images": 50, "num_steps": 500, "num_chains": 2}
SIZES = {"ladder": {"num_images": 16, "num_steps": 300, "num_chains": 1}}  # a slower decoder
NUM_SAMPLES = 1000


def measure(name: str, mnist: str, out: Path) -> dict[str, Any]:
    """Train a model, and bound log p(x) of test images and of images that it generates."""
    fields, epochs = MODELS[name]
    train = jaxvae.TrainConfig(
        batch_size=64, epochs=epochs, optimizer="adam", schedule="cosine", binarization="dynamic"
    )
    jaxvae.fit(mnist, jaxvae.ModelConfig(**fields), train, run_dir=out / name, progress=False)
    found = measure_bounds(out / name, NUM_SAMPLES, **SIZES.get(name, SIZE))
    print(name, found, flush=True)
    return {name: found}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, nats per image."""
    columns = {"elbo": "ELBO", "importance_sampling": "IS", "lower": "lower", "upper": "upper"}
    head = ["model", "images", *columns.values(), "upper - lower", "upper - IS", "T", "K", "N"]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---" + " | ---:" * (len(head) - 2) + " |"]
    for name, found in results.items():
        for images in ("simulated", "test"):
            bounds = found[images]
            cells = [f"{bounds[column]:.2f}" if column in bounds else "" for column in columns]
            if "upper" in bounds:
                below = bounds["lower"], bounds["importance_sampling"]
                cells += [f"{bounds['upper'] - bound:.2f}" for bound in below]
            else:
                cells += ["", ""]
            cells += [str(found[key]) for key in ("num_steps", "num_chains", "images")]
            lines.append("| " + " | ".join([name, images, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    compare(__doc__, MODELS, measure, table)
