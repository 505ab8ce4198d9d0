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
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvae.errors import InputError
from jaxvae.figures.grid import decode_coordinates
from jaxvae.interchange.jaxpr import RULES, Array, Translation, padded
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
    work = _Translation("decoder")
    inputs = [work.new(v.aval.shape) for v in traced.jaxpr.invars]
    (output,) = work.inline(traced.jaxpr, traced.consts, inputs)
    return work.finished([x.number for x in inputs], output.number)


def _divide(work: "_Translation", equation: Any, x: Array, y: Array) -> Array:
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        raise work.unsupported(equation, " on integers")
    return work.map("div", x, y)


def _conv(work: "_Translation", equation: Any, x: Array, kernel: Array) -> Array:
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
          "stop_gradient", "gather")  # fmt: skip


class _Translation(Translation):
    target = "the explorer"
    functions = frozenset((
        "add", "sub", "mul", "max", "min", "pow", "neg", "exp", "exp2", "log", "log1p", "expm1",
        "tanh", "logistic", "abs", "sign", "floor", "ceil", "sqrt", "rsqrt", "sin", "cos", "erf",
        "erfc", "square", "clamp", "eq", "ne", "lt", "le", "gt", "ge",
    ))  # fmt: skip
    rules: ClassVar = {**RULES, "div": _divide, "conv_general_dilated": _conv}

    def map(self, name: str, *given: Array) -> Array:
        shape = np.broadcast_shapes(*(x.shape for x in given))
        return self.emit("map", [self.broadcast(x, shape) for x in given], shape, f=name)

    def convert(self, x: Array, dtype: Any) -> Array:
        if dtype == jnp.bool_:
            return self.map("ne", x, self.constant(0.0))
        if jnp.issubdtype(dtype, jnp.integer):
            return self.map("trunc", x)
        if dtype in (jnp.float32, jnp.bfloat16):  # results in bfloat16 are rounded in `primitive`
            return x
        raise InputError(
            f"the decoder has numbers of type {jnp.dtype(dtype).name}: expected float32 or bfloat16"
        )

    def view(
        self, x: Array, shape: Sequence[int], strides: Sequence[int], offset: int = 0
    ) -> Array:
        if offset == 0 and tuple(shape) == x.shape and list(strides) == _strides(shape):
            return x
        return self.emit("view", [x], shape, shape=_ints(shape), strides=_ints(strides),
                         offset=int(offset))  # fmt: skip

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x._replace(shape=tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        strides = _strides(x.shape)
        return self.view(x, [x.shape[a] for a in axes], [strides[a] for a in axes])

    def broadcast(self, x: Array, shape: Sequence[int]) -> Array:
        if math.prod(shape) == math.prod(x.shape):
            return self.reshape(x, shape)
        strides = [0] * (len(shape) - len(x.shape)) + _strides(x.shape)
        sides = [1] * (len(shape) - len(x.shape)) + list(x.shape)
        kept = [0 if side == 1 else s for side, s in zip(sides, strides, strict=True)]
        return self.view(x, shape, kept)

    def slice(
        self, x: Array, first: Sequence[int], last: Sequence[int], steps: Sequence[int]
    ) -> Array:
        strides = _strides(x.shape)
        shape = [-(-(b - a) // step) for a, b, step in zip(first, last, steps, strict=True)]
        moved = [s * step for s, step in zip(strides, steps, strict=True)]
        offset = sum(int(a) * s for a, s in zip(first, strides, strict=True))
        return self.view(x, shape, moved, offset)

    def reverse(self, x: Array, axes: Sequence[int]) -> Array:
        strides, offset = _strides(x.shape), 0
        for axis in axes:
            offset += (x.shape[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
        return self.view(x, x.shape, strides, offset)

    def place(
        self, fill: Array, parts: Sequence[Array], wheres: Sequence[Any], shape: Sequence[int]
    ) -> Array:
        """Fill a buffer with `fill`, then write each part at its offset with its strides."""
        laid = [
            {"shape": _ints(x.shape), "strides": _ints(strides), "offset": int(offset)}
            for x, (offset, strides) in zip(parts, wheres, strict=True)
        ]
        return self.emit("place", [fill, *parts], shape, parts=laid)

    def pad(self, x: Array, fill: Array, edges: Sequence[tuple[int, int, int]]) -> Array:
        shape = padded(x.shape, edges)
        first, last, offset, strides = [], [], 0, []
        for n, side, stride, (low, _, between) in zip(
            x.shape, shape, _strides(shape), edges, strict=True
        ):
            step = between + 1
            # Negative padding crops.
            first.append(min(n, max(0, -(low // step))))
            last.append(max(first[-1], min(n, -(-(side - low) // step))))
            offset += (low + first[-1] * step) * stride
            strides.append(step * stride)
        kept = self.slice(x, first, last, [1] * len(first))
        return self.place(fill, [kept], [(offset, strides)], shape)

    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        shape = list(parts[0].shape)
        shape[axis] = sum(x.shape[axis] for x in parts)
        strides = _strides(shape)
        starts = np.cumsum([0, *(x.shape[axis] for x in parts[:-1])])
        wheres = [(start * strides[axis], strides) for start in starts]
        return self.place(self.constant(0.0), parts, wheres, shape)

    def reduce(self, name: str, x: Array, axes: Sequence[int], shape: Sequence[int]) -> Array:
        kept = [axis for axis in range(len(x.shape)) if axis not in axes]
        inner = math.prod(x.shape[axis] for axis in axes)
        return self.emit("reduce", [self.transpose(x, [*kept, *axes])], shape, f=name, inner=inner)

    def dot(self, x: Array, y: Array, sizes: Sequence[int], shape: Sequence[int]) -> Array:
        batch, m, k, n = sizes
        return self.emit("dot", [x, y], shape, batch=batch, m=m, k=k, n=n)

    def primitive(self, equation: Any, given: list[Array]) -> list[Array]:
        """Round results in bfloat16."""
        results = super().primitive(equation, given)
        if equation.primitive.name in _MOVES:
            return results
        return [
            self.map("bfloat16", x) if v.aval.dtype == jnp.bfloat16 else x
            for x, v in zip(results, equation.outvars, strict=True)
        ]

    def finished(self, inputs: list[int], output: int) -> Program:
        """Keep what the output depends on, and number the constants first."""
        kept, needed = self.needed([output])
        constants = [r for r in self.constants if r in needed]
        others = [x.number for x in self.arrays
                  if x.number not in self.constants and x.number in {*needed, *inputs}]  # fmt: skip
        number = {register: i for i, register in enumerate([*constants, *others])}
        return Program(
            [self.constants[r].astype(np.float32).ravel() for r in constants],
            [math.prod(self.arrays[r].shape) for r in number],
            [number[r] for r in inputs],
            number[output],
            [
                {"kind": kind, "in": [number[r] for r in given], "out": number[out], **how}
                for kind, how, given, out in kept
            ],
        )


def _ints(values: Sequence[int]) -> list[int]:
    return [int(n) for n in values]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]
