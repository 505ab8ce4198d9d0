"""Entry point of the command line: `jaxvae`, or `python -m jaxvae`."""

import gc
import os
import signal
import sys
from typing import Any


def main() -> int:
    """Run the command line and return its exit code."""
    # The imports take seconds, and a KeyboardInterrupt inside a C++ library can crash it: until
    # they are done, Ctrl-C ends the process at once.
    default_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default_handler:
        signal.signal(signal.SIGINT, _end)
    gc.disable()  # the imports make hundreds of thousands of objects, and none is garbage
    try:
        # First, from a shallow stack: inside deeper imports, JAX's scan of the installed packages
        # can fall on a border of CPython 3.11's stack chunks, and then takes 0.3 s more.
        import jax  # noqa: F401

        from jaxvae.cli.commands import main as run
    except ValueError as error:  # JAX rejects an environment variable such as JAX_ENABLE_X64
        print(f"jaxvae: {error}", file=sys.stderr)
        return 2
    finally:
        gc.enable()
        if default_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _end(*_: Any) -> None:
    os.write(2, b"jaxvae: interrupted\n")
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
