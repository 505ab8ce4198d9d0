"""Exceptions and warnings, and how their messages quote values."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """The caller's input is wrong: what was given, what was expected and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        """What the message quotes may be anything: it is shortened, and escaped for terminals."""
        if len(message) > _MOST:
            message = f"{message[: _MOST // 2]} ... {message[-_MOST // 2 + 5 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ComponentNeeded(InputError):
    """A recorded component is the user's own, which no file holds: it has to be handed over."""


_MOST = 4000  # characters


class TrainingFailed(Exception):
    """Training cannot go on, as its numbers or the disk went wrong; what it had saved is whole.

    The command line prints it without a traceback and exits with code 1.
    """


class Preempted(Exception):
    """Training was told to stop, and has saved all that it needs to go on.

    The command line prints it and exits with code 75, EX_TEMPFAIL: try again.
    """


class Converted(UserWarning):
    """Pictures of a data set were scaled to 8 bits, composed on white or rotated."""


class Damaged(UserWarning):
    """Something of a run directory is damaged and was passed over for an older whole one."""


class OtherData(UserWarning):
    """The data set at a run's recorded place is not the one that the run was trained on."""


class Diverged(UserWarning):
    """One of many models that are trained at once has diverged; the others are trained on."""


class NotDrawn(UserWarning):
    """A figure could not be drawn; the others were."""


def shown(value: Any) -> str:
    """Format a value for a message."""
    try:
        return repr(value)
    except Exception:  # too many digits, nested too deeply, or raised by its own __repr__
        return f"of type {type(value).__name__}"


def either(names: Iterable[str], before: str = "") -> str:
    """Format names as a list for a message: 'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{before}{', '.join(most)} or {last}" if most else f"{before}{last}"
