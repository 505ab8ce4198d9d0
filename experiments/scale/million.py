"""Memory of a training beside the size of its data set: a million colour images on disk.

python experiments/scale/million.py FOLDER     writes data sets there, 3.6 GB in all
"""

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIDE = 32
PER_FILE = 50_000  # a reader keeps a file's index, and for a moment copies of it
FLAGS = "--network mlp:width=32 --latent-dim 8 --batch-size 1024 --epochs 1"


def write(folder: Path, count: int) -> None:
    """Images of noise: what they show does not matter here."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("test", 1000)):
        for begin in range(0, number, PER_FILE):
            path = folder / f"{split}-{begin // PER_FILE:03}.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for _ in range(min(PER_FILE, number - begin)):
                file = io.BytesIO()
                np.save(file, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
                writer.write(file.getvalue())
            writer.close()


def main() -> None:
    if sys.argv[1] == "--train":
        words = [sys.executable, "-m", "jaxvae", "train", *sys.argv[2:], *FLAGS.split()]
        subprocess.run(words, check=True)
        # The largest child's, in KiB on Linux.
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
        return
    folder = Path(sys.argv[1])
    for count in (10_000, 100_000, 1_000_000):
        data = folder / str(count)
        if not data.exists():
            write(data, count)
        began = time.perf_counter()
        words = ["--train", "--data", str(data), "--run-dir", str(folder / f"run-{count}")]
        done = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
        )
        peak = float(done.stdout.splitlines()[-1])
        seconds = time.perf_counter() - began
        print(f"{count:,} images: peak resident memory {peak:.2f} GiB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
