"""Checkpoints: what is saved comes back, and the latest and the best are kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvae
from jaxvae.checkpoint import open_checkpoints, write

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def state(model_config, images):
    config = jaxvae.TrainConfig(batch_size=16, learning_rate=3e-4)
    state = jaxvae.create_train_state(jax.random.key(5), model_config, config)
    return jaxvae.train_epoch(state, images)[0]


def assert_states_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(*map(numbers, (x, y)))


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    jaxvae.save(tmp_path, state)
    assert_states_equal(jaxvae.restore(tmp_path), state)


def test_a_directory_is_enough_to_use_a_model(tmp_path, state, images):
    jaxvae.save(tmp_path, state)
    params = jaxvae.load(str(tmp_path))
    assert params.config == state.params.config
    np.testing.assert_array_equal(
        jaxvae.reconstruct(params, images), jaxvae.reconstruct(state.params, images)
    )


def test_training_goes_on_as_if_nothing_had_happened(tmp_path, state, images):
    jaxvae.save(tmp_path, state)
    assert_states_equal(
        jaxvae.train_epoch(jaxvae.restore(tmp_path), images)[0],
        jaxvae.train_epoch(state, images)[0],
    )


def test_the_latest_and_the_best_are_kept(tmp_path, state):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, elbo in enumerate([-30.0, -10.0, -20.0, -25.0]):
            write(checkpoints, replace(state, step=jnp.int32(step)), {"elbo": elbo})
    assert int(jaxvae.restore(tmp_path).step) == 3
    assert int(jaxvae.restore(tmp_path, "best").step) == 1
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"1", "3"}


def test_a_state_saved_without_a_measurement_does_not_push_out_the_best(tmp_path, state, caplog):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, elbo in enumerate([-10.0, -30.0]):
            write(checkpoints, replace(state, step=jnp.int32(step)), {"elbo": elbo})
    jaxvae.save(tmp_path, state)
    assert int(jaxvae.restore(tmp_path).step) == 4
    assert int(jaxvae.restore(tmp_path, "best").step) == 0
    assert not caplog.records


def test_a_checkpoint_is_not_overwritten(tmp_path, state):
    jaxvae.save(tmp_path, state)
    with pytest.raises(jaxvae.InputError, match="already holds a checkpoint of step 4"):
        jaxvae.save(tmp_path, state)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "checkpoints").mkdir()])
def test_a_directory_without_checkpoints_is_refused(tmp_path, make):
    make(tmp_path)
    with pytest.raises(jaxvae.InputError, match="holds no checkpoint: expected the run directory"):
        jaxvae.load(tmp_path)
    with pytest.raises(jaxvae.InputError, match="holds no checkpoint"):
        jaxvae.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
