"""Exceptions and warnings, and how their messages quote values."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Wrong input. The message, one line, names the value, what was expected and the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        """Shorten a long message and escape control characters, as it may quote any input."""
        if len(message) > _MOST:
            message = f"{message[: _MOST // 2]} ... {message[-_MOST // 2 + 5 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ComponentNeeded(InputError):
    """A recorded component is of a user's class, which no file contains: pass it as an object."""


_MOST = 4000  # characters


class TrainingFailed(Exception):
    """Training failed, by divergence or an error of the disk. Saved checkpoints stay valid.

    The command line prints the message without a traceback and exits with code 1.
    """


class Preempted(Exception):
    """Training was interrupted by a signal and saved a checkpoint; it can be resumed.

    The command line prints the message and exits with code 75 (EX_TEMPFAIL).
    """


class Converted(UserWarning):
    """Pictures of a data set were converted: scaled to 8 bits, resized, rotated, ..."""


class Damaged(UserWarning):
    """A file of a run directory is damaged: it, or a part, was skipped or an older one used."""


class OtherData(UserWarning):
    """The data set at the recorded path is not the one that the run was trained on."""


class Diverged(UserWarning):
    """One of several models trained together diverged; training of the others continues."""


class NotTracked(UserWarning):
    """A tracking server did not take metrics or files; the training continues."""


class NotDrawn(UserWarning):
    """A figure could not be drawn; the others were drawn."""


def shown(value: Any) -> str:
    """Format a value for a message."""
    try:
        return repr(value)
    except Exception:  # too many digits, too deep nesting, or an error in the value's __repr__
        return f"of type {type(value).__name__}"


def either(names: Iterable[str], before: str = "") -> str:
    """Format names as a list for a message: 'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{before}{', '.join(most)} or {last}" if most else f"{before}{last}"
