"""Functions whose translations from JAX are tested: of the explorer and of the export to ONNX."""

import jax
import jax.numpy as jnp
import numpy as np

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
FUNCTIONS = {
    "pad, also by less than nothing": lambda x: jax.lax.pad(
        x, jnp.float32(7), [(1, 2, 1), (-1, 0, 0), (2, -3, 2)]
    ),
    "crop into what lies between": lambda x: jax.lax.pad(
        x, jnp.float32(7), [(-1, -1, 1), (-2, 1, 2), (-3, 0, 1)]
    ),
    "reverse and slice in strides": lambda x: x[:, ::-1, 1::2],
    "transpose": lambda x: jnp.transpose(x, (2, 0, 1)),
    "tile": lambda x: jnp.tile(x, (2, 1, 3)),
    "stack": lambda x: jnp.stack([x, 2 * x], axis=1),
    "sums and maxima": lambda x: jnp.max(x, 0).sum(1) + jnp.min(x, (0, 2)) + x.mean((0, 2)),
    "products in a batch": lambda x: jnp.einsum("bij,bkj->kbi", x, x),
    "a polynomial": lambda x: jnp.polyval(jnp.array([2.0, -1.0, 0.5, 3.0]), x),
    "a loop": lambda x: jax.lax.scan(lambda c, r: (c * 0.5 + r, c.sum()), x[0], x, reverse=True)[1],
    "elementwise": lambda x: jnp.where(x > 0, jnp.log1p(jnp.abs(x)), jnp.expm1(x)) ** 3,
    "more of these": lambda x: jnp.sqrt(jnp.abs(x)) + jnp.sin(x) * jnp.cos(x) - jnp.floor(x),
    "clip and the sign": lambda x: jnp.clip(x, -0.5, 0.5) + jnp.sign(x) + jax.lax.rsqrt(x * x + 1),
    "the error function": lambda x: jax.lax.erf(2 * x),
    "broadcasting": lambda x: x[:, :1] + jnp.arange(3.0)[:, None] + x[0, 0],
    "truths and whole numbers": lambda x: (x.astype(int) == 0).astype(float) + (x <= 0.1),
    "a convolution in strides": lambda x: jax.lax.conv_general_dilated(
        x[..., None], jnp.arange(12.0).reshape(2, 3, 1, 2), (2, 1), [(1, 2), (0, 3)],
        lhs_dilation=(1, 2), rhs_dilation=(2, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "a convolution, channels first": lambda x: jax.lax.conv(
        x[:, None], jnp.arange(24.0).reshape(4, 1, 2, 3), (1, 1), "SAME"),
}  # fmt: skip
