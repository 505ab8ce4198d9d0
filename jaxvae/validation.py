"""What the arguments of the public functions must be.

Shapes and types are checked always. Values are checked where they are known, which inside `jit`
they are not: images of floats have to lie between 0 and 1, labels have to be classes of the model.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.errors import InputError, shown

P = ParamSpec("P")
R = TypeVar("R")
_THREEFRY = "threefry2x32"
_ROUNDING = 1e-3  # how far resizing or half precision may take an image's values beyond 0 and 1


def jit(*, wait: bool = True, **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return `jax.jit`, where arguments that are wrong end as InputError.

    What JAX cannot take is looked at once JAX has refused it. The values of images and labels are
    checked beforehand; of uint8 images there is nothing to check.

    Args:
      wait: whether to check values that only an accelerator knows, which means to wait for it.
      options: as of `jax.jit`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        jitted = jax.jit(function, **options)
        signature = inspect.signature(function)
        first, *_ = names = tuple(signature.parameters)
        places = {name: names.index(name) for name in ("images", "labels") if name in names}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Once it has seen an array, `jax.jit` takes one of the other byte order for the same.
            if any(map(_is_swapped, (*args, *kwargs.values()))):
                args = tuple(map(native, args))  # type: ignore[assignment]
                kwargs = {name: native(x) for name, x in kwargs.items()}  # type: ignore[assignment]
            for name, place in places.items():
                x = args[place] if place < len(args) else kwargs.get(name)
                if x is None:
                    continue
                if name == "images":
                    expect_unit_interval(x, wait=wait)
                else:
                    _expect_classes(args[0] if args else kwargs.get(first), x, wait)
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


def native(x: Any) -> Any:
    """Return a NumPy array of the other byte order in this machine's own; all else as it is."""
    return x.astype(x.dtype.newbyteorder("=")) if _is_swapped(x) else x


def _is_swapped(x: Any) -> bool:
    return isinstance(x, np.ndarray) and not x.dtype.isnative


def expect_unit_interval(images: Any, *, wait: bool = True) -> None:
    """Raise InputError if images of floats are known to have values beyond 0 and 1.

    wait: as of `jit`.
    """
    if getattr(images, "dtype", None) == np.uint8:
        return
    found = _extremes(images, jnp.floating, wait)
    if found is not None and not (found[0] >= -_ROUNDING and found[1] <= 1 + _ROUNDING):
        has = "NaN" if found[0] != found[0] else f"values from {found[0]:g} to {found[1]:g}"
        raise InputError(
            f"images have {has}: expected floats between 0 and 1, or uint8 from 0 to 255"
        )


def _expect_classes(model: Any, labels: Any, wait: bool) -> None:
    """Raise InputError if labels are known to be no classes of a model, or of a state's model."""
    config = getattr(getattr(model, "params", model), "config", None)
    classes = getattr(config, "num_classes", 0)
    found = _extremes(labels, jnp.integer, wait) if classes else None
    if found is not None and not (found[0] >= 0 and found[1] < classes):
        raise InputError(
            f"labels are from {found[0]} to {found[1]}: expected classes from 0 to "
            f"{classes - 1}, as num_classes is {classes}"
        )


def _extremes(x: Any, kind: Any, wait: bool) -> tuple[Any, Any] | None:
    """Return the least and the greatest number of an array of this kind, where they are known."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            return None
        if not _on_host(x):
            if not wait or not x.size or not jnp.issubdtype(x.dtype, kind):
                return None
            with jax.ensure_compile_time_eval():  # it may be a constant of an outer function
                return jnp.min(x).item(), jnp.max(x).item()
    try:
        array = np.asarray(x)
    except (TypeError, ValueError):
        return None
    if not array.size or not jnp.issubdtype(array.dtype, kind):
        return None
    return array.min().item(), array.max().item()


def _on_host(x: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in x.devices())


def as_array(name: str, x: Any) -> jax.Array:
    """`x` as an array, or InputError where it is none of numbers."""
    try:
        if x is None:
            raise TypeError
        return jnp.asarray(native(x))
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name}: expected an array of numbers, not {_kind(x)}") from None


def as_key(key: Any, *, several: bool = False) -> jax.Array:
    """A PRNG key, or several, typed or raw: as typed ones of Threefry, or InputError.

    Under `vmap`, a key of another implementation ("rbg", "unsafe_rbg") draws numbers that depend
    on the other keys of the batch. The first 64 bits of it are taken for a Threefry key.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            key = jax.random.wrap_key_data(native(key))
        except (AttributeError, TypeError, ValueError):
            raise InputError(
                f"key: expected a PRNG key, as of jax.random.key(0), not {_kind(key)}"
            ) from None
    if key.shape and not several:
        raise InputError(f"there are {key.shape} keys: expected one")
    if jax.random.key_impl(key) == _THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl=_THREEFRY)


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
