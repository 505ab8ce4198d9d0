"""The test ELBO after each epoch of several runs, as a Markdown table.

python experiments/mnist/table.py DIR...
"""

import json
import statistics
import sys
from pathlib import Path


def main():
    directories = [Path(argument) for argument in sys.argv[1:]]
    runs = {}
    for directory in directories:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        runs[directory.name] = [json.loads(line)["test"]["elbo"] for line in lines]
    epochs = max(map(len, runs.values()))
    print("| run | " + " | ".join(str(epoch) for epoch in range(1, epochs + 1)) + " |")
    print("| --- |" + " ---: |" * epochs)
    for name, elbos in runs.items():
        print(f"| {name} | " + " | ".join(f"{elbo:.1f}" for elbo in elbos) + " |")
    seeds = [elbos for name, elbos in runs.items() if name.startswith("seed")]
    if len(seeds) > 1:
        means = [statistics.mean(epoch) for epoch in zip(*seeds, strict=True)]
        spread = [statistics.stdev(epoch) for epoch in zip(*seeds, strict=True)]
        print("| mean of seeds | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
        print("| standard deviation | " + " | ".join(f"{s:.1f}" for s in spread) + " |")


if __name__ == "__main__":
    main()
