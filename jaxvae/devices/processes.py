"""Several processes, on one host or on many, that train one model together."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxvae.errors import InputError
from jaxvae.validation import shown

# What libtpu would ask a server for, and complain of.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# What JAX reads of SLURM's environment, all of it numbers.
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of the training, if there are any.

    Where SLURM, Open MPI, Kubernetes or a TPU pod started this process as one of several, they
    say all there is to know, and what is given here comes before what they say. Must come before
    JAX's first computation.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
    Raises:
      InputError: nothing says what is not given; or the others cannot be reached.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    told = all(value is not None for value in given.values())
    launcher = None if told else _launcher()
    if launcher is None:
        if not any(value is not None for value in given.values()):
            return
        missing = [flag for flag, value in given.items() if value is None]
        if missing:
            raise InputError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and no "
                f"launcher says what: expected {', '.join(given)}"
            )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator is {coordinator}: expected HOST:PORT")
    named = "--process-id"
    if launcher == "Open MPI":  # of which JAX reads only what older versions say
        num_processes = num_processes or _number("OMPI_COMM_WORLD_SIZE")
        if process_id is None:
            process_id, named = _number("OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK"
    if num_processes and process_id is not None and not 0 <= process_id < num_processes:
        raise InputError(
            f"{named} is {process_id}: expected a number from 0 to {num_processes - 1}, "
            "one for each process"
        )
    if launcher == "SLURM":
        for name in _SLURM:
            _number(name)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
    except Exception as error:  # of every kind, where the environment says half or wrong things
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the other processes cannot be reached: {reason}") from None


def _launcher() -> str | None:
    """What started this process as one of several."""
    here = os.environ
    if "SLURM_STEP_NODELIST" in here and _number("SLURM_STEP_NUM_TASKS", "1") > 1:
        return "SLURM"
    if _number("OMPI_COMM_WORLD_SIZE", "1") > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in here and "JOB_COMPLETION_INDEX" in here:
        return "Kubernetes"
    if _has_libtpu() and _tpu_chips():
        return "a TPU host"
    return None


def _number(name: str, default: str = "") -> int:
    """Return what a launcher's environment variable says, or raise InputError."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        given = shown(text) if name in os.environ else "not set"
        raise InputError(
            f"{name} is {given}: expected a whole number, as srun or mpirun sets it; start all "
            "processes with one of them, or unset what is left of one"
        ) from None


def pass_over_missing_tpu() -> None:
    """Keep libtpu, where it is there to compile with, from telling at length of finding no TPU.

    Changes the environment, so it is for programs to call, and before JAX looks for its devices.
    """
    if _has_libtpu() and not _tpu_chips():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _tpu_chips() -> list[Path]:
    return [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes, draws and tells."""
    return jax.process_index() == 0


def memory() -> int | None:
    """Bytes of memory that this host has, where it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def wait_for_all(what: str) -> None:
    """Go on when every process has come here; `what` names the place."""
    if several():
        multihost_utils.sync_global_devices(what)


def all_agree(value: bool) -> bool:
    """Return whether a value is true in every process; all of them have to ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)))) if several() else value


@contextmanager
def preemption(step: int) -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM and Ctrl-C; what it gives says whether it is time to save and stop.

    A second Ctrl-C interrupts at once.

    Asked at a step of a training that began at `step`, it answers for all steps up to that.
    Among several processes, a signal that any of them gets counts; they have to ask at the same
    steps, and all hear of it at the same one.
    """
    if several():
        # JAX's own runtime listens, and agrees on a step that no process has come to yet.
        asked, agreed = step, False

        def ask(step: int) -> bool:
            nonlocal asked, agreed
            for one in range(asked + 1, step + 1):
                agreed |= multihost_utils.reached_preemption_sync_point(one)
            asked = step
            return agreed

        yield ask
        return
    told = False

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told = True

    try:
        before = {one: signal.signal(one, tell) for one in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever has it listens
        yield lambda step: False
        return
    try:
        yield lambda step: told
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
