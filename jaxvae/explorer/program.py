"""Translation of a decoder to a list of simple operations, which `runtime.js` executes.

JAX traces the decoder, and each equation is translated to operations of these kinds:

    view     out[i] = x[offset + sum_d i_d stride_d]: transpose, slice, broadcast, ...
    place    writes arrays at such strided positions of a buffer: concatenate, pad
    map      an elementwise function
    reduce   a reduction over the last axis
    dot      a batch of matrix products
    conv     a two-dimensional convolution, channels last

Every array is a register: a flat float32 buffer, also for integers and booleans. Only this module
knows its shape, so a reshape needs no operation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxvae.errors import InputError
from jaxvae.figures.grid import decode_coordinates
from jaxvae.models.vae import Params


class Program(NamedTuple):
    """A program for `runtime.js`. Registers are numbered, the constants first.

    Attributes:
      constants: values of the first registers, flat float32 arrays.
      sizes: number of elements of each register.
      inputs: registers of the inputs.
      output: register of the output.
      operations: in the order of execution; each has its "kind", its "in" and "out" registers and
        its parameters.
    """

    constants: list[np.ndarray]
    sizes: list[int]
    inputs: list[int]
    output: int
    operations: list[dict[str, Any]]


class _Array(NamedTuple):
    register: int
    shape: tuple[int, ...]


def decoder_program(params: Params) -> Program:
    """Translate the decoder's mean of one image.

    Args:
      params: the model.

    Returns:
      A program whose inputs are coordinates [1, latent] and, for a conditional model, a class [1].

    Raises:
      InputError: the decoder has an operation that cannot be translated.
    """

    def mean(z: jax.Array, *labels: jax.Array) -> jax.Array:
        return decode_coordinates(params, z, *labels).mean

    inputs = [jax.ShapeDtypeStruct((1, params.config.latent_dim), jnp.float32)]
    if params.config.num_classes:
        inputs.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    # Traced for an accelerator, where a convolution is a single operation.
    with jax.default_device("tpu"):
        traced = jax.make_jaxpr(mean)(*inputs)
    return translate(traced)


def translate(traced: Any) -> Program:
    """Translate a traced function with one result.

    Args:
      traced: what `jax.make_jaxpr` returned.

    Returns:
      The program.

    Raises:
      InputError: the function has an operation that cannot be translated.
    """
    work = _Translation()
    inputs = [work.new(tuple(v.aval.shape)) for v in traced.jaxpr.invars]
    (output,) = work.inline(traced.jaxpr, traced.consts, inputs)
    return work.finished([x.register for x in inputs], output.register)


class _Translation:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.constants: dict[int, np.ndarray] = {}
        self.operations: list[dict[str, Any]] = []

    def new(self, shape: Sequence[int]) -> _Array:
        self.sizes.append(math.prod(shape))
        return _Array(len(self.sizes) - 1, tuple(shape))

    def constant(self, value: Any) -> _Array:
        value = np.asarray(value)
        if value.dtype.kind not in "fiub" and value.dtype != jnp.bfloat16:
            raise InputError(f"the decoder has a constant of type {value.dtype}: expected numbers")
        array = self.new(value.shape)
        self.constants[array.register] = value.astype(np.float32).ravel()
        return array

    def emit(
        self, kind: str, given: Sequence[_Array], shape: Sequence[int], /, **how: Any
    ) -> _Array:
        out = self.new(shape)
        registers = [x.register for x in given]
        self.operations.append({"kind": kind, "in": registers, "out": out.register, **how})
        return out

    def map(self, name: str, *given: _Array, **how: Any) -> _Array:
        shape = np.broadcast_shapes(*(x.shape for x in given))
        given = tuple(self.broadcast(x, shape) for x in given)
        return self.emit("map", given, shape, f=name, **how)

    def view(
        self, x: _Array, shape: Sequence[int], strides: Sequence[int], offset: int = 0
    ) -> _Array:
        if offset == 0 and tuple(shape) == x.shape and list(strides) == _strides(shape):
            return x
        return self.emit("view", [x], shape, shape=_ints(shape), strides=_ints(strides),
                         offset=int(offset))  # fmt: skip

    def transpose(self, x: _Array, axes: Sequence[int]) -> _Array:
        strides = _strides(x.shape)
        return self.view(x, [x.shape[a] for a in axes], [strides[a] for a in axes])

    def broadcast(self, x: _Array, shape: Sequence[int]) -> _Array:
        """Broadcast as NumPy does: prepend missing axes and repeat those of size 1."""
        strides = [0] * (len(shape) - len(x.shape)) + _strides(x.shape)
        sides = [1] * (len(shape) - len(x.shape)) + list(x.shape)
        kept = [0 if side == 1 else s for side, s in zip(sides, strides, strict=True)]
        if tuple(sides) == tuple(shape):
            return x._replace(shape=tuple(shape))
        return self.view(x, shape, kept)

    def slice(
        self, x: _Array, first: Sequence[int], last: Sequence[int], steps: Sequence[int]
    ) -> _Array:
        strides = _strides(x.shape)
        shape = [-(-(b - a) // step) for a, b, step in zip(first, last, steps, strict=True)]
        moved = [s * step for s, step in zip(strides, steps, strict=True)]
        offset = sum(int(a) * s for a, s in zip(first, strides, strict=True))
        return self.view(x, shape, moved, offset)

    def place(
        self, fill: _Array, parts: Sequence[_Array], wheres: Sequence[Any], shape: Sequence[int]
    ) -> _Array:
        """Fill a buffer with `fill`, then write each part at its offset with its strides."""
        laid = [
            {"shape": _ints(x.shape), "strides": _ints(strides), "offset": int(offset)}
            for x, (offset, strides) in zip(parts, wheres, strict=True)
        ]
        return self.emit("place", [fill, *parts], shape, parts=laid)

    def concatenate(self, parts: Sequence[_Array], axis: int) -> _Array:
        shape = list(parts[0].shape)
        shape[axis] = sum(x.shape[axis] for x in parts)
        strides = _strides(shape)
        starts = np.cumsum([0, *(x.shape[axis] for x in parts[:-1])])
        wheres = [(start * strides[axis], strides) for start in starts]
        return self.place(self.constant(0.0), parts, wheres, shape)

    def inline(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[_Array]) -> list[_Array]:
        known: dict[Any, _Array] = {}

        def read(atom: Any) -> _Array:
            return self.constant(atom.val) if isinstance(atom, Literal) else known[atom]

        known.update(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known.update(zip(jaxpr.invars, given, strict=True))
        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, given: list[_Array]) -> list[_Array]:
        name, how = equation.primitive.name, equation.params
        if name == "scan":
            return self.scan(equation, given)
        if name in _RULES:
            results = _RULES[name](self, equation, *given)
            results = results if isinstance(results, list) else [results]
            return [
                self.map("bfloat16", x)
                if v.aval.dtype == jnp.bfloat16 and name not in _MOVES
                else x
                for x, v in zip(results, equation.outvars, strict=True)
            ]
        called = next((how[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in how), None)
        inner = getattr(called, "jaxpr", called)
        if inner is None or len(inner.invars) != len(given):
            raise InputError(
                f"the decoder has the operation {name!r}, which the explorer does not support: "
                "expected those listed in jaxvae/explorer/program.py"
            )
        return self.inline(inner, getattr(called, "consts", ()), given)

    def scan(self, equation: Any, given: list[_Array]) -> list[_Array]:
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
        collected: dict[int, list[_Array]] = {}
        for turn in reversed(turns) if how["reverse"] else turns:
            now = [
                self.view(x, x.shape[1:], _strides(x.shape)[1:], turn * math.prod(x.shape[1:]))
                for x in through
            ]
            results = self.inline(jaxpr, consts, [*fixed, *carry, *now])
            carry, collected[turn] = results[:carried], results[carried:]
        columns = zip(*(collected[turn] for turn in turns), strict=True)
        whole = [
            self.concatenate([x._replace(shape=(1, *x.shape)) for x in column], 0)
            for column in columns
        ]
        return [*carry, *whole]

    def finished(self, inputs: list[int], output: int) -> Program:
        """Keep what the output depends on, and number the constants first."""
        needed, kept = {output}, []
        for operation in reversed(self.operations):
            if operation["out"] in needed:
                needed.update(operation["in"])
                kept.append(operation)
        constants = [r for r in self.constants if r in needed]
        others = [r for r in range(len(self.sizes))
                  if r not in self.constants and (r in needed or r in inputs)]  # fmt: skip
        number = {register: i for i, register in enumerate([*constants, *others])}
        for operation in kept:
            operation["in"] = [number[r] for r in operation["in"]]
            operation["out"] = number[operation["out"]]
        return Program(
            [self.constants[r] for r in constants],
            [self.sizes[r] for r in number],
            [number[r] for r in inputs],
            number[output],
            kept[::-1],
        )


def _ints(values: Sequence[int]) -> list[int]:
    return [int(n) for n in values]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _mapped(name: str) -> Callable[..., _Array]:
    def rule(work: _Translation, equation: Any, *given: _Array) -> _Array:
        return work.map(name, *given)

    return rule


def _same(work: _Translation, equation: Any, *given: _Array) -> list[_Array]:
    return list(given)


def _reshape(work: _Translation, equation: Any, x: _Array) -> _Array:
    return x._replace(shape=tuple(equation.outvars[0].aval.shape))


def _divide(work: _Translation, equation: Any, x: _Array, y: _Array) -> _Array:
    return work.map("div", x, y) if _is_float(equation.outvars[0]) else _whole_numbers(equation)


def _whole_numbers(equation: Any) -> _Array:
    raise InputError(
        f"the decoder has the operation {equation.primitive.name!r} on integers, which the "
        "explorer does not support: expected floats"
    )


def _is_float(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.aval.dtype, jnp.floating))


def _convert(work: _Translation, equation: Any, x: _Array) -> _Array:
    new = equation.params["new_dtype"]
    if new == jnp.bool_:
        return work.map("ne", x, work.constant(0.0))
    if jnp.issubdtype(new, jnp.integer):
        return work.map("trunc", x)
    if new in (jnp.float32, jnp.bfloat16):  # results in bfloat16 are rounded in `equation`
        return x
    raise InputError(
        f"the decoder has numbers of type {jnp.dtype(new).name}: expected float32 or bfloat16"
    )


def _polynomial(work: _Translation, equation: Any, x: _Array, *terms: _Array) -> _Array:
    """Evaluate a polynomial by Horner's rule; JAX gives the constant term first."""
    *rest, total = terms
    for term in reversed(rest):
        total = work.map("add", work.map("mul", total, x), term)
    return work.broadcast(total, equation.outvars[0].aval.shape)


def _integer_pow(work: _Translation, equation: Any, x: _Array) -> _Array:
    return work.map("pow", x, work.constant(float(equation.params["y"])))


def _select(work: _Translation, equation: Any, which: _Array, *cases: _Array) -> _Array:
    if len(cases) != 2:
        raise InputError(f"the decoder selects from {len(cases)} cases: expected 2")
    return work.map("select", which, *cases)


def _broadcast(work: _Translation, equation: Any, x: _Array) -> _Array:
    shape = equation.params["shape"]
    strides, own = [0] * len(shape), _strides(x.shape)
    for axis, where in enumerate(equation.params["broadcast_dimensions"]):
        strides[where] = 0 if x.shape[axis] == 1 else own[axis]
    if math.prod(shape) == math.prod(x.shape):
        return x._replace(shape=tuple(shape))
    return work.view(x, shape, strides)


def _slice(work: _Translation, equation: Any, x: _Array) -> _Array:
    how = equation.params
    steps = how["strides"] or (1,) * len(x.shape)
    return work.slice(x, how["start_indices"], how["limit_indices"], steps)


def _split(work: _Translation, equation: Any, x: _Array) -> list[_Array]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    parts = []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        first, last = [0] * len(x.shape), list(x.shape)
        first[axis], last[axis] = int(end - size), int(end)
        parts.append(work.slice(x, first, last, [1] * len(first)))
    return parts


def _reverse(work: _Translation, equation: Any, x: _Array) -> _Array:
    strides, offset = _strides(x.shape), 0
    for axis in equation.params["dimensions"]:
        offset += (x.shape[axis] - 1) * strides[axis]
        strides[axis] = -strides[axis]
    return work.view(x, x.shape, strides, offset)


def _pad(work: _Translation, equation: Any, x: _Array, fill: _Array) -> _Array:
    shape = equation.outvars[0].aval.shape
    first, last, offset, strides = [], [], 0, []
    for n, side, stride, (low, _, between) in zip(
        x.shape, shape, _strides(shape), equation.params["padding_config"], strict=True
    ):
        step = between + 1
        # Negative padding crops.
        first.append(min(n, max(0, -(low // step))))
        last.append(max(first[-1], min(n, -(-(side - low) // step))))
        offset += (low + first[-1] * step) * stride
        strides.append(step * stride)
    kept = work.slice(x, first, last, [1] * len(first))
    return work.place(fill, [kept], [(offset, strides)], shape)


def _concatenate(work: _Translation, equation: Any, *parts: _Array) -> _Array:
    return work.concatenate(parts, equation.params["dimension"])


def _stack(work: _Translation, equation: Any, *parts: _Array) -> _Array:
    axis = equation.params["axis"]
    rows = [x._replace(shape=(*x.shape[:axis], 1, *x.shape[axis:])) for x in parts]
    return work.concatenate(rows, axis)


def _iota(work: _Translation, equation: Any) -> _Array:
    shape, axis = equation.params["shape"], equation.params["dimension"]
    strides = [int(i == axis) for i in range(len(shape))]
    return work.view(work.constant(np.arange(shape[axis])), shape, strides)


def _reduced(name: str) -> Callable[..., _Array]:
    def rule(work: _Translation, equation: Any, x: _Array) -> _Array:
        gone = tuple(equation.params["axes"])
        kept = [axis for axis in range(len(x.shape)) if axis not in gone]
        inner = math.prod(x.shape[axis] for axis in gone)
        x = work.transpose(x, [*kept, *gone])
        return work.emit("reduce", [x], equation.outvars[0].aval.shape, f=name, inner=inner)

    return rule


def _dot(work: _Translation, equation: Any, x: _Array, y: _Array) -> _Array:
    (over_x, over_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    free_x = [a for a in range(len(x.shape)) if a not in (*over_x, *batch_x)]
    free_y = [a for a in range(len(y.shape)) if a not in (*over_y, *batch_y)]
    batch, m, k, n = (
        math.prod(array.shape[a] for a in axes)
        for array, axes in ((x, batch_x), (x, free_x), (x, over_x), (y, free_y))
    )
    x = work.transpose(x, [*batch_x, *free_x, *over_x])
    y = work.transpose(y, [*batch_y, *over_y, *free_y])
    shape = equation.outvars[0].aval.shape
    return work.emit("dot", [x, y], shape, batch=batch, m=m, k=k, n=n)


def _conv(work: _Translation, equation: Any, x: _Array, kernel: _Array) -> _Array:
    how = equation.params
    if len(x.shape) != 4 or how["batch_group_count"] != 1:
        raise InputError(
            f"the decoder has a convolution over {len(x.shape) - 2} axes with "
            f"batch_group_count={how['batch_group_count']}, which the explorer does not support: "
            "expected 2 axes and batch_group_count=1"
        )
    numbers = how["dimension_numbers"]
    n, c, *sides = numbers.lhs_spec
    x = work.transpose(x, [n, *sides, c])
    o, i, *taps = numbers.rhs_spec
    kernel = work.transpose(kernel, [*taps, i, o])
    out = equation.outvars[0].aval.shape
    n, c, *sides = numbers.out_spec
    result = work.emit(
        "conv",
        [x, kernel],
        [out[axis] for axis in (n, *sides, c)],
        x=_ints(x.shape),
        kernel=_ints(kernel.shape),
        result=_ints([out[axis] for axis in sides]),
        stride=_ints(how["window_strides"]),
        low=[int(low) for low, _ in how["padding"]],
        spread=_ints(how["lhs_dilation"]),
        reach=_ints(how["rhs_dilation"]),
        groups=int(how["feature_group_count"]),
    )
    return work.transpose(result, [int(a) for a in np.argsort((n, *sides, c))])


# Operations that only move values, so their results need no rounding.
_MOVES = ("reshape", "squeeze", "expand_dims", "transpose", "slice", "split", "rev", "pad",
          "concatenate", "stack", "broadcast_in_dim", "copy", "optimization_barrier",
          "stop_gradient")  # fmt: skip

_RULES: dict[str, Callable[..., Any]] = {
    **{name: _mapped(name) for name in (
        "add", "sub", "mul", "max", "min", "pow", "neg", "exp", "exp2", "log", "log1p", "expm1",
        "tanh", "logistic", "abs", "sign", "floor", "ceil", "sqrt", "rsqrt", "sin", "cos", "erf",
        "erfc", "square", "clamp", "eq", "ne", "lt", "le", "gt", "ge",
    )},
    "add_any": _mapped("add"),
    "div": _divide,
    "integer_pow": _integer_pow,
    "polynomial": _polynomial,
    "select_n": _select,
    "convert_element_type": _convert,
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
    "rev": _reverse,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "iota": _iota,
    "reduce_sum": _reduced("add"),
    "reduce_max": _reduced("max"),
    "reduce_min": _reduced("min"),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}  # fmt: skip
