"""Translation of functions that JAX has traced to other programs.

`Translation` walks over the equations of a jaxpr. It inlines calls, unrolls loops of known length,
and reduces JAX's primitives to the operations that each of its subclasses defines. The explorer
translates decoders to JavaScript with it, and `jaxvae.interchange.onnx` encoders and decoders to
ONNX.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxvae.errors import InputError


class Array(NamedTuple):
    """An array of the program: its number, and its shape, which may have symbolic sides."""

    number: int
    shape: tuple[Any, ...]


class Operation(NamedTuple):
    """An operation of the program: its kind, its parameters and the numbers of its arrays."""

    kind: str
    how: dict[str, Any]
    given: tuple[int, ...]
    out: int


class Translation(ABC):
    """The translation of a traced function, one equation at a time.

    Attributes:
      part: what is translated, for messages.
      arrays: the arrays, by number.
      constants: the values of those that are constants, by number.
      operations: in the order of execution.
    """

    target: ClassVar[str]  # for messages
    functions: ClassVar[frozenset[str]]  # elementwise primitives, which `map` translates
    rules: ClassVar[Mapping[str, Callable[..., Any]]]  # of the other primitives, by name

    def __init__(self, part: str) -> None:
        self.part = part
        self.arrays: list[Array] = []
        self.constants: dict[int, np.ndarray] = {}
        self.operations: list[Operation] = []

    @abstractmethod
    def map(self, name: str, *given: Array) -> Array:
        """Apply an elementwise function to arrays, which broadcast as in NumPy."""

    @abstractmethod
    def convert(self, x: Array, dtype: Any) -> Array:
        """Convert to another type."""

    @abstractmethod
    def reshape(self, x: Array, shape: Sequence[Any]) -> Array:
        """Reshape, as `jnp.reshape` does."""

    @abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """Transpose, as `jnp.transpose` does."""

    @abstractmethod
    def broadcast(self, x: Array, shape: Sequence[Any]) -> Array:
        """Broadcast, as `jnp.broadcast_to` does."""

    @abstractmethod
    def slice(
        self, x: Array, first: Sequence[Any], last: Sequence[Any], steps: Sequence[int]
    ) -> Array:
        """Slice, as `lax.slice` does."""

    @abstractmethod
    def reverse(self, x: Array, axes: Sequence[int]) -> Array:
        """Reverse, as `lax.rev` does."""

    @abstractmethod
    def pad(self, x: Array, fill: Array, edges: Sequence[tuple[int, int, int]]) -> Array:
        """Pad, as `lax.pad` does."""

    @abstractmethod
    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        """Concatenate, as `jnp.concatenate` does."""

    @abstractmethod
    def reduce(self, name: str, x: Array, axes: Sequence[int], shape: Sequence[Any]) -> Array:
        """Compute the sum ("add"), "max" or "min" over axes, an array of this shape."""

    @abstractmethod
    def dot(self, x: Array, y: Array, sizes: Sequence[Any], shape: Sequence[Any]) -> Array:
        """Compute [batch, m, k] times [batch, k, n], given (batch, m, k, n).

        The arrays have several axes, or none, in the place of batch, m, k and n.
        """

    def new(self, shape: Sequence[Any]) -> Array:
        """Add an array."""
        self.arrays.append(Array(len(self.arrays), tuple(shape)))
        return self.arrays[-1]

    def constant(self, value: Any) -> Array:
        """Add a constant."""
        dtype = jnp.result_type(value)
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise InputError(f"the {self.part} has a constant of type {dtype}: expected numbers")
        value = np.asarray(value)
        array = self.new(value.shape)
        self.constants[array.number] = value
        return array

    def emit(self, kind: str, given: Sequence[Array], shape: Sequence[Any], /, **how: Any) -> Array:
        """Add an operation; return its result, of this shape."""
        out = self.new(shape)
        self.operations.append(Operation(kind, how, tuple(x.number for x in given), out.number))
        return out

    def inline(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Array]) -> list[Array]:
        """Translate a function, given its arguments; return its results."""
        known: dict[Any, Array] = {}

        def read(atom: Any) -> Array:
            if not isinstance(atom, Literal):
                return known[atom]
            aval: Any = atom.aval
            return self.constant(np.asarray(atom.val, aval.dtype))

        known.update(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known.update(zip(jaxpr.invars, given, strict=True))
        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, given: list[Array]) -> list[Array]:
        """Translate an equation, given its arguments; return its results."""
        how = equation.params
        if equation.primitive.name == "scan":
            return self.scan(equation, given)
        called = next((how[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in how), None)
        inner = getattr(called, "jaxpr", called)
        if inner is not None and len(inner.invars) == len(given):
            return self.inline(inner, getattr(called, "consts", ()), given)
        return self.primitive(equation, given)

    def primitive(self, equation: Any, given: list[Array]) -> list[Array]:
        """Translate an equation that calls no function."""
        name = equation.primitive.name
        if _is_index(equation) and all(x.number in self.constants for x in given):
            # Computed here, because indices have to be constants.
            values = equation.primitive.bind(
                *(self.constants[x.number] for x in given), **equation.params
            )
            return list(
                map(self.constant, values if equation.primitive.multiple_results else [values])
            )
        if name in self.functions:
            return [self.map(name, *given)]
        if name not in self.rules:
            raise self.unsupported(equation)
        results = self.rules[name](self, equation, *given)
        return results if isinstance(results, list) else [results]

    def unsupported(self, equation: Any, why: str = "") -> InputError:
        """Return the error that an equation cannot be translated."""
        own = type(self).__module__.replace(".", "/")
        return InputError(
            f"the {self.part} has the operation {equation.primitive.name!r}{why}, which "
            f"{self.target} does not support: expected those listed in "
            f"jaxvae/interchange/jaxpr.py and {own}.py"
        )

    def scan(self, equation: Any, given: list[Array]) -> list[Array]:
        """Unroll a loop of known length."""
        how, body = equation.params, equation.params["jaxpr"]
        jaxpr, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
        # Each iteration gets one row of a scanned array, so its rank differs from a constant's.
        # The parameters with this information differ between versions of JAX.
        rows = sum(len(x.shape) > v.aval.ndim for x, v in zip(given, jaxpr.invars, strict=True))
        stacked = sum(
            outer.aval.ndim > inner.aval.ndim
            for outer, inner in zip(equation.outvars, jaxpr.outvars, strict=True)
        )
        carried = len(jaxpr.outvars) - stacked
        first, last = len(given) - rows - carried, len(given) - rows
        fixed, carry, through = given[:first], given[first:last], given[last:]
        turns = range(how["length"])
        collected: dict[int, list[Array]] = {}
        for turn in reversed(turns) if how["reverse"] else turns:
            now = [self._row(x, turn) for x in through]
            results = self.inline(jaxpr, consts, [*fixed, *carry, *now])
            carry, collected[turn] = results[:carried], results[carried:]
        columns = zip(*(collected[turn] for turn in turns), strict=True)
        return [*carry, *(self.stack(column, 0) for column in columns)]

    def _row(self, x: Array, turn: int) -> Array:
        rest = x.shape[1:]
        row = self.slice(x, [turn, *(0 for _ in rest)], [turn + 1, *rest], [1] * len(x.shape))
        return self.reshape(row, rest)

    def stack(self, parts: Sequence[Array], axis: int) -> Array:
        """Stack, as `jnp.stack` does."""
        rows = [self.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in parts]
        return self.concatenate(rows, axis)

    def needed(self, outputs: Sequence[int]) -> tuple[list[Operation], set[int]]:
        """Return the operations that arrays depend on, and the numbers of all arrays in these."""
        kept, numbers = [], set(outputs)
        for operation in reversed(self.operations):
            if operation.out in numbers:
                numbers.update(operation.given)
                kept.append(operation)
        return kept[::-1], numbers


def _is_index(equation: Any) -> bool:
    """Return whether the results are integers or booleans, of known shapes."""
    return bool(equation.outvars) and all(
        not jnp.issubdtype(v.aval.dtype, jnp.inexact)
        and all(isinstance(n, int) for n in v.aval.shape)
        for v in equation.outvars
    )


def _mapped(name: str) -> Callable[..., Array]:
    return lambda work, equation, *given: work.map(name, *given)


def _same(work: Translation, equation: Any, *given: Array) -> list[Array]:
    return list(given)


def _reshape(work: Translation, equation: Any, x: Array) -> Array:
    return work.reshape(x, equation.outvars[0].aval.shape)


def _polynomial(work: Translation, equation: Any, x: Array, *terms: Array) -> Array:
    """Evaluate a polynomial by Horner's rule; JAX gives the constant term first."""
    *rest, total = terms
    for term in reversed(rest):
        total = work.map("add", work.map("mul", total, x), term)
    return work.broadcast(total, equation.outvars[0].aval.shape)


def _integer_pow(work: Translation, equation: Any, x: Array) -> Array:
    power = np.asarray(equation.params["y"], equation.outvars[0].aval.dtype)
    return work.map("pow", x, work.constant(power))


def _select(work: Translation, equation: Any, which: Array, *cases: Array) -> Array:
    if len(cases) != 2:
        raise work.unsupported(equation, f" from {len(cases)} cases")
    return work.map("select", which, *cases)


def _broadcast(work: Translation, equation: Any, x: Array) -> Array:
    shape = equation.params["shape"]
    sides = [1] * len(shape)
    for side, where in zip(x.shape, equation.params["broadcast_dimensions"], strict=True):
        sides[where] = side
    return work.broadcast(work.reshape(x, sides), shape)


def _slice(work: Translation, equation: Any, x: Array) -> Array:
    how = equation.params
    steps = how["strides"] or (1,) * len(x.shape)
    return work.slice(x, how["start_indices"], how["limit_indices"], steps)


def _split(work: Translation, equation: Any, x: Array) -> list[Array]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    parts = []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        first, last = [0] * len(x.shape), list(x.shape)
        first[axis], last[axis] = int(end - size), int(end)
        parts.append(work.slice(x, first, last, [1] * len(first)))
    return parts


def padded(shape: Sequence[Any], edges: Sequence[tuple[int, int, int]]) -> tuple[Any, ...]:
    """Return the shape of what `lax.pad` returns."""
    return tuple(
        low + n + (between and max(n - 1, 0) * between) + high
        for n, (low, high, between) in zip(shape, edges, strict=True)
    )


def gather(work: Translation, equation: Any, x: Array, index: Array) -> Array:
    """Slice at an index that is a constant, as in x[..., 1, :]."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    at = work.constants.get(index.number)
    if at is None or at.ndim != 1 or numbers.operand_batching_dims:
        raise work.unsupported(equation)
    first: list[int] = [0] * len(x.shape)
    for axis, i in zip(numbers.start_index_map, at.tolist(), strict=True):
        first[axis] = i
        if not 0 <= i <= x.shape[axis] - sizes[axis]:
            raise work.unsupported(equation, f" at index {i} of {x.shape[axis]}")
    last = [a + n for a, n in zip(first, sizes, strict=True)]
    rows = work.slice(x, first, last, [1] * len(first))
    return work.reshape(rows, equation.outvars[0].aval.shape)


def _tile(work: Translation, equation: Any, x: Array) -> Array:
    sides = [n for side in x.shape for n in (1, side)]
    pairs = zip(equation.params["reps"], x.shape, strict=True)
    repeated = work.broadcast(work.reshape(x, sides), [n for pair in pairs for n in pair])
    return work.reshape(repeated, equation.outvars[0].aval.shape)


def _iota(work: Translation, equation: Any) -> Array:
    shape, axis, dtype = (equation.params[key] for key in ("shape", "dimension", "dtype"))
    sides = [1] * len(shape)
    sides[axis] = shape[axis]
    return work.broadcast(work.constant(np.arange(shape[axis], dtype=dtype).reshape(sides)), shape)


def _reduced(name: str) -> Callable[..., Array]:
    return lambda work, equation, x: work.reduce(
        name, x, equation.params["axes"], equation.outvars[0].aval.shape
    )


def _dot(work: Translation, equation: Any, x: Array, y: Array) -> Array:
    (over_x, over_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    free_x = [a for a in range(len(x.shape)) if a not in (*over_x, *batch_x)]
    free_y = [a for a in range(len(y.shape)) if a not in (*over_y, *batch_y)]
    sizes = [
        math.prod(array.shape[a] for a in axes)
        for array, axes in ((x, batch_x), (x, free_x), (x, over_x), (y, free_y))
    ]
    x = work.transpose(x, [*batch_x, *free_x, *over_x])
    y = work.transpose(y, [*batch_y, *over_y, *free_y])
    return work.dot(x, y, sizes, equation.outvars[0].aval.shape)


RULES: Mapping[str, Callable[..., Any]] = {
    "add_any": _mapped("add"),
    "integer_pow": _integer_pow,
    "polynomial": _polynomial,
    "select_n": _select,
    "convert_element_type": lambda work, equation, x: work.convert(x, equation.params["new_dtype"]),
    "copy": _same,
    "optimization_barrier": _same,
    "stop_gradient": _same,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": lambda work, equation, x: work.transpose(x, equation.params["permutation"]),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "rev": lambda work, equation, x: work.reverse(x, equation.params["dimensions"]),
    "pad": lambda work, equation, x, fill: work.pad(x, fill, equation.params["padding_config"]),
    "concatenate": lambda work, equation, *parts: work.concatenate(
        parts, equation.params["dimension"]
    ),
    "stack": lambda work, equation, *parts: work.stack(parts, equation.params["axis"]),
    "gather": gather,
    "iota": _iota,
    "tile": _tile,
    "reduce_sum": _reduced("add"),
    "reduce_max": _reduced("max"),
    "reduce_min": _reduced("min"),
    "dot_general": _dot,
}
