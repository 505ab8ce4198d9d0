"""Imputation error on tables with half of the entries missing, beside scikit-learn's imputers.

    python -m experiments.imputation.run OUT [TABLE...]

Run it in the root of the repository. The results are written to OUT/results.json after every table
and printed; a killed call goes on at the table where it was.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.preprocessing import scale

import jaxvae
from experiments.resumable import measure_missing

TABLES = {
    "breast cancer": load_breast_cancer,
    "wine": load_wine,
    "iris": load_iris,
    "diabetes": load_diabetes,
}
SEEDS = range(3)
TRAIN = jaxvae.TrainConfig(objective="miwae:num_samples=20", batch_size=64, optimizer="adam")
STEPS = range(600, 3001, 600)  # at which the training may end
NUM_SAMPLES = 1000  # importance samples of an imputation
NEIGHBORS = (3, 5, 10, 20, 40)
Table = np.ndarray  # [rows, columns], with NaN in missing entries


def train(x: Table, last: int, seed: int) -> Iterator[tuple[int, jaxvae.Params]]:
    """Train, and yield the steps and the parameters at each of STEPS, until `last`."""
    model = jaxvae.ModelConfig(
        x.shape[1:], latent_dim=10, network="mlp:width=128", likelihood="student_t"
    )
    state = jaxvae.create_train_state(jax.random.key(seed), model, TRAIN)
    for step in range(STEPS.start, last + 1, STEPS.step):
        while state.step < step:
            state, _ = jaxvae.train_epoch(state, x)
        yield step, state.params


def miwae(x: Table, held_out: Table, seed: int) -> tuple[Table, dict]:
    """Choose the number of steps on held-out observed entries; train anew with all of x."""
    key = jax.random.key(seed + 100)
    without = np.where(np.isnan(held_out), x, np.nan)
    errors = {
        steps: squared_error(jaxvae.impute(params, key, without, NUM_SAMPLES).mean, held_out)
        for steps, params in train(without, STEPS[-1], seed)
    }
    steps = min(errors, key=errors.__getitem__)
    *_, (_, params) = train(x, steps, seed)
    filled = jaxvae.impute(params, key, x, NUM_SAMPLES)
    ess = float(np.median(filled.effective_sample_size))
    return np.asarray(filled.mean), {"steps": steps, "effective_sample_size": ess}


def knn(x: Table, held_out: Table, seed: int) -> tuple[Table, dict]:
    """Choose the number of neighbors on held-out observed entries."""
    without = np.where(np.isnan(held_out), x, np.nan)
    errors = {k: squared_error(KNNImputer(n_neighbors=k).fit_transform(without), held_out)
              for k in NEIGHBORS}  # fmt: skip
    k = min(errors, key=errors.__getitem__)
    return KNNImputer(n_neighbors=k).fit_transform(x), {"neighbors": k}


def forest(x: Table, held_out: Table, seed: int) -> tuple[Table, dict]:
    trees = RandomForestRegressor(50, max_features="sqrt", random_state=seed)
    return IterativeImputer(trees, max_iter=5, random_state=seed).fit_transform(x), {}


METHODS: dict[str, Callable[[Table, Table, int], tuple[Table, dict]]] = {
    "mean": lambda x, _held_out, _seed: (SimpleImputer().fit_transform(x), {}),
    "k nearest neighbors": knn,
    "iterative, Bayesian ridge": lambda x, _held_out, seed: (
        IterativeImputer(max_iter=20, random_state=seed).fit_transform(x),
        {},
    ),
    "iterative, random forest": forest,
    "jaxvae, `miwae`": miwae,
}


def squared_error(filled: Table, truth: Table) -> float:
    """Compute the mean squared error over the entries of `truth` that are not NaN."""
    return float(np.nanmean((np.asarray(filled) - truth) ** 2))


def measure(name: str) -> dict[str, dict[str, list[dict]]]:
    """Impute a table with every method and mask."""
    complete = scale(TABLES[name]().data)  # mean 0 and variance 1 of every column
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        missing = rng.random(complete.shape) < 0.5
        x = np.where(missing, np.nan, complete)
        held_out = np.where(rng.random(x.shape) < 0.1, x, np.nan)  # a tenth of what is observed
        for method, fill in METHODS.items():
            start = time.perf_counter()
            filled, chosen = fill(x, held_out, seed)
            seconds = time.perf_counter() - start
            error = squared_error(filled, np.where(missing, complete, np.nan))
            found[method].append({"error": error, "seconds": seconds, **chosen})
            print(name, seed, method, found[method][-1], flush=True)
    return {name: found}


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: mean squared error, mean (standard deviation) over the masks."""
    lines = ["| method | " + " | ".join(results) + " |", "| ---" + " | ---:" * len(results) + " |"]
    for method in METHODS:
        cells = []
        for of_methods in results.values():
            errors = [run["error"] for run in of_methods[method]]
            cells.append(f"{statistics.mean(errors):.3f} ({statistics.stdev(errors):.3f})")
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    warnings.simplefilter("ignore", ConvergenceWarning)  # of the iterative imputers
    out = Path(sys.argv[1])
    print(table(measure_missing(out / "results.json", sys.argv[2:], TABLES, measure)))


if __name__ == "__main__":
    main()
