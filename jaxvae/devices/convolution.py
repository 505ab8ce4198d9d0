"""Convolutions that are fast on the current backend.

On a CPU, XLA's convolution is fast inside a loop in one form only: stride 1, and dimensions in the
order NHWC, HWIO, NHWC. The gradients that JAX derives have other forms, which are up to a hundred
times slower there. Here the gradients of a convolution of this form have this form, too, and
everything else is matrix products:

    stride 1, 16 input channels or more    XLA's convolution
    3x3, with 64 x 64 channels or more     Winograd's minimal filtering F(2x2, 3x3), with 2.25
                                           times fewer multiplications
    few output channels                    a product for every tap, then overlap-add
    otherwise                              patches times filters
    transposed                             pixels times filters, then overlap-add

The matrix products use two linear maps, which are transposes of each other: `_taps` splits an image
into strided shifts of itself, and `_overlap_add` adds such shifts up. The derivative of each is
itself, as a primitive whose transpose is the other one. Between them are matrix products and sums,
whose derivatives are matrix products and sums as well. So forward and reverse mode, of any order,
use the same operations. A batch is processed in blocks that fit into the cache.

On every other backend XLA's own convolution is faster, and the whole batch is one block. This also
holds for a batch of symbolic size, as in `jax.export`: an exported program may run anywhere.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_NHWC = ("NHWC", "HWIO", "NHWC")


def backend() -> str:
    """Return the platform on which a computation traced now will run: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()


def block_size(batch: int, params: Any) -> int:
    """Return how many images of a batch to process at once on this backend.

    Args:
      batch: images of the batch.
      params: parameters of the networks. Without convolution filters the whole batch is one block,
        because one large matrix product is faster.

    Returns:
      The number of images per block.
    """
    if _as_xla_does(batch) or not any(x.ndim == 4 for x in jax.tree.leaves(params)):
        return batch
    # One device that runs on all cores needs larger blocks than a device with one core.
    if jax.local_device_count() == 1:
        return min(batch, 16)
    return batch if batch <= 8 else 4


def in_blocks(f: Callable[[Any], Any], batch: Any, size: int) -> Any:
    """Compute f(batch) on `size` rows at a time.

    Args:
      f: a function of a tree of arrays whose result for a row depends on that row only.
      batch: a tree of arrays with the same number of rows.
      size: rows per block, at most.

    Returns:
      f(batch).
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows <= size:
        return f(batch)
    blocks = -(-rows // size)
    size = -(-rows // blocks)
    # All blocks have one size, as a block of another size would be compiled once more. The first
    # rows are computed again where the last block lacks some.
    if missing := blocks * size - rows:
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:missing]]), batch)
    split = jax.tree.map(lambda x: x.reshape(blocks, size, *x.shape[1:]), batch)
    done = lax.map(f, split)
    return jax.tree.map(lambda y: y.reshape(blocks * size, *y.shape[2:])[:rows], done)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Replace `jax.lax.conv_general_dilated`, in `flax.linen.Conv(conv_general_dilated=...)`.

    Dilated, grouped and not two-dimensional convolutions are XLA's on every backend.

    Args:
      lhs: images, [batch, height, width, in].
      rhs: filters, [kernel height, kernel width, in, out].
      window_strides: as in `jax.lax.conv_general_dilated`.
      padding: as in `jax.lax.conv_general_dilated`.
      **options: as in `jax.lax.conv_general_dilated`.

    Returns:
      The convolution, [batch, out height, out width, out].
    """
    dilation = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    plain = (
        lhs.ndim == 4
        and _is_nhwc(options.get("dimension_numbers"))
        and all(d == 1 for d in dilation)
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and options.get("preferred_element_type") is None
    )
    if not plain or _as_xla_does(lhs.shape[0]):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    *kernel, fan_in, fan_out = rhs.shape
    sides = list(zip(lhs.shape[1:3], kernel, window_strides, strict=True))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel, window_strides, padding)
    steps = [
        (n + low + high - k) // stride + 1
        for (n, k, stride), (low, high) in zip(sides, padding, strict=True)
    ]
    if min(steps) < 1:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    low = [low for low, _ in padding]
    window = _Window(_pair(kernel), _pair(window_strides), _pair(low), _pair(steps))
    precision = options.get("precision")
    dot = partial(_dot, precision=precision)
    if window.strides == (1, 1) and 4 * fan_out <= fan_in:
        return _by_taps(lhs, rhs, window, dot)
    exact_enough = lhs.dtype in (jnp.float32, jnp.float64)
    if window.strides == (1, 1) and fan_in >= 16 and exact_enough:
        if window.kernel == (3, 3) and fan_in * fan_out >= 64 * 64:
            return _winograd(lhs, rhs, window, dot)
        return _stride_1(lhs, rhs, tuple(map(_pair, padding)), precision)
    patches = jnp.concatenate(_taps(lhs, window), axis=-1)
    return dot(patches, rhs.reshape(-1, fan_out))


def conv_transpose(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Compute `jax.lax.conv_transpose` with "SAME" padding: each side grows by its stride.

    Args:
      x: images, [batch, height, width, in].
      kernel: filters, [kernel height, kernel width, in, out].
      strides: (down, right).

    Returns:
      The transposed convolution, [batch, height * down, width * right, out].
    """
    if _as_xla_does(x.shape[0]):
        return lax.conv_transpose(x, kernel, strides, "SAME", dimension_numbers=_NHWC)
    *size, fan_in, fan_out = kernel.shape
    # lax.conv_transpose is a correlation with the filter; adding each input pixel's filter into
    # the output, as here, is a convolution: hence the flip.
    filters = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(fan_in, -1)
    products = lax.split(_dot(x, filters), [fan_out] * (size[0] * size[1]), axis=3)
    low = [max(k - stride, 0) // 2 for k, stride in zip(size, strides, strict=True)]
    window = _Window(_pair(size), _pair(strides), _pair(low), _pair(x.shape[1:3]))
    return _overlap_add(products, window, (x.shape[1] * strides[0], x.shape[2] * strides[1]))


def _as_xla_does(batch: int) -> bool:
    """Return whether XLA's own convolution is used: not on a CPU, or a batch of symbolic size."""
    return backend() != "cpu" or not isinstance(batch, int)


class _Window(NamedTuple):
    """The window of a convolution: pairs of (down, right).

    Attributes:
      kernel: size of the filter.
      strides: pixels between two steps.
      low: padding above and to the left.
      steps: number of steps, the size of the output.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    low: tuple[int, int]
    steps: tuple[int, int]

    def taps(self) -> list[tuple[int, int]]:
        """Return the indices (i, j) of the filter's taps, in row-major order."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]


def _taps(x: jax.Array, window: _Window) -> list[jax.Array]:
    """Return, for every tap (i, j) of the filter, the pixels under it at all steps.

        taps[i, j][h, w] = x[stride h + i - low, stride w + j - low],    0 outside x

    Args:
      x: images, [batch, height, width, channels].
      window: window of the convolution.

    Returns:
      A list in the order of `window.taps()`, each [batch, *window.steps, channels].
    """
    return _linear(_apart, _taps_p, window=window, size=_pair(x.shape[1:3]))(x)


def _overlap_add(parts: Sequence[jax.Array], window: _Window, size: tuple[int, int]) -> jax.Array:
    """Compute the transpose of `_taps`: add each part to the pixels that its tap reads.

        out[stride h + i - low, stride w + j - low] += parts[i, j][h, w]

    Args:
      parts: in the order of `window.taps()`, each [batch, *window.steps, channels].
      window: window of the convolution.
      size: height and width of the result; pixels outside are dropped.

    Returns:
      The sum, [batch, *size, channels].
    """
    (image,) = _linear(_together, _overlap_add_p, window=window, size=size)(*parts)
    return image


def _apart(x: jax.Array, *, window: _Window, size: tuple[int, int]) -> list[jax.Array]:
    """Compute `_taps` of images of this size, without its differentiation rules."""
    (down, right), (rows, columns) = window.strides, window.steps
    edges = [
        (low, stride * (n - 1) + k - low - side)
        for side, k, stride, low, n in zip(size, *window, strict=True)
    ]
    # Written into zeros, because XLA would fuse `lax.pad` into every tap and pad each time.
    x = _pad(x, [(min(low, 0), min(high, 0)) for low, high in edges])
    (top, bottom), (left, right_edge) = ((max(low, 0), max(high, 0)) for low, high in edges)
    if top or bottom or left or right_edge:
        shape = (x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right_edge, x.shape[3])
        x = lax.dynamic_update_slice(jnp.zeros(shape, x.dtype), x, (0, top, left, 0))
    return [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i, j in window.taps()
    ]


def _together(*parts: jax.Array, window: _Window, size: tuple[int, int]) -> list[jax.Array]:
    """Compute `_overlap_add`, without its differentiation rules."""
    (down, right), (rows, columns) = window.strides, window.steps
    height, width = (-(-n // stride) for n, stride in zip(size, window.strides, strict=True))

    def phase(p: int, q: int) -> jax.Array:
        """Return the pixels whose indices are p and q modulo the strides: they use equal taps."""
        seen = []
        for (i, j), part in zip(window.taps(), parts, strict=True):
            y, x = i - window.low[0] - p, j - window.low[1] - q
            if y % down == x % right == 0:
                top, left = y // down, x // right
                edges = [(top, height - top - rows), (left, width - left - columns)]
                seen.append(_pad(part, edges))
        shape = (parts[0].shape[0], height, width, parts[0].shape[-1])
        return reduce(jnp.add, seen) if seen else jnp.zeros(shape, parts[0].dtype)

    rows_of_phases = [jnp.stack([phase(p, q) for q in range(right)], axis=3) for p in range(down)]
    image = jnp.stack(rows_of_phases, axis=2)
    image = image.reshape(image.shape[0], height * down, width * right, image.shape[-1])
    return [image[:, : size[0], : size[1]]]


def _linear(
    f: Callable[..., list[jax.Array]], p: Primitive, **static: Any
) -> Callable[..., list[jax.Array]]:
    """Return f, whose derivative is computed by the primitive p of it.

    The values are not computed by p, as converters of traced functions do not know it.
    """
    call = jax.custom_jvp(partial(f, **static))
    call.defjvp(lambda x, tangents: (call(*x), p.bind(*tangents, **static)))
    return call


def _primitive(f: Callable[..., list[jax.Array]]) -> Primitive:
    """Make a primitive of a map of images, which treats every image of the batch alone."""
    p = Primitive(f.__name__.strip("_"))
    p.multiple_results = True

    def shapes(*x: Any, **static: Any) -> Any:
        return jax.make_jaxpr(partial(f, **static))(*x).out_avals

    def batched(x: Sequence[jax.Array], axes: Sequence[int | None], **static: Any) -> Any:
        """Append the axis of a `vmap` to the batch."""
        (n,) = {y.shape[axis] for y, axis in zip(x, axes, strict=True) if axis is not None}
        x = [batching.bdim_at_front(y, axis, n) for y, axis in zip(x, axes, strict=True)]
        rows = x[0].shape[1]
        out = p.bind(*[y.reshape(n * rows, *y.shape[2:]) for y in x], **static)
        return [y.reshape(n, rows, *y.shape[1:]) for y in out], [0] * len(out)

    p.def_impl(jax.jit(f, static_argnames=("window", "size")))
    p.def_abstract_eval(shapes)
    batching.primitive_batchers[p] = batched
    mlir.register_lowering(p, mlir.lower_fun(f, multiple_results=True))
    return p


def _transpose(p: Primitive, cotangents: Sequence[Any], **static: Any) -> list[jax.Array]:
    """Apply p, which is the transpose of the primitive whose cotangents are given."""
    out: list[jax.Array] = p.bind(*map(ad.instantiate_zeros, cotangents), **static)
    return out


# XLA's own transposes of strided slices are scatter-adds, which are several times slower.
_taps_p, _overlap_add_p = _primitive(_apart), _primitive(_together)
ad.deflinear(_taps_p, partial(_transpose, _overlap_add_p))
ad.deflinear(_overlap_add_p, partial(_transpose, _taps_p))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _stride_1(x: jax.Array, kernel: jax.Array, padding: Any, precision: Any) -> jax.Array:
    """Compute XLA's convolution with stride 1, with gradients of the same form."""
    return _xla_stride_1(x, kernel, padding=padding, precision=precision)


@_stride_1.defjvp
def _stride_1_jvp(padding: Any, precision: Any, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    bind = partial(_stride_1_p.bind, padding=padding, precision=precision)
    return _stride_1(x, kernel, padding, precision), bind(dx, kernel) + bind(x, dkernel)


def _xla_stride_1(x: jax.Array, kernel: jax.Array, *, padding: Any, precision: Any) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=_NHWC, precision=precision
    )


def _to_images(y: jax.Array, x: Any, kernel: jax.Array, *, padding: Any, precision: Any) -> Any:
    """Transpose with respect to the images: a convolution with the mirrored filters.

    x[h, w, c] = sum_ijk y[h + low - i, w + low - j, k] kernel[i, j, c, k]
    """
    edges = [
        (k - 1 - low, n - steps + low)
        for n, steps, k, (low, _) in zip(
            x.aval.shape[1:3], y.shape[1:3], kernel.shape[:2], padding, strict=True
        )
    ]
    mirrored = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _stride_1_p.bind(y, mirrored, padding=tuple(edges), precision=precision)


def _to_filters(y: jax.Array, x: jax.Array, kernel: Any, *, padding: Any, precision: Any) -> Any:
    """Transpose with respect to the filters: a convolution of channels, summed over the batch.

    kernel[i, j, c, k] = sum_nhw x[n, h + i - low, w + j - low, c] y[n, h, w, k]
    """
    images, filters = x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)
    sums = _stride_1_p.bind(images, filters, padding=padding, precision=precision)
    return sums.transpose(1, 2, 0, 3)


def _batched_stride_1(args: Sequence[jax.Array], axes: Sequence[int | None], **static: Any) -> Any:
    """Append the axis of a `vmap` to the batch, unless there are filters for each of its rows."""
    if axes[0] is None or axes[1] is not None:
        return jax.vmap(partial(_xla_stride_1, **static), axes)(*args), 0
    x = jnp.moveaxis(args[0], axes[0], 0)
    y = _stride_1_p.bind(x.reshape(-1, *x.shape[2:]), args[1], **static)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


_stride_1_p = Primitive("stride_1")
_stride_1_p.def_impl(jax.jit(_xla_stride_1, static_argnames=("padding", "precision")))
_stride_1_p.def_abstract_eval(
    lambda *x, **static: jax.make_jaxpr(partial(_xla_stride_1, **static))(*x).out_avals[0]
)
ad.defbilinear(_stride_1_p, _to_images, _to_filters)
batching.primitive_batchers[_stride_1_p] = _batched_stride_1
mlir.register_lowering(_stride_1_p, mlir.lower_fun(_xla_stride_1, multiple_results=False))


# Winograd's minimal filtering F(2x2, 3x3), Lavin and Gray (2016), Fast Algorithms for
# Convolutional Neural Networks, equations 9 to 12: with d a 4x4 tile of the input, g a filter
# and the products summed over the input channels,
#     Y = A^T [(G g G^T) * (B^T d B)] A
_B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


def _winograd(x: jax.Array, kernel: jax.Array, window: _Window, dot: Any) -> jax.Array:
    """Compute a 3x3 convolution with stride 1, in tiles of 2x2 output pixels."""
    fan_in, fan_out = kernel.shape[2:]
    tiles = _pair([-(-n // 2) for n in window.steps])
    d = _taps(x, _Window((4, 4), (2, 2), window.low, tiles))
    g = [tap[0] for tap in lax.split(kernel.reshape(9, fan_in, fan_out), [1] * 9)]
    products = [dot(v, u) for v, u in zip(_both_sides(_B_T, d), _both_sides(_G, g), strict=True)]
    return _overlap_add(
        _both_sides(_A_T, products), _Window((2, 2), (2, 2), (0, 0), tiles), window.steps
    )


def _both_sides(matrix: np.ndarray, x: Sequence[jax.Array]) -> list[jax.Array]:
    """Compute M X M^T for a matrix X of arrays, both in row-major order."""
    k = matrix.shape[1]

    def times(column: Sequence[jax.Array]) -> list[jax.Array]:
        return [_combination(row, column) for row in matrix]

    columns = [times(x[j::k]) for j in range(k)]
    return [y for i in range(len(matrix)) for y in times([column[i] for column in columns])]


def _combination(weights: np.ndarray, x: Sequence[jax.Array]) -> jax.Array:
    """Compute a weighted sum of arrays, without multiplications by 0, 1 or -1."""
    terms = [(w, y) for w, y in zip(weights.tolist(), x, strict=True) if w]
    (weight, first), *rest = terms
    total = first if weight == 1 else weight * first
    for weight, y in rest:
        total = total + y if weight == 1 else total - y if weight == -1 else total + weight * y
    return total


def _by_taps(x: jax.Array, kernel: jax.Array, window: _Window, dot: Any) -> jax.Array:
    """Compute a convolution with stride 1 and few output channels, by a product for every tap."""
    batch, *size, fan_in = x.shape
    taps, fan_out = len(window.taps()), kernel.shape[3]
    filters = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(fan_in, -1)
    # With the taps in front, the additions run along rows of pixels. The barrier keeps XLA from
    # transposing x instead of the much smaller products.
    products = jnp.moveaxis(lax.optimization_barrier(dot(x, filters)), 3, 0)
    parts = lax.split(products.reshape(-1, *size, 1), [fan_out * batch] * taps)
    # From input to output the taps are in reverse order: hence the flip.
    low = [k - 1 - low for k, low in zip(window.kernel, window.low, strict=True)]
    mirrored = _Window(window.kernel, (1, 1), _pair(low), _pair(size))
    out = _overlap_add(parts, mirrored, window.steps)
    return jnp.moveaxis(out.reshape(fan_out, batch, *window.steps), 0, -1)


def _dot(x: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """Compute x @ matrix over the last axis, as one matrix product."""
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
    return product.reshape(*x.shape[:-1], -1)


def _pad(x: jax.Array, edges: Sequence[tuple[int, int]]) -> jax.Array:
    """Pad height and width with zeros; unlike `jnp.pad`, a negative number crops."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in edges), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _is_nhwc(numbers: Any) -> bool:
    """Return whether dimension numbers, in Flax's or lax's form, mean NHWC, HWIO, NHWC."""
    if isinstance(numbers, lax.ConvDimensionNumbers):
        spec = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, _NHWC)
        return numbers == spec
    return numbers == _NHWC
