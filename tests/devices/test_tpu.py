"""The TPU compiler takes the programs, for one host and for many, on a machine without a TPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

REPORT = Path(__file__).parents[2] / "experiments" / "scale" / "tpu.py"
GIBIBYTES = {"v4": 32, "v5e": 16}


@pytest.mark.parametrize(
    ("topology", "program"),
    [("v4:2x2x1", "step"), ("v5e:16x16", "epoch"), ("v5e:16x16", "sample")],
)
def test_it_compiles_with_one_all_reduce_and_fits(topology, program):
    words = [sys.executable, REPORT, topology, program, "16", "bfloat16"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    told = {kind: times for kind, (times, _) in made["collectives"].items()}
    assert told == ({} if program == "sample" else {"all-reduce": 1})
    assert made["memory"] < GIBIBYTES[topology.partition(":")[0]] * 2**30 / 10
    assert made["flops"] > 16 * 2e6
