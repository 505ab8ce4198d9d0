"""What the TPU compiler makes of the training step, without a TPU.

    python experiments/scale/tpu.py OUT.json     compile everything, some five minutes
    python experiments/scale/tpu.py TOPOLOGY PROGRAM BATCH DTYPE [NETWORK]

The package libtpu (pip install libtpu) compiles for a topology on an ordinary machine. Its programs
hold the compiler's own estimate of the cycles that each operation takes.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from programs import collectives, compiled

import jaxvae

# Google Cloud's system architecture pages, 2025: bfloat16 FLOP/s and bytes of memory of a chip.
# What a cycle is follows from the multipliers that they count: peak / (2 * multipliers).
CHIPS = {
    "TPU v4": {"flops": 275e12, "memory": 32 * 2**30, "multipliers": 8 * 128 * 128},
    "TPU v5 lite": {"flops": 197e12, "memory": 16 * 2**30, "multipliers": 4 * 128 * 128},
}


def topology(name: str) -> Any:
    """The devices of a TPU topology, such as "v5e:2x2", that need not be there."""
    # Looks for no TPU and asks no metadata server; several processes may do so at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, "tpu")


def measured(name: str, program: str, batch: int, dtype: str, network: str) -> dict[str, Any]:
    began = time.perf_counter()
    devices = topology(name).devices
    model = jaxvae.ModelConfig(compute_dtype=dtype, network=network)
    done = compiled(devices, program, batch, model)
    memory, cost = done.memory_analysis(), done.cost_analysis()
    kind = devices[0].device_kind
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', done.as_text())))
    told = collectives(done)
    record = {
        "topology": name,
        "chip": kind,
        "network": network,
        "program": program,
        "batch": batch,
        "dtype": dtype,
        "collectives": told,
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
    if len(sys.argv) > 2:
        name, program, batch, dtype, *model = sys.argv[1:]
        network = model[0] if model else "conv"
        print(json.dumps(measured(name, program, int(batch), dtype, network)))
        return
    (out,) = sys.argv[1:]
    wanted = [
        *(
            ("v5e:2x2", "step", b, "bfloat16")
            for b in (16, 32, 64, 100, *(2**i for i in range(7, 13)))
        ),
        *(("v5e:2x2", "step", b, "float32") for b in (128, 512)),
        *(
            ("v5e:2x2", "step", 128, "bfloat16", f"residual:width={width}")
            for width in (16, 32, 64)
        ),
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
