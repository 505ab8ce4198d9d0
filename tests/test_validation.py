"""What the public functions are handed by mistake ends as InputError, never deep inside JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxvae
from jaxvae import ModelConfig, TrainConfig

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
        with refused("params: expected what `jaxvae.init` gives, not "):
            f()
    with refused("state: expected what `jaxvae.create_train_state` gives, not "):
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


def test_what_counts_as_an_array_is_taken(params):
    expected = jaxvae.encode(params, IMAGES).mean
    for images in (IMAGES.tolist(), jnp.asarray(IMAGES), IMAGES > 1, IMAGES.astype(np.float16)):
        np.testing.assert_allclose(jaxvae.encode(params, images).mean, expected, atol=1e-6)
    assert jaxvae.sample(params, KEY, np.int64(3)).shape == (3, *SHAPE)


def test_an_error_that_is_not_the_callers_keeps_its_kind():
    def broken(images):
        raise TypeError("of a network")

    with pytest.raises(TypeError, match="of a network"):
        jaxvae.validation.jit()(broken)(IMAGES)
