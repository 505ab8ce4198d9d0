"""What the public functions are handed by mistake ends as InputError, never deep inside JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxvae
from jaxvae import ModelConfig, TrainConfig
from jaxvae.evaluation.evaluate import evaluate
from jaxvae.models import likelihoods
from jaxvae.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
SHAPE = (4, 3, 1)
IMAGES = np.zeros((5, *SHAPE), np.float32)
LABELS = np.array([0, 1, 2, 0, 1])
Z = np.zeros((5, 2), np.float32)

quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)

no_arrays = st.sampled_from(
    [
        None,
        "images",
        b"images",
        object(),
        {},
        {"images": 1},
        [[1, 2], [3]],
        2**70,
        lambda images: images,
        np.array([None]),
        np.array(["a", "b"]),
        np.array([1], "M8[s]"),
        np.zeros(5, "i4,f4"),
    ]
)


def of_other_shapes(right, dtype):
    shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)
    return shapes.filter(lambda shape: not right(shape)).map(lambda shape: np.zeros(shape, dtype))


def of_other_types(array, *types):
    return st.sampled_from(types).map(array.astype)


bad_images = (
    no_arrays
    | of_other_shapes(lambda shape: shape[1:] == SHAPE and shape[0] > 0, np.uint8)
    | of_other_types(IMAGES, *"bhilHILFDOSUV")
)
bad_latents = (
    no_arrays
    | of_other_shapes(lambda shape: shape[1:] == (2,) and shape[0] > 0, np.float32)
    | of_other_types(Z, *"?FDOSU")
)
bad_labels = (
    no_arrays.filter(lambda x: x is not None)
    | of_other_shapes(lambda shape: shape == (5,), np.int32)
    | of_other_types(LABELS, *"?efdFOSU")
)
bad_counts = (
    st.sampled_from(
        [
            0,
            -1,
            2.0,
            2.5,
            True,
            None,
            "5",
            float("nan"),
            [3],
            np.ones(2),
            2**31,
            jnp.int32(3),
            -(2**70),
        ]
    )
    | st.floats()
)
bad_keys = no_arrays | st.sampled_from([0, 1.5, np.zeros(2), np.zeros(3, np.uint32), KEY[None]])


@pytest.fixture(scope="module")
def params():
    return jaxvae.init(KEY, ModelConfig(SHAPE, 2, network="mlp:width=4"))


@pytest.fixture(scope="module")
def conditional():
    return jaxvae.init(KEY, ModelConfig(SHAPE, 2, network="mlp:width=4", num_classes=3))


@pytest.fixture(scope="module")
def state():
    config = ModelConfig(SHAPE, 2, network="mlp:width=4")
    return jaxvae.create_train_state(KEY, config, TrainConfig(batch_size=5))


@pytest.fixture(scope="module")
def conditional_state():
    config = ModelConfig(SHAPE, 2, network="mlp:width=4", num_classes=3)
    return jaxvae.create_train_state(KEY, config, TrainConfig(batch_size=5))


OF_IMAGES = {
    "encode": lambda params, images: jaxvae.encode(params, images),
    "reconstruct": lambda params, images: jaxvae.reconstruct(params, images),
    "elbo": lambda params, images: jaxvae.elbo(params, KEY, images),
    "log_likelihood": lambda params, images: jaxvae.log_likelihood(params, KEY, images, 2),
    "ais": lambda params, images: jaxvae.ais(params, KEY, images, 2),
}


@pytest.mark.parametrize("f", OF_IMAGES.values(), ids=OF_IMAGES)
@quickly
@given(images=bad_images)
def test_images_that_are_none_are_refused(f, params, images):
    with refused():
        f(params, images)


@pytest.mark.parametrize("step", [jaxvae.train_step, jaxvae.train_epoch])
@quickly
@given(images=bad_images)
def test_steps_refuse_images_that_are_none_and_leave_the_state_as_it_is(step, state, images):
    with refused():
        step(state, images)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@quickly
@given(images=bad_images)
def test_a_likelihood_refuses_images_that_are_none(params, images):
    p_x = jaxvae.Bernoulli(jnp.zeros((5, *SHAPE)))
    with refused():
        p_x.log_prob(images)


@quickly
@given(z=bad_latents)
def test_latents_that_are_none_are_refused(params, z):
    with refused():
        jaxvae.decode(params, z)


OF_LABELS = {
    "encode": lambda params, labels: jaxvae.encode(params, IMAGES, labels),
    "decode": lambda params, labels: jaxvae.decode(params, Z, labels),
    "reconstruct": lambda params, labels: jaxvae.reconstruct(params, IMAGES, labels),
    "elbo": lambda params, labels: jaxvae.elbo(params, KEY, IMAGES, labels),
    "log_likelihood": lambda params, labels: jaxvae.log_likelihood(params, KEY, IMAGES, 2, labels),
    "ais": lambda params, labels: jaxvae.ais(params, KEY, IMAGES, 2, labels),
    "sample": lambda params, labels: jaxvae.sample(params, KEY, 5, labels),
}


@pytest.mark.parametrize("f", OF_LABELS.values(), ids=OF_LABELS)
@quickly
@given(labels=bad_labels)
def test_labels_that_are_none_are_refused(f, conditional, labels):
    with refused():
        f(conditional, labels)


@pytest.mark.parametrize("step", [jaxvae.train_step, jaxvae.train_epoch])
@quickly
@given(labels=bad_labels)
def test_steps_refuse_labels_that_are_none(step, conditional_state, labels):
    with refused():
        step(conditional_state, IMAGES, labels)


@quickly
@given(n=bad_counts)
def test_numbers_that_count_nothing_are_refused(params, n):
    with refused("n is "):
        jaxvae.sample(params, KEY, n)
    with refused("num_samples is "):
        jaxvae.log_likelihood(params, KEY, IMAGES, n)


@quickly
@given(key=bad_keys)
def test_keys_that_are_none_are_refused(params, key):
    config = ModelConfig(SHAPE, 2, network="mlp:width=4")
    for f in (
        lambda: jaxvae.init(key, config),
        lambda: jaxvae.create_train_state(key, config, TrainConfig()),
        lambda: jaxvae.sample(params, key, 3),
        lambda: jaxvae.elbo(params, key, IMAGES),
        lambda: jaxvae.log_likelihood(params, key, IMAGES, 2),
        lambda: jaxvae.reparameterize(key, Z, Z),
    ):
        with refused():
            f()


@quickly
@given(bad=no_arrays | of_other_types(Z, *"?ilFDOSU") | of_other_shapes((5, 2).__eq__, np.float32))
def test_a_mean_and_a_log_var_are_floats_of_one_shape(bad):
    for mean, log_var in ((bad, Z), (Z, bad)):
        with refused():
            jaxvae.reparameterize(KEY, mean, log_var)


@pytest.mark.parametrize("bad", [None, {}, "params", 3, [IMAGES]])
def test_params_states_and_configurations_are_what_they_are_called(bad):
    config = ModelConfig(SHAPE, 2, network="mlp")
    for f in (
        lambda: jaxvae.encode(bad, IMAGES),
        lambda: jaxvae.decode(bad, Z),
        lambda: jaxvae.elbo(bad, KEY, IMAGES),
        lambda: jaxvae.sample(bad, KEY, 3),
    ):
        with refused("params: expected the result of `jaxvae.init`, not "):
            f()
    with refused("state: expected the result of `jaxvae.create_train_state`, not "):
        jaxvae.train_step(bad, IMAGES)
    with refused("config is ", "expected a ModelConfig"):
        jaxvae.init(KEY, bad)
    with refused("config is ", "expected a ModelConfig"):
        jaxvae.create_train_state(KEY, bad, TrainConfig())
    with refused("train_config is ", "expected a TrainConfig"):
        jaxvae.create_train_state(KEY, config, bad)


@pytest.mark.parametrize("name", ["learning_rate", "beta"])
@pytest.mark.parametrize("bad", ["fast", np.ones(5), 1j, True, {}, object()])
def test_learning_rate_and_beta_are_numbers(state, name, bad):
    with refused(name):
        jaxvae.train_step(state, IMAGES, **{name: bad})


def test_an_objective_is_a_function(state):
    with refused("objective is 'elbo': expected a function"):
        jaxvae.train_step(state, IMAGES, objective="elbo")


@pytest.mark.parametrize(
    "images", [np.zeros((5, 3, 4, 1), np.float32), IMAGES.astype(np.int32), IMAGES.astype("F")]
)
def test_under_jit_and_vmap_shapes_and_types_are_looked_at_too(params, images):
    for f in OF_IMAGES.values():
        with refused("images "):
            jax.jit(f)(params, images)
        with refused("images "):
            jax.vmap(partial(f, params))(images[None])


HELD = {"numpy": np.asarray, "jax": jnp.asarray, "list": lambda x: np.asarray(x).tolist()}
held = pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
GREY = np.random.default_rng(0).random((5, *SHAPE), np.float32)


@held
@pytest.mark.parametrize("f", OF_IMAGES.values(), ids=OF_IMAGES)
def test_float_images_beyond_0_and_1_are_refused(f, params, hold):
    for images, has in (
        (255 * GREY, "values from "),
        (GREY - 0.5, "values from -0."),
        (np.where(GREY.max() == GREY, np.inf, GREY), " to inf"),
        (np.where(GREY.max() == GREY, np.nan, GREY), "NaN"),
    ):
        if has == "NaN" and f is OF_IMAGES["log_likelihood"]:  # of missing entries
            continue
        with refused("images have ", has, "expected floats between 0 and 1, or uint8 from 0 to"):
            f(params, hold(images))
    with unchecked():  # lists are taken, although the annotations do not name them
        f(params, hold(GREY + 1e-4 * np.sign(GREY - 0.5)))  # as resizing rounds


@pytest.mark.parametrize("step", [jaxvae.train_step, jaxvae.train_epoch])
def test_steps_refuse_values_beyond_their_range_and_leave_the_state_as_it_is(
    step, state, conditional_state
):
    with refused("images have values from 0 to 255: expected floats between 0 and 1"):
        step(state, np.linspace(0, 255, GREY.size, dtype="f").reshape(GREY.shape))
    for bad in (3, -1):
        with refused("labels are from ", "expected classes from 0 to 2, as num_classes is 3"):
            step(conditional_state, IMAGES, np.array([0, 1, 2, 0, bad]))
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, conditional_state)))


@held
@pytest.mark.parametrize("f", OF_LABELS.values(), ids=OF_LABELS)
def test_labels_that_are_no_classes_are_refused(f, conditional, hold):
    for bad, has in ((3, "labels are from 0 to 3"), (-1, "labels are from -1 to 2")):
        with refused(has, "expected classes from 0 to 2, as num_classes is 3"):
            f(conditional, hold(np.array([0, 1, 2, 0, bad])))


def test_values_that_are_traced_are_not_looked_at(params, conditional):
    for f in OF_IMAGES.values():
        jax.jit(f)(params, 255 * GREY)
    jax.jit(OF_LABELS["encode"])(conditional, LABELS + 1)


def test_constants_of_an_outer_function_are_looked_at(params, conditional):
    for images in (255 * GREY, jnp.asarray(255 * GREY)):
        with refused("images have values from "):
            jax.jit(lambda params, images=images: jaxvae.encode(params, images))(params)
    with refused("labels are from 1 to 3"):
        jax.jit(lambda params: jaxvae.encode(params, IMAGES, LABELS + 1))(conditional)


def test_a_step_does_not_wait_for_an_accelerator(params, state, monkeypatch):
    """What only it knows, all others do; also inside an outer function."""
    monkeypatch.setattr("jaxvae.validation._on_host", lambda x: False)
    bright = jnp.asarray(255 * GREY)
    jaxvae.train_step(state, bright)
    for f in (
        lambda params: jaxvae.elbo(params, KEY, bright),
        jax.jit(lambda params: jaxvae.elbo(params, KEY, bright)),
        lambda params: jaxvae.train_epoch(state, bright),
    ):
        with refused("images have values from "):
            f(params)
    with refused("images have values from "):
        jaxvae.train_step(state, 255 * GREY)


def test_likelihoods_and_binarization_refuse_values_beyond_0_and_1_too():
    logits = jnp.zeros((5, *SHAPE))
    for likelihood in (likelihoods.Bernoulli, likelihoods.ContinuousBernoulli):
        with refused("images have values from "):
            likelihood(logits).log_prob(255 * GREY)
    with refused("images have values from "):
        likelihoods.DiscretizedLogistic(logits, logits).log_prob(255 * GREY)
    with refused("images have values from "):
        likelihoods.binarize(KEY, 255 * GREY)
    # A density on all of the real line.
    assert np.isfinite(likelihoods.GaussianPixels(logits, logits[0, 0, 0, 0]).log_prob(-GREY)).all()


def swapped(x):
    """The same numbers in the other byte order."""
    return x.astype(x.dtype.newbyteorder())


def test_arrays_of_the_other_byte_order_are_read_right(params, conditional, state):
    """Also after one of this machine's, for which `jax.jit` has a way without questions."""
    labels, key = LABELS.astype(np.int64), np.array([0, 7], np.uint32)
    z = np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2)
    calls = [(partial(f, params), GREY) for f in OF_IMAGES.values()]
    calls += [(partial(f, conditional), labels) for f in OF_LABELS.values()]
    calls += [
        (lambda z: jaxvae.decode(params, z), z),
        (lambda key: jaxvae.init(key, params.config), key),
        (lambda key: jaxvae.sample(params, key, 3), key),
        (lambda key: jaxvae.elbo(params, key, GREY), key),
        (lambda key: jaxvae.elbo(params, key=key, images=GREY), key),
        (lambda key: jaxvae.reparameterize(key, Z, Z), key),
        (lambda z: jaxvae.reparameterize(KEY, z, z), z),
        (lambda key: jax.random.key_data(
            jaxvae.create_train_state(key, params.config, TrainConfig()).key), key),
        (lambda images: jaxvae.train_step(state, images)[1], GREY),
        (lambda images: jaxvae.train_epoch(jax.tree.map(jnp.copy, state), images)[1], GREY),
        (lambda rate: jaxvae.train_step(state, GREY, learning_rate=rate)[0].params,
         np.array(0.1, np.float32)),
        (lambda images: evaluate(params, KEY, images), GREY),
        (lambda images: jaxvae.Bernoulli(jnp.ones(GREY.shape)).log_prob(images), GREY),
        (lambda images: likelihoods.binarize(KEY, images), GREY),
        (lambda images: OBJECTIVES.parse("elbo")(params, KEY, images)[0], GREY),
        (lambda images: OBJECTIVES.parse("dreg")(params, KEY, images)[0], GREY),
        (lambda x: OBJECTIVES.parse("dreg")(conditional, KEY, GREY, x)[0], labels),
    ]  # fmt: skip
    for f, x in calls:
        for _ in range(2):
            expected = f(x)
        jax.tree.map(np.testing.assert_array_equal, f(swapped(x)), expected)


def test_what_counts_as_an_array_is_taken(params):
    expected = jaxvae.encode(params, IMAGES).mean
    with unchecked():  # more than the annotations name
        for images in (IMAGES.tolist(), jnp.asarray(IMAGES), IMAGES > 1, IMAGES.astype(np.float16)):
            np.testing.assert_allclose(jaxvae.encode(params, images).mean, expected, atol=1e-6)
        assert jaxvae.sample(params, KEY, np.int64(3)).shape == (3, *SHAPE)


def test_an_error_that_is_not_the_callers_keeps_its_kind():
    def broken(images):
        raise TypeError("of a network")

    with pytest.raises(TypeError, match="of a network"):
        jaxvae.validation.jit()(broken)(IMAGES)
