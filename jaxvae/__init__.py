"""Variational autoencoders in JAX and Flax."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxvae.api import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # JAX is imported with the first name that is used, not before: the command line answers for
    # what goes wrong in that, such as a Ctrl-C, from where it can.
    if name == "__all__" or not name.startswith("__"):
        api = import_module("jaxvae.api")
        globals().update({public: getattr(api, public) for public in ("__all__", *api.__all__)})
        if name in globals():  # the name, or a package that is imported now
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
