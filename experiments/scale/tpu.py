"""What the TPU compiler makes of the training step, without a TPU.

    python experiments/scale/tpu.py OUT.json     compile everything, some 20 minutes
    python experiments/scale/tpu.py TOPOLOGY PROGRAM BATCH DTYPE

The package libtpu (pip install libtpu) compiles for a topology on an ordinary machine. Its programs
hold the compiler's own estimate of the cycles that each operation takes.
"""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxvae
from jaxvae.parallel import AXIS
from jaxvae.training import train_epoch, train_step

# Google Cloud's system architecture pages, 2025: bfloat16 FLOP/s and bytes of memory of a chip.
# What a cycle is follows from the multipliers that they count: peak / (2 * multipliers).
CHIPS = {
    "TPU v4": {"flops": 275e12, "memory": 32 * 2**30, "multipliers": 8 * 128 * 128},
    "TPU v5 lite": {"flops": 197e12, "memory": 16 * 2**30, "multipliers": 4 * 128 * 128},
}
IMAGES = 60_000


def topology(name: str) -> Any:
    """The devices of a TPU topology, such as "v5e:2x2", that need not be there."""
    # Looks for no TPU and asks no metadata server; several processes may do so at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, "tpu")


def compiled(name: str, program: str, batch: int, dtype: str) -> Any:
    """A program compiled for all chips of a topology; `batch` images for each."""
    devices = topology(name).devices
    mesh = jax.sharding.Mesh(devices, (AXIS,))

    def laid_out(tree: Any, spec: jax.P) -> Any:
        sharding = jax.NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    model = jaxvae.ModelConfig(compute_dtype=dtype)
    train = jaxvae.TrainConfig(batch_size=batch * mesh.size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda: jaxvae.create_train_state(jax.random.key(0), model, train))
    everywhere, rows = jax.P(), jax.P(AXIS)
    images = jax.ShapeDtypeStruct((IMAGES, 28, 28, 1), jnp.uint8)
    if program == "sample":
        keys = jax.ShapeDtypeStruct((mesh.size,), key.dtype)
        arguments = laid_out(state.params, everywhere), laid_out(keys, rows)
        f, specs, result = lambda p, k: jaxvae.sample(p, k[0], batch), (everywhere, rows), rows
    elif program == "epoch":
        arguments = laid_out((state, images), everywhere)
        f, specs, result = partial(train_epoch, axis_name=AXIS), everywhere, everywhere
    else:
        images = jax.ShapeDtypeStruct((batch * mesh.size, 28, 28, 1), jnp.uint8)
        arguments = laid_out(state, everywhere), laid_out(images, rows)
        f, specs, result = partial(train_step, axis_name=AXIS), (everywhere, rows), everywhere
    parts = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)
    donated = () if program == "sample" else (0,)
    with jax.default_device("tpu"):  # what is traced is for that, whatever is here
        return jax.jit(parts, donate_argnums=donated).lower(*arguments).compile()


def measured(name: str, program: str, batch: int, dtype: str) -> dict[str, Any]:
    began = time.perf_counter()
    done = compiled(name, program, batch, dtype)
    text, memory, cost = done.as_text(), done.memory_analysis(), done.cost_analysis()
    kind = topology(name).devices[0].device_kind
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    record = {
        "topology": name,
        "chip": kind,
        "program": program,
        "batch": batch,
        "dtype": dtype,
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "cycles": cycles,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }
    chip = CHIPS.get(kind)
    if chip and program == "step":  # an epoch's loop holds the cycles of one of its steps
        seconds = cycles * 2 * chip["multipliers"] / chip["flops"]
        record |= {"seconds": seconds, "of_peak": cost["flops"] / seconds / chip["flops"]}
    return record


def main() -> None:
    if len(sys.argv) == 5:
        name, program, batch, dtype = sys.argv[1:]
        print(json.dumps(measured(name, program, int(batch), dtype)))
        return
    (out,) = sys.argv[1:]
    wanted = [
        *(("v5e:2x2", "step", b, d) for d in ("float32", "bfloat16") for b in (128, 512, 2048)),
        ("v5e:16x16", "step", 512, "bfloat16"),
        ("v4:2x2x1", "step", 512, "bfloat16"),
        ("v6e:2x2", "step", 512, "bfloat16"),
        *((t, p, 128, "bfloat16") for t in ("v5e:2x2", "v5e:16x16") for p in ("epoch", "sample")),
    ]
    records = []
    for arguments in wanted:  # each in a process of its own: libtpu keeps what it has compiled
        words = [sys.executable, __file__, *map(str, arguments)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(records[-1]), flush=True)
        Path(out).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
