"""The state and the step."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxvae
from jaxvae.objectives import example_keys, negative_elbo
from jaxvae.training import optimizer, shuffle, train_steps

pytestmark = pytest.mark.usefixtures("compile_quickly")


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def arrays(state):
    """The state with its key as plain numbers."""
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.fixture
def state(model_config):
    train_config = jaxvae.TrainConfig(batch_size=16)
    return jaxvae.create_train_state(jax.random.key(0), model_config, train_config)


def test_rmsprop_follows_keras():
    """Keras: v = 0.9 v + 0.1 g^2; w = w - 1e-3 g / sqrt(v + 1e-7), from v = 0."""
    update = optimizer(jaxvae.TrainConfig())
    w, v = jnp.float32(2.0), 0.0
    opt_state = update.init(w)
    for g in (0.5, -1e-4, 3.0):
        v = 0.9 * v + 0.1 * g**2
        step, opt_state = update.update(jnp.float32(g), opt_state)
        assert float(step) == pytest.approx(-1e-3 * g / np.sqrt(v + 1e-7), rel=1e-5)


def test_a_step_is_rmsprop_on_the_gradient_of_the_mean_negative_elbo(state, images):
    batch = jnp.asarray(images[:16])
    keys = example_keys(jax.random.split(jax.random.fold_in(state.key, 0))[0], 16)

    def loss(params):
        return -jnp.mean(jaxvae.elbo(params, keys, batch).value)

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, _ = optimizer(state.config).update(grads, state.opt_state)
    expected = optax.apply_updates(state.params, updates)
    after, metrics = jaxvae.train_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert int(after.step) == 1
    moved = [np.linalg.norm(np.subtract(a, b)) for a, b in leaves(after.params, state.params)]
    apart = [np.linalg.norm(np.subtract(a, b)) for a, b in leaves(after.params, expected)]
    assert np.linalg.norm(apart) < 1e-2 * np.linalg.norm(moved)


def leaves(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_metrics_are_means_over_the_batch_in_nats_per_image(state, images):
    batch = jnp.asarray(images[:16])
    keys = example_keys(jax.random.split(jax.random.fold_in(state.key, 0))[0], 16)
    terms = jaxvae.elbo(state.params, keys, batch)
    _, metrics = jaxvae.train_step(state, batch)
    assert set(metrics) == {"loss", "elbo", "log_likelihood", "kl"}
    np.testing.assert_allclose(metrics["elbo"], jnp.mean(terms.value), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], jnp.mean(terms.kl), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], -metrics["elbo"])


@pytest.mark.parametrize("batch_size", [1, 7, 8, 19])
def test_any_batch_size_gives_the_gradient_of_the_whole_batch(model_config, images, batch_size):
    """The batch is worked through in blocks; a last, smaller block counts as much as it holds."""
    config = jaxvae.TrainConfig(batch_size=batch_size)
    state = jaxvae.create_train_state(jax.random.key(0), model_config, config)
    batch = jnp.asarray(images[:batch_size])
    keys = example_keys(jax.random.split(jax.random.fold_in(state.key, 0))[0], batch_size)
    _, metrics = jaxvae.train_step(state, batch)
    terms = jaxvae.elbo(state.params, keys, batch)
    np.testing.assert_allclose(metrics["elbo"], jnp.mean(terms.value), rtol=1e-5)


def test_training_learns(model_config, images):
    config = jaxvae.TrainConfig(batch_size=32)
    state = jaxvae.create_train_state(jax.random.key(0), model_config, config)
    half = jnp.asarray(images // 2)
    state, first = jaxvae.train_epoch(state, half)
    for _ in range(20):
        state, last = jaxvae.train_epoch(state, half)
    assert last["elbo"] > first["elbo"] + 1


def test_training_learns_in_mixed_precision_and_keeps_a_float32_state(model_config, images):
    config = jaxvae.TrainConfig(batch_size=32)
    mixed = replace(model_config, compute_dtype="bfloat16")
    state = jaxvae.create_train_state(jax.random.key(0), mixed, config)
    half = jnp.asarray(images // 2)
    state, first = jaxvae.train_epoch(state, half)
    for _ in range(20):
        state, last = jaxvae.train_epoch(state, half)
    assert last["elbo"] > first["elbo"] + 1
    for x in jax.tree.leaves((state.params, state.opt_state, first, last)):
        assert x.dtype == jnp.float32
        assert np.isfinite(x).all()


def test_the_same_key_gives_the_same_run_and_another_key_another(model_config, images):
    def run(seed):
        config = jaxvae.TrainConfig(batch_size=16)
        state = jaxvae.create_train_state(jax.random.key(seed), model_config, config)
        return jaxvae.train_epoch(state, jnp.asarray(images))[0]

    assert_trees_equal(run(0), run(0))
    kernels = [run(seed).params.encoder["dense"]["kernel"] for seed in (0, 1)]
    assert not np.array_equal(*kernels)


def test_old_style_keys_give_the_same_state(model_config):
    config = jaxvae.TrainConfig()
    new = jaxvae.create_train_state(jax.random.key(3), model_config, config)
    old = jaxvae.create_train_state(jax.random.PRNGKey(3), model_config, config)
    assert_trees_equal(new, old)


def kept(state):
    """A state of its own, for what donates the one it is given."""
    return jax.tree.map(jnp.copy, state)


def test_an_epoch_is_its_steps(state, images):
    epoch, means = jaxvae.train_epoch(kept(state), jnp.asarray(images))
    assert int(epoch.step) == 4
    steps, losses = state, []
    for indices in shuffle(state, len(images)):
        steps, metrics = jaxvae.train_step(steps, jnp.asarray(images)[indices])
        losses.append(metrics["loss"])
    np.testing.assert_allclose(means["loss"], np.mean(losses), rtol=1e-5)
    for a, b in leaves(epoch.params, steps.params):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_epoch_in_parts_is_the_epoch_bit_for_bit(state, images):
    batches = shuffle(state, len(images))
    whole, _ = train_steps(kept(state), images, batches, 0, 4)
    parts, _ = train_steps(state, images, batches, 0, 1)
    parts, _ = train_steps(parts, images, batches, 1, 4)
    assert_trees_equal(whole, parts)


def test_an_epoch_takes_over_the_states_memory_and_a_step_does_not(state, images):
    jaxvae.train_step(state, images[:16])
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    after, _ = jaxvae.train_epoch(state, images)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))
    batches = shuffle(after, len(images))
    train_steps(after, images, batches, 0, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(after))


def test_every_epoch_has_each_image_at_most_once_in_an_order_of_its_own(state, images):
    first = np.asarray(shuffle(state, 60))
    assert first.shape == (3, 16)
    assert len(set(first.ravel())) == 48
    later, _ = jaxvae.train_epoch(state, jnp.asarray(images))
    assert not np.array_equal(first, shuffle(later, 60))


def test_more_images_per_batch_than_there_are_is_refused(state, images):
    with pytest.raises(jaxvae.InputError, match="batch_size is 16: expected at most the 10"):
        jaxvae.train_epoch(state, images[:10])


def test_images_of_another_shape_are_refused(state):
    with pytest.raises(jaxvae.InputError, match=r"expected \(batch, 8, 8, 1\)"):
        jaxvae.train_step(state, np.zeros((16, 9, 8, 1), np.uint8))


def test_an_objective_of_ones_own_is_what_is_minimised(state, images):
    def doubled(params, key, images):
        loss, terms = negative_elbo(params, key, images)
        return 2 * loss, terms

    _, metrics = jaxvae.train_step(state, images[:16], objective=doubled)
    np.testing.assert_allclose(metrics["loss"], -2 * metrics["elbo"], rtol=1e-6)


def test_seeds_can_be_trained_at_once_under_vmap(model_config, images):
    create = partial(
        jaxvae.create_train_state, config=model_config, train_config=jaxvae.TrainConfig(16)
    )
    keys = jax.random.split(jax.random.key(0), 3)
    together, _ = jax.vmap(jaxvae.train_step, (0, None))(jax.vmap(create)(keys), images[:16])
    alone, _ = jaxvae.train_step(create(keys[1]), images[:16])
    for a, b in leaves(jax.tree.map(lambda x: x[1], together.params), alone.params):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_kl_term_is_weighted_by_beta(state, images):
    config = replace(state.config, beta=4.0)
    _, metrics = jaxvae.train_step(replace(state, config=config), images[:16])
    loss = 4 * metrics["kl"] - metrics["log_likelihood"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    elbo = metrics["log_likelihood"] - metrics["kl"]
    np.testing.assert_allclose(metrics["elbo"], elbo, rtol=1e-6)


def test_learning_rates_and_betas_can_differ_under_vmap(state, images):
    """And are the configuration's, had it been theirs."""
    rates, betas = jnp.array([1e-3, 1e-3, 1e-4]), jnp.array([1.0, 8.0, 8.0])

    def epoch(state, learning_rate, beta):
        return jaxvae.train_epoch(state, images, learning_rate=learning_rate, beta=beta)[0]

    three = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
    together = jax.vmap(epoch)(three, rates, betas)
    before = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
    ends = []
    for i, (rate, beta) in enumerate(zip(rates, betas, strict=True)):
        config = replace(state.config, learning_rate=float(rate), beta=float(beta))
        alone, _ = jaxvae.train_epoch(replace(kept(state), config=config), images)
        one = np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(together.params)])
        other = np.concatenate([np.ravel(x) for x in jax.tree.leaves(alone.params)])
        ends.append(one)
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(one - before)
    assert np.linalg.norm(ends[0] - ends[1]) > 0.05 * np.linalg.norm(ends[0] - before)
    assert np.linalg.norm(ends[2] - before) < 0.2 * np.linalg.norm(ends[1] - before)


def as_float64(tree):
    def wide(x):
        return x.astype(jnp.float64) if x.dtype == jnp.float32 else x

    return jax.tree.map(wide, tree)


def run_alone_and_on_eight_devices(state, images, steps):
    """The state and the ELBOs of both runs; the devices' copies are the same."""
    shared = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    step = jax.pmap(partial(jaxvae.train_step, axis_name="batch"), axis_name="batch")
    elbos = []
    for i in range(steps):
        batch = np.roll(images, i, axis=0)
        state, metrics = jaxvae.train_step(state, batch)
        shared, shared_metrics = step(shared, batch.reshape(8, 8, *batch.shape[1:]))
        elbos.append((metrics["elbo"], *shared_metrics["elbo"]))
    assert int(shared.step[7]) == int(state.step) == steps
    one = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
    eight = np.concatenate([np.ravel(x[7]) for x in jax.tree.leaves(shared.params)])
    return np.linalg.norm(eight - one) / np.linalg.norm(one), np.array(elbos)


def test_pmap_over_eight_devices_is_the_single_device_run(model_config, images):
    """In double precision, so that RMSprop does not magnify rounding where gradients are near 0."""
    assert jax.device_count() == 8
    with jax.enable_x64(True):
        config = jaxvae.TrainConfig(batch_size=64)
        state = jaxvae.create_train_state(jax.random.key(0), model_config, config)
        apart, elbos = run_alone_and_on_eight_devices(as_float64(state), images / 255, 20)
    assert apart < 1e-9
    np.testing.assert_allclose(elbos, elbos[:, :1].repeat(9, axis=1), rtol=1e-12)


def test_pmap_over_eight_devices_in_float32(model_config, images):
    config = jaxvae.TrainConfig(batch_size=64)
    state = jaxvae.create_train_state(jax.random.key(0), model_config, config)
    apart, elbos = run_alone_and_on_eight_devices(state, images, 5)
    assert apart < 1e-3
    np.testing.assert_allclose(elbos, elbos[:, :1].repeat(9, axis=1), rtol=1e-5)


def test_a_sharded_batch_under_jit_is_the_single_device_step(state, images):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    _, alone = jaxvae.train_step(state, images)
    _, sharded = jaxvae.train_step(state, jax.device_put(images, sharding))
    np.testing.assert_allclose(sharded["elbo"], alone["elbo"], rtol=1e-5)
