"""Convolutions carried out the way this backend is fast at.

On a CPU, XLA's convolutions, and above all their gradients with respect to the filters, are
several times slower than the machine's matrix product. Written as shifted slices and one matrix
product, a convolution differentiates into matrix products too. Its patches take nine times
(3x3) the memory of its input, so batches are worked through in blocks that stay in cache. On
every other backend XLA's own convolution is the fast one, and the whole batch is one block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")


def backend() -> str:
    """The platform that a computation traced now will run on: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()


def block_size(batch: int) -> int:
    """How many images of a batch to work through at once on this backend."""
    return min(batch, 8) if backend() == "cpu" else batch


def in_blocks(f: Callable[[Any], Any], batch: Any, size: int | None = None) -> Any:
    """f(batch), `size` rows at a time; f treats every row on its own."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    size = min(rows, size) if size else block_size(rows)
    whole = rows // size * size
    if rows == size:
        return f(batch)
    split = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), batch)
    done = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), lax.map(f, split))
    if whole == rows:
        return done
    rest = f(jax.tree.map(lambda x: x[whole:], batch))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), done, rest)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv(conv_general_dilated=...)`.

    Args:
      lhs: images, [batch, height, width, in].
      rhs: filters, [kernel height, kernel width, in, out].
      window_strides, padding, **options: as of `jax.lax.conv_general_dilated`.
    Returns:
      [batch, out height, out width, out].

    Dilated, grouped and other than two-dimensional convolutions are XLA's on every backend.
    """
    dilation = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    plain = (
        lhs.ndim == 4
        and _is_nhwc(options.get("dimension_numbers"))
        and all(d == 1 for d in dilation)
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and options.get("preferred_element_type") is None
    )
    if not plain or backend() != "cpu":
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    pads = (
        lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        if isinstance(padding, str)
        else padding
    )
    edges = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)  # unlike jnp.pad, crops too
    *kernel, fan_in, fan_out = rhs.shape
    size = tuple(
        (n - k) // s + 1 for n, k, s in zip(lhs.shape[1:3], kernel, window_strides, strict=True)
    )
    if min(size) < 1:
        return lax.conv_general_dilated(lhs, rhs, window_strides, "VALID", **options)

    def shifted(x: jax.Array, i: int, j: int) -> jax.Array:
        """The pixel that filter tap (i, j) meets, for every output pixel."""
        (height, width), (down, right) = size, window_strides
        rows = slice(i, i + (height - 1) * down + 1, down)
        return x[:, rows, j : j + (width - 1) * right + 1 : right]

    taps = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    precision = options.get("precision")
    # Whichever side has fewer channels is the one that is repeated for every tap.
    if 4 * fan_out <= fan_in:
        products = jnp.einsum("nhwi,klio->nhwklo", lhs, rhs, precision=precision)
        return sum(shifted(products, i, j)[:, :, :, i, j] for i, j in taps)  # type: ignore[return-value]
    patches = jnp.concatenate([shifted(lhs, i, j) for i, j in taps], axis=-1)
    product = jnp.matmul(
        patches.reshape(-1, patches.shape[-1]), rhs.reshape(-1, fan_out), precision=precision
    )
    return product.reshape(-1, *size, fan_out)


def conv_transpose(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """`jax.lax.conv_transpose` with "SAME" padding: each side grows by its stride.

    Args:
      x: [batch, height, width, in].
      kernel: [kernel height, kernel width, in, out].
      strides: (down, right).
    Returns:
      [batch, height * down, width * right, out].
    """
    if backend() != "cpu":
        return lax.conv_transpose(x, kernel, strides, "SAME", dimension_numbers=_NHWC)
    # lax.conv_transpose correlates with the filter as it lies; adding each input pixel's
    # filter into the output, as below, convolves: hence the flip.
    products = jnp.einsum("nhwi,klio->nhwklo", x, kernel[::-1, ::-1])
    return _overlap_add(_overlap_add(products, 1, strides[0]), 2, strides[1])


def _overlap_add(x: jax.Array, axis: int, stride: int) -> jax.Array:
    """out[stride * i + k] += x[i, k], i along `axis` and k along axis 3, cropped as "SAME" is."""
    length, kernel = x.shape[axis], x.shape[3]
    low = max(kernel - stride, 0) // 2
    taps = jnp.moveaxis(x, 3, 0)
    # Output pixels of one residue modulo the stride all see the same taps.
    reach = -(-(low + stride * length) // stride)
    shape = list(taps.shape[1:])
    shape[axis] = reach
    phases = []
    for residue in range(stride):
        total = jnp.zeros(shape, x.dtype)
        for shift, tap in enumerate(taps[residue::stride]):
            edges = [(0, 0, 0)] * tap.ndim
            edges[axis] = (shift, reach - length - shift, 0)
            total += lax.pad(tap, jnp.zeros((), x.dtype), edges)
        phases.append(total)
    shape[axis] *= stride
    out = jnp.stack(phases, axis=axis + 1).reshape(shape)
    return lax.slice_in_dim(out, low, low + stride * length, axis=axis)


def _is_nhwc(numbers: Any) -> bool:
    """Whether flax's or lax's spelling of the dimension numbers means NHWC, HWIO, NHWC."""
    if isinstance(numbers, lax.ConvDimensionNumbers):
        spec = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, _NHWC)
        return numbers == spec
    return numbers == _NHWC
