"""Files that are written whole or not at all, and never outside the folder that they belong to.

A run directory may come from a stranger, with symbolic links and pipes in it. What is written gets
a random name first, which nobody can have prepared, and then replaces what has its own name: a
link is replaced, not followed. Only regular files are read.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from jaxvae.errors import InputError

_PART = re.compile(r"\.jaxvae-[0-9a-f]{16}\.part")
_NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` write a file so that a kill, or a full disk, leaves the old one or the new."""
    part = path.with_name(f".jaxvae-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:  # fails where there is anything of that name, links too
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def is_temporary(name: str) -> bool:
    """Return whether `write_atomic` gives a file that is not whole yet such a name."""
    return _PART.fullmatch(name) is not None


def remove_temporary(folder: Path) -> None:
    """Remove what kills left of files that `write_atomic` was writing into a folder."""
    with suppress(OSError):
        for path in [] if folder.is_symlink() else folder.iterdir():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)


def open_regular(path: str | Path, flags: int) -> int:
    """Open a regular file, as an `opener` for `open`: of a pipe, reading might never end."""
    file = os.open(path, flags | _NON_BLOCKING, 0o666)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_regular_itself(path: str | Path, flags: int) -> int:
    """Open a regular file as `open_regular` does, but not through a symbolic link."""
    return open_regular(path, flags | _NO_LINK)


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


def make_folder(parent: Path, name: str) -> Path:
    """Return a folder to write into, and make it if it is not there.

    Raises:
      InputError: it is a symbolic link.
    """
    folder = parent / name
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def expect_utf8(path: Path) -> None:
    """Raise InputError unless a path is UTF-8, as those of checkpoints have to be."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path.absolute()} is not a path in UTF-8, as that of a run has to be: rename what "
            "is not, or choose another directory"
        ) from None


def refuse_links(*paths: Path) -> None:
    """Raise InputError if one of these is a symbolic link, which may lead anywhere."""
    for path in paths:
        if path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link, and jaxvae writes only into the directory itself: "
                "replace the link by what it points to"
            )
