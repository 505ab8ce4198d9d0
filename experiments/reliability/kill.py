"""Kills trainings at random moments, goes on each time, and compares with an undisturbed run.

    python experiments/reliability/kill.py [--kills N] [--seed N]

Every training is `jaxvae train` on the embedded digits in a process of its own, killed by SIGKILL:
half of them at a random moment from the start of the process on, half within a tenth of a second
after it began to write a checkpoint, a line of metrics, or a figure. When a run has come to its end
in spite of it, its parameters, optimizer state, step and key must have the bits of the undisturbed
run's, and metrics.jsonl the same lines but for `seconds`; nothing temporary may be left, and no
kill may cost more than one checkpoint. Then the next run begins, until there were enough kills.
Writes results/kill.json beside this file; exits with code 1 if anything differed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

import jaxvae
from jaxvae.runs.checkpoints import steps_of
from jaxvae.runs.files import read_metrics

HERE = Path(__file__).parent
EPOCHS = 8
STEPS = 4500 // 128  # of an epoch


def begin(run_dir: Path, cache: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "jaxvae", "train", "--run-dir", str(run_dir)]
    words += ["--resume"] if (run_dir / "config.json").exists() else ["--epochs", str(EPOCHS)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, text=True)


def unfinished(run_dir: Path) -> list[str]:
    """What is being written, or was when the kill came."""
    return [str(p.relative_to(run_dir)) for p in run_dir.rglob("*")
            if "tmp" in p.name or p.name.endswith(".part")]  # fmt: skip


def phase(run_dir: Path, before: int) -> str:
    """What the kill hit, by what it left."""
    left = " ".join(unfinished(run_dir))
    lines = len(read_metrics(run_dir))
    steps = steps_of(run_dir)
    if "figures/" in left:
        return "drawing"
    if left.startswith(".jaxvae-") or " .jaxvae-" in left:  # not in a folder
        return "writing metrics or configuration"
    if "checkpoints/" in left or lines > (steps[-1] // STEPS if steps else 0):
        return "writing a checkpoint"
    if lines == EPOCHS:
        return "after training"
    return "starting, compiling or in the first epoch" if lines == before else "training"


def strike(training: subprocess.Popen, run_dir: Path, chance: random.Random, usual: float) -> None:
    """Kills, or waits for the end."""
    began, aimed = time.monotonic(), chance.random() < 0.5
    moment = chance.uniform(0, usual)
    while training.poll() is None and time.monotonic() - began < moment:
        time.sleep(0.01)
    while aimed and training.poll() is None and not unfinished(run_dir):
        time.sleep(0.002)
    if aimed:
        time.sleep(chance.uniform(0, 0.1))
    training.send_signal(signal.SIGKILL)


def bits(run_dir: Path) -> list[bytes]:
    state = jaxvae.restore(run_dir)
    state = (state.params, state.opt_state, state.step, jax.random.key_data(state.key))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def lines(run_dir: Path) -> list[dict]:
    return [{**line, "seconds": 0} for line in read_metrics(run_dir)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began, wrong, phases, runs = time.monotonic(), [], Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole"
        start = time.monotonic()
        for _ in range(2):  # the second one finds its programs compiled, as those to be killed
            start = time.monotonic()
            code = begin(whole, folder / "cache").wait()
        assert code == 0, "the undisturbed run failed"
        usual = min(40.0, time.monotonic() - start)
        while sum(phases.values()) < options.kills:
            run_dir, runs = folder / f"run-{runs}", runs + 1
            ended = False
            while not ended:
                before = len(read_metrics(run_dir))
                training = begin(run_dir, folder / "cache")
                if sum(phases.values()) < options.kills:
                    strike(training, run_dir, chance, usual)
                _, told = training.communicate()
                ended = training.returncode == 0
                if "damaged" in told or training.returncode not in (0, -signal.SIGKILL):
                    wrong.append(told.strip().splitlines()[-1])
                    break
                if ended:
                    continue
                phases[phase(run_dir, before)] += 1
                steps = steps_of(run_dir)
                if len(read_metrics(run_dir)) > (steps[-1] // STEPS if steps else 0) + 1:
                    wrong.append(f"{run_dir.name}: more than one checkpoint was lost")
                print(f"\r{sum(phases.values())} kills", end="", file=sys.stderr, flush=True)
            if not ended or bits(run_dir) != bits(whole):
                wrong.append(f"{run_dir.name}: other bits")
            if not ended or lines(run_dir) != lines(whole):
                wrong.append(f"{run_dir.name}: other metrics")
            wrong += [f"{run_dir.name}: {left} is left behind" for left in unfinished(run_dir)]
    found = {
        "kills": sum(phases.values()),
        "runs": runs,
        "epochs": EPOCHS,
        "hit": dict(phases.most_common()),
        "wrong": wrong,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "kill.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n" + json.dumps(found, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
