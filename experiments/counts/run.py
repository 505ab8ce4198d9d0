"""jaxvae and scvi-tools on counts: bounds of test examples and training time.

    python experiments/counts/run.py OUT PYTHON NAME=FILE...

PYTHON is that of an environment with scvi-tools, NAME a data set of DATA, and FILE its counts, as
for `jaxvae train --data`. Each run is a process on one core, one after the other. The results are
written to OUT/results.json, so that a killed call goes on where it was, and printed as tables.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

import jaxvae

HERE = Path(__file__).parent
SEEDS = range(3)
# Batch sizes divide the number of training examples: neither library then has a smaller batch.
DATA = {"smfish": {"batch_size": 151, "epochs": 100}, "reuters": {"batch_size": 71, "epochs": 40}}
COMMON = {"eps": 0.01, "draws": 100, "num_samples": 1000}
OURS = "mlp:width=128,layers=1,norm=true,log1p=true"
MODELS = {
    "jaxvae": {"network": OURS},
    "jaxvae, activation=relu": {"network": OURS + ",activation=relu"},
    "jaxvae, relu": {"network": "relu"},
    "scvi-tools": {"norm": "batch", "dropout_rate": 0.1},
    "scvi-tools, no dropout": {"norm": "batch", "dropout_rate": 0.0},
    "scvi-tools, layer norm, no dropout": {"norm": "layer", "dropout_rate": 0.0},
}


def call(peer: str, name: str, *words: str) -> str:
    """Run ours.py or the peer on one core, and return the last line that it prints."""
    ours = name.startswith("jaxvae")
    python, script = (sys.executable, "ours.py") if ours else (peer, "scvi_peer.py")
    core = str(min(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    if not ours:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["taskset", "-c", core, python, str(HERE / script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().rpartition("\n")[2]


def compare_log_prob(peer: str, out: Path) -> dict[str, float]:
    """Compare log ZINB of the two libraries, and of SciPy in float64, for the same parameters.

    Returns:
      Largest differences between entries, in nats.
    """
    random, n = np.random.default_rng(0), 100_000
    p = {
        "log_mean": random.uniform(-7, 7, n),
        "log_theta": random.uniform(-5, 9, n),
        "zero_logits": random.uniform(-6, 6, n),
    }
    p = {name: value.astype(np.float32) for name, value in p.items()}
    m, theta, logits = (value.astype(np.float64) for value in p.values())
    m, theta, pi = np.exp(m), np.exp(theta), 1 / (1 + np.exp(-logits))
    negative_binomial = stats.nbinom(theta, theta / (theta + m))
    p["x"] = np.where(random.random(n) < pi, 0, negative_binomial.rvs(random_state=random))
    exact = np.log1p(-pi) + negative_binomial.logpmf(p["x"])
    exact = np.where(p["x"] == 0, np.logaddexp(np.log(pi), exact), exact)
    p["x"] = p["x"].astype(np.float32)
    np.savez(out / "parameters.npz", **p)
    found = {"scipy": exact}
    for name in ("jaxvae", "scvi-tools"):
        call(peer, name, "log_prob", str(out / "parameters.npz"), str(out / f"{name}.npy"))
        found[name] = np.load(out / f"{name}.npy")
    few = p["x"] <= 50
    results = {}
    for a, b in (("jaxvae", "scvi-tools"), ("jaxvae", "scipy"), ("scvi-tools", "scipy")):
        difference = np.abs(found[a] - found[b])
        results[f"{a} - {b}"] = float(difference.max())
        results[f"{a} - {b}, counts up to 50"] = float(difference[few].max())
    return results


def mean(rows: list[dict[str, float]], key: str) -> str:
    """Mean over the seeds, with the standard deviation in brackets."""
    values = [row[key] for row in rows]
    spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


COLUMNS = {
    "negative_elbo": "negative ELBO",
    "kl": "KL",
    "log_p_x": "log p(x)",
    "train_negative_elbo": "of training",
    "processor_seconds": "processor s",
}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: nats per example, seconds, and ratios of processor seconds to those of jaxvae.

    The second ratio is without the first epoch of jaxvae, in which it compiles.
    """
    head = ["model", "seeds", *COLUMNS.values(), "ratio", "compiled"]
    lines = ["| " + " | ".join(head) + " |", "| ---" + " | ---:" * (len(head) - 1) + " |"]

    def used(name: str, compiled: str = "") -> float:
        return statistics.mean(
            row["processor_seconds"] - row.get(compiled, 0) for row in results[name]
        )

    for name in filter(results.get, MODELS):
        rows = results[name]
        ratios = (
            f"{used(name, compiled) / used('jaxvae', compiled):.1f}"
            for compiled in ("", "processor_seconds_of_first_epoch")
        )
        cells = [name, str(len(rows)), *(mean(rows, key) for key in COLUMNS), *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    out, peer = Path(sys.argv[1]), sys.argv[2]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n")

    if "log_prob" not in results:
        results["log_prob"] = compare_log_prob(peer, out)
        keep()
    print(json.dumps(results["log_prob"], indent=1), flush=True)
    files = dict(word.split("=", 1) for word in sys.argv[3:])
    for name, file in files.items():
        x_train, x_test = jaxvae.load_data(file)  # every tenth is a test example
        np.savez(out / f"{name}.npz", x_train=x_train, x_test=x_test)
    for seed, name, model in itertools.product(SEEDS, files, MODELS):
        found = results.setdefault(name, {}).setdefault(model, [])
        if len(found) > seed:
            continue
        options = json.dumps(COMMON | DATA[name] | MODELS[model] | {"seed": seed})
        answer = json.loads(call(peer, model, "train", str(out / f"{name}.npz"), options))
        found.append(answer | {"load": os.getloadavg()[0]})
        keep()
        print(name, model, found[-1], flush=True)
    for name in files:
        print(f"\n{name}\n\n{table(results[name])}")


if __name__ == "__main__":
    main()
