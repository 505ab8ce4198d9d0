"""How a training step scales: measured where there are devices, predicted to 256 of them.

    python experiments/scale/scaling.py FOLDER     FOLDER/tpu.json is what tpu.py has written

Writes FOLDER/scaling.json and FOLDER/scaling.png. The prediction adds up, for n devices,

    t(n) = t_step(batch of a device) + 2 (n - 1) / n * bytes / bandwidth + hops(n) * latency

the time of a step without its collectives, and that of a ring all-reduce of the gradients
(Patarasuk and Yuan, 2009, Bandwidth optimal all-reduce algorithms), of which nothing happens
meanwhile. t_step is measured here for a CPU core, and the compiler's estimate for a TPU chip.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CORES = len(os.sched_getaffinity(0))
DEVICES = [2**i for i in range(9)]
FIXED, EACH = 4096, 128  # images of a batch: of the whole, or of each device
BATCHES = [FIXED // n for n in reversed(DEVICES)]

# What is assumed of a link: bytes a second that a device sends, seconds that a hop takes, and how
# many hops an all-reduce of n devices takes one after another.
LINKS = {
    "CPU cores, one a host, 10 Gbit/s Ethernet": (1.25e9, 30e-6, lambda n: 2 * (n - 1)),
    # Google Cloud's page of the v5e, 2025: 400 GB/s a chip, in both directions. A torus of two
    # axes, one ring after the other.
    "TPU v5e chips": (200e9, 1e-6, lambda n: 4 * (math.sqrt(n) - 1)),
}


def step_seconds(batch: int, devices: int) -> float:
    """The median seconds of a training step, on so many cores of this machine, one device each."""
    words = [sys.executable, __file__, "--step", str(batch), str(devices)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_step(batch: int, devices: int) -> float:
    cores = sorted(os.sched_getaffinity(0))[:devices]
    os.sched_setaffinity(0, cores)
    import jax

    import jaxvae
    from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, make_cores_devices, shard

    make_cores_devices()
    mesh = devices_for(batch)
    assert mesh.size == devices
    state = jaxvae.create_train_state(
        jax.random.key(0), jaxvae.ModelConfig(), jaxvae.TrainConfig(batch_size=batch)
    )
    images = np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8)
    specs = {"in_specs": (jax.P(), jax.P(AXIS)), "out_specs": jax.P()}
    step = data_parallel(jaxvae.train_step, mesh, donate_argnums=(0,), **specs)
    state = shard(state, mesh)
    images = jax.device_put(images, jax.NamedSharding(mesh, jax.P(AXIS)))
    seconds = []
    while len(seconds) < 5 or (sum(seconds) < 3 and len(seconds) < 50):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, images))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[2:]))


def told(devices: int, fsdp: bool) -> dict[str, Any]:
    """What the devices tell each other in a step, on simulated devices of this machine."""
    code = (
        "import jax, json, jaxvae; from programs import *; print(json.dumps(collectives("
        f"compiled(jax.devices('cpu'), 'step', 16, jaxvae.ModelConfig(), {fsdp}))))"
    )
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=os.environ | flags | {"JAX_PLATFORMS": "cpu"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def predicted(seconds: float, sent: float, link: tuple[float, float, Any], n: int) -> float:
    """t(n), of t(1)."""
    bandwidth, latency, hops = link
    return seconds + 2 * (n - 1) / n * sent / bandwidth + hops(n) * latency


def draw(curves: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = f"{FIXED} images in all", f"{EACH} images each"
    for panel, title, kind in zip(panels, titles, ("fixed", "growing"), strict=True):
        panel.loglog(DEVICES, DEVICES, color="0.7", linestyle=":", label="in proportion")
        for (name, curve), marker in zip(curves.items(), "os", strict=True):
            rates = np.array(curve[kind])
            panel.loglog(DEVICES, rates / rates[0], marker=marker, label=name)
        panel.set(title=f"A batch of {title}", xlabel="devices", xticks=DEVICES)
        panel.set_xticklabels(map(str, DEVICES))
        panel.minorticks_off()
    panels[0].set_ylabel("predicted images per second, relative to one device")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    if sys.argv[1] == "--step":
        print(measure_step(*map(int, sys.argv[2:])))
        return
    folder = Path(sys.argv[1])
    tpu = json.loads((folder / "tpu.json").read_text())
    core = {batch: step_seconds(batch, 1) for batch in BATCHES}
    both = {batch: step_seconds(batch, CORES) for batch in BATCHES}
    chip = {
        made["batch"]: made["seconds"]
        for made in tpu
        if (made["topology"], made["network"], made["program"], made["dtype"])
        == ("v5e:2x2", "conv", "step", "bfloat16")
    }
    collectives = {
        "replicated": {n: told(n, False) for n in (2, 8)},
        "fsdp": {n: told(n, True) for n in (2, 8)},
    }
    sent = collectives["replicated"][8]["all-reduce"][1]
    curves = {}
    for (name, link), seconds in zip(LINKS.items(), (core, chip), strict=True):
        curves[name] = {
            kind: [n * each(n) / predicted(seconds[each(n)], sent, link, n) for n in DEVICES]
            for kind, each in (("fixed", lambda n: FIXED // n), ("growing", lambda n: EACH))
        }
    record = {
        "step_seconds": {"1": core, str(CORES): both, "TPU v5e, estimated": chip},
        "collectives": collectives,
        "devices": DEVICES,
        "images_per_second": curves,
    }
    (folder / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, folder / "scaling.png")
    for batch in BATCHES:
        print(f"batch {batch}: {CORES} cores {core[batch] / both[batch]:.2f} times as fast as one")
    for layout, found in collectives.items():
        print(f"{layout}: {found}")
    for name, curve in curves.items():
        for kind, rates in curve.items():
            gains = ", ".join(
                f"{n}: {r / rates[0]:.1f}" for n, r in zip(DEVICES, rates, strict=True)
            )
            print(f"{name}, {kind}: {gains}")


if __name__ == "__main__":
    main()
