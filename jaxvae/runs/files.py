"""Files of a run directory: atomic writes, metrics.jsonl, and a lock for one training at a time.

A kill at any instant leaves the old file or the new one, and temporary files, which the next
training removes.
"""

import itertools
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from jaxvae.components import is_dotted_path
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
except ImportError:  # Windows: run directories are not locked there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_LOCK = ".lock"
IN_PYTHON = "python"  # the name of data that were passed as arrays
_ANY = "DATA"  # in the place of a name
_METRICS = {"elbo", "log_likelihood", "kl"}


def version() -> str:
    """Return the version of jaxvae, which is recorded in run directories."""
    from jaxvae import __version__

    return __version__


def without_version(content: Any, where: str | Path) -> dict[str, Any]:
    """Return the content of a file of a run without the version that wrote it.

    Args:
      content: the parsed JSON.
      where: the file, for messages.

    Returns:
      The content.

    Raises:
      NewerVersion: a newer version wrote the file, whose format may differ.
      InputError: the content is not an object, or its version is invalid.
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
    """A newer version of jaxvae wrote the run directory."""


def _parts(version: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in version.split("."))
    except ValueError:
        return None


def read_json(path: Path, parse: Callable[[Any], T]) -> T:
    """Read a JSON file of a run directory.

    Args:
      path: the file.
      parse: makes the result from the content, which has no version any more.

    Returns:
      The result of `parse`.

    Raises:
      InputError: the file is missing or damaged, or a newer version wrote it.
    """
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
    """Write a JSON file of a run directory, and make the directory.

    Args:
      path: the file.
      content: the object to write.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        write_atomic(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written: {error.strerror}") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, in order.

    Blank lines and an incomplete last line are skipped. Damaged lines are skipped with a warning of
    the category `jaxvae.errors.Damaged`.

    Args:
      run_dir: the run directory.

    Returns:
      A dict for each epoch.

    Raises:
      InputError: the file cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    records, damaged = _records(_content(path))
    if damaged:
        warnings.warn(
            f"{path} is damaged in line {', '.join(map(str, damaged[:8]))}"
            f"{' and others' if len(damaged) > 8 else ''}, skipped: restore it from a copy",
            Damaged,
            stacklevel=2,
        )
    return records


def truncate_history(run_dir: Path, done: int) -> None:
    """Truncate metrics.jsonl to the first `done` epochs, and drop damaged lines.

    A damaged file is first copied to metrics.jsonl.damaged. Missing lines are reported by a warning
    of the category `jaxvae.errors.Damaged`.

    Args:
      run_dir: the run directory.
      done: number of finished epochs.
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
            f"{path} lacks the lines of {len(missing)} of {done} epochs, from epoch "
            f"{missing[0]} on, and the figures will lack them too: restore it from a copy",
            Damaged,
            stacklevel=2,
        )
    text = "".join(map(_line, kept))
    write_atomic(path, lambda file: file.write(text.encode()))


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl and flush it to disk."""
    with open(run_dir / "metrics.jsonl", "a", opener=open_regular_itself) as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def damaged_name(path: Path) -> Path:
    """Return an unused path next to `path`, to which a damaged file can be renamed."""
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    return next(one for name in names if not os.path.lexists(one := path.with_name(name)))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; restore it from a copy, or remove it"
        ) from None


def _records(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the valid lines of metrics.jsonl, and the line numbers of the damaged ones."""
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
    """Return whether this is the line of an epoch, of number `least` or later."""
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
    """Lock a run directory against other trainings, and remove temporary files in it.

    Args:
      run_dir: the run directory.

    Raises:
      InputError: another training has locked it, or it cannot be written.
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
            pass  # the file system has no locks
        with suppress(OSError):  # on a full disk the lock works without the text
            if os.fstat(file.fileno()).st_nlink == 1:  # never write through a hard link
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
    """Turn an OSError raised while writing to a run directory into a one-line message.

    Args:
      run_dir: the run directory.

    Raises:
      TrainingFailed: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise TrainingFailed(cannot_write(run_dir, error.strerror or str(error))) from error


def cannot_write(run_dir: Path, reason: str) -> str:
    """Return the message for a run directory that cannot be written."""
    return (
        f"{run_dir} cannot be written: {reason}; correct that, then resume with: "
        f"{resume_command(run_dir)}"
    )


def resume_command(run_dir: Path) -> str:
    """Return the command that resumes a run."""
    again = typed_again(run_dir)
    or_fit = " (or by the same call of jaxvae.fit)" if again.endswith(f" --data {_ANY}") else ""
    return f"jaxvae train --resume --run-dir {as_argument(run_dir)}{again}{or_fit}"


def typed_again(run_dir: Path, parts: Collection[str] = ("data", "model", "train")) -> str:
    """Return the flags that a command on a run needs, as no command imports what a file names.

    Args:
      run_dir: the directory of a run or of a sweep; if it cannot be read, there are none.
      parts: those of the configuration that the command reads.

    Returns:
      The custom components and data, such as " --prior mypackage.Laplace".
    """
    try:
        content = json.loads(read_bytes(run_dir / "config.json"))
    except (OSError, ValueError, RecursionError):
        try:
            sweep = json.loads(read_bytes(run_dir / "sweep.json"))
            content = next(x for x in sweep.values() if isinstance(x, dict))
        except (OSError, ValueError, RecursionError, AttributeError, StopIteration):
            return ""
    fields: dict[str, Any] = {}
    for part in parts:
        value = content.get(part) if isinstance(content, dict) else None
        fields |= value if isinstance(value, dict) else {part: value}
    own = {n: x for n, x in fields.items() if is_dotted_path(x) and not Path(x).exists()}
    if fields.get("data") == IN_PYTHON:
        own["data"] = _ANY
    return "".join(f" --{n.replace('_', '-')} {shlex.quote(x)}" for n, x in own.items())


def as_argument(path: Path) -> str:
    """Return a path quoted for a shell command, and never read as a flag."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
