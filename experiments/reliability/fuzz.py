"""Files that nobody would write, in great numbers: each is read, or refused as it should be.

    python experiments/reliability/fuzz.py KIND --seconds N

KIND is one of npy, npz, idx, idx.gz, png, jpg, gif, webp. libFuzzer, by way of atheris (pip install
atheris; Python 3.11 to 3.13 on Linux), changes valid files and follows which lines of jaxvae each
new one reaches. Anything but a Dataset or an InputError of one line is a finding, and so is a file
that takes ten seconds or brings the process to 1 GiB of memory; the command then exits with 1 and
leaves the file as finding-KIND-... in the working directory. What a kind came to is kept, a line
of JSON, in results/fuzz.json.
"""

import argparse
import gzip
import io
import json
import mmap
import os
import platform
import random
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
MOST_MEMORY = 1024  # MiB
MOST_TIME = 10  # seconds for one file
PICTURES = {"png": "png", "jpg": "jpeg", "gif": "gif", "webp": "webp"}
KINDS = ("npy", "npz", "idx", "idx.gz", *PICTURES)


def seeds(kind: str) -> list[bytes]:
    """Valid files to begin with."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 5), np.uint8)
    if kind in PICTURES:
        return [_picture(kind, images[:1, :, :, None], mode) for mode in ("L", "RGB", "P")] + [
            _picture(kind, rng.integers(0, 256, (2, 9, 8, 3), np.uint8), "RGB")
        ]
    if kind == "npy":
        return [_npy(array) for array in (images, images[..., None] / 255, images > 99)]
    if kind == "npz":
        labels = np.arange(20)
        return [
            _npz(np.savez, images=images, labels=labels),
            _npz(np.savez_compressed, x_train=images, y_train=labels, x_test=images / 255),
        ]
    idx = [
        struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        for array in (images, images[..., None])
    ]
    return [gzip.compress(content) for content in idx] if kind == "idx.gz" else idx


def _picture(kind: str, images: np.ndarray, mode: str) -> bytes:
    pictures = [Image.fromarray(np.broadcast_to(x, (*x.shape[:2], 3))) for x in images]
    first, *others = [picture.convert("RGB" if kind == "jpg" else mode) for picture in pictures]
    more = {"save_all": True, "append_images": others} if others and kind != "jpg" else {}
    file = io.BytesIO()
    first.save(file, PICTURES[kind], **more)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz(save: Callable, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def changed_inside(kind: str, content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A file whose inside is changed, and whose checksums hold, so that the reader gets there."""
    if kind == "idx.gz":
        return gzip.compress(change(gzip.decompress(content)), 1)
    if kind == "npz":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(member, archive.read(member)) for member in archive.infolist()]
        which = random.randrange(len(members))
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for i, (member, inside) in enumerate(members):
                archive.writestr(member, change(inside) if i == which else inside)
        return file.getvalue()
    if kind == "png":
        content = change(content)
        at, parts = 8, [content[:8]]
        while at + 12 <= len(content):
            length = int.from_bytes(content[at : at + 4])
            part = content[at : at + 8 + length]
            parts.append(part + struct.pack(">I", zlib.crc32(part[4:])))
            at += len(part) + 4
        return b"".join(parts)
    return change(content)


def fuzz(kind: str, seconds: int, folder: Path, runs: mmap.mmap) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["jaxvae"]):
        from jaxvae import InputError
        from jaxvae.data import Dataset, files, load_dataset  # noqa: F401  files are read by it

    corpus, place = folder / "corpus", folder / "files"
    corpus.mkdir()
    place.mkdir()
    for i, content in enumerate(seeds(kind)):
        (corpus / str(i)).write_bytes(content)
    path = place / ("images-idx3-ubyte.gz" if kind == "idx.gz" else f"x.{kind}")
    data = path
    if kind in PICTURES:  # beside a whole one, as one alone leaves nothing to train on
        data = place
        (place / f"y.{kind}").write_bytes(seeds(kind)[1])

    def one(content: bytes) -> None:
        path.write_bytes(content)
        runs[:8] = (int.from_bytes(runs[:8]) + 1).to_bytes(8)
        try:
            dataset = load_dataset(str(data))
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError("a message of several lines") from error
            return
        if not isinstance(dataset, Dataset):
            raise AssertionError(f"a {type(dataset).__name__}")

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        random.seed(seed)
        if seed % 2:
            try:
                return changed_inside(kind, content, lambda x: atheris.Mutate(x, most))[:most]
            except Exception:  # no longer a file with an inside
                pass
        return atheris.Mutate(content, most)

    options = {
        "max_total_time": seconds,
        "rss_limit_mb": MOST_MEMORY,
        "timeout": MOST_TIME,
        "max_len": 4096,
        "artifact_prefix": f"finding-{kind}-",
        "print_final_stats": 0,
        "verbosity": 0,
    }
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items())]
    atheris.Setup([*arguments, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=int, default=120)
    options = parser.parse_args()
    try:
        version("atheris")
    except ImportError:
        parser.error("atheris is not installed: pip install atheris (Linux, Python 3.11 to 3.13)")
    runs, began = mmap.mmap(-1, 8), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if not child:
            fuzz(options.kind, options.seconds, Path(folder), runs)
        _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss // 1024  # Linux counts in KiB
    record = {
        "kind": options.kind,
        "seconds": round(time.monotonic() - began),
        "runs": int.from_bytes(runs[:8]),
        "peak_mib": peak,
        "findings": int(code != 0 or peak > MOST_MEMORY),
        "python": platform.python_version(),
        **{name: version(name) for name in ("atheris", "numpy", "pillow")},
    }
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in lines if json.loads(line)["kind"] != options.kind]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(record)]))
    print(f"{record['runs']:,} files, at most {peak} MiB, {record['findings']} findings")
    return min(1, record["findings"])


if __name__ == "__main__":
    sys.exit(main())
