"""jaxvae beside Flax, PyTorch, Keras and pythae, timed in turn in one run.

    python experiments/speed/run.py [--only step,sample] [--peers ours,torch] [--rounds N] ...

Makes a virtual environment for each peer where there is none, then writes results.json, table.md
and speed.png. Needs nothing but Python 3.11 or newer, pip and Linux.
"""

import argparse
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
# With --quick: the fastest peers of each library, the training steps, less often.
QUICK = {
    "only": ["step", "mlp", "residual", "spatial", "ladder", "encode"],
    "peers": ["ours", "torch-eager", "keras-tensorflow-nojit"],
    "rounds": 2,
    "seconds": 0.5,
    "batches": [16, 128],
    "network_batches": [128],
    "forward_images": 2000,
}
ROOT = HERE.parent.parent
TOLERANCE = 1e-3  # relative, between a peer's loss terms and ours
NETWORKS = "mlp", "residual", "spatial", "ladder"  # besides the notebook's
WITHOUT_NETWORKS = "flax", "pythae"  # peers that have the notebook's only
COMPILE_CACHES = {
    "JAX_COMPILATION_CACHE_DIR": "jax",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


@dataclass(frozen=True)
class Peer:
    """A worker program: peers/`command`, in the environment `env`."""

    name: str
    env: str
    command: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    gpu_only: bool = False


PEERS = [
    Peer("ours", "jaxvae", ("ours.py",)),
    Peer("flax", "jaxvae", ("flax_plain.py",)),
    Peer("torch-eager", "torch", ("torch_peer.py", "eager")),
    Peer("torch-compile", "torch", ("torch_peer.py", "compile")),
    Peer("torch-cudagraphs", "torch", ("torch_peer.py", "cudagraphs"), gpu_only=True),
    *(
        Peer(f"keras-{backend}", f"keras-{backend}", ("keras_peer.py",), {"KERAS_BACKEND": backend})
        for backend in ("tensorflow", "jax", "torch")
    ),
    Peer(
        "keras-tensorflow-nojit",
        "keras-tensorflow",
        ("keras_peer.py", "nojit"),
        {"KERAS_BACKEND": "tensorflow"},
    ),
    Peer("pythae", "pythae", ("pythae_peer.py",)),
]


def requirements(env: str, gpu: bool) -> list[str]:
    """What pip installs in an environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cuda = project["optional-dependencies"]["cuda"] if gpu else []
    torch, keras = "torch==2.13.0", "keras==3.15.1"
    return {
        "jaxvae": [*project["dependencies"], *cuda],
        "torch": [torch, "numpy"],
        "keras-tensorflow": [
            keras,
            "tensorflow[and-cuda]==2.21.0" if gpu else "tensorflow-cpu==2.21.0",
        ],
        "keras-jax": [keras, "jax", *cuda],
        "keras-torch": [keras, torch],
        "pythae": [torch, "pythae==0.1.2"],
    }[env]


def measures(options: argparse.Namespace, gpu: bool) -> dict[str, list[dict]]:
    """The requests of each group, in order."""
    groups = {
        "step": [{"measure": "step", "batch": batch} for batch in options.batches],
        **{
            network: [
                {"measure": "step", "batch": b, "network": network} for b in options.network_batches
            ]
            for network in NETWORKS
        },
        "epoch": [{"measure": "epoch", "batch": 128, "images": options.epoch_images}],
        "sample": [{"measure": "sample", "images": options.forward_images}],
        "encode": [{"measure": "encode", "images": options.forward_images}],
        "log_likelihood": [
            {
                "measure": "log_likelihood",
                "images": options.ll_images,
                "samples": options.ll_samples,
            }
        ],
        "start": [{"measure": "step", "batch": 128, "repeats": 1}],
        "cold_start": [{"measure": "step", "batch": 128, "repeats": 1}],
        "memory": [
            {"measure": "step", "batch": batch, "repeats": 3} for batch in options.memory_batches
        ],
        "peak": [{"measure": "peak"}],
        "bfloat16": [{"measure": "step", "batch": 4096, "compute_dtype": "bfloat16"}],
        "seeds": [{"measure": "seeds", "batch": 128, "count": 32}],
    }
    default = [name for name in groups if gpu or name not in ("bfloat16", "seeds")]
    if unknown := sorted(set(options.only or []) - set(groups)):
        raise SystemExit(f"no measurement {unknown[0]!r}: expected {', '.join(groups)}")
    return {name: groups[name] for name in groups if name in (options.only or default)}


def label(group: str, request: dict) -> str:
    """The key of a measurement in results.json."""
    return f"{group} {request['batch']}" if group in ("step", "memory", *NETWORKS) else group


class WorkerError(Exception):
    """A worker that died, or did not answer in time."""


class Worker:
    """A peer's process: stopped whenever it is not the one asked."""

    def __init__(self, peer: Peer, python: str, options: argparse.Namespace, extra=None):
        self.peer, self.timeout = peer, options.timeout
        self.log = options.out / "logs" / f"{peer.name}.log"
        self.answers, theirs = os.pipe()
        paths = (str(ROOT), str(HERE), os.environ.get("PYTHONPATH", ""))
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SPEED_ANSWERS": str(theirs),
            # On a GPU the peers share its memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "TF_CPP_MIN_LOG_LEVEL": "1",
            **peer.environ,
            **(extra or {}),
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python, str(HERE / "peers" / peer.command[0]), *peer.command[1:]],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environ,
                pass_fds=[theirs],
                process_group=0,  # so that its children stop with it
                text=True,
            )
        os.close(theirs)
        self.reader = os.fdopen(self.answers)

    def ask(self, request: dict) -> dict:
        """Its answer; only while it works on it does the process run."""
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.answers], [], [], self.timeout)
            line = self.reader.readline() if ready else None
        except BrokenPipeError:
            line = ""
        self._signal(signal.SIGSTOP)
        if line:
            return json.loads(line)
        if line is None:
            raise WorkerError(f"no answer in {self.timeout:.0f} s")
        said = self.log.read_text(errors="replace").strip().splitlines()
        raise WorkerError(f"its process ended: {said[-1] if said else 'it said nothing'}"[:300])

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.reader.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Run:
    """The benchmark, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, peers: list[Peer], gpu: bool):
        self.options, self.gpu = options, gpu
        self.pythons: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self.results: dict = {
            "machine": machine(),
            "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
            "peers": {},
            "left_out": [],
            "rounds": [],
        }
        self.absent: set[tuple[str, str]] = set()
        self.peers = peers

    def leave_out(self, line: str) -> None:
        print(f"left out: {line}", flush=True)
        self.results["left_out"].append(line)

    def drop(self, peer: Peer, why: object) -> None:
        self.leave_out(f"{peer.name}: {why}")
        if peer.name == "ours":
            raise SystemExit("ours does not work: there is nothing to compare")
        self.peers = [other for other in self.peers if other != peer]
        if worker := self.workers.pop(peer.name, None):
            worker.close()

    def start(self, peer: Peer, extra: dict | None = None) -> Worker:
        return Worker(peer, self.pythons[peer.env], self.options, extra)

    def prepare(self) -> None:
        """Environments, then a worker for each peer that computes the same thing as ours."""
        for env in dict.fromkeys(peer.env for peer in self.peers):
            try:
                self.pythons[env] = environment(env, self.options, self.gpu)
            except subprocess.CalledProcessError as error:
                for peer in [peer for peer in self.peers if peer.env == env]:
                    words = (error.stderr or str(error)).strip().splitlines()
                    self.drop(peer, f"could not be installed: {words[-1]}")
        reference = None
        for peer in list(self.peers):
            self.workers[peer.name] = self.start(peer)
            try:
                self.results["peers"][peer.name] = self.workers[peer.name].ask({"measure": "info"})
                reference = self.check(peer, reference)
            except WorkerError as error:
                self.drop(peer, error)
        (self.options.out / "check.npz").unlink(missing_ok=True)

    def check(self, peer: Peer, reference: dict | None, **model: str) -> dict:
        """Compare a peer's terms of the loss with the reference's: ours, which is the first."""
        path = str(self.options.out.resolve() / "check.npz")
        answer = self.workers[peer.name].ask({"measure": "check", "path": path, **model})
        if "error" in answer:
            raise WorkerError(answer["error"])
        reference = reference or answer
        compare(answer, reference)
        return reference

    def check_network(self, network: str, requests: list[dict]) -> None:
        """Leave a network out for peers that do not have it, or compute other terms than ours."""
        reference = None
        for peer in self.peers:
            absent = {(peer.name, label(network, request)) for request in requests}
            if peer.name in WITHOUT_NETWORKS:
                self.absent |= absent
                continue
            try:
                reference = self.check(peer, reference, network=network)
            except WorkerError as error:
                self.leave_out(f"{peer.name}: {network}: {error}")
                self.absent |= absent
        (self.options.out / "check.npz").unlink(missing_ok=True)

    def measure(self, group: str, request: dict, turn: int) -> dict:
        """One measurement of every peer, in an order that differs from round to round."""
        found = {}
        name = label(group, request)
        first = turn % len(self.peers)
        for peer in self.peers[first:] + self.peers[:first]:
            if (peer.name, name) in self.absent:
                continue
            if group in ("bfloat16", "seeds") and peer.name != "ours":
                continue  # other libraries' figures for these would be another study
            asked = dict(request)
            if peer.name == "pythae" and group == "log_likelihood":
                asked["images"] = min(request["images"], self.options.pythae_images)
            try:
                answer = self.ask(peer, group, asked)
            except WorkerError as error:
                if group not in (
                    "start",
                    "cold_start",
                    "memory",
                ):  # the worker that is left cannot go on
                    self.drop(peer, f"{name}: {error}")
                    continue
                answer = {"error": str(error)}
            if "error" in answer:
                self.leave_out(f"{peer.name}: {name}: {answer['error']}")
            if "error" in answer or "absent" in answer:
                self.absent.add((peer.name, name))
            else:
                found[peer.name] = answer
        return found

    def ask(self, peer: Peer, group: str, request: dict) -> dict:
        if group in ("start", "cold_start"):
            caches = self.options.envs.resolve() / "caches"
            if group == "cold_start":
                caches = caches / "cold"
                shutil.rmtree(caches, ignore_errors=True)
            folders = {name: str(caches / folder) for name, folder in COMPILE_CACHES.items()}
            return self.fresh(
                peer,
                request,
                {**folders, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            )
        if group == "memory":
            return self.fresh(peer, request)
        return self.workers[peer.name].ask({**request, "seconds": self.options.seconds})

    def fresh(self, peer: Peer, request: dict, extra: dict | None = None) -> dict:
        """The answer of a new process, and the seconds from its start to that answer.

        `processor_seconds` are of all its threads, and hardly depend on other programs.
        """
        began, used = time.perf_counter(), sum(os.times()[2:4])
        worker = self.start(peer, extra)
        try:
            answer = worker.ask(request)
        finally:
            worker.close()
        seconds = {
            "seconds": time.perf_counter() - began,
            "processor_seconds": sum(os.times()[2:4]) - used,
        }
        return seconds | answer

    def rounds(self, groups: dict[str, list[dict]]) -> None:
        if "start" in groups:  # fill the compilation caches
            self.measure("start", groups["start"][0], 0)
        for turn in range(self.options.rounds):
            found: dict = {}
            self.results["rounds"].append(found)
            for group, requests in groups.items():
                if group == "memory" and turn:
                    continue  # it hardly varies
                for request in requests:
                    name = label(group, request)
                    found[name] = self.measure(group, request, turn)
                    self.write()
                    told = ", ".join(
                        f"{peer} {answer['seconds']:.3g} s / {answer['images']}"
                        for peer, answer in found[name].items()
                        if "seconds" in answer
                    )
                    print(f"round {turn + 1}  {name}: {told or 'done'}", flush=True)
            self.render()

    def write(self) -> None:
        path = self.options.out / "results.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)

    def render(self) -> None:
        """Draw in a process of its own, in the environment that has matplotlib."""
        command = [self.pythons["jaxvae"], str(HERE / "render.py"), str(self.options.out)]
        drawn = subprocess.run(command, capture_output=True, text=True)
        if drawn.returncode:
            print(f"not drawn: {drawn.stderr.strip().splitlines()[-1]}", flush=True)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def compare(answer: dict, reference: dict) -> None:
    """Raise WorkerError unless the loss terms and the numbers of parameters are ours."""
    if answer["parameters"] != reference["parameters"]:
        raise WorkerError(f"has {answer['parameters']} parameters: ours {reference['parameters']}")
    for term in ("log_likelihood", "kl"):
        theirs, ours = answer[term], reference[term]
        if len(theirs) == 1:  # a mean over the batch
            ours = [sum(ours) / len(ours)]
        # A comparison with a NaN is false, so it must be the good case that is asked for.
        wrong = [
            (a, b)
            for a, b in zip(theirs, ours, strict=True)
            if not abs(a - b) <= TOLERANCE * abs(b)
        ]
        if wrong:
            raise WorkerError(f"computes another {term}: {wrong[0][0]:.6g}, ours {wrong[0][1]:.6g}")


def environment(env: str, options: argparse.Namespace, gpu: bool) -> str:
    """The Python of a peer's environment, made where there is none."""
    if options.system:
        return sys.executable
    folder = options.envs / env
    python = folder / "bin" / "python"
    marker, wanted = folder / "installed.txt", "\n".join(requirements(env, gpu))
    if not (marker.exists() and marker.read_text() == wanted):
        print(f"installing {folder}", flush=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *wanted.split("\n")],
        ):
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        marker.write_text(wanted)
    return str(python.absolute())


def nvidia() -> list[str]:
    """The GPUs' names and driver, as nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True)
    return told.stdout.strip().splitlines() if told.returncode == 0 else []


def machine() -> dict:
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in cpu if line.startswith("model name")), ": unknown")
    return {
        "cpu": model.split(":")[1].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": nvidia(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def choose(names: list[str] | None, gpu: bool) -> list[Peer]:
    """The peers of those names or families ("torch" is every torch-...), ours always first."""
    if unknown := [
        name
        for name in names or []
        if not any(name in (peer.name, peer.name.split("-")[0]) for peer in PEERS)
    ]:
        known = ", ".join(peer.name for peer in PEERS)
        raise SystemExit(f"no peer {unknown[0]!r}: expected {known}")
    return [
        peer
        for peer in PEERS
        if (gpu or not peer.gpu_only)
        and (
            names is None
            or peer.name == "ours"
            or peer.name in names
            or peer.name.split("-")[0] in names
        )
    ]


def main() -> None:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    gpu = bool(nvidia())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="training steps and the fastest peers: 5 minutes")
    add("--only", type=words, help="groups of measurements, by commas")
    add("--peers", type=words, help="peers or families of peers, by commas")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="what a bunch of steps takes, about")
    add("--batches", type=numbers, default=[16, 128, 512, 4096])
    add("--network-batches", type=numbers, default=[16, 128], help="of the other networks")
    add("--memory-batches", type=numbers, default=[16, 4096])
    # A multiple of the batch: nobody meets a last batch of another shape.
    add("--epoch-images", type=int, default=59_904 if gpu else 10_240)
    add("--forward-images", type=int, default=10_000, help="to sample, and to encode")
    add("--ll-images", type=int, default=100)
    add("--ll-samples", type=int, default=5000)
    add("--pythae-images", type=int, default=4, help="pythae's part of --ll-images")
    add("--envs", type=Path, default=HERE / ".envs")
    add("--out", type=Path, default=HERE / "results")
    add("--system", action="store_true", help="run every peer in this Python, as far as it can")
    add("--timeout", type=float, default=1800.0, help="seconds for one measurement of one peer")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.rounds < 1 or options.epoch_images < 128:
        parser.error("expected at least 1 round, and at least the 128 images of a batch")
    shutil.rmtree(options.out / "logs", ignore_errors=True)
    (options.out / "logs").mkdir(parents=True)
    run = Run(options, choose(options.peers, gpu), gpu)
    groups = measures(options, gpu)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # end the workers as well
    with ExitStack() as stack:
        stack.callback(run.close)
        run.prepare()
        for network in [name for name in NETWORKS if name in groups]:
            run.check_network(network, groups[network])
        run.rounds(groups)
    print((options.out / "table.md").read_text() if (options.out / "table.md").exists() else "")


if __name__ == "__main__":
    main()
