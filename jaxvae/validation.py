"""Checks and conversions of the arguments of the public functions.

Shapes and types are always checked. Values are checked where they are known, which they are not
inside `jit`: float images must be between 0 and 1, other examples in the support of the likelihood,
and labels must be classes of the model, or finite covariates.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Shaped, UInt32

from jaxvae.errors import InputError, either, shown

AnyKey = Key[Array, "..."] | UInt32[ArrayLike, "..."]  # one PRNG key or several, typed or raw

P = ParamSpec("P")
R = TypeVar("R")
_THREEFRY = "threefry2x32"
_ROUNDING = 1e-3  # tolerance for values that resizing or half precision moves outside [0, 1]

# The values of examples, as in `protocols.LikelihoodFamily`.
Support = str | tuple[tuple[str, int], ...]
_IN_WORDS = {
    "count": "counts, whole numbers of at least 0",
    "one_hot": "one-hot columns of 0 and 1",
}
# Ranges; that of "real" is all finite numbers.
_RANGES = {"count": (0, math.inf), **dict.fromkeys(("binary", "levels", "unit", "one_hot"), (0, 1))}


def jit(
    *, wait: bool = True, missing: bool = False, unlabelled: bool = False, **options: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator like `jax.jit` which raises InputError for wrong arguments.

    Values of images and labels are checked before the call; uint8 images need no check. Other
    arguments are examined only after JAX has refused them. "Images" are the examples of the model,
    of any shape.

    Args:
      wait: whether to check values on an accelerator, which waits for their computation.
      missing: whether NaN in the images is allowed, as the mark of missing entries; with False it
        is if the objective of a training step has the attribute `missing`.
      unlabelled: whether -1 is allowed as the class of an image without a label; with False it is
        if the objective of a training step has the attribute `unlabelled`.
      **options: options of `jax.jit`.

    Returns:
      The decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        jitted = jax.jit(function, **options)
        signature = inspect.signature(function)
        first, *_ = names = tuple(signature.parameters)
        places = {name: names.index(name) for name in ("images", "labels") if name in names}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # The cache of `jax.jit` does not distinguish the byte orders of NumPy arrays.
            if any(map(_is_swapped, (*args, *kwargs.values()))):
                args = tuple(map(native, args))  # type: ignore[assignment]
                kwargs = {name: native(x) for name, x in kwargs.items()}  # type: ignore[assignment]
            for name, place in places.items():
                x = args[place] if place < len(args) else kwargs.get(name)
                if x is None:
                    continue
                model = args[0] if args else kwargs.get(first)
                objective = kwargs.get("objective")
                if name == "images":
                    allowed = missing or _takes(model, objective, "missing")
                    _expect_values(model, x, wait, allowed)
                else:
                    allowed = unlabelled or _takes(model, objective, "unlabelled")
                    _expect_labels(model, x, wait, allowed)
            try:
                return jitted(*args, **kwargs)
            except InputError:
                raise
            except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError):
                _refuse(signature.bind(*args, **kwargs).arguments)
                raise

        for name in ("lower", "trace", "eval_shape", "clear_cache"):  # methods of a jitted function
            setattr(call, name, getattr(jitted, name))
        return call

    return decorate


def native(x: Any) -> Any:
    """Convert a NumPy array to the machine's byte order; return anything else unchanged."""
    return x.astype(x.dtype.newbyteorder("=")) if _is_swapped(x) else x


def _is_swapped(x: Any) -> bool:
    return isinstance(x, np.ndarray) and not x.dtype.isnative


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether examples of this shape are images, (height, width, channels)."""
    return len(shape) == 3


def is_of_pixels(support: Support) -> bool:
    """Whether values of this support are pixels: they are scaled to [0, 1] in images."""
    return isinstance(support, str) and support not in _IN_WORDS


def is_scaled(support: Support, shape: tuple[int, ...]) -> bool:
    """Whether examples are images whose pixels are scaled to [0, 1]."""
    return is_of_pixels(support) and is_image(shape)


def support_of(model: Any) -> Support:
    """Return the support of a model's likelihood.

    Args:
      model: `Params` or a training state; anything else counts as a model of images.
    """
    return getattr(getattr(_config_of(model), "likelihood", None), "support", "unit")


def expect_unit_interval(images: Any, *, wait: bool = True, missing: bool = False) -> None:
    """Raise InputError if float images are known to have values outside [0, 1].

    Args:
      images: of any type; only floats are checked.
      wait: as in `jit`.
      missing: whether NaN is allowed, as the mark of missing entries.

    Raises:
      InputError: NaN, or values outside [0, 1].
    """
    if getattr(images, "dtype", None) == np.uint8:
        return
    found = _observed_extremes(images, jnp.floating, wait, missing)
    if found is not None and not (found[0] >= -_ROUNDING and found[1] <= 1 + _ROUNDING):
        has = "NaN" if found[0] != found[0] else f"values from {found[0]:g} to {found[1]:g}"
        raise InputError(
            f"images have {has}: expected floats between 0 and 1, or uint8 from 0 to 255"
        )


def expect_support(
    support: Support,
    examples: Any,
    subject: str = "images have",
    *,
    wait: bool = True,
    missing: bool = False,
) -> None:
    """Raise InputError if examples that are not scaled are known to be outside of a support.

    Args:
      support: of the likelihood, as in `protocols.LikelihoodFamily`.
      examples: of any type; only numbers are checked.
      subject: start of the error message, such as "data.csv has".
      wait: as in `jit`.
      missing: whether NaN is allowed, as the mark of missing entries.

    Raises:
      InputError: NaN, infinity or values outside of the support.
    """
    if not isinstance(support, str):
        if isinstance(examples, jax.core.Tracer):
            return
        try:
            x = examples if isinstance(examples, jax.Array) else np.asarray(examples)
            x = x.astype(np.float32)[..., :]
        except (IndexError, TypeError, ValueError):
            return  # what is no array of numbers is refused where it is converted to one
        start = 0
        for kind, columns in support:
            block = x[..., start : start + columns]
            expect_support(kind, block, subject, wait=wait, missing=missing)
            start += columns
        return
    found = _observed_extremes(examples, jnp.floating, wait, missing)
    found = found or _extremes(examples, jnp.integer, wait)
    if found is None:
        return
    if not all(map(math.isfinite, found)):
        raise InputError(f"{subject} NaN or infinity: expected finite numbers")
    low, high = _RANGES.get(support, (-math.inf, math.inf))
    rounding = 0 if support in _IN_WORDS else _ROUNDING
    expected = _IN_WORDS.get(
        support,
        f"numbers between {low} and {high}, the support of the likelihood; scale the data, or "
        "choose another likelihood, such as 'gaussian'",
    )
    if found[0] < low - rounding or found[1] > high + rounding:
        raise InputError(f"{subject} values from {found[0]:g} to {found[1]:g}: expected {expected}")
    if support == "count" and any(_extremes(examples, jnp.floating, wait, _fractions) or ()):
        raise InputError(f"{subject} fractional values: expected {expected}")


def _fractions(x: Any) -> Any:
    return (x - x.round())[x == x]


def _observed_extremes(x: Any, kind: Any, wait: bool, missing: bool) -> tuple[Any, Any] | None:
    """Return `_extremes` of an array; with `missing`, of its numbers that are not NaN."""
    found = _extremes(x, kind, wait)
    if missing and found is not None and found[0] != found[0]:
        found = _extremes(x, kind, wait, lambda x: x[x == x])
    return found


def _expect_values(model: Any, images: Any, wait: bool, missing: bool) -> None:
    """Raise InputError if examples are known to have values that the model does not take.

    Args:
      model: `Params` or a training state; anything else counts as a model of images.
      images: the examples.
      wait: as in `jit`.
      missing: whether NaN is allowed.

    Raises:
      InputError: as for `expect_unit_interval` or `expect_support`.
    """
    support, config = support_of(model), _config_of(model)
    if config is None or is_scaled(support, config.image_shape):
        expect_unit_interval(images, wait=wait, missing=missing)
    else:
        expect_support(support, images, wait=wait, missing=missing)


def _takes(model: Any, objective: Any, what: str) -> bool:
    """Whether the objective of a training step takes "missing" entries, or "unlabelled" images."""
    if objective is None:
        objective = getattr(getattr(model, "config", None), "objective", None)
    return getattr(objective, what, False)


def _config_of(model: Any) -> Any:
    """Return the ModelConfig of `Params` or of a training state, else None."""
    config = getattr(getattr(model, "params", model), "config", None)
    return config if hasattr(config, "image_shape") else None


def _expect_labels(model: Any, labels: Any, wait: bool, unlabelled: bool) -> None:
    """Raise InputError if labels are known to be no classes, or no covariates, of the model.

    Args:
      model: `Params` or a training state; anything else is not checked.
      labels: classes or covariates.
      wait: as in `jit`.
      unlabelled: whether -1 is allowed if the model has a classifier.

    Raises:
      InputError: classes below 0, or not below the number of classes; covariates that are NaN or
        infinite.
    """
    if getattr(_config_of(model), "num_covariates", 0):
        found = _extremes(labels, jnp.floating, wait)
        if found is not None and not all(map(math.isfinite, found)):
            raise InputError("labels have NaN or infinity: expected finite covariates")
        return
    classes = getattr(_config_of(model), "num_classes", 0)
    least = -1 if unlabelled and getattr(_config_of(model), "classifier", False) else 0
    found = _extremes(labels, jnp.integer, wait) if classes else None
    if found is not None and not (found[0] >= least and found[1] < classes):
        raise InputError(
            f"labels are from {found[0]} to {found[1]}: expected classes from 0 to "
            f"{classes - 1}, as num_classes is {classes}"
        )


def _extremes(
    x: Any, kind: Any, wait: bool, of: Callable[[Any], Any] = lambda x: x
) -> tuple[Any, Any] | None:
    """Return the minimum and maximum of an array of this kind; None if they are not known.

    Args:
      x: array-like.
      kind: supertype of the dtypes that are examined.
      wait: as in `jit`.
      of: function of the array whose result is examined.
    """
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            return None
        if not _on_host(x):
            if not wait or not x.size or not jnp.issubdtype(x.dtype, kind):
                return None
            with jax.ensure_compile_time_eval():  # x may be a constant of a function being traced
                x = of(x)
                return (jnp.min(x).item(), jnp.max(x).item()) if x.size else None
    try:
        array = np.asarray(x)
    except (TypeError, ValueError):
        return None
    if not jnp.issubdtype(array.dtype, kind):
        return None
    array = of(array)
    return (array.min().item(), array.max().item()) if array.size else None


def _on_host(x: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in x.devices())


def as_array(name: str, x: Any) -> jax.Array:
    """Convert an argument to an array.

    Args:
      name: of the argument, for the message.
      x: array-like.

    Returns:
      The array.

    Raises:
      InputError: not an array of numbers.
    """
    try:
        if x is None:
            raise TypeError
        return jnp.asarray(native(x))
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name}: expected an array of numbers, not {_kind(x)}") from None


def scale_images(images: Shaped[ArrayLike, " batch *shape"]) -> Float[Array, " batch *shape"]:
    """Convert images to floats in [0, 1], and other examples to floats of the same values.

    Args:
      images: images [batch, height, width, channels]: uint8, which is divided by 255; bool; or
        floats, which are returned unchanged. Or other examples [batch, ...]: numbers of any type.

    Returns:
      The examples as floats.

    Raises:
      InputError: images of any other type.
    """
    if not isinstance(images, np.ndarray):  # whose division is exact
        images = as_array("images", images)
    if not is_image(images.shape[1:]):
        return _numbers(images)
    if images.dtype == jnp.uint8:
        return jnp.asarray(images.astype(jnp.float32) / 255)
    if images.dtype == jnp.bool_:
        return jnp.asarray(images.astype(jnp.float32))
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(native(images))
    raise InputError(
        f"images are of type {images.dtype}: expected uint8, or floats between 0 and 1"
    )


def as_floats(support: Support, images: Shaped[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Convert examples to the floats that encoder and likelihood take.

    Args:
      support: of the likelihood.
      images: pixels, which are converted by `scale_images`, or others, which keep their values.

    Returns:
      The examples as floats.

    Raises:
      InputError: another type.
    """
    return scale_images(images) if is_of_pixels(support) else _numbers(as_array("images", images))


def _numbers(images: Any) -> Float[Array, "*shape"]:
    """Convert numbers of any type to floats of the same values."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(native(images))
    if images.dtype != jnp.bool_:
        expect_real("images", images)
    return jnp.asarray(native(images), jnp.float32)


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Promote floats to float32; float64 stays float64.

    In bfloat16 the sum over the pixels of an image would be off by nats.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_key(key: Any, *, several: bool = False) -> jax.Array:
    """Convert a PRNG key to a typed Threefry key.

    Keys of other implementations ("rbg", "unsafe_rbg") draw numbers which, under `vmap`, depend on
    the other keys of the batch. Their first 64 bits become a Threefry key.

    Args:
      key: typed or raw.
      several: whether an array of keys is allowed.

    Returns:
      The key, or the keys.

    Raises:
      InputError: not a PRNG key, or several where one was expected.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            key = jax.random.wrap_key_data(native(key))
        except (AttributeError, TypeError, ValueError):
            raise InputError(
                f"key: expected a PRNG key, such as jax.random.key(0), not {_kind(key)}"
            ) from None
    if key.shape and not several:
        raise InputError(f"key has shape {key.shape}: expected one key")
    if jax.random.key_impl(key) == _THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl=_THREEFRY)


def expect_real(name: str, x: jax.Array | np.ndarray) -> None:
    """Raise InputError unless the dtype is an integer or floating type."""
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"{name} are of type {x.dtype}: expected floats")


def expect_number(name: str, x: Any) -> None:
    """Raise InputError unless `x` is a scalar."""
    array = as_array(name, x)
    expect_real(name, array)
    if array.shape:
        raise InputError(f"{name} has shape {array.shape}: expected one number")


def expect_config(name: str, config: Any, kind: type) -> None:
    """Raise InputError unless `config` is an instance of the class."""
    if not isinstance(config, kind):
        raise InputError(f"{name} is {shown(config)}: expected a {kind.__name__}")


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Raise InputError for the first argument of a wrong type or without memory, if any."""
    for name, value in arguments.items():
        if name in ("params", "state"):
            made_by = {"params": "jaxvae.init", "state": "jaxvae.create_train_state"}[name]
            if not hasattr(value, "config"):
                raise InputError(f"{name}: expected the result of `{made_by}`, not {_kind(value)}")
            if any(map(is_deleted, jax.tree.leaves(value))):
                raise InputError(
                    f"{name} was donated to an earlier call, which reused its memory: expected the "
                    f"state that the call returned, or a copy, jax.tree.map(jnp.copy, {name})"
                )
        elif name == "config":
            if not hasattr(value, "image_shape"):  # else the error is of a user's own module
                raise InputError(f"config is {shown(value)}: expected a ModelConfig")
        elif name == "objective":
            if value is not None and not callable(value):
                raise InputError(f"objective is {shown(value)}: expected a function")
        elif name == "n" or name.startswith("num_"):
            whole_number(name, value)
            if isinstance(value, jax.Array):
                raise InputError(f"{name} is an array: expected a whole number, int({name})")
        elif name == "key":
            as_key(value, several=True)
        elif name != "axis_name" and not (value is None and name not in ("images", "z")):
            as_array(name, value)


def is_deleted(x: Any) -> bool:
    """Return whether an array has been donated, so that its memory is gone."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted()


def _kind(x: Any) -> str:
    if isinstance(x, str):
        return shown(x)
    dtype = getattr(x, "dtype", None)
    return f"one of type {dtype}" if dtype is not None else f"a {type(x).__name__}"


def whole_number(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """Convert an option to an int.

    Args:
      name: of the option, for the message.
      value: anything with `__index__` except a bool.
      least: smallest allowed value.
      most: largest allowed value.

    Returns:
      The number.

    Raises:
      InputError: not a whole number, or out of range.
    """
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


def expect_bool(name: str, value: Any) -> None:
    """Raise InputError unless the value of an option is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}: expected true or false")


def is_complete(images: Shaped[ArrayLike, "*shape"]) -> bool:
    """Return whether no entry of images can be missing, because their type has no NaN."""
    return not jnp.issubdtype(getattr(images, "dtype", float), jnp.floating)


def expect_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless the value of an option is one of these."""
    if value not in allowed:
        raise InputError(f"{name} is {shown(value)}: expected {either(allowed)}")


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, of Python or NumPy; a bool is not."""
    kinds = int | float | np.integer | np.floating
    return isinstance(value, kinds) and not isinstance(value, bool)
