"""What the arguments of the public functions must be.

Shapes and types are looked at, which `jit` can tell, and not the values of arrays.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxvae.errors import InputError

R = TypeVar("R")


def jit(**options: Any) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """`jax.jit`, where arguments that JAX cannot take end as InputError.

    They are looked at once JAX has refused them: a call that is right costs nothing more.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        jitted = jax.jit(function, **options)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            try:
                return jitted(*args, **kwargs)
            except InputError:
                raise
            except (AttributeError, OverflowError, TypeError, ValueError):
                _refuse(signature.bind(*args, **kwargs).arguments)
                raise

        for name in ("lower", "trace", "eval_shape", "clear_cache"):  # as of what `jax.jit` gives
            setattr(call, name, getattr(jitted, name))
        return call

    return decorate


def as_array(name: str, x: Any) -> jax.Array:
    """`x` as an array, or InputError where it is none of numbers."""
    try:
        if x is None:
            raise TypeError
        return jnp.asarray(x)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name}: expected an array of numbers, not {_kind(x)}") from None


def as_key(key: Any, *, several: bool = False) -> jax.Array:
    """A PRNG key, or several, typed or raw: as typed ones, or InputError."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            key = jax.random.wrap_key_data(key)
        except (AttributeError, TypeError, ValueError):
            raise InputError(
                f"key: expected a PRNG key, as of jax.random.key(0), not {_kind(key)}"
            ) from None
    if key.shape and not several:
        raise InputError(f"there are {key.shape} keys: expected one")
    return key


def expect_real(name: str, x: jax.Array) -> None:
    """Raises InputError unless an array is of whole numbers or floats."""
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"{name} are of type {x.dtype}: expected floats")


def expect_number(name: str, x: Any) -> None:
    """Raises InputError unless `x` is one number."""
    array = as_array(name, x)
    expect_real(name, array)
    if array.shape:
        raise InputError(f"{name} has shape {array.shape}: expected one number")


def expect_config(name: str, config: Any, kind: type) -> None:
    """Raises InputError unless `config` is of this kind."""
    if not isinstance(config, kind):
        raise InputError(f"{name} is {shown(config)}: expected a {kind.__name__}")


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Raises InputError for the first argument that is none."""
    for name, value in arguments.items():
        if name in ("params", "state"):
            made_by = {"params": "jaxvae.init", "state": "jaxvae.create_train_state"}[name]
            if not hasattr(value, "config"):
                raise InputError(f"{name}: expected what `{made_by}` gives, not {_kind(value)}")
        elif name == "config":
            raise InputError(f"config is {shown(value)}: expected a ModelConfig")
        elif name == "objective":
            if value is not None and not callable(value):
                raise InputError(f"objective is {shown(value)}: expected a function")
        elif name in ("n", "num_samples"):
            whole_number(name, value)
            if isinstance(value, jax.Array):
                raise InputError(f"{name} is an array: expected a whole number, int({name})")
        elif name == "key":
            as_key(value, several=True)
        elif name != "axis_name" and not (value is None and name not in ("images", "z")):
            as_array(name, value)


def _kind(x: Any) -> str:
    if isinstance(x, str):
        return shown(x)
    dtype = getattr(x, "dtype", None)
    return f"one of type {dtype}" if dtype is not None else f"a {type(x).__name__}"


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    try:
        return repr(value)
    except Exception:  # too many digits, too deep, or of its own making
        return f"of type {type(value).__name__}"


def whole_number(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """`value` as an int from `least` to `most`; anything that counts as an index will do."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = value.__index__()
    except (AttributeError, TypeError):
        raise InputError(
            f"{name} is {shown(value)}: expected a whole number of at least {least}"
        ) from None
    if number < least:
        raise InputError(f"{name} is {shown(number)}: expected at least {least}")
    if number > most:
        raise InputError(f"{name} is {shown(number)}: expected at most {most}")
    return number


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def either(names: Iterable[str], before: str = "") -> str:
    """Write names as a message lists them: 'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{before}{', '.join(most)} or {last}" if most else f"{before}{last}"
