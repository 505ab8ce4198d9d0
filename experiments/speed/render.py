"""table.md and speed.png from results.json.

    python experiments/speed/render.py experiments/speed/results

Needs matplotlib.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from run import NETWORKS

# The notebook's layers: output positions, kernel positions, channels in and out.
LAYERS = (
    (28 * 28, 9, 1, 32),
    (14 * 14, 9, 32, 64),
    (14 * 14, 9, 64, 64),
    (14 * 14, 9, 64, 64),
    (1, 1, 14 * 14 * 64, 32),
    (1, 1, 32, 2 + 2),
    (1, 1, 2, 14 * 14 * 64),
    (14 * 14, 9, 64, 32),  # transposed: each position of the input meets each of the kernel
    (28 * 28, 9, 32, 1),
)
COLOURS = {
    "ours": "#d62728",
    "flax": "#7f7f7f",
    "torch-eager": "#1f77b4",
    "torch-compile": "#17becf",
    "torch-cudagraphs": "#0b3d66",
    "keras-tensorflow": "#ff7f0e",
    "keras-tensorflow-nojit": "#e377c2",
    "keras-jax": "#bcbd22",
    "keras-torch": "#9467bd",
    "pythae": "#8c564b",
}


def training_flop() -> int:
    """Per image and step: a multiplication and an addition, forward and in both gradients."""
    return 3 * 2 * sum(p * k * fan_in * fan_out for p, k, fan_in, fan_out in LAYERS)


def value(answer: dict, name: str) -> float | None:
    """A figure in its row's unit."""
    if name in ("start", "cold_start"):
        return answer["seconds"]
    if name.startswith("memory device"):
        return None if answer["device"] is None else answer["device"] / 2**20
    if name.startswith("memory"):
        return answer["rss"] / 2**20
    return answer["seconds"] / answer["images"] * 1e3


def title(name: str, options: dict) -> str:
    group, _, batch = name.rpartition(" ")
    if group == "step":
        return f"training step, batch {batch}, ms per image"
    if group in NETWORKS:
        return f"training step of `{group}`, batch {batch}, ms per image"
    if group == "memory device":
        return f"peak device memory, batch {batch}, MiB"
    if group == "memory":
        return f"peak resident memory, batch {batch}, MiB"
    return {
        "epoch": f"epoch of {options['epoch_images']:,} images, batch 128, ms per image",
        "sample": f"sampling {options['forward_images']:,}, ms per image",
        "encode": f"encoding {options['forward_images']:,}, ms per image",
        "log_likelihood": f"log p(x), {options['ll_samples']:,} samples, ms per image",
        "start": "process start to first training step, s",
        "cold_start": "the same with empty compilation caches, s",
        "bfloat16": "training step in bfloat16, batch 4096, ms per image",
        "seeds": "training step of 32 models, batch 128, ms per image",
    }[name]


def collect(results: dict) -> dict[str, dict[str, dict[int, float]]]:
    """Figures by row, peer and round."""
    rows: dict = {}
    for turn, found in enumerate(results["rounds"]):
        for name, answers in found.items():
            if name == "peak":
                continue
            names = [name, name.replace("memory", "memory device")]
            for row in dict.fromkeys(names):
                for peer, answer in answers.items():
                    figure = value(answer, row)
                    if figure is not None:
                        rows.setdefault(row, {}).setdefault(peer, {})[turn] = figure
    return rows


def median(figures: dict[int, float]) -> float:
    return statistics.median(figures.values())


def ratio(row: dict, peer: str) -> float | None:
    """The median over rounds of a peer's figure over ours in the same round."""
    both = set(row.get("ours", ())) & set(row.get(peer, ()))
    if not both:
        return None
    return statistics.median(row[peer][turn] / row["ours"][turn] for turn in both)


def digits(x: float) -> str:
    """Three figures."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x < 0.001 else f"{x:#.3g}".rstrip(".")


def cell(figures: dict[int, float] | None) -> str:
    if not figures:
        return ""
    if len(figures) == 1:
        return digits(median(figures))
    low, high = min(figures.values()), max(figures.values())
    return f"{digits(median(figures))} ({digits(low)} to {digits(high)})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def table(results: dict) -> str:
    rows, options, of = collect(results), results["options"], results["machine"]
    peers = [peer for peer in COLOURS if any(peer in row for row in rows.values())]
    versions = {}
    for peer in results["peers"].values():
        versions |= peer["versions"]
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    where = " and ".join([f"{of['cores']} cores of {of['cpu']}", *of["gpus"]])
    several = len(results["rounds"])
    parts = [
        f"{where}; Python {of['python']}; {used}. float32.",
        f"Medians (least to greatest) of {several} round{'s' * (several > 1)}, the peers in turn "
        "in each; memory from the first alone.",
        markdown(
            ["", *peers],
            [
                [title(name, options), *(cell(row.get(peer)) for peer in peers)]
                for name, row in rows.items()
            ],
        ),
    ]
    ratios = [
        [title(name, options).rpartition(", ")[0], *(times(ratio(row, p)) for p in peers[1:])]
        for name, row in rows.items()
        if len(row) > 1
    ]
    if ratios:
        parts += [
            "How many times ours each peer takes: medians over rounds of the ratio in a round.",
            markdown(["", *peers[1:]], ratios),
        ]
    return "\n\n".join([*parts, *bullets(results, rows)]) + "\n"


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def bullets(results: dict, rows: dict) -> list[str]:
    """The machine's peaks, what the step makes of them, and what is missing."""
    lines = []
    flops, bandwidth = peaks(results)
    for name, rate in flops.items():
        lines.append(f"{name}: {rate / 1e9:,.0f} GFLOP/s")
    for peer, rate in bandwidth.items():
        lines.append(
            f"memory bandwidth, an array negated in place in {peer}: {rate / 1e9:,.1f} GB/s"
        )
    allowed = [rate for name, rate in flops.items() if "float32" in name]
    steps = sorted(
        (int(name.split()[1]), median(row["ours"]))
        for name, row in rows.items()
        if name.startswith("step ") and "ours" in row
    )
    for batch, milliseconds in steps:
        rate = training_flop() / milliseconds * 1e3
        share = f", {rate / max(allowed):.0%} of the best float32 matrix product" if allowed else ""
        lines.append(
            f"ours, training step, batch {batch}: {rate / 1e9:,.0f} GFLOP/s at "
            f"{training_flop() / 1e6:.0f} MFLOP per image{share}"
        )
    for peer in COLOURS:
        small, large = (rows.get(f"step {batch}", {}).get(peer) for batch in (16, 4096))
        if small and large:
            grown = statistics.median(large[t] / small[t] for t in set(small) & set(large))
            lines.append(f"{peer}, cost per image at batch 4096 over batch 16: {grown:.2f}")
    seeds, one = (rows.get(name, {}).get("ours") for name in ("seeds", "step 128"))
    if seeds and one:
        gain = statistics.median(32 * seeds[t] / one[t] for t in set(seeds) & set(one))
        lines.append(f"ours, a step of 32 seeds at once over a step of one: {gain:.2f}")
    half, whole = rows.get("bfloat16", {}).get("ours"), rows.get("step 4096", {}).get("ours")
    if half and whole:
        gain = statistics.median(whole[t] / half[t] for t in set(half) & set(whole))
        lines.append(f"ours, float32 step over bfloat16 step at batch 4096: {gain:.2f}")
    lines += [f"left out: {line}" for line in results["left_out"]]
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def peaks(results: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The best rate of any round: of matrix products by kind and library, and of memory."""
    flops: dict[str, float] = {}
    bandwidth: dict[str, float] = {}
    for found in results["rounds"]:
        for peer, answer in found.get("peak", {}).items():
            library = "JAX" if peer == "ours" else peer
            for kind, rate in answer["flops"].items():
                key = f"{kind}, {library}"
                flops[key] = max(flops.get(key, 0), rate)
            bandwidth[library] = max(bandwidth.get(library, 0), answer["bytes"])
    return flops, bandwidth


def figure(results: dict, path: Path) -> None:
    rows = collect(results)
    peers = [peer for peer in COLOURS if any(peer in row for row in rows.values())]
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(13, 8), layout="constrained", width_ratios=(1, 1.25)
    )
    batches = sorted(int(name.split()[1]) for name in rows if name.startswith("step "))
    for peer in peers:
        points = [(b, rows[f"step {b}"][peer]) for b in batches if peer in rows[f"step {b}"]]
        if points:
            x = [batch for batch, _ in points]
            y = [median(figures) for _, figures in points]
            low = [m - min(f.values()) for m, (_, f) in zip(y, points, strict=True)]
            high = [max(f.values()) - m for m, (_, f) in zip(y, points, strict=True)]
            width = 2.5 if peer == "ours" else 1.5
            left.errorbar(
                x, y, (low, high), marker="o", capsize=3, lw=width, label=peer, color=COLOURS[peer]
            )
    left.set(xscale="log", yscale="log", xlabel="batch size", ylabel="milliseconds per image")
    left.set_title("Training step: cost per image, median and range")
    left.set_xticks(batches, [str(batch) for batch in batches])
    left.xaxis.set_minor_locator(NullLocator())
    plain_log(left.yaxis)
    left.grid(alpha=0.25)

    shown = [name for name in rows if any(p != "ours" and ratio(rows[name], p) for p in peers)]
    height = 0.8 / max(len(peers) - 1, 1)
    for i, peer in enumerate(peers[1:]):
        bars = [(j, ratio(rows[name], peer)) for j, name in enumerate(shown)]
        bars = [(j, r) for j, r in bars if r]
        where = [j + (i - (len(peers) - 2) / 2) * height for j, _ in bars]
        ratios = [r for _, r in bars]
        # From 1, so that on a logarithmic axis a bar to the left says "faster than ours".
        right.barh(where, [r - 1 for r in ratios], height, 1, color=COLOURS[peer], label=peer)
        for y, r in zip(where, ratios, strict=True):
            right.annotate(
                f"{r:.2g}" if r < 10 else f"{r:.0f}",
                (r, y),
                (3 if r >= 1 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if r >= 1 else "right",
                fontsize=6,
            )
    right.axvline(1, color=COLOURS["ours"], lw=1.5)
    right.set(xscale="log", xlabel="peer / ours, median over rounds (above 1: ours takes less)")
    plain_log(right.xaxis)
    names = {
        "log_likelihood": "log p(x)",
        "start": "start to\nfirst step",
        "cold_start": "cold start",
    }
    right.set_yticks(range(len(shown)), [names.get(n, n.replace("memory", "mem.")) for n in shown])
    right.invert_yaxis()
    right.margins(x=0.12)
    right.grid(axis="x", alpha=0.25)
    right.set_title("Ratios to ours")
    patches = [Patch(color=COLOURS[peer], label=peer) for peer in peers]
    fig.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    fig.savefig(path, dpi=120)


def plain_log(axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    (out / "table.md").write_text(table(results))
    figure(results, out / "speed.png")


if __name__ == "__main__":
    main()
