"""The training state."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused

import jaxvae
from jaxvae.training.state import binarization_key, noise_key, shuffle_key, state_of

MODEL = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=8")


def numbers(tree):
    """Its arrays, with keys as plain numbers."""
    return [
        np.asarray(jax.random.key_data(x))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.asarray(x)
        for x in jax.tree.leaves(tree)
    ]


def create(key=None, **config):
    key = jax.random.key(3) if key is None else key
    return jaxvae.create_train_state(key, MODEL, jaxvae.TrainConfig(**config))


def test_old_style_keys_give_the_same_state():
    new, old = create(jax.random.key(3)), create(jax.random.PRNGKey(3))
    for a, b in zip(numbers(new), numbers(old), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_begins_at_step_0_with_parameters_of_the_key():
    state, other = create(), create(jax.random.key(4))
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 0
    assert state.config == jaxvae.TrainConfig()
    assert state.params.config == MODEL
    assert not np.array_equal(*(s.params.encoder["mean"]["kernel"] for s in (state, other)))


def test_a_state_is_a_pytree_whose_configuration_is_static():
    state = create(ema=0.9)
    leaves, structure = jax.tree.flatten(state)
    back = jax.tree.unflatten(structure, leaves)
    assert back.config is state.config
    assert jax.tree.structure(replace(state, config=jaxvae.TrainConfig())) != structure


def test_a_state_is_shown_without_its_arrays():
    state = create(epochs=3)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert repr(state.params) == f"Params({count:,} parameters, config={MODEL!r})"
    assert repr(state) == f"TrainState(step=0, params={state.params!r}, config={state.config!r})"
    assert "epochs=3" in repr(state)


def test_the_parameters_to_evaluate_with_are_the_average_where_there_is_one():
    state, averaged = create(), create(ema=0.9)
    assert state.ema is None
    assert state.eval_params is state.params
    assert averaged.eval_params is averaged.ema
    for a, b in zip(numbers(averaged.ema), numbers(averaged.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_average_has_memory_of_its_own(images, compile_quickly):
    """An epoch takes over that of both."""
    state, _ = jaxvae.train_epoch(create(ema=0.9, batch_size=32), images)
    assert int(state.step) == 2


def test_a_state_of_given_parameters_begins_there():
    params = jaxvae.init(jax.random.key(8), MODEL)
    state = state_of(params, jax.random.key(1), jaxvae.TrainConfig(ema=0.9))
    for tree in state.params, state.ema:
        for a, b in zip(numbers(tree), numbers(params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_use_of_a_step_has_a_key_of_its_own():
    state = create()
    keys = [
        key(replace(state, step=jnp.int32(step)))
        for key in (noise_key, shuffle_key, binarization_key)
        for step in range(3)
    ]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((3, MODEL, jaxvae.TrainConfig()), "key"),
        ((jax.random.key(0), jaxvae.TrainConfig(), MODEL), "config"),
        ((jax.random.key(0), MODEL, MODEL), "train_config"),
        ((jax.random.key(0), MODEL, {"batch_size": 8}), "train_config"),
    ],
)
def test_what_is_no_key_or_configuration_is_refused(arguments, says):
    with refused(says):
        jaxvae.create_train_state(*arguments)
