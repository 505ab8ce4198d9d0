"""The TPU compiler takes the programs, for one host and for many, on a machine without a TPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

REPORT = Path(__file__).parents[1] / "experiments" / "scale" / "tpu.py"
GIBIBYTES = {"v5e": 16, "v6e": 32}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:16x16", "v6e:2x2"])
@pytest.mark.parametrize("program", ["step", "epoch", "sample"])
def test_it_compiles_with_one_all_reduce_and_fits(topology, program):
    words = [sys.executable, REPORT, topology, program, "128", "bfloat16"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    told = {kind: times for kind, (times, _) in made["collectives"].items()}
    assert told == ({} if program == "sample" else {"all-reduce": 1})
    assert made["memory"] < GIBIBYTES[topology.partition(":")[0]] * 2**30 / 10
    assert made["flops"] > 128 * 2e6
