"""Convolutions against XLA's own, values and derivatives, whatever the backend is said to be."""

import re
from functools import partial
from inspect import unwrap
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxvae import ModelConfig, decode, encode, init
from jaxvae.devices import convolution
from jaxvae.devices.convolution import conv_general_dilated, conv_transpose, in_blocks

NHWC = ("NHWC", "HWIO", "NHWC")
few_examples = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)
sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
kernels = st.tuples(st.integers(1, 4), st.integers(1, 3))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
channels = st.sampled_from([(1, 1), (1, 3), (2, 5), (3, 1), (4, 1), (8, 2), (5, 3)])
pads = st.tuples(st.integers(-1, 3), st.integers(0, 3))

lax_conv = partial(lax.conv_general_dilated, dimension_numbers=NHWC)
FILTERS = jnp.zeros((3, 3, 1, 1))
our_conv = partial(conv_general_dilated, dimension_numbers=NHWC)


def lax_conv_transpose(x, kernel, strides):
    return lax.conv_transpose(x, kernel, strides, "SAME", dimension_numbers=NHWC)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: "cpu")


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: request.param)
    return request.param


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max(initial=0)))


def assert_same_function(ours, theirs, x, kernel):
    """Values, and both derivatives in reverse and in forward mode, in the same random direction."""

    @jax.jit
    def both(x, kernel):
        y, pull = jax.vjp(theirs, x, kernel)
        z, our_pull = jax.vjp(ours, x, kernel)
        cotangent = normal(*y.shape, seed=2)
        tangents = normal(*x.shape, seed=3), normal(*kernel.shape, seed=4)
        _, slope = jax.jvp(theirs, (x, kernel), tangents)
        _, our_slope = jax.jvp(ours, (x, kernel), tangents)
        return (z, our_pull(cotangent), our_slope), (y, pull(cotangent), slope)

    assert jax.eval_shape(ours, x, kernel) == jax.eval_shape(theirs, x, kernel)
    assert_close(*both(x, kernel))


@few_examples
@given(sides, kernels, strides, channels, st.sampled_from(["SAME", "VALID"]))
def test_convolution_and_its_gradients_equal_xlas(side, kernel, stride, channels, padding):
    x, filters = normal(3, *side, channels[0]), normal(*kernel, *channels, seed=1)
    options = {"window_strides": stride, "padding": padding}
    assert_same_function(partial(our_conv, **options), partial(lax_conv, **options), x, filters)


@few_examples
@given(sides, kernels, strides, channels, st.tuples(pads, pads))
def test_convolution_with_explicit_padding_equals_xlas(side, kernel, stride, channels, padding):
    x, filters = normal(2, *side, channels[0]), normal(*kernel, *channels, seed=1)
    options = {"window_strides": stride, "padding": padding}
    assert_same_function(partial(our_conv, **options), partial(lax_conv, **options), x, filters)


@few_examples
@given(sides, kernels, st.sampled_from([(16, 16), (17, 20), (20, 6)]), st.tuples(pads, pads))
def test_convolution_with_stride_1_and_its_gradients_equal_xlas(side, kernel, channels, padding):
    x, filters = normal(2, *side, channels[0]), normal(*kernel, *channels, seed=1)
    options = {"window_strides": (1, 1), "padding": padding}
    assert_same_function(partial(our_conv, **options), partial(lax_conv, **options), x, filters)


@few_examples
@given(sides, st.sampled_from([(64, 64), (17, 250), (130, 33)]), st.tuples(pads, pads))
def test_winograd_and_its_gradients_equal_xlas(side, channels, padding):
    x, filters = normal(2, *side, channels[0]), normal(3, 3, *channels, seed=1)
    options = {"window_strides": (1, 1), "padding": padding}
    assert_same_function(partial(our_conv, **options), partial(lax_conv, **options), x, filters)


@few_examples
@given(sides, kernels, strides, channels)
def test_transposed_convolution_and_its_gradients_equal_xlas(side, kernel, stride, channels):
    x, filters = normal(2, *side, channels[0]), normal(*kernel, *channels, seed=1)
    assert_same_function(
        partial(conv_transpose, strides=stride),
        partial(lax_conv_transpose, strides=stride),
        x,
        filters,
    )


STRIDED = {"window_strides": (2, 1), "padding": "SAME"}
SAME = {"window_strides": (1, 1), "padding": "SAME"}
PAIRS = {
    "strided": (partial(our_conv, **STRIDED), partial(lax_conv, **STRIDED), (2, 3)),
    "narrow": (partial(our_conv, **SAME), partial(lax_conv, **SAME), (4, 1)),
    "stride 1": (partial(our_conv, **SAME), partial(lax_conv, **SAME), (16, 5)),
    "winograd": (partial(our_conv, **SAME), partial(lax_conv, **SAME), (64, 64)),
    "transposed": (
        partial(conv_transpose, strides=(2, 1)),
        partial(lax_conv_transpose, strides=(2, 1)),
        (2, 3),
    ),
}
every_pair = pytest.mark.parametrize(("ours", "theirs", "channels"), PAIRS.values(), ids=PAIRS)


@every_pair
def test_convolutions_work_eagerly_and_under_vmap(ours, theirs, channels, platform):
    x, filters = normal(3, 2, 5, 4, channels[0]), normal(3, 3, 3, *channels, seed=1)
    assert_close(ours(x[0], filters[0]), theirs(x[0], filters[0]))
    for axes in (0, 0), (None, 0), (0, None):
        args = [x if axes[0] == 0 else x[0], filters if axes[1] == 0 else filters[0]]
        our_rows, their_rows = jax.vmap(ours, axes), jax.vmap(theirs, axes)
        assert_close(jax.jit(our_rows)(*args), jax.jit(their_rows)(*args))


def along(mode, f, direction):
    """The derivative of a scalar function in a direction, as a function."""
    if mode == "forward":
        return lambda primals: jax.jvp(f, (primals,), (direction,))[1]
    return lambda primals: sum(map(jnp.vdot, jax.grad(f)(primals), direction))


@every_pair
def test_higher_derivatives_in_every_mixture_of_modes_equal_xlas(ours, theirs, channels):
    """The second and the third, of examples with their own filters, under `vmap`."""
    # Filters so small that tanh is not flat.
    filters = normal(2, 3, 3, *channels, seed=1) / 3 / channels[0] ** 0.5
    primals = normal(2, 1, 5, 4, channels[0]), filters
    directions = [tuple(normal(*p.shape[1:], seed=seed) for p in primals) for seed in (2, 3)]

    def derivatives(conv, first, second):
        f = along(first, lambda primals: jnp.mean(jnp.tanh(conv(*primals))), directions[0])
        return jax.vmap(jax.value_and_grad(along(second, f, directions[1])))(primals)

    mixtures = list(product(["forward", "reverse"], repeat=2))
    found = jax.jit(lambda: [derivatives(ours, *modes) for modes in mixtures])()
    expected = jax.jit(lambda: derivatives(theirs, "reverse", "reverse"))()
    assert_close(found, [expected] * len(mixtures))


@every_pair
def test_rematerialised_and_sharded_batches_give_the_same(ours, theirs, channels):
    x, filters = normal(8, 5, 4, channels[0]), normal(3, 3, *channels, seed=1)
    devices = jax.make_mesh((8,), ("batch",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(devices, jax.P("batch"))

    def gradients(conv):
        return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.tanh(conv(x, k))), argnums=(0, 1)))

    sharded = gradients(jax.checkpoint(ours))(jax.device_put(x, rows), filters)
    assert sharded[0].sharding.is_equivalent_to(rows, x.ndim)
    assert_close(sharded, gradients(theirs)(x, filters))


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 6, 5, 4), (3, 2, 4, 3), {"rhs_dilation": (2, 1)}),
        ((2, 6, 5, 4), (3, 2, 4, 3), {"lhs_dilation": (1, 2), "padding": ((1, 1), (0, 2))}),
        ((2, 6, 5, 4), (3, 2, 2, 6), {"feature_group_count": 2}),
        ((2, 6, 5, 4), (3, 2, 4, 6), {"batch_group_count": 2}),
        ((2, 6, 5, 4), (3, 2, 4, 3), {"preferred_element_type": jnp.float32}),
        ((2, 4, 6, 5), (3, 4, 3, 2), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
        ((2, 4, 6, 5), (3, 4, 3, 2), {"dimension_numbers": None}),
        ((2, 6, 4), (3, 4, 3), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_convolutions_are_xlas_to_the_bit(lhs, rhs, options):
    x, filters = normal(*lhs), normal(*rhs, seed=1)
    options = {
        "dimension_numbers": NHWC,
        "window_strides": (1,) * (x.ndim - 2),
        "padding": "SAME",
    } | options
    ours = jax.jit(partial(conv_general_dilated, **options))
    theirs = jax.jit(partial(lax.conv_general_dilated, **options))
    np.testing.assert_array_equal(ours(x, filters), theirs(x, filters))


def test_gradients_of_a_convolution_with_stride_1_are_convolutions_of_the_same_form():
    """XLA derives other forms, which it computes slowly inside of a loop on a CPU."""
    x, filters = normal(2, 6, 5, 16), normal(3, 3, 16, 16, seed=1)
    slopes = jax.grad(lambda x, k: jnp.sum(jnp.tanh(our_conv(x, k, **SAME))), argnums=(0, 1))
    program = jax.jit(slopes).lower(x, filters).as_text()
    forms = re.findall("dim_numbers = .* reverse = [^}]*", program)
    assert len(forms) == 3
    assert set(forms) == {
        "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {stride = [1, 1], "
        "pad = [[1, 1], [1, 1]], lhs_dilate = [1, 1], rhs_dilate = [1, 1], "
        "reverse = [false, false]"
    }


def test_dilations_and_groups_of_one_are_plain():
    x, filters = normal(2, 6, 5, 4), normal(3, 2, 4, 3, seed=1)
    ones = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    ours = partial(our_conv, window_strides=(1, 1), padding="SAME", **ones)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(ours)(x, filters))
    assert_close(ours(x, filters), lax_conv(x, filters, (1, 1), "SAME"))


@pytest.mark.parametrize("rows", range(1, 41))
def test_blocks_give_what_the_whole_batch_gives(rows):
    batch = {"x": normal(rows, 3), "n": jnp.arange(rows)}
    seen = []

    def f(batch):
        seen.append(len(batch["n"]))
        return jnp.cumsum(batch["x"] ** 2, axis=-1), batch["n"] * 2

    blocks, n = in_blocks(f, batch, convolution.block_size(rows, FILTERS))
    assert len(seen) == 1  # traced once, as all blocks have one size
    assert seen[0] == rows if rows <= 8 else seen[0] in (3, 4)
    np.testing.assert_allclose(blocks, np.cumsum(np.square(batch["x"]), axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(n, 2 * np.arange(rows))


@pytest.mark.parametrize("size", [1, 3, 12, 13, 1000])
def test_blocks_are_of_one_size_and_at_most_that_asked_for(size):
    seen = []
    doubled = in_blocks(lambda x: (seen.append(len(x)), 2 * x)[1], jnp.arange(13), size)
    assert set(seen) == {{1: 1, 3: 3, 12: 7, 13: 13, 1000: 13}[size]}
    np.testing.assert_array_equal(doubled, 2 * np.arange(13))


def test_a_batch_is_one_block_except_for_convolutions_on_a_cpu(platform):
    assert convolution.block_size(100, FILTERS) == (4 if platform == "cpu" else 100)
    assert convolution.block_size(8, FILTERS) == 8
    assert convolution.block_size(100, jnp.zeros((5, 6))) == 100


def test_blocks_are_larger_where_one_device_has_all_the_cores(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert convolution.block_size(100, FILTERS) == 16


def test_the_model_is_the_same_on_every_backend(monkeypatch):
    params = init(jax.random.key(0), ModelConfig((6, 5, 2), 2))
    images, z = jax.nn.sigmoid(normal(11, 6, 5, 2)), normal(11, 2)

    on = {}
    for name in "cpu", "gpu":
        monkeypatch.setattr(convolution, "backend", lambda name=name: name)
        run = jax.jit(lambda x, z: (unwrap(encode)(params, x), unwrap(decode)(params, z)))
        traced = run.trace(images, z)
        assert ("conv_general_dilated" in str(traced.jaxpr)) == (name == "gpu")
        on[name] = traced.lower().compile()(images, z)
    assert_close(on["cpu"], on["gpu"])


def test_the_backend_is_that_of_the_default_device(monkeypatch):
    monkeypatch.undo()
    assert convolution.backend() == jax.default_backend()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert convolution.backend() == "tpu"
    for device in jax.devices("cpu")[0], "cpu":
        with jax.default_device(device):
            assert convolution.backend() == "cpu"
