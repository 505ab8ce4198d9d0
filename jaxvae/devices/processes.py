"""Training of one model by several processes, on one host or several."""

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

from jaxvae.errors import InputError, shown

# Values that libtpu otherwise requests from a metadata server, with warnings if there is none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# SLURM's variables that JAX reads as numbers.
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as lost


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of the training, if there are any.

    If SLURM, Open MPI, Kubernetes or a TPU pod started this process as one of several, all values
    are read from the launcher; arguments override them. Call it before JAX's first computation.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      num_processes: number of processes.
      process_id: index of this process, from 0.

    Raises:
      InputError: values are missing or invalid, or the other processes cannot be reached.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    complete = all(value is not None for value in given.values())
    launcher = None if complete else _launcher()
    if launcher is None:
        if not any(value is not None for value in given.values()):
            return
        missing = [flag for flag, value in given.items() if value is None]
        if missing:
            raise InputError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and no "
                f"launcher was found that sets them: expected {', '.join(given)}"
            )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator is {coordinator}: expected HOST:PORT")
    named = "--process-id"
    if launcher == "Open MPI":  # JAX reads only the variables of its older versions
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
    except Exception as error:  # of any type, if the environment is incomplete or wrong
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the other processes cannot be reached: {reason}") from None


def _launcher() -> str | None:
    """Return the launcher that started this process as one of several, if any."""
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
    """Read a whole number from a launcher's environment variable, or raise InputError."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        given = shown(text) if name in os.environ else "not set"
        raise InputError(
            f"{name} is {given}: expected a whole number, as set by srun or mpirun; start all "
            "processes with one of them, or unset the launcher's variables"
        ) from None


def pass_over_missing_tpu() -> None:
    """Suppress the warnings of libtpu on a machine without a TPU, where it serves as a compiler.

    Call it in programs, before JAX looks for its devices: it changes the environment.
    """
    if _has_libtpu() and not _tpu_chips():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)


def _has_libtpu() -> bool:
    """Return whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _tpu_chips() -> list[Path]:
    """Return the device files of this host's TPU chips."""
    return [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]


def several() -> bool:
    """Return whether there are several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is process 0, which writes files, draws figures and prints."""
    return jax.process_index() == 0


def memory() -> int | None:
    """Return the bytes of memory of this host, or None if they are unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def wait_for_all(what: str) -> None:
    """Wait until every process has called this function; `what` names the barrier."""
    if several():
        multihost_utils.sync_global_devices(what)


def all_agree(value: bool) -> bool:
    """Return whether a value is true in every process; every process has to call it."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)))) if several() else value


@contextmanager
def preemption(step: int) -> Iterator[Callable[[int], bool]]:
    """Handle SIGTERM and Ctrl-C by a request to save and stop.

    A second Ctrl-C interrupts at once. Among several processes, a signal to any of them counts:
    they have to ask at the same steps, and all get the same answer.

    Args:
      step: step at which the training starts.

    Yields:
      A function of the current step that returns whether to save and stop.
    """
    if several():
        # JAX's runtime handles the signal and agrees on a step that no process has reached yet.
        asked, agreed = step, False

        def ask(step: int) -> bool:
            nonlocal asked, agreed
            for one in range(asked + 1, step + 1):
                agreed |= multihost_utils.reached_preemption_sync_point(one)
            asked = step
            return agreed

        yield ask
        return
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    try:
        before = {one: signal.signal(one, request) for one in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread can handle signals
        yield lambda step: False
        return
    try:
        yield lambda step: requested
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
