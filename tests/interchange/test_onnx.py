"""Every operation does in ONNX Runtime what it does in JAX, for batches of any size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import refused
from jax import lax
from traced import FUNCTIONS, X

from jaxvae.interchange.onnx import to_onnx

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS = np.random.default_rng(1).normal(size=(3, 2, 3, 4)).astype(np.float32)
IMAGE = np.random.default_rng(2).normal(size=(3, 5, 4, 2)).astype(np.float32)
INDEX = np.array([3, 0, 3, 1], np.int32)
SMALL = np.float32([-1, -0.999, -1e-3, -1e-6, 0, 1e-7, 1e-3, 1, 1e3, 1e30, np.inf])
KEY = jax.random.key(0)
TABLE = jnp.asarray(X[0])


def run(f, x, **inputs):
    """The result of f in ONNX Runtime: f is traced without the size of the batch."""
    content = to_onnx("decoder", f, {"x": jax.ShapeDtypeStruct(x.shape[1:], x.dtype)}, ["y"])
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    (y,) = onnxruntime.InferenceSession(content).run(["y"], {"x": x})
    return y


def check(f, x, rtol=2e-6, atol=2e-6):
    expected = f(x)
    for rows in (len(x), 1):
        y = run(f, x[:rows])
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y, f(x[:rows]), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_does_what_jax_does(name):
    check(jax.vmap(FUNCTIONS[name]), ROWS)


def filters(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def transposed(kernel, strides, padding, **how):
    return lambda x: lax.conv_transpose(
        x,
        filters(*kernel, 2, 3),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **how,
    )


def convolution(kernel, strides, padding, **how):
    return lambda x: lax.conv_general_dilated(
        x, filters(*kernel), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how
    )


CONVOLUTIONS = {
    "same": convolution((3, 2, 2, 3), (2, 1), "SAME"),
    "cropped": convolution((2, 2, 2, 3), (1, 1), [(-1, 2), (1, -2)]),
    "dilated": convolution((2, 2, 2, 3), (1, 2), "SAME", rhs_dilation=(2, 1)),
    "in groups": convolution((3, 3, 1, 4), (1, 1), "SAME", feature_group_count=2),
    "transposed": transposed((3, 3), (2, 2), "SAME"),
    "transposed, with gaps": transposed((2, 1), (3, 2), "SAME"),
    "transposed, valid": transposed((3, 4), (2, 1), "VALID"),
    "transposed, dilated": transposed((2, 3), (2, 2), "SAME", rhs_dilation=(2, 1)),
    "transposed, in groups": convolution(
        (3, 3, 1, 4), (1, 1), [(1, 2), (2, 0)], lhs_dilation=(2, 2), feature_group_count=2
    ),
    "transposed, in strides": convolution(
        (3, 3, 2, 4), (2, 1), [(3, 2), (1, 2)], lhs_dilation=(3, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name):
    check(CONVOLUTIONS[name], IMAGE, rtol=1e-5, atol=1e-5)


OTHERS = {
    "round half to even": (lambda x: jnp.round(x), np.float32([[0.5], [1.5], [-2.5], [0.6]])),
    "the largest and the smallest": (
        lambda x: jnp.argmax(x, 2) * 10 + jnp.argmin(x, 1, keepdims=True)[:, 0, :1], X),
    "rows of a table": (lambda i: TABLE[i % 3], INDEX),
    "rows of a table, clipped": (lambda i: TABLE.at[i].get(mode="clip"), INDEX),
    "columns by a list": (lambda x: x[:, np.array([2, 0, 0, 1])], X),
    "the largest of a window": (lambda x: nn.max_pool(x, (2, 3), (2, 1), "SAME"), IMAGE),
    "the mean of a window": (lambda x: nn.avg_pool(x, (3, 2), (1, 2), ((1, 0), (0, 1))), IMAGE),
    "enlarged": (lambda x: jax.image.resize(x, (x.shape[0], 10, 8, 2), "nearest"), IMAGE),
    "enlarged by a line": (
        lambda x: jax.image.resize(x, (x.shape[0], 7, 9, 2), "bilinear"), IMAGE),
    "an index": (lambda x: x[..., 1, :] + x[:, -1], X),
    "one-hot classes": (lambda i: jax.nn.one_hot(i, 4), INDEX),
    "quotients of whole numbers": (lambda i: (i - 2) // 2 + lax.div(i - 2, 2), INDEX),
    "logic": (lambda x: (x > 0) & ~(x > 1) | (x < -1), X),
    "zeros of the batch": (lambda x: jnp.concatenate([x, jnp.zeros((x.shape[0], 1, 4))], 1), X),
    "zeros of twice the batch": (
        lambda x: jnp.concatenate([x, jnp.zeros((2 * x.shape[0], 3, 4))]), X),
    "sums over the batch": (lambda x: x - x.sum(0) + jnp.max(x, 0), X),
    "a batch of pixels": (lambda x: x.reshape(-1, 4) @ jnp.arange(8.0).reshape(4, 2), X),
    "repeated rows": (lambda x: jnp.repeat(x, 2, axis=0), X),
    "the identity": (lambda x: x, X),
    "a constant": (lambda x: jnp.broadcast_to(TABLE, (x.shape[0], 3, 4)), X),
    "missing values": (lambda x: jnp.where(jnp.isnan(x), 0, x), np.float32([[1, np.nan], [3, 4]])),
    "a logarithm of sums": (lambda x: jax.nn.logsumexp(x, 2) + jax.nn.softplus(x[..., 0]), X),
    "other elementwise": (
        lambda x: jnp.arctan(jnp.sinh(x)) + jnp.exp2(x) + lax.erfc(x) + jnp.square(x), X),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name):
    check(*OTHERS[name])


@pytest.mark.parametrize(("f", "exact"), [(jnp.log1p, np.log1p), (jnp.expm1, np.expm1)])
def test_functions_near_zero_lose_no_digits(f, exact):
    x = SMALL if f is jnp.log1p else np.concatenate([SMALL[:-3], np.float32([-np.inf, 88, np.inf])])
    with np.errstate(divide="ignore"):
        expected = exact(x.astype(float))
    np.testing.assert_allclose(run(f, x), expected, rtol=1e-6)


def test_a_convolution_is_one_operator_with_its_filter():
    """As programs for small devices expect it."""
    model = onnx.load_from_string(
        to_onnx(
            "decoder",
            CONVOLUTIONS["transposed"],
            {"x": jax.ShapeDtypeStruct((5, 4, 2), "f")},
            ["y"],
        )
    )
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["Transpose", "ConvTranspose", "Transpose", "Identity"]
    assert [tuple(x.dims) for x in model.graph.initializer] == [(2, 3, 3, 3)]


def test_what_the_result_does_not_need_is_left_out():
    content = to_onnx(
        "f", lambda x: (jnp.exp(x), x * 2)[1], {"x": jax.ShapeDtypeStruct((), "f")}, "y"
    )
    assert [node.op_type for node in onnx.load_from_string(content).graph.node] == [
        "Mul",
        "Identity",
    ]


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (
            jnp.sort,
            "the decoder has the operation 'sort', which the export to ONNX does not support",
        ),
        (lambda x: lax.round(x), "'round' half away from zero"),
        (lambda x: jnp.zeros((x.shape[0] + 1, 3)), "a side of batch + 1"),
        (lambda x: x + jax.random.normal(KEY, (3, 4)), "a constant of type key<fry>"),
    ],
)
def test_an_operation_without_a_translation_is_named(f, says):
    with refused(says, "expected"):
        run(f, X)
