"""Translation of a function to ONNX.

JAX traces the function with a symbolic batch size, and `jaxvae.interchange.jaxpr` walks over its
equations. The operators are those of opset 18, and the types are JAX's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
import onnx
from jax import export, lax
from onnx import helper, numpy_helper

from jaxvae.errors import InputError
from jaxvae.interchange.jaxpr import RULES, Array, Translation, gather, padded

# Of 2022, so that older programs read the files too.
_OPSET, _IR_VERSION = 18, 8
_END = 2**63 - 1  # of a slice that takes all the rest


def to_onnx(
    name: str,
    function: Callable[..., Any],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
) -> bytes:
    """Translate a function of a batch to ONNX.

    Args:
      name: name of the function.
      function: a function of arrays [batch, ...], which returns an array or several.
      inputs: the arguments by name: shape of one row, and type.
      outputs: names of the results.

    Returns:
      The content of the file.

    Raises:
      InputError: the function has an operation that cannot be translated.
    """
    (batch,) = export.symbolic_shape("batch")
    rows = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in inputs.values()]
    traced = jax.make_jaxpr(function)(*rows)
    work = _Translation(name, batch)
    given = [work.new(x.shape) for x in rows]
    results = work.inline(traced.jaxpr, traced.consts, given)
    operations, needed = work.needed([x.number for x in results])

    names = {x.number: f"x{x.number}" for x in work.arrays}
    names |= {x.number: own for x, own in zip(given, inputs, strict=True)}
    nodes = [
        helper.make_node(kind, [names[x] for x in of], [names[out]], **how)
        for kind, how, of, out in operations
    ]
    nodes += [
        helper.make_node("Identity", [names[x.number]], [own])
        for x, own in zip(results, outputs, strict=True)
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [_described(own, x) for own, x in zip(inputs, rows, strict=True)],
        [_described(own, x) for own, x in zip(outputs, traced.out_avals, strict=True)],
        [
            numpy_helper.from_array(np.ascontiguousarray(value), names[number])
            for number, value in work.constants.items()
            if number in needed
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="jaxvae",
    )
    content: bytes = model.SerializeToString()
    return content


def _described(name: str, x: Any) -> onnx.ValueInfoProto:
    shape = [n if isinstance(n, int) else str(n) for n in x.shape]
    return helper.make_tensor_value_info(name, _type(x.dtype), shape)


def _type(dtype: Any) -> int:
    number: int = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return number


def _one(work: "_Translation", equation: Any) -> Array:
    return work.constant(np.ones((), equation.invars[0].aval.dtype))


def _rsqrt(work: "_Translation", equation: Any, x: Array) -> Array:
    return work.map("div", _one(work, equation), work.map("sqrt", x))


def _exp2(work: "_Translation", equation: Any, x: Array) -> Array:
    one = _one(work, equation)
    return work.map("pow", work.map("add", one, one), x)


def _one_and_half(work: "_Translation", equation: Any, x: Array) -> tuple[Array, Array]:
    one = _one(work, equation)
    return one, work.map("div", x, work.map("add", one, one))


def _expm1(work: "_Translation", equation: Any, x: Array) -> Array:
    """Compute e^x - 1 = tanh(x / 2) (e^x + 1), which does not cancel at small x."""
    one, half = _one_and_half(work, equation, x)
    return work.map("mul", work.map("tanh", half), work.map("add", work.map("exp", x), one))


def _log1p(work: "_Translation", equation: Any, x: Array) -> Array:
    """Compute log(1 + x) = arsinh(x / 2 (1 + 1 / (1 + x))), which does not cancel at small x."""
    one, half = _one_and_half(work, equation, x)
    inverse = work.map("div", one, work.map("add", one, x))
    return work.map("asinh", work.map("mul", half, work.map("add", one, inverse)))


def _erfc(work: "_Translation", equation: Any, x: Array) -> Array:
    return work.map("sub", _one(work, equation), work.map("erf", x))


def _round(work: "_Translation", equation: Any, x: Array) -> Array:
    if equation.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise work.unsupported(equation, " half away from zero")
    return work.emit("Round", [x], x.shape)


def _is_finite(work: "_Translation", equation: Any, x: Array) -> Array:
    """Compute x - x, which is 0, or NaN for others, and compare it with itself."""
    zero = work.map("sub", x, x)
    return work.map("eq", zero, zero)


def _rem(work: "_Translation", equation: Any, x: Array, y: Array) -> Array:
    return work.emit("Mod", [x, y], lax.broadcast_shapes(x.shape, y.shape), fmod=1)


def _index_of(kind: str) -> Callable[..., Array]:
    def rule(work: "_Translation", equation: Any, x: Array) -> Array:
        (axis,), out = equation.params["axes"], equation.outvars[0].aval
        return work.convert(work.emit(kind, [x], out.shape, axis=axis, keepdims=0), out.dtype)

    return rule


def _gather(work: "_Translation", equation: Any, x: Array, index: Array) -> Array:
    """Look up rows along an axis, as in x[:, index], or slice at a constant, as in x[:, 1]."""
    how, rank = equation.params, len(index.shape) - 1
    numbers, shape = how["dimension_numbers"], equation.outvars[0].aval.shape
    axis = numbers.start_index_map[0]
    along = lax.GatherDimensionNumbers(
        offset_dims=(*range(axis), *range(axis + rank, len(shape))),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    whole = tuple(how["slice_sizes"]) == (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    if numbers != along or not whole or (rank == 0 and index.number in work.constants):
        return gather(work, equation, x, index)
    if how["mode"] == lax.GatherScatterMode.CLIP:
        first, last = (work.constant(np.int32(i)) for i in (0, x.shape[axis] - 1))
        index = work.map("min", work.map("max", index, first), last)
    return work.emit("Gather", [x, work.reshape(index, index.shape[:-1])], shape, axis=axis)


def _pool(kind: str) -> Callable[..., Array]:
    def rule(work: "_Translation", equation: Any, x: Array) -> Array:
        """Translate a pooling of all axes but the first and the last, with channels in front."""
        how = equation.params
        window, strides, edges = (
            how[key] for key in ("window_dimensions", "window_strides", "padding")
        )
        spread = {*how["base_dilation"], *how["window_dilation"]}
        if len(x.shape) < 3 or window[0] != 1 or window[-1] != 1 or spread != {1}:
            raise work.unsupported(equation, f" of a window {window}")
        last = len(x.shape) - 1
        front, back = [0, last, *range(1, last)], [0, *range(2, last + 1), 1]
        shape = [equation.outvars[0].aval.shape[axis] for axis in front]
        y = work.emit(
            kind, [work.transpose(x, front)], shape, kernel_shape=window[1:-1],
            strides=strides[1:-1], pads=np.transpose(edges[1:-1]).ravel().tolist(),
            **({"count_include_pad": 1} if kind == "AveragePool" else {}),
        )  # fmt: skip
        if kind == "AveragePool":  # times the number of pixels, the sum
            size = np.asarray(math.prod(window), equation.outvars[0].aval.dtype)
            y = work.map("mul", y, work.constant(size))
        return work.transpose(y, back)

    return rule


def _conv(work: "_Translation", equation: Any, x: Array, kernel: Array) -> Array:
    """Translate a convolution, with channels before height and width."""
    how = equation.params
    numbers, edges = how["dimension_numbers"], how["padding"]
    strides, spread, reach = (
        list(how[key]) for key in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    if how["batch_group_count"] != 1:
        raise work.unsupported(equation, " with batch_group_count")
    zero = work.constant(np.zeros((), equation.invars[0].aval.dtype))
    x = work.transpose(x, numbers.lhs_spec)
    kernel = work.transpose(kernel, numbers.rhs_spec)
    shape = [equation.outvars[0].aval.shape[axis] for axis in numbers.out_spec]
    sides = range(2, len(shape))
    if max(spread) > 1 and max(strides) == how["feature_group_count"] == 1:
        filters = work.transpose(work.reverse(kernel, sides), [1, 0, *sides])
        # Its padding crops. Where nothing is to be cropped, there are zeros.
        crops = [
            [(k - 1) * r - edge for edge in pair]
            for k, r, pair in zip(kernel.shape[2:], reach, edges, strict=True)
        ]
        zeros = [(0, 0, 0)] * 2 + [(max(-low, 0), max(-high, 0), 0) for low, high in crops]
        inner = [n - low - high for n, (low, high, _) in zip(shape, zeros, strict=True)]
        pads = [max(crop, 0) for crops_of in zip(*crops, strict=True) for crop in crops_of]
        y = work.emit("ConvTranspose", [x, filters], inner, strides=spread, dilations=reach,
                      pads=pads)  # fmt: skip
        y = work.pad(y, zero, zeros)
    else:
        inside = [
            (min(low, 0), min(high, 0), n - 1) for (low, high), n in zip(edges, spread, strict=True)
        ]
        x = work.pad(x, zero, [(0, 0, 0)] * 2 + inside)
        pads = [max(edge, 0) for side in zip(*edges, strict=True) for edge in side]
        y = work.emit("Conv", [x, kernel], shape, strides=strides, dilations=reach, pads=pads,
                      group=how["feature_group_count"])  # fmt: skip
    return work.transpose(y, np.argsort(numbers.out_spec).tolist())


# The elementwise primitives that are one operator.
_OPERATORS = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "pow": "Pow", "neg": "Neg", "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "erf": "Erf", "logistic": "Sigmoid",
    "tanh": "Tanh", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh",
    "atanh": "Atanh", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos",
    "atan": "Atan", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor", "not": "Not",
    "select": "Where",
}  # fmt: skip


class _Translation(Translation):
    target = "the export to ONNX"
    functions = frozenset(_OPERATORS)
    rules: ClassVar = {
        **RULES,
        "ne": lambda work, equation, *given: work.map("not", work.map("eq", *given)),
        "clamp": lambda work, _, least, x, most: work.map("min", work.map("max", x, least), most),
        "square": lambda work, _, x: work.map("mul", x, x),
        "rsqrt": _rsqrt,
        "exp2": _exp2,
        "expm1": _expm1,
        "log1p": _log1p,
        "erfc": _erfc,
        "round": _round,
        "is_finite": _is_finite,
        "rem": _rem,
        "argmax": _index_of("ArgMax"),
        "argmin": _index_of("ArgMin"),
        "gather": _gather,
        "reduce_window_max": _pool("MaxPool"),
        "reduce_window_sum": _pool("AveragePool"),
        "conv_general_dilated": _conv,
    }

    def __init__(self, part: str, batch: Any) -> None:
        super().__init__(part)
        self.batch = batch  # the symbolic size

    def map(self, name: str, *given: Array) -> Array:
        if name == "select":
            which, no, yes = given
            given = which, yes, no
        return self.emit(_OPERATORS[name], given, lax.broadcast_shapes(*(x.shape for x in given)))

    def convert(self, x: Array, dtype: Any) -> Array:
        return self.emit("Cast", [x], x.shape, to=_type(dtype))

    def integers(self, values: Sequence[int]) -> Array:
        return self.constant(np.array(values, np.int64))

    def size(self, n: Any) -> Array:
        """Return a side of a shape as an array [1]."""
        if isinstance(n, int):
            return self.integers([n])
        factor, rest = divmod(n, self.batch)
        if not isinstance(factor, int) or not isinstance(rest, int) or rest:
            raise InputError(
                f"the {self.part} has an array with a side of {n}, which {self.target} does not "
                "support: expected numbers and multiples of the batch size"
            )
        batch = self.emit("Shape", [self.arrays[0]], [1], start=0, end=1)
        return self.map("mul", batch, self.integers([factor]))

    def shape(self, sides: Sequence[Any]) -> Array:
        """Return a shape as an array."""
        if all(isinstance(n, int) for n in sides):
            return self.integers(sides)
        return self.emit("Concat", [self.size(n) for n in sides], [len(sides)], axis=0)

    def reshape(self, x: Array, shape: Sequence[Any]) -> Array:
        if tuple(shape) == x.shape:
            return x
        if x.number in self.constants:
            return self.constant(self.constants[x.number].reshape(shape))
        unknown = [n for n in shape if not isinstance(n, int)]
        sides = [-1 if [n] == unknown else n for n in shape]
        return self.emit("Reshape", [x, self.shape(sides)], shape)

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        if list(axes) == sorted(axes):
            return x
        if x.number in self.constants:
            return self.constant(self.constants[x.number].transpose(axes))
        return self.emit("Transpose", [x], [x.shape[a] for a in axes], perm=list(axes))

    def broadcast(self, x: Array, shape: Sequence[Any]) -> Array:
        if tuple(shape) == x.shape:
            return x
        own = [1] * (len(shape) - len(x.shape)) + list(x.shape)
        # `Expand` leaves a side as it is where 1 is asked for.
        sides = [1 if a == n else n for a, n in zip(own, shape, strict=True)]
        return self.emit("Expand", [x, self.shape(sides)], shape)

    def slice(
        self, x: Array, first: Sequence[Any], last: Sequence[Any], steps: Sequence[int]
    ) -> Array:
        axes = [
            axis
            for axis, (a, b, step, n) in enumerate(zip(first, last, steps, x.shape, strict=True))
            if a != 0 or b != n or step != 1
        ]
        if not axes:
            return x
        ends = [_END if last[axis] == x.shape[axis] else last[axis] for axis in axes]
        how = [first[axis] for axis in axes], ends, axes, [steps[axis] for axis in axes]
        shape = [-(-(b - a) // step) for a, b, step in zip(first, last, steps, strict=True)]
        return self.emit("Slice", [x, *map(self.shape, how)], shape)

    def reverse(self, x: Array, axes: Sequence[int]) -> Array:
        if x.number in self.constants:
            return self.constant(np.flip(self.constants[x.number], tuple(axes)))
        back = [-1] * len(axes)
        how = back, [-_END] * len(axes), axes, back
        return self.emit("Slice", [x, *map(self.integers, how)], x.shape)

    def pad(self, x: Array, fill: Array, edges: Sequence[tuple[int, int, int]]) -> Array:
        edges = list(edges)
        for axis, (low, high, between) in enumerate(edges):
            if between:  # after each element, also the last one
                before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
                alone = [(0, 0, 0)] * len(before) + [(0, between, 0)] + [(0, 0, 0)] * len(after)
                x = self.pad(self.reshape(x, (*before, 1, *after)), fill, alone)
                x = self.reshape(x, (*before[:-1], before[-1] * (between + 1), *after))
                edges[axis] = low, high - between, 0
        if not any(map(any, edges)):
            return x
        pads = [edge[0] for edge in edges] + [edge[1] for edge in edges]
        return self.emit("Pad", [x, self.integers(pads), fill], padded(x.shape, edges))

    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        shape = list(parts[0].shape)
        shape[axis] = sum(x.shape[axis] for x in parts)
        return self.emit("Concat", parts, shape, axis=axis)

    def reduce(self, name: str, x: Array, axes: Sequence[int], shape: Sequence[Any]) -> Array:
        if not axes:
            return x
        kind = {"add": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin"}[name]
        return self.emit(kind, [x, self.integers(axes)], shape, keepdims=0)

    def dot(self, x: Array, y: Array, sizes: Sequence[Any], shape: Sequence[Any]) -> Array:
        batch, m, k, n = sizes
        lead = [] if batch == 1 else [batch]
        x, y = self.reshape(x, [*lead, m, k]), self.reshape(y, [*lead, k, n])
        return self.reshape(self.emit("MatMul", [x, y], [*lead, m, n]), shape)
