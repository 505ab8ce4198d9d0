"""Runs as results to keep: what they were told, how long they took and what they came to.

    python experiments/record.py FOLDER RUN_DIR...     keep these runs as FOLDER/NAME.json
    python experiments/record.py FOLDER                print the table of what is kept

A run counts once `jaxvae evaluate` has measured it. A network of one's own is imported from the
current directory.
"""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

from jaxvae.cli.parser import config_fields
from jaxvae.components import imported, is_dotted_path
from jaxvae.devices.sharding import cores
from jaxvae.runs.config import RunConfig, as_flag, read_config
from jaxvae.runs.files import read_metrics

COLUMNS = {
    "elbo": ("ELBO", "{:.2f}"),
    "log_p_x": ("log p(x)", "{:.2f}"),
    "bits_per_dimension": ("bits/dim", "{:.3f}"),
    "active_units": ("active units", "{:.0f}"),
    "mutual_information": ("I(n; z)", "{:.2f}"),
    "marginal_kl": ("KL(q(z) &#124;&#124; p(z))", "{:.2f}"),
    "nearest_neighbors": ("5-NN", "{:.3f}"),
}


def command(config: RunConfig) -> str:
    """The command line that makes a run, without its directory."""
    words = ["jaxvae train", "--data", name_of(config.data)]
    own, plain = (
        {**c.to_dict(), **c.model.to_dict(), **c.train.to_dict()} for c in (config, RunConfig())
    )
    for name in sorted(config_fields().keys() - {"data", "data_dir", "manual_dir"}):
        value = own[name]
        if value == plain[name]:
            continue
        words.append(as_flag(name))
        if name == "start_from":
            words.append(Path(value).name)
        elif isinstance(value, list):
            words += value
        elif value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def name_of(data: str) -> str:
    """The data without the folders of this machine."""
    return data if data.startswith("tfds:") else Path(data).name


def machine() -> str:
    """The processor, and how many of its cores this process may use."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("model name"):
            return f"{cores()} x {line.split(':')[1].strip()}"
    return f"{cores()} x {platform.processor() or platform.machine()}"


def record(run_dir: Path) -> dict:
    model = json.loads((run_dir / "config.json").read_text())["model"]
    own = {name: imported(name, value) for name, value in model.items() if is_dotted_path(value)}
    config = read_config(run_dir, **own)
    lines = read_metrics(run_dir)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    if "data" in evaluation:
        evaluation["data"] = name_of(evaluation["data"])
    return {
        "command": command(config),
        "seed": config.seed,
        "epochs": lines[-1]["epoch"],
        "seconds": round(sum(line["seconds"] for line in lines)),
        "machine": machine(),
        "evaluation": evaluation,
        "test_elbo": {
            line["epoch"]: round(line["test"]["elbo"], 3)
            for line in lines
            if line["epoch"] <= 10 or line["epoch"] % max(1, len(lines) // 50) == 0
        },
    }


def table(records: dict[str, dict]) -> str:
    """Markdown: what the runs came to, and below how each was made."""
    measured = {name: kept["evaluation"] for name, kept in records.items()}
    shown = {key: how for key, how in COLUMNS.items() if any(key in e for e in measured.values())}
    head = ["run", "epochs", *(title for title, _ in shown.values()), "minutes", "seed", "machine"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, kept in records.items():
        cells = [name, str(kept["epochs"])]
        for key, (_, form) in shown.items():
            value = measured[name].get(key)
            cells.append("" if value is None else form.format(value))
        cells += [f"{kept['seconds'] / 60:.0f}", str(kept["seed"]), kept["machine"]]
        rows.append("| " + " | ".join(cells) + " |")
    made = [f"{name:12} {kept['command']} --run-dir {name}" for name, kept in records.items()]
    return "\n".join([*rows, "", "```", *made, "```"])


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, *run_dirs = map(Path, sys.argv[1:])
    for run_dir in run_dirs:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(run_dir), indent=1) + "\n"
        (folder / f"{run_dir.name}.json").write_text(text)
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    print(table(kept))


if __name__ == "__main__":
    main()
