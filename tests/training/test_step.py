"""The step, and an epoch of steps."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import refused
from jax.flatten_util import ravel_pytree

import jaxvae
from jaxvae.devices.sharding import AXIS, data_parallel, devices_for, own_part
from jaxvae.models.likelihoods import binarize
from jaxvae.objectives import ELBO, Elbo, example_keys, parse_objective
from jaxvae.training.state import optimizer
from jaxvae.training.step import shuffle, train_steps

pytestmark = pytest.mark.usefixtures("compile_quickly")


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def arrays(state):
    """The state with its key as plain numbers."""
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class SmallEncoder(nn.Module):
    """With filters: it is those that are taken in blocks."""

    @nn.compact
    def __call__(self, images):
        x = nn.tanh(nn.Conv(2, (3, 3), strides=(4, 4))(images)).reshape(len(images), -1)
        return nn.Dense(2)(x), nn.Dense(2)(x)


class SmallDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(64)(z).reshape(-1, 8, 8, 1)


SMALL = jaxvae.ModelConfig((8, 8, 1), 2, network=(SmallEncoder(), SmallDecoder()))


def small_state(**config):
    return jaxvae.create_train_state(jax.random.key(0), SMALL, jaxvae.TrainConfig(**config))


@pytest.fixture
def state(model_config):
    train_config = jaxvae.TrainConfig(batch_size=16)
    return jaxvae.create_train_state(jax.random.key(0), model_config, train_config)


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


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e5])
def test_a_gradient_longer_than_the_limit_is_cut_down_to_it(state, images, limit):
    """By optax's own: with plain gradient descent's first moment, Adam's step is of g alone."""
    config = replace(state.config, optimizer="adam:eps=1e3", clip_norm=limit)
    state = replace(state, config=config, opt_state=optimizer(config).init(state.params))
    batch = jnp.asarray(images[:16])
    keys = example_keys(jax.random.split(jax.random.fold_in(state.key, 0))[0], 16)
    grads = jax.grad(lambda p: -jnp.mean(jaxvae.elbo(p, keys, batch).value))(state.params)
    clip = optax.clip_by_global_norm(limit)
    cut, _ = clip.update(grads, clip.init(state.params))
    assert (float(optax.tree.norm(cut)) < 0.999 * float(optax.tree.norm(grads))) == (limit < 2)
    updates, _ = optimizer(config).update(cut, state.opt_state)
    after, _ = jaxvae.train_step(state, batch)
    expected = optax.apply_updates(state.params, updates)
    far = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, expected))
    assert float(far) < 2e-2 * float(optax.tree.norm(updates))


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


def test_an_epochs_steps_follow_the_schedule_of_the_whole_run(images):
    steps = state = small_state(batch_size=16, schedule="cosine", epochs=2)
    epoch, _ = jaxvae.train_epoch(kept(state), jnp.asarray(images))
    for i, indices in enumerate(shuffle(state, len(images))):
        rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * i / 8))
        steps, _ = jaxvae.train_step(steps, jnp.asarray(images)[indices], learning_rate=rate)
    for a, b in leaves(epoch.params, steps.params):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_beta_is_warmed_up_by_the_step(images):
    state = small_state(beta=2.0, warmup="linear:steps=4")
    for step, weight in (0, 0.0), (3, 1.5), (9, 2.0):
        _, metrics = jaxvae.train_step(replace(state, step=jnp.int32(step)), images[:16])
        loss = weight * metrics["kl"] - metrics["log_likelihood"]
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


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


def test_a_donated_state_says_so(state, images):
    jaxvae.train_epoch(state, images)
    for again in (jaxvae.train_epoch, jaxvae.train_step):
        with refused("state was donated to an earlier call, which reused its memory: expected"):
            again(state, images)
    with refused("params was donated to an earlier call"):
        jaxvae.sample(state.params, jax.random.key(0), 1)
    assert repr(state).startswith("TrainState(step=deleted, params=Params(")


def test_every_epoch_has_each_image_at_most_once_in_an_order_of_its_own(state, images):
    first = np.asarray(shuffle(state, 60))
    assert first.shape == (3, 16)
    assert len(set(first.ravel())) == 48
    later, _ = jaxvae.train_epoch(state, jnp.asarray(images))
    assert not np.array_equal(first, shuffle(later, 60))


def batches_of_m2(labels, batch_size=16, share=0.1):
    config = jaxvae.TrainConfig(batch_size, objective=f"m2:labelled_share={share}")
    state = replace(small_state(), config=config)
    return np.asarray(shuffle(state, len(labels), labels))


def test_few_labelled_images_are_repeated_equally_often_in_every_batch():
    labels = np.full(100, -1)
    labels[[3, 50, 51]] = 0, 1, 0
    batches = batches_of_m2(labels)
    assert batches.shape == (6, 16)
    np.testing.assert_array_equal(np.sum(labels[batches] >= 0, axis=1), 2)  # 1.6, rounded up
    assert all(len(set(batch)) == 16 for batch in batches)
    times = np.bincount(batches.ravel(), minlength=100)
    np.testing.assert_array_equal(times[labels >= 0], 4)
    np.testing.assert_array_equal(np.sort(times[labels < 0])[-84:], 1)
    assert times[labels < 0].sum() == 84


def test_a_share_that_is_a_whole_number_of_images_is_not_rounded_up():
    labels = np.where(np.arange(100) < 3, 0, -1)
    assert np.sum(labels[batches_of_m2(labels, 100, 0.07)] >= 0) == 7


def test_labelled_images_that_are_frequent_enough_are_distributed_evenly_once():
    labels = np.where(np.arange(100) % 3, -1, 1)  # 34 of 100 for six batches
    batches = batches_of_m2(labels)
    assert set(np.sum(labels[batches] >= 0, axis=1)) == {5, 6}
    assert len(set(batches.ravel())) == 96


@pytest.mark.parametrize("labels", [np.full(100, -1), np.zeros(100, int)])
def test_images_of_which_no_or_every_one_has_a_label_come_once(labels):
    batches = batches_of_m2(labels)
    assert len(set(batches.ravel())) == 96
    assert np.any(np.sort(batches.ravel()) != np.arange(96))


def test_labelled_images_need_not_be_repeated():
    labels = np.where(np.arange(100) < 3, 0, -1)
    assert len(set(batches_of_m2(labels, share=0).ravel())) == 96


def test_an_epoch_of_m2_has_labelled_images_in_every_step():
    """With the labels that the objective is called with."""
    seen = []

    def objective(params, keys, images, labels):
        jax.debug.callback(lambda y: seen.append(np.sum(y >= 0)), labels)
        terms = jaxvae.elbo(params, keys, images, jnp.maximum(labels, 0))
        return -terms.value, terms

    objective.unlabelled, objective.labelled_share = True, 0.25
    model = jaxvae.ModelConfig((3,), 2, "mlp:width=4", "gaussian", num_classes=3, classifier=True)
    config = jaxvae.TrainConfig(batch_size=8, objective=objective)
    state = jaxvae.create_train_state(jax.random.key(0), model, config)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    jaxvae.train_epoch(state, x, np.where(np.arange(40) == 7, 2, -1).astype(np.int32))
    jax.effects_barrier()
    assert seen == [2] * 5


def test_more_images_per_batch_than_there_are_is_refused(state, images):
    with pytest.raises(jaxvae.InputError, match="batch_size is 16: expected at most the 10"):
        jaxvae.train_epoch(state, images[:10])


def test_images_of_another_shape_are_refused(state):
    with pytest.raises(jaxvae.InputError, match=r"expected \(batch, 8, 8, 1\)"):
        jaxvae.train_step(state, np.zeros((16, 9, 8, 1), np.uint8))


def test_an_objective_of_ones_own_is_what_is_minimised(state, images):
    def doubled(params, key, images):
        loss, terms = ELBO()(params, key, images)
        return 2 * loss, terms

    _, metrics = jaxvae.train_step(state, images[:16], objective=doubled)
    np.testing.assert_allclose(metrics["loss"], -2 * metrics["elbo"], rtol=1e-6)


def test_a_plain_function_as_objective_takes_no_beta(state, images):
    def plain(params, key, images):
        return ELBO()(params, key, images)

    for step in (jaxvae.train_step, jaxvae.train_epoch):
        with refused("beta was given, but the objective is a plain function", "leave it out"):
            step(state, images, objective=plain, beta=2.0)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_noise_is_the_examples_with_keys_of_another_implementation(images, implementation):
    """Under `vmap` such keys draw numbers that depend on the whole batch."""
    key = jax.random.key(3, impl=implementation)
    state = jaxvae.create_train_state(key, SMALL, jaxvae.TrainConfig(binarization="dynamic"))
    others = replace(state, key=key)  # as it may come from elsewhere
    for one in (state, others):
        _, alone = step_on(1, one, images[:16])
        _, shared = step_on(4, one, images[:16])
        for name, value in alone.items():
            np.testing.assert_allclose(shared[name], value, rtol=1e-5)
    whole = jaxvae.elbo(state.params, key, images[:16]).value
    keys = example_keys(key, 16)
    part = jaxvae.elbo(state.params, keys[5:7], images[5:7]).value
    np.testing.assert_allclose(part, whole[5:7], rtol=1e-5)


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


def test_learning_rates_and_betas_can_differ_under_vmap(images):
    """And are the configuration's, had it been theirs."""
    model = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=32")
    state = jaxvae.create_train_state(jax.random.key(0), model, jaxvae.TrainConfig(batch_size=16))
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


def step_on(devices, state, images, objective=None):
    """`train_step` with the batch shared by so many devices."""
    if devices == 1:
        return jaxvae.train_step(state, images, objective=objective)

    def step(state, images, axis_name):
        part = own_part(images, axis_name)
        return jaxvae.train_step(state, part, axis_name=axis_name, objective=objective)

    mesh = devices_for(len(images), least=len(images) // devices)
    assert mesh.size == devices
    return data_parallel(step, mesh)(state, images)


@pytest.mark.parametrize(
    "objective",
    ["elbo:num_samples=2,free_bits=0.1", "dreg:num_samples=3", "beta_tc", "mmd:weight=50"],
    ids=["free_bits", "dreg", "beta_tc", "mmd"],
)
def test_the_gradient_is_the_whole_batchs_on_any_number_of_devices(images, objective):
    """Whatever its blocks are. Adam's first moment shows the gradient: m = 0.1 g."""
    with jax.enable_x64(True):
        train_config = jaxvae.TrainConfig(objective=objective, beta=2.0, optimizer="adam")
        # More components than half the images: each image has several draws of the prior.
        mixture = "mixture:components=11" if "mmd" in str(objective) else "standard_normal"
        config = replace(SMALL, prior=mixture)
        state = jaxvae.create_train_state(jax.random.key(0), config, train_config)
        state = as_float64(state)
        batch = jnp.asarray(images[:16] / 255)
        key = jax.random.split(jax.random.fold_in(state.key, 0))[0]

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            return jnp.mean(parse_objective(objective)(params, key, batch, beta=2.0)[0])

        value, gradient = loss(state.params)
        expected = ravel_pytree(gradient)[0]
        if "free_bits" in objective:
            kl = jnp.mean(jaxvae.encode(state.params, batch).kl_per_latent(), axis=0)
            assert min(kl) < 0.1 < max(kl)
        for devices in 1, 2, 4:
            after, metrics = step_on(devices, state, batch)
            moment = ravel_pytree(after.opt_state[0].mu)[0]
            np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
            np.testing.assert_allclose(moment, 0.1 * expected, atol=1e-12 * jnp.abs(expected).max())


def test_every_example_keeps_its_covariates_on_any_number_of_devices(images):
    config = jaxvae.ModelConfig((8, 8, 1), 2, "mlp:width=4", num_covariates=2)
    state = jaxvae.create_train_state(jax.random.key(0), config, jaxvae.TrainConfig(batch_size=8))
    covariates = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)

    def step(state, images, labels, *, axis_name=None):
        return jaxvae.train_step(state, images, labels, axis_name=axis_name)

    after, metrics = step(state, images[:8], covariates)
    rows, whole = jax.P(AXIS), jax.P()
    mesh = devices_for(8, least=2)
    split = data_parallel(step, mesh, in_specs=(whole, rows, rows), out_specs=whole)
    others, of_devices = split(state, images[:8], covariates)
    np.testing.assert_allclose(metrics["loss"], of_devices["loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (after.params, others.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    _, shuffled = step(state, images[:8], covariates[::-1])
    assert abs(shuffled["loss"] - metrics["loss"]) > 1e-3


def what_is_seen(params, keys, images):
    """For `train_step` to minimise: metrics that tell what pixels it was given."""
    grey = jnp.sum((images != 0) & (images != 1), axis=(1, 2, 3))
    places = jnp.sum(images * jnp.arange(64.0).reshape(8, 8, 1), axis=(1, 2, 3))
    return jnp.zeros(len(images)), Elbo(grey, places, jnp.mean(images, axis=(1, 2, 3)))


def test_dynamic_binarization_draws_black_and_white_anew_at_every_step():
    images = np.full((64, 8, 8, 1), 51, np.uint8)
    state = small_state(binarization="dynamic")
    places = []
    for _ in range(3):
        _, shared = step_on(2, state, images, what_is_seen)
        state, metrics = step_on(1, state, images, what_is_seen)
        for name, value in metrics.items():
            np.testing.assert_allclose(shared[name], value, rtol=1e-6)
        assert metrics["elbo"] == 0
        assert abs(metrics["kl"] - 0.2) < 4 * np.sqrt(0.2 * 0.8 / images.size)
        places.append(float(metrics["log_likelihood"]))
    assert len(set(places)) == 3
    plain = replace(state, config=jaxvae.TrainConfig())
    _, metrics = step_on(1, plain, images, what_is_seen)
    assert metrics["elbo"] > 0


def test_the_pixels_drawn_are_independent_of_the_latents_noise():
    """No key that an image's samples are drawn with draws any image's pixels."""
    grey = jnp.full((4, 8, 8, 1), 0.5)

    def likeness(params, keys, images):
        folded = [jax.vmap(jax.random.fold_in, (0, None))(keys, k) for k in range(4)]
        drawn = jnp.stack([binarize(key, grey[0]) for keys in (keys, *folded) for key in keys])
        same = jnp.mean(drawn[:, None] == images, axis=(2, 3, 4))
        terms = jnp.full(4, jnp.max(same))
        return jnp.zeros(4), Elbo(terms, terms, terms)

    state = small_state(binarization="dynamic")
    _, metrics = jaxvae.train_step(state, grey, objective=likeness)
    assert 0.5 < metrics["elbo"] < 0.9


def test_a_sharded_batch_under_jit_is_the_single_device_step(state, images):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    _, alone = jaxvae.train_step(state, images)
    _, sharded = jaxvae.train_step(state, jax.device_put(images, sharding))
    np.testing.assert_allclose(sharded["elbo"], alone["elbo"], rtol=1e-5)
