"""The run-time check of annotations in the tests."""

import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeException

if sys.version_info < (3, 12):
    # Protocols look attributes up without their values, as later Pythons do: the mean of a
    # posterior would run its network at each check.
    def _has(instance: object, name: str) -> bool:
        missing = object()
        return inspect.getattr_static(instance, name, missing) is not missing

    vars(typing)["hasattr"] = _has

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, too


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations of a function by beartype, except those that it cannot check.

    It cannot check names that are imported only for type checkers, and `Self`. The fields of
    dataclasses are not checked, as JAX rebuilds pytrees with leaves that are not arrays.
    """
    if function.__name__ == "__init__":
        return function
    for name, hint in list(function.__annotations__.items()):
        try:
            is_bearable(None, hint)
        except BeartypeException:
            del function.__annotations__[name]
    return _beartype(function)
