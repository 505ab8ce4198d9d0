"""Optimizers and learning-rate schedules: those of optax, by name or as objects."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Num
from optax.contrib import MuonDimensionNumbers, muon

from jaxvae.components import Registry, option_names, written
from jaxvae.errors import InputError

Rate = Num[Array, ""] | float
Step = Int[Array, ""] | int
P = TypeVar("P")

# Options whose defaults differ from optax's: RMSprop has Keras's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "rmsprop": {"decay": 0.9, "eps": 1e-7, "eps_in_sqrt": True},
    # Updates of the size of Adam's, so that both take the same learning rate: Liu et al. (2025),
    # Muon is Scalable for LLM Training.
    "muon": {"consistent_rms": 0.2},
}

_CONTRIB = {"muon": muon}

# Optimizers that update every number independently of the others, so that a device can update its
# part of the parameters.
ELEMENTWISE = (
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad",
    "lion", "optimistic_adam_v2", "optimistic_gradient_descent", "radam",
    "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "yogi",
)  # fmt: skip

# Arrays of several axes that are not kernels: the biases of attention, [heads, features], the
# vectors of vector quantization, which stay as they are, and the learned input of a ladder.
_NO_KERNELS = ("bias", "vectors", "top")

# Arrays of `kernel` have inputs before outputs; `kernel_1`, ... of coupling layers are one for each
# layer. Attention's, [inputs, heads, features], are left to Adam.
_MATRICES = {
    ("kernel", 2): MuonDimensionNumbers(0, 1),
    ("kernel", 4): MuonDimensionNumbers((0, 1, 2), 3),
    ("kernels", 3): MuonDimensionNumbers(1, 2),
}

# Options of optax's schedules that are learning rates.
_VALUES = {"init_value", "peak_value", "end_value", "value"}


class _Named:
    """A function of optax with its options.

    Attributes:
      name: name of the function in optax.
      options: pairs of name and value.
    """

    name: str
    options: tuple[tuple[str, Any], ...]

    @property
    def spec(self) -> str:
        """The one-line form, NAME:KEY=VALUE."""
        return written(self.name, self.options)


@dataclass(frozen=True)
class Optimizer(_Named):
    """An optimizer of optax, as a function of the learning rate.

    Weight decay applies to the networks' kernels only: not to biases, scales or the parameters of
    prior and likelihood. `muon` updates kernels, of flows too, and Adam the rest; a convolution's
    kernel counts as the matrix [height * width * inputs, outputs].

    Attributes:
      name: name of the function in optax.
      options: pairs of name and value.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, learning_rate: Rate) -> optax.GradientTransformation:
        """Build the gradient transformation for a learning rate, which may be traced."""
        function = _function(self.name)
        options = _DEFAULTS.get(self.name, {}) | dict(self.options)
        if function is muon:
            options.setdefault("muon_weight_dimension_numbers", _matrices)
        for mask in {"mask", "weight_decay_mask"} & set(option_names(function)):
            options.setdefault(mask, _kernels)
        return function(learning_rate, **options)


@dataclass(frozen=True)
class OptaxSchedule(_Named):
    """A schedule of optax.

    Options that are not given follow from the run: the peak value, or the initial value of a
    schedule without a peak, is the learning rate; the number of steps is that of the run; the
    initial value before a peak and the end value are 0.

    Attributes:
      name: name of the function in optax.
      options: pairs of name and value.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def rate(self, learning_rate: Rate, step: Step, steps: int) -> Rate:
        """Return the learning rate at a step of a run of `steps`."""
        function = getattr(optax, self.name)
        has = option_names(function)
        top = next(n for n in ("peak_value", "init_value", "value") if n in has)
        follows = {"init_value": 0.0, "end_value": 0.0, "power": 1.0, top: learning_rate}
        follows |= dict.fromkeys(("decay_steps", "transition_steps"), steps)
        needed = {
            p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty
        }
        options = {n: value for n, value in follows.items() if n in needed} | dict(self.options)
        if top in dict(self.options):
            return function(**options)(step)
        # optax branches on these values in Python, so they must not be traced. Every schedule is
        # proportional to them: it is built for multiples of the rate, then scaled by the rate.
        for n in _VALUES & set(options):
            options[n] = options[n] / learning_rate
        return learning_rate * function(**options | {top: 1.0})(step)


class Schedule(Protocol):
    """A learning rate as a function of the step and the length of the run."""

    def rate(self, learning_rate: Rate, step: Step, steps: int) -> Rate:
        """Return the learning rate at a step of a run of `steps`."""


@dataclass(frozen=True)
class Constant:
    """A constant learning rate."""

    def rate(self, learning_rate: Rate, step: Step, steps: int) -> Rate:
        """Return the learning rate."""
        return learning_rate


@dataclass(frozen=True)
class Cosine:
    """Decay of the learning rate to 0 along half a cosine.

        rate = learning_rate 1/2 (1 + cos(pi step / steps))

    References:
      Loshchilov and Hutter (2017), SGDR, equation 5.
    """

    def rate(self, learning_rate: Rate, step: Step, steps: int) -> Rate:
        """Return the learning rate at a step of a run of `steps`."""
        return learning_rate * (0.5 * (1 + jnp.cos(jnp.pi * step / steps)))


@dataclass(frozen=True)
class Burda:
    """Decay of the learning rate in eight stages i = 0, ..., 7, each three times as long.

        rate = learning_rate 10^(-i / 7)    for 3^i / 3280 of the steps

    References:
      Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.
    """

    def rate(self, learning_rate: Rate, step: Step, steps: int) -> Rate:
        """Return the learning rate at a step of a run of `steps`."""
        ends = [math.ceil(steps * (3**i - 1) / (3**8 - 1)) for i in range(1, 8)]
        return learning_rate * 10.0 ** (-jnp.sum(step >= jnp.array(ends)) / 7)


def _function(name: str) -> Any:
    """Return the function of optax or `_CONTRIB` of this name, or None."""
    return _CONTRIB.get(name) or getattr(optax, name, None)


def _takes_learning_rate(function: Any) -> bool:
    return option_names(function)[:1] == ("learning_rate",)


class _OptaxNames(Mapping[str, Any]):
    """The functions of optax and `_CONTRIB` that `is_one` accepts, looked up on access."""

    def __init__(self, is_one: Callable[[str, Any], bool], make: Any, **own: Any) -> None:
        self._is_one, self._make, self._own = is_one, make, own

    def __getitem__(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        function = _function(name)
        if not inspect.isfunction(function) or not self._is_one(name, function):
            raise KeyError(name)
        return _named(self._make, name, function)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        for name in sorted({*dir(optax), *_CONTRIB}):
            if name not in self._own and name in self:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _named(make: Any, name: str, function: Any) -> Any:
    known = [n for n in option_names(function) if n != "learning_rate"]

    def component(**options: Any) -> Any:
        # In the order of the signature, so that equal options have one spelling.
        return make(name, tuple((n, options[n]) for n in known if n in options))

    kind = inspect.Parameter.KEYWORD_ONLY
    component.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind, default=None) for n in known]
    )
    component.__doc__ = function.__doc__
    return component


OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    _OptaxNames(
        lambda name, function: (
            name[:1] != "_"
            and not name.startswith("scale_by")
            # They need the loss, need a key, or are deprecated.
            and name not in ("lbfgs", "noisy_sgd", "optimistic_adam")
            and _takes_learning_rate(function)
        ),
        Optimizer,
    ),
)
SCHEDULES: Registry[Any] = Registry(
    "schedule",
    _OptaxNames(
        lambda name, function: (
            (name.endswith("_schedule") or name == "exponential_decay")
            and name not in ("sgdr_schedule", "piecewise_interpolate_schedule")
            and name != "scale_by_schedule"
        ),
        OptaxSchedule,
        constant=Constant,
        cosine=Cosine,
        burda=Burda,
    ),
)


def parse_optimizer(value: Any) -> Any:
    """Parse the optimizer of a configuration.

    Args:
      value: a name with options; an `optax.GradientTransformation`, which has its own learning
        rate; or a function of the learning rate that returns one.

    Returns:
      The optimizer that `value` names, or `value` if it is an object.

    Raises:
      InputError: an unknown name or option, or options that optax rejects.
    """
    if isinstance(value, str):
        parsed = OPTIMIZERS.parse(value)
        if not isinstance(parsed, Optimizer):
            parsed = parsed()
        _try_out(parsed.spec, lambda: parsed(1e-3))
        return parsed
    if not isinstance(value, optax.GradientTransformation) and not callable(value):
        OPTIMIZERS.parse(value, ", an optax.GradientTransformation or a function that makes one",
                         ("init", "update"))  # fmt: skip
    return value


def parse_schedule(value: Any) -> Any:
    """Parse the learning-rate schedule of a configuration.

    Args:
      value: a name with options, an object with a method `rate`, or an optax schedule: a function
        of the step.

    Returns:
      The schedule that `value` names, or `value` if it is an object.

    Raises:
      InputError: an unknown name or option, or options that optax rejects.
    """
    if isinstance(value, str):
        parsed = SCHEDULES.parse(value)
        if inspect.isfunction(parsed):
            parsed = parsed()
        expect_rate(parsed, None, str(value))
        return parsed
    if hasattr(value, "rate") or not callable(value):
        return SCHEDULES.parse(value, " or an optax schedule, a function of the step", ("rate",))
    return value


def rate_at(schedule: Any, learning_rate: Rate, step: Step, steps: int) -> Rate:
    """Return the learning rate of a schedule at a step of a run of `steps`."""
    if hasattr(schedule, "rate"):
        return schedule.rate(learning_rate, step, steps)
    return schedule(step)


def expect_rate(schedule: Any, steps: int | None, written: str | None = None) -> None:
    """Check that a schedule can be evaluated.

    Args:
      schedule: the schedule.
      steps: number of steps of the run; None: not known, and no limit.
      written: the schedule as it was given.

    Raises:
      InputError: it cannot, such as with a warm-up that is longer than the run.
    """
    try:
        last = 2**30 if steps is None else steps
        jax.eval_shape(lambda step: rate_at(schedule, 1e-3, step, last), jnp.int32(0))
    except Exception as error:  # optax does not document what it raises
        name = SCHEDULES.spec(schedule) if written is None else written
        run = "" if steps is None else f" for a run of {steps} steps"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"schedule is {name!r}, which optax refuses{run}: {reason}") from None


def _try_out(written: str, make: Callable[[], optax.GradientTransformation]) -> None:
    """Raise InputError unless the optimizer can be built and applied."""
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}

    def step(params: Any) -> Any:
        made = make()
        return made.update(params, made.init(params), params)

    try:
        jax.eval_shape(step, params)
    except InputError:
        raise
    except Exception as error:  # optax does not document what it raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"optimizer is {written!r}, which optax refuses: {reason}") from None


def _kernels(params: P) -> P:
    """Return a tree of booleans: whether weight decay applies to each array."""

    def is_kernel(path: Any, x: Any) -> bool:
        part = getattr(path[0], "name", "") if path else ""
        return x.ndim > 1 and part not in ("prior", "likelihood") and _key(path) not in _NO_KERNELS

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def _matrices(params: P) -> P:
    """Return a tree of the axes of each matrix, for Muon, and None for every other array."""

    def axes(path: Any, x: Any) -> MuonDimensionNumbers | None:
        name = _key(path)
        return _MATRICES.get(("kernels" if name.startswith("kernel_") else name, x.ndim))

    return jax.tree_util.tree_map_with_path(axes, params)


def _key(path: Any) -> str:
    """Return the last key of a path in a tree, or nothing if it ends in an attribute or index."""
    return str(getattr(path[-1], "key", "")) if path else ""
