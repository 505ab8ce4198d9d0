"""Watches a long training: its resident memory and its open files, then Ctrl-C, and a resume.

    python experiments/reliability/watch.py [--hours H]

Trains on the embedded digits in a process of its own and looks at it every ten seconds. Writes
results/watch.json and watch.png beside this file. Exits with code 1 if the second half's memory
grew by more than 5 %, if files stayed open, or if the run did not go on.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
EVERY = 10.0  # seconds
TRAIN = [sys.executable, "-m", "jaxvae", "train"]


def resident(process: int) -> float:
    """MiB of memory that a process has."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS: expected Linux")


def look(process: int, run_dir: Path, began: float) -> dict:
    metrics = run_dir / "metrics.jsonl"
    return {
        "seconds": round(time.monotonic() - began, 1),
        "mib": round(resident(process), 1),
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "epochs": metrics.read_text().count("\n") if metrics.exists() else 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    hours = parser.parse_args().hours
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        words = ["--epochs", "100000", "--run-dir", str(run_dir)]
        training = subprocess.Popen([*TRAIN, *words], stderr=subprocess.PIPE, text=True)
        began, seen = time.monotonic(), []
        while time.monotonic() - began < 3600 * hours and training.poll() is None:
            time.sleep(EVERY)
            seen.append(look(training.pid, run_dir, began))
        training.send_signal(signal.SIGINT)
        _, told = training.communicate()
        epochs = seen[-1]["epochs"]
        again = [*TRAIN, "--resume", "--run-dir", str(run_dir), "--epochs", str(epochs + 1)]
        resumed = subprocess.run(again, capture_output=True, text=True, check=False)
        left = [str(path) for path in run_dir.rglob("*") if "tmp" in path.name]
    # The first two minutes compile and warm up.
    steady = [one for one in seen if one["seconds"] > min(120, seen[-1]["seconds"] / 2)]
    half = steady[len(steady) // 2 :]
    found = {
        "hours": round(seen[-1]["seconds"] / 3600, 2),
        "epochs": epochs,
        "mib_after_warm_up": steady[0]["mib"],
        "mib_at_half": half[0]["mib"],
        "mib_at_end": half[-1]["mib"],
        "files": sorted({one["files"] for one in half}),
        "ctrl_c": {"code": training.returncode, "told": told.splitlines()[-1].split(";")[0]},
        "resumed": resumed.returncode,
        "left_behind": len(left),
        "seen": seen[:: max(1, len(seen) // 240)],
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "watch.json").write_text(json.dumps(found) + "\n")
    draw(found["seen"])
    print(json.dumps({name: value for name, value in found.items() if name != "seen"}, indent=2))
    grown = found["mib_at_end"] / found["mib_at_half"] - 1
    print(f"resident memory grew by {100 * grown:.1f} % in the second half")
    good = grown < 0.05 and max(found["files"]) - min(found["files"]) <= 2
    return 0 if good and resumed.returncode == 0 and training.returncode == 75 and not left else 1


def draw(seen: list[dict]) -> None:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    memory, files = figure.subplots(1, 2)
    minutes = [one["seconds"] / 60 for one in seen]
    for axes, name, title in (
        (memory, "mib", "Resident memory, MiB"),
        (files, "files", "Open files"),
    ):
        axes.plot(minutes, [one[name] for one in seen], color="#332288")
        axes.set(title=title, xlabel="minutes of training")
        axes.set_ylim(0, 1.15 * max(one[name] for one in seen))
    figure.savefig(HERE / "results" / "watch.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
