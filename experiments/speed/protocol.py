"""The worker's side of the benchmark: a JSON request a line in, a JSON answer a line out.

A worker hands `serve` its measures by name. A measure takes the request's other fields and
returns either a dict, which is the answer, or a Timed, which is warmed up once, kept, and timed
here, so that every peer is timed by the same lines.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
PROTOCOL = "measure", "seconds", "repeats"  # the fields that are not a measure's own


class Timed(NamedTuple):
    """Work to time.

    run: run(n) does it n times, and waits for the device only at the end.
    images: how many images it treats each time.
    warm: compiles it more cheaply than run(1) does, where that is long.
    """

    run: Callable[[int], None]
    images: int
    warm: Callable[[], Any] | None = None


def serve(
    measures: dict[str, Callable[..., Any]], device_peak: Callable[[], int | None] = lambda: None
) -> None:
    """Answer requests until the input ends.

    Answers go to the file descriptor that run.py opened for them: libraries print on stdout.
    """
    # A stopped process outlives the one that stopped it, unless it is told to die with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    kept: dict[str, Timed] = {}
    with os.fdopen(int(os.environ["SPEED_ANSWERS"]), "w") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = _answer(request, measures, kept, device_peak)
            except Exception as error:  # the next measure may well work
                traceback.print_exc()
                words = str(error).strip().splitlines()
                answer = {"error": f"{type(error).__name__}: {words[0] if words else ''}"[:300]}
            print(json.dumps(answer), file=answers, flush=True)


def _answer(request, measures, kept, device_peak):
    name = request["measure"]
    if name not in measures:
        return {"absent": True}
    options = {key: value for key, value in request.items() if key not in PROTOCOL}
    label = json.dumps([name, options], sort_keys=True)
    if label not in kept:
        work = measures[name](**options)
        if isinstance(work, dict):
            return work
        if "repeats" in request:  # in a fresh process, whose start or memory is measured
            work.run(request["repeats"])
            kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return {"images": work.images, "rss": kibibytes * 1024, "device": device_peak()}
        (work.warm or (lambda: work.run(1)))()
        kept[label] = work
    work = kept[label]
    return {"seconds": _time(work.run, request["seconds"]), "images": work.images}


def _time(run: Callable[[int], None], seconds: float) -> float:
    """Seconds that one repetition takes, over a bunch of them lasting about `seconds`."""
    n, took = 1, _clock(run, 1)
    while took < seconds / 2:
        n = max(n + 1, math.ceil(n * min(seconds / took, 10)))
        took = _clock(run, n)
    return took / n


def _clock(run: Callable[[int], None], n: int) -> float:
    began = time.perf_counter()
    run(n)
    return time.perf_counter() - began


def best(run: Callable[[], Any], times: int = 5) -> float:
    """The least of several timings of run(), in seconds, after one to warm up."""
    run()
    return min(_clock(lambda n: run(), 1) for _ in range(times))


def make_images(n: int) -> np.ndarray:
    """Grey blobs on black, the same ones every time: uint8 [n, 28, 28, 1]."""
    random = np.random.default_rng(0)
    x, y, width = random.uniform((8, 8, 2), (20, 20, 5), (n, 3)).astype(np.float32).T
    pixels = np.arange(28, dtype=np.float32)
    across = np.exp(-(((pixels - x[:, None]) / width[:, None]) ** 2))
    down = np.exp(-(((pixels - y[:, None]) / width[:, None]) ** 2))
    return np.rint(255 * down[:, :, None] * across[:, None, :]).astype(np.uint8)[..., None]


def float_images(n: int) -> np.ndarray:
    """The same as float32 in [0, 1]."""
    return make_images(n).astype(np.float32) / 255


def load_check(path: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What ours wrote: weights by name ("encoder/conv_1/kernel", HWIO), images and noise."""
    with np.load(path) as file:
        weights = {name: file[name] for name in file.files if "/" in name}
        return weights, file["images"], file["eps"]


def check_answer(log_likelihood: Any, kl: Any, encoder: int, decoder: int) -> dict[str, Any]:
    """The terms of the loss, each [batch] in nats, and the numbers of parameters."""
    return {
        "log_likelihood": np.asarray(log_likelihood, np.float64).ravel().tolist(),
        "kl": np.asarray(kl, np.float64).ravel().tolist(),
        "parameters": [int(encoder), int(decoder)],
    }
