"""Standard output and standard error that may be closed by their reader."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Continue when the reader of standard output or standard error has gone, as with `| head`.

    Further output is dropped. Messages for standard error that cannot be written for another
    reason, such as a full disk, are dropped too; for standard output that is an error. Characters
    that the encoding of a stream lacks are escaped.
    """
    with ExitStack() as stack:
        if sys.stdout is not None:  # None if the file descriptor is closed
            stack.enter_context(redirect_stdout(_TolerantStream(sys.stdout, BrokenPipeError)))
            stack.callback(sys.stdout.close)
        if sys.stderr is not None:
            stack.enter_context(redirect_stderr(_TolerantStream(sys.stderr, OSError)))
            stack.callback(sys.stderr.close)
        yield


class _TolerantStream:
    """A text stream that drops its output after an error of one kind."""

    def __init__(self, stream: Any, dropped: type[OSError]) -> None:
        self._stream, self._dropped = stream, dropped

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # for example of a path that is not UTF-8
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except self._dropped as error:
            self._drop_output(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._dropped as error:
            self._drop_output(error)

    def close(self) -> None:
        """Flush the stream, so that Python does not fail to do so at exit."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_devnull()

    def _drop_output(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        with suppress(OSError):  # the stream may have no file descriptor
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
