"""Standard output and standard error that may stop being read."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Go on where nobody reads standard output or standard error any more, as behind `| head`.

    What would be written then is dropped. So are messages for standard error that cannot be
    written for another reason, such as a full disk; of standard output, that is an error. What
    the encoding of a stream does not have is escaped.
    """
    with ExitStack() as stack:
        if sys.stdout is not None:  # it is None where the file is closed
            stack.enter_context(redirect_stdout(_TolerantStream(sys.stdout, BrokenPipeError)))
            stack.callback(sys.stdout.close)
        if sys.stderr is not None:
            stack.enter_context(redirect_stderr(_TolerantStream(sys.stderr, OSError)))
            stack.callback(sys.stderr.close)
        yield


class _TolerantStream:
    """A text stream that drops what it cannot write, where that is an error of one kind."""

    def __init__(self, stream: Any, dropped: type[OSError]) -> None:
        self._stream, self._dropped = stream, dropped

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # of a path that is not UTF-8, say
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
        """Write what is left, so that Python does not fail in that when it ends."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_devnull()

    def _drop_output(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        with suppress(OSError):  # of a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
