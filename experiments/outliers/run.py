"""Out-of-distribution scores: which images does a model of digits find unlikely?

    python experiments/outliers/run.py MNIST OUT

MNIST is a folder with the four IDX files. Every model is a run directory in OUT, so that a killed
call goes on where it was; OUT/results.json and OUT/log_p.png are written, and tables printed.
"""

import io
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import jaxvae
from jaxvae.devices.sharding import make_cores_devices

make_cores_devices()  # before the first computation
SEEDS = range(3)
NUM_IMAGES = 500  # of each data set, at most
NUM_SAMPLES = 100  # importance samples
MODEL = jaxvae.ModelConfig(
    network="mlp:width=200", latent_dim=20, likelihood="discretized_logistic"
)
EPOCHS = {"mnist": 5, "digits": 100}
Images = np.ndarray  # uint8 [N, H, W, 1]


def resized(images: Images, size: int) -> Images:
    """Resize grey images with Pillow's box filter if they shrink, bicubic if they grow."""
    how = Image.Resampling.BOX if size < images.shape[1] else Image.Resampling.BICUBIC
    small = [Image.fromarray(image[..., 0]).resize((size, size), how) for image in images]
    return np.stack([np.asarray(image) for image in small])[..., None]


def sixteenths(images: Images) -> Images:
    """Round to the 17 grey levels of scikit-learn's digits."""
    return np.uint8(np.rint(np.rint(images / 255 * 16) * 255 / 16))


def digits() -> tuple[Images, Images]:
    """Load scikit-learn's 1,797 digits, 8x8, and hold out 500 test images."""
    images = np.rint(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
    images = np.random.default_rng(0).permutation(images)
    return images[500:], images[:500]


def simple_sets(inside: Images) -> dict[str, Images]:
    """Make the data sets that need only the test images of the model."""
    rng = np.random.default_rng(1)
    level = np.linspace(0, 255, len(inside)).astype(np.uint8)
    return {
        "rotated by 90 degrees": np.rot90(inside, axes=(1, 2)).copy(),
        "inverted": 255 - inside,
        "constant": np.broadcast_to(level[:, None, None, None], inside.shape).copy(),
        "uniform noise": rng.integers(0, 256, inside.shape, np.uint8),
    }


def png_bits(images: Images) -> np.ndarray:
    """Measure the size of each image as a PNG file, in bits."""

    def size(image: np.ndarray) -> int:
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "png", optimize=True)
        return 8 * len(file.getvalue())

    return np.array([size(image) for image in images])


def log_p(params: jaxvae.Params, images: Images) -> np.ndarray:
    return np.asarray(jaxvae.log_likelihood(params, jax.random.key(0), images, NUM_SAMPLES))


def scores(params: jaxvae.Params, images: Images, entropy: float) -> dict[str, np.ndarray]:
    """Compute the scores of each image, which are high for outliers.

    The complexity correction is S(x) = -log2 p(x) - L(x), where L(x) is the size of the PNG file in
    bits (Serra et al. 2020). Typicality is |-log p(x) - H|, where H is the mean of
    -log p over training images (Nalisnick et al. 2019, with batches of one image).
    """
    nats = -log_p(params, images)
    error = (images / 255 - np.asarray(jaxvae.reconstruct(params, images))) ** 2
    return {
        "log p(x)": nats,
        "ELBO": -np.asarray(jaxvae.elbo(params, jax.random.key(1), images).value),
        "reconstruction": error.sum((1, 2, 3)),
        "complexity": nats / np.log(2) - png_bits(images),
        "typicality": np.abs(nats - entropy),
    }


def measure(
    params: jaxvae.Params, train: Images, inside: Images, outside: dict[str, Images]
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Return the AUROC of every data set and score, and log p of every data set."""
    entropy = float(-log_p(params, train[:NUM_IMAGES]).mean())
    of_inside = scores(params, inside, entropy)
    found, logs = {}, {"test images": -of_inside["log p(x)"]}
    for name, images in outside.items():
        of_outside = scores(params, images, entropy)
        logs[name] = -of_outside["log p(x)"]
        is_outside = np.repeat([0, 1], [len(inside), len(images)])
        found[name] = {
            score: float(roc_auc_score(is_outside, np.append(of_inside[score], values)))
            for score, values in of_outside.items()
        }
    return found, logs


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: AUROC, means over the seeds (standard deviation)."""
    names = list(next(iter(runs[0].values())))
    lines = ["| outliers | " + " | ".join(names) + " |", "| ---" + " | ---:" * len(names) + " |"]
    for outliers in runs[0]:
        cells = []
        for name in names:
            values = [run[outliers][name] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})")
        lines.append("| " + " | ".join([outliers, *cells]) + " |")
    return "\n".join(lines)


def histograms(of_models: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw log p of every data set, a row for each."""
    rows = max(map(len, of_models.values()))
    figure = Figure(figsize=(11, 0.9 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, len(of_models), sharex="col", squeeze=False)
    for column, (model, logs) in zip(axes.T, of_models.items(), strict=True):
        values = np.concatenate(list(logs.values()))
        bins = np.linspace(values.min(), values.max(), 120)
        column[0].set_title(f"model of {model}")
        for ax, (name, log) in zip(column, logs.items(), strict=False):
            ax.hist(log, bins, color="C0" if name == "test images" else "C1")
            ax.axvline(np.median(logs["test images"]), color="grey", linewidth=0.8)
            ax.text(0.01, 0.8, name, transform=ax.transAxes, va="top")
            ax.set_yticks([])
        for ax in column[len(logs) :]:
            ax.set_axis_off()
        column[len(logs) - 1].set_xlabel("log p(x), nats per image")
        column[len(logs) - 1].tick_params(labelbottom=True)
    return figure


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out = Path(sys.argv[2])
    mnist, mnist_test = jaxvae.load_data(sys.argv[1])
    mnist_test = np.random.default_rng(0).permutation(mnist_test)[:NUM_IMAGES]
    small, small_test = digits()
    framed = np.pad(resized(small_test, 20), ((0, 0), (4, 4), (4, 4), (0, 0)))
    data = {
        "mnist": (mnist, mnist_test, {
            "digits, 28x28": resized(small_test, 28),
            "digits, 20x20 and a margin": framed,
            **simple_sets(mnist_test),
        }),
        "digits": (small, small_test, {
            "MNIST, 8x8": sixteenths(resized(mnist_test, 8)),
            "MNIST without margin, 8x8": sixteenths(resized(mnist_test[:, 4:24, 4:24], 8)),
            **simple_sets(small_test),
        }),
    }  # fmt: skip
    results, logs = {}, {}
    for name, (train_images, inside, outside) in data.items():
        train = jaxvae.TrainConfig(epochs=EPOCHS[name], optimizer="adam", schedule="cosine")
        results[name] = []
        for seed in SEEDS:
            pair = (train_images, inside)
            fitted = jaxvae.fit(
                pair, MODEL, train, seed=seed, run_dir=out / f"{name}-{seed}", progress=False
            )
            auroc, logs[name] = measure(fitted.params, train_images, inside, outside)
            black = float(log_p(fitted.params, jnp.zeros_like(inside[:1]))[0])
            medians = {key: float(np.median(log)) for key, log in logs[name].items()}
            results[name].append({"auroc": auroc, "median_log_p": medians, "log_p_black": black})
            seconds = sum(line["seconds"] for line in fitted.history)
            print(f"{name}, seed {seed}: trained in {seconds:.0f} s, {medians}", flush=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    names = {"mnist": "MNIST", "digits": "scikit-learn's digits"}
    histograms({names[key]: log for key, log in logs.items()}).savefig(out / "log_p.png", dpi=110)
    for name, runs in results.items():
        print(f"\n{name}:\n\n{table([run['auroc'] for run in runs])}")


if __name__ == "__main__":
    main()
