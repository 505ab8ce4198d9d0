"""The files of a run directory: each written whole or not at all, and by one training at a time.

A kill at any instant leaves the old file or the new one, and temporary files, which the next
training takes away.
"""

import itertools
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from jaxvae.errors import ComponentNeeded, Damaged, InputError, TrainingFailed
from jaxvae.storage import (
    open_regular_itself,
    read_bytes,
    refuse_links,
    remove_temporary,
    write_atomic,
)

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two trainings apart there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_LOCK = ".lock"
_METRICS = {"elbo", "log_likelihood", "kl"}


def version() -> str:
    """The version that a run directory is marked with."""
    from jaxvae import __version__

    return __version__


def without_version(content: Any, where: str | Path) -> dict[str, Any]:
    """What a file of a run says, without the mark of the version that wrote it.

    Raises InputError if that version is newer than this one, whose files may mean other things.
    """
    if not isinstance(content, dict):
        raise InputError(f"expected an object of named fields, not {type(content).__name__}")
    made_by = content.get("jaxvae", "0")
    if not isinstance(made_by, str) or _parts(made_by) is None:
        raise InputError(f"expected a version of jaxvae, such as {version()!r}, not {made_by!r}")
    if _parts(made_by) > _parts(version()):  # type: ignore[operator]
        raise NewerVersion(
            f"{where} was made by jaxvae {made_by}, and this is {version()}: "
            f"use jaxvae {made_by} or newer"
        )
    return {name: value for name, value in content.items() if name != "jaxvae"}


class NewerVersion(InputError):
    """A run directory was made by a newer version."""


def _parts(version: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in version.split("."))
    except ValueError:
        return None


def read_json(path: Path, parse: Callable[[Any], T]) -> T:
    """What a file of a run directory says, or InputError if it is not there or is damaged."""
    try:
        return parse(without_version(json.loads(read_bytes(path)), path))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path.parent} is not a run directory: expected one made by `jaxvae train`, "
            f"with a {path.name}"
        ) from None
    except NewerVersion:
        raise
    except ComponentNeeded as error:
        raise ComponentNeeded(f"{path.parent}: {error}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {_one_line(error)}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a run directory, and make the directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        write_atomic(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written: {error.strerror}") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the measurements of the finished epochs, in order.

    Blank lines and one that a kill cut off are passed over. Damaged lines are too, and a warning of
    the category `jaxvae.errors.Damaged` says so. Epochs whose lines were lost are missing.

    Raises:
      InputError: the file cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    records, damaged = _records(_content(path))
    if damaged:
        warnings.warn(
            f"{path} is damaged in line {', '.join(map(str, damaged[:8]))}"
            f"{' and others' if len(damaged) > 8 else ''}, passed over: put it back from a copy",
            Damaged,
            stacklevel=2,
        )
    return records


def truncate_history(run_dir: Path, done: int) -> None:
    """Make metrics.jsonl hold the lines of the first `done` epochs, as far as they are whole.

    Of a damaged file a copy is kept, as metrics.jsonl.damaged. Warns, with the category
    `jaxvae.errors.Damaged`, if lines are missing: no later epoch brings them back.
    """
    path = run_dir / "metrics.jsonl"
    content = _content(path)
    records, damaged = _records(content)
    kept = [record for record in records if record["epoch"] <= done]
    missing = sorted(set(range(1, done + 1)) - {record["epoch"] for record in kept})
    if damaged:
        write_atomic(damaged_name(path), lambda file: file.write(content))
    if missing:
        warnings.warn(
            f"{path} has lost the lines of {len(missing)} of {done} epochs, from epoch "
            f"{missing[0]} on; they stay missing there and in the figures, unless the file is put "
            "back from a copy",
            Damaged,
            stacklevel=2,
        )
    text = "".join(map(_line, kept))
    write_atomic(path, lambda file: file.write(text.encode()))


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl, on the disk before this returns."""
    with open(run_dir / "metrics.jsonl", "a", opener=open_regular_itself) as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def damaged_name(path: Path) -> Path:
    """Return a name beside `path` that is free, to keep there what is damaged."""
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    return next(one for name in names if not os.path.lexists(one := path.with_name(name)))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; put it back from a copy, or remove it"
        ) from None


def _records(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of metrics.jsonl that are whole, and the numbers of those that are damaged."""
    records: list[dict[str, Any]] = []
    damaged = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record, records[-1]["epoch"] + 1 if records else 1):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def _is_record(record: Any, least: int) -> bool:
    """Whether this is a line of an epoch, of number `least` or later."""
    return (
        isinstance(record, dict)
        and type(record.get("epoch")) is int
        and least <= record["epoch"] < 2**63
        and type(record.get("step")) is int
        and all(_are_numbers(record.get(split)) for split in ("train", "test"))
    )


def _are_numbers(metrics: Any) -> bool:
    return (
        isinstance(metrics, dict)
        and metrics.keys() >= _METRICS
        and all(map(is_number, metrics.values()))
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a run directory, and take away what a killed one left there.

    Raises InputError if another training is in it, or it cannot be written.
    """
    path = run_dir / _LOCK
    refuse_links(path)
    try:
        file = open(path, "a+", opener=open_regular_itself)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}") from None
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run_dir} is being trained by {file.read().strip() or 'another process'}: "
                "wait for it to end, or choose another --run-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        with suppress(OSError):  # on a full disk it is a lock all the same
            if os.fstat(file.fileno()).st_nlink == 1:  # or it is some other file too
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        for folder in (run_dir, *(run_dir / name for name in ("figures", "manifolds", "export"))):
            remove_temporary(folder)
        checkpoints = run_dir / "checkpoints"
        if not checkpoints.is_symlink():
            for folder in checkpoints.glob("[0-9]*"):
                remove_temporary(folder)
        yield


@contextmanager
def disk_errors(run_dir: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to a run directory into one line."""
    try:
        yield
    except OSError as error:
        raise TrainingFailed(cannot_write(run_dir, error.strerror or str(error))) from error


def cannot_write(run_dir: Path, reason: str) -> str:
    return (
        f"{run_dir} cannot be written: {reason}; mend that, and go on with: "
        f"{resume_command(run_dir)}"
    )


def resume_command(run_dir: Path) -> str:
    """Return the command that goes on with a run."""
    return f"jaxvae train --resume --run-dir {as_argument(run_dir)}"


def as_argument(path: Path) -> str:
    """Return a path as a suggested command has to have it: quoted for the shell, and no flag."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
