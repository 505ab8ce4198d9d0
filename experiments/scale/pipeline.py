"""Does reading keep up? Images on disk, 64x64 in colour, beside the training steps that take them.

python experiments/scale/pipeline.py FOLDER     writes the images there, 5,120 of each kind
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import jaxvae
from jaxvae.data.records import array_records
from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, make_cores_devices, shard
from jaxvae.training.pipeline import _read

SIDE, COUNT, BATCH = 64, 5120, 128


def pictures() -> np.ndarray:
    """Smooth images, as PNG compresses photographs and not noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    size = (SIDE, SIDE)
    return np.stack([Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in small])


def as_npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def as_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write(path: Path, images: np.ndarray, encode: Callable[[np.ndarray], bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image in images:
        writer.write(encode(image))
    writer.close()


def read_rate(path: Path, workers: int) -> float:
    """Images a second, in a random order, once the readers have begun."""
    images = array_records([path])
    order = np.random.default_rng(1).permutation(COUNT)
    portions = list(order[: COUNT // 1024 * 1024].reshape(-1, 1024)) * 4
    began, seen = 0.0, 0
    for i, read in enumerate(_read(images, portions, workers)):
        if i == 0:
            began = time.perf_counter()
        else:
            seen += len(read)
    return seen / (time.perf_counter() - began)


def step_rate(network: str) -> float:
    """Images a second that training steps take, on all devices."""
    mesh = devices_for(BATCH)
    model = jaxvae.ModelConfig((SIDE, SIDE, 3), 256, network=network)
    train = jaxvae.TrainConfig(batch_size=BATCH)
    state = shard(jaxvae.create_train_state(jax.random.key(0), model, train), mesh)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    images = jax.device_put(images, jax.NamedSharding(mesh, jax.P(AXIS)))
    specs = {"in_specs": (jax.P(), jax.P(AXIS)), "out_specs": jax.P()}
    step = data_parallel(jaxvae.train_step, mesh, donate_argnums=(0,), **specs)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, images))
        seconds.append(time.perf_counter() - began)
    return BATCH / float(np.median(seconds[2:]))


def main() -> None:
    make_cores_devices()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    images = pictures()
    steps = {network: step_rate(network) for network in ("mlp", "conv", "residual", "spatial")}
    fastest = max(steps.values())
    reads = {}
    for kind, encode in (("npy", as_npy), ("png", as_png)):
        path = folder / f"{kind}.array_record"
        write(path, images, encode)
        for workers in (0, 2):
            reads[f"{kind}, {workers} workers"] = read_rate(path, workers)
    print(json.dumps({"steps": steps, "reads": reads}, indent=1))
    for kind, rate in reads.items():
        print(f"{kind}: {rate / fastest:.1f} times what the fastest step takes")


if __name__ == "__main__":
    main()
