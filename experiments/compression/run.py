"""Measure the size of compressed test images beside general and image compressors.

    python experiments/compression/run.py OUT.json NAME=RUN_DIR[:IMAGES] ...

Each run is measured on the first IMAGES of its test images, by default all. zstd is measured if
the package zstandard is installed.
"""

import bz2
import io
import json
import lzma
import math
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

import jaxvae
from jaxvae.compression import compress, decompress, header_of
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.figures.grid import tile
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import load_run_data


def picture_bytes(image, binary, kind):
    """The size of a picture file of one image."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if kind == "png":
        how = {"format": "png", "optimize": True}
        picture = picture.convert("1") if binary else picture
    else:
        how = {"format": "webp", "lossless": True, "quality": 100, "method": 6}
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, **how)
    return len(file.getvalue())


def others(images, binary):
    """The size in bytes of the images by each other compressor."""
    raw = (np.packbits(images > 0) if binary else images).tobytes()
    rows = next(r for r in range(math.isqrt(len(images)), 0, -1) if len(images) % r == 0)
    sizes = {"bz2": len(bz2.compress(raw, 9)), "lzma": len(lzma.compress(raw, preset=9))}
    if find_spec("zstandard"):
        import zstandard

        sizes["zstd"] = len(zstandard.ZstdCompressor(level=22).compress(raw))
    for kind in ("png", "webp"):
        sizes[f"{kind}, a file for each image"] = sum(
            picture_bytes(image, binary, kind) for image in images
        )
        sizes[f"{kind}, one grid"] = picture_bytes(tile(images, rows), binary, kind)
    return sizes


def measure(run_dir, most):
    """The results of one run."""
    config = read_config(run_dir)
    images = load_run_data(config).test_images[:most]
    params = jaxvae.load(run_dir)
    binary = config.model.likelihood.support == "binary"
    compress(params, images[:1])  # compiles
    began = time.perf_counter()
    data = compress(params, images)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    restored = decompress(params, data)
    back = time.perf_counter() - began
    assert np.array_equal(restored, images)
    elbo = float(evaluate(params, run_keys(config)[1], images)["elbo"])
    initial = header_of(data).initial_bits
    sizes = {"jaxvae": len(data)} | others(images, binary)
    return {
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "network": config.model.specs()["network"],
        "likelihood": config.model.specs()["likelihood"],
        "bytes": sizes,
        "bits_per_dimension": {name: 8 * size / images.size for name, size in sizes.items()},
        "without_initial_bits": (8 * len(data) - initial) / images.size,
        "initial_bytes": initial // 8,
        "elbo": -elbo / math.log(2) / math.prod(images.shape[1:]),
        "images_per_second": {"compress": len(images) / seconds, "decompress": len(images) / back},
    }


def main():
    """Measure every run, and write the results after each."""
    out, *runs = sys.argv[1:]
    results = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    results["versions"] = {n: version(n) for n in ("jax", "numpy", "pillow")}
    for run in runs:
        name, _, path = run.partition("=")
        path, _, most = path.partition(":")
        results[name] = measure(Path(path), int(most) if most else None)
        Path(out).write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main()
