"""The files of a run directory: each written whole or not at all, and by one training at a time.

A kill at any instant leaves the old file or the new one, and `.part` files, which the next
training takes away.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from jaxvae.config import NetworkNeeded
from jaxvae.errors import InputError, TrainingFailed

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two trainings apart there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_LOCK = ".lock"
_PART = ".part"


def version() -> str:
    """The version that a run directory is marked with."""
    from jaxvae import __version__

    return __version__


def unmarked(content: Any, where: str | Path) -> dict[str, Any]:
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
        return parse(unmarked(json.loads(path.read_text()), path))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path.parent} is not a run directory: expected one made by `jaxvae train`, "
            f"with a {path.name}"
        ) from None
    except NewerVersion:
        raise
    except NetworkNeeded as error:
        raise NetworkNeeded(f"{path.parent}: {error}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {_one_line(error)}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a run directory, and make the directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written: {error.strerror}") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The measurements of every finished epoch, in order.

    A line that a kill cut off is passed over. Raises InputError if the file is damaged otherwise.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {_one_line(error)}; put it back from a copy, or remove the line"
        ) from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or record.get("epoch") != number:
            raise InputError(
                f"{path} is damaged: line {number} is not that of epoch {number}; "
                "put it back from a copy"
            )
    return records


def write_history(run_dir: Path, history: list[dict[str, Any]]) -> None:
    """Make metrics.jsonl hold these lines."""
    text = "".join(map(_line, history))
    write_whole(run_dir / "metrics.jsonl", lambda part: part.write_text(text))


def append_history(run_dir: Path, record: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl, on the disk before this returns."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file so that a kill, or a full disk, leaves the old one or the new."""
    part = path.with_name(path.name + _PART)
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a run directory, and take away what a killed one left there.

    Raises InputError if another training is in it, or it cannot be written.
    """
    try:
        file = (run_dir / _LOCK).open("a+")
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
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        with suppress(OSError):
            for part in run_dir.rglob("*" + _PART):
                part.unlink()
        yield


@contextmanager
def on_disk(run_dir: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to a run directory into one line."""
    try:
        yield
    except OSError as error:
        raise TrainingFailed(cannot_write(run_dir, error.strerror or str(error))) from error


def cannot_write(run_dir: Path, reason: str) -> str:
    return (
        f"{run_dir} cannot be written: {reason}; mend that, and go on with: "
        f"jaxvae train --resume --run-dir {run_dir}"
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
