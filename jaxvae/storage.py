"""Atomic and safe file access.

An untrusted run directory may contain symbolic links and pipes. A file is written under a random
name, which cannot have been prepared, and then renamed: an existing link is replaced, not followed.
Only regular files are read.
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
    """Write a file atomically: a kill or a full disk leaves the old content or the new.

    Args:
      path: the file.
      write: writes the content to an open binary file.

    Raises:
      OSError: it cannot be written, or is a device, such as /dev/null, which it would replace.
    """
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "it is a device, not a file", str(path))
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
    """Return whether a file name is one of the temporary names of `write_atomic`."""
    return _PART.fullmatch(name) is not None


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed `write_atomic` left in a folder."""
    with suppress(OSError):
        for path in [] if folder.is_symlink() else folder.iterdir():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)


def open_regular(path: str | Path, flags: int) -> int:
    """Open a regular file, as an `opener` for `open`; reading a pipe might block forever.

    Args:
      path: the file.
      flags: flags of `os.open`.

    Returns:
      The file descriptor.

    Raises:
      OSError: it is not a regular file.
    """
    file = os.open(path, flags | _NON_BLOCKING, 0o666)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_regular_itself(path: str | Path, flags: int) -> int:
    """Open a regular file as `open_regular` does, without following a symbolic link."""
    return open_regular(path, flags | _NO_LINK)


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


def make_folder(parent: Path, name: str) -> Path:
    """Make a folder to write to, if it does not exist.

    Args:
      parent: the folder that contains it.
      name: its name.

    Returns:
      The path of the folder.

    Raises:
      InputError: it is a symbolic link.
    """
    folder = parent / name
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def expect_utf8(path: Path) -> None:
    """Check that a path is valid UTF-8, which Orbax requires.

    Args:
      path: the path.

    Raises:
      InputError: it is not.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path.absolute()} is not valid UTF-8: expected a UTF-8 path for a run directory; "
            "rename it, or choose another directory"
        ) from None


def refuse_links(*paths: Path) -> None:
    """Check that no path is a symbolic link, through which files elsewhere could be overwritten.

    Args:
      paths: the paths.

    Raises:
      InputError: one of them is a symbolic link.
    """
    for path in paths:
        if path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link: expected a regular file or folder; replace the link "
                "by its target"
            )
