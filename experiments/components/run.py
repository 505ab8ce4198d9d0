"""The effect of each component on the test ELBO of MNIST, on one small budget and three seeds.

    python -m experiments.components.run MNIST OUT [NAME...]

Run it in the root of the repository. MNIST is a folder with the four IDX files. Every model is a
run directory in OUT, so that a killed call goes on where it was; the results are written to
OUT/results.json and printed as a table.
"""

import shutil
import statistics
from pathlib import Path

import jaxvae
from experiments.resumable import compare
from jaxvae.runs.fit_prior import fit_prior

SEEDS = range(3)
TRAIN = jaxvae.TrainConfig(
    batch_size=64, epochs=1, optimizer="adam", schedule="cosine", binarization="dynamic"
)
FLAT = {"network": "residual:width=16", "latent_dim": 32}
CODES = {**FLAT, "prior": "uniform_codes"}
MODELS = {
    "gaussian": FLAT,
    "iaf": {**FLAT, "posterior": "iaf"},
    "mixture": {**FLAT, "prior": "mixture"},
    "realnvp": {**FLAT, "prior": "realnvp"},
    "fsq": {**CODES, "posterior": "fsq:levels=8x5x5x5"},
    "vq": {**CODES, "posterior": "vq:codes=256,dim=4"},
    "categorical": {**CODES, "posterior": "categorical:classes=10", "latent_dim": 320},
    "ladder of 2": {"network": "ladder:groups=4x1+2x1,width=16"},
    "ladder of 4": {"network": "ladder:groups=4x2+2x2,width=16"},
    "ladder of 8": {"network": "ladder:groups=4x4+2x4,width=16"},
}
FITTED = ("fsq", "vq")  # an autoregressive prior is fitted to these afterwards


def result(run_dir: Path, seconds: float, terms: dict) -> dict:
    """The last test metrics of a run, in nats per image."""
    print(f"{run_dir.name}: test ELBO {terms['elbo']:.2f}, {seconds:.0f} s", flush=True)
    return {"elbo": terms["elbo"], "kl": terms["kl"], "seconds": seconds}


def measure(name: str, mnist: str, out: Path) -> dict[str, list[dict]]:
    """Train a model with every seed; then fit the prior, if it is one of FITTED."""
    model = jaxvae.ModelConfig(**MODELS[name])
    found: dict[str, list[dict]] = {name: []}
    for seed in SEEDS:
        run_dir = out / f"{name.replace(' ', '-')}-{seed}"
        history = jaxvae.fit(
            mnist, model, TRAIN, seed=seed, run_dir=run_dir, progress=False
        ).history
        seconds = sum(line["seconds"] for line in history)
        found[name].append(result(run_dir, seconds, history[-1]["test"]))
        if name in FITTED:
            fitted_dir = out / f"{run_dir.name}-fitted"
            shutil.rmtree(fitted_dir, ignore_errors=True)  # of a call that was killed
            fitted = fit_prior(run_dir, "autoregressive", out=fitted_dir, epochs=1, progress=False)
            row = result(fitted_dir, fitted.history[-1]["seconds"], fitted.after)
            found.setdefault(f"{name}, fitted prior", []).append(row)
    return found


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    base = statistics.mean(row["elbo"] for row in results["gaussian"])
    lines = ["| model | test ELBO | over `gaussian` | KL |", "| --- | ---: | ---: | ---: |"]
    names = [name for model in MODELS for name in (model, f"{model}, fitted prior")]
    for name in filter(results.get, names):
        elbo, kl = ([row[key] for row in results[name]] for key in ("elbo", "kl"))
        mean = statistics.mean(elbo)
        lines.append(
            f"| {name} | {mean:.2f} ({statistics.stdev(elbo):.2f}) | {mean - base:+.2f} "
            f"| {statistics.mean(kl):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    compare(__doc__, MODELS, measure, table)
