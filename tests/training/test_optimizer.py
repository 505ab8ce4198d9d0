"""Optimizers, schedules, and what a configuration makes of a gradient."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import refused
from jax.flatten_util import ravel_pytree

import jaxvae
from jaxvae.devices.sharding import data_parallel, devices_for, fsdp_specs, gather, shard
from jaxvae.objectives import ELBO, example_keys
from jaxvae.runs.config import RunConfig
from jaxvae.training.optimizer import (
    ELEMENTWISE,
    OPTIMIZERS,
    SCHEDULES,
    expect_rate,
    parse_optimizer,
    parse_schedule,
    rate_at,
)
from jaxvae.training.state import noise_key, optimizer
from jaxvae.training.step import train_steps

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=8")


def state_of(model=SMALL, **config):
    train = jaxvae.TrainConfig(**{"batch_size": 16} | config)
    return jaxvae.create_train_state(jax.random.key(0), model, train)


def vector(tree):
    return np.asarray(ravel_pytree(tree)[0])


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@jax.jit
def _gradient(params, key, batch):
    keys = example_keys(key, len(batch))
    return jax.grad(lambda p: -jnp.mean(jaxvae.elbo(p, keys, batch).value))(params)


def gradient(state, batch):
    """Of the mean loss that the next step of a state minimises."""
    return _gradient(state.params, noise_key(state), jnp.asarray(batch))


# The named optimizers


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_takes_a_step(name, images):
    """Under a traced learning rate; the next state has the types of the last."""
    state = state_of(optimizer=name)
    assert state.config.to_dict()["optimizer"] == name

    def step(state, learning_rate):
        return jaxvae.train_step(state, images[:16], learning_rate=learning_rate)[0]

    after = jax.eval_shape(step, state, jnp.float32(1e-3))
    assert after == jax.eval_shape(lambda: state)


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("sgd:momentum=0.9", lambda rate: optax.sgd(rate, momentum=0.9)),
        ("adamw:weight_decay=0", lambda rate: optax.adam(rate)),
        ("lion:weight_decay=0", lambda rate: optax.lion(rate, weight_decay=0)),
        ("adafactor", lambda rate: optax.adafactor(rate)),
        ("lamb", lambda rate: optax.lamb(rate)),
    ],
)
def test_a_step_is_optaxs_on_the_gradient_of_the_mean_loss(spec, made, images):
    state = state_of(optimizer=spec, learning_rate=0.01)
    update = made(0.01)
    changes, _ = update.update(
        gradient(state, images[:16]), update.init(state.params), state.params
    )
    after, _ = jaxvae.train_step(state, images[:16])
    moved = vector(after.params) - vector(state.params)
    assert np.linalg.norm(moved) > 0
    assert np.linalg.norm(moved - vector(changes)) < 1e-2 * np.linalg.norm(moved)


def test_muon_makes_each_kernel_an_orthogonal_matrix_and_adam_updates_the_rest():
    """A convolution has one matrix, coupling layers one for each; the size is that of Adam's.

    The singular values of Muon's matrices lie around 1 (Jordan et al. 2024): between 0.6 and 1.3.
    """
    draw = np.random.default_rng(0).normal
    shapes = {
        "dense": {"kernel": (6, 8), "bias": (8,)},
        "conv": {"kernel": (3, 3, 4, 8)},
        "coupling": {"kernel_1": (2, 6, 8)},
        "attention": {"kernel": (6, 2, 4)},
    }
    grads = jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), "f"),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    update = parse_optimizer("muon")(1.0)
    changes, _ = update.update(grads, update.init(grads), grads)
    matrices = (
        changes["dense"]["kernel"],
        changes["conv"]["kernel"].reshape(36, 8),
        *changes["coupling"]["kernel_1"],
    )
    for matrix in matrices:
        singular = np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
        assert (singular > 0.6).all()
        assert (singular < 1.3).all()
    adam = optax.adam(1.0, nesterov=True)
    others = {"bias": grads["dense"]["bias"], "attention": grads["attention"]["kernel"]}
    expected, _ = adam.update(others, adam.init(others))
    np.testing.assert_allclose(changes["dense"]["bias"], expected["bias"], rtol=1e-5)
    np.testing.assert_allclose(changes["attention"]["kernel"], expected["attention"], rtol=1e-5)


def halves(tree):
    """Of every array, along its last axis, as two devices would hold it."""
    return [
        jax.tree.map(lambda x: jnp.split(x, 2, axis=-1)[i], tree)  # noqa: B023
        for i in (0, 1)
    ]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_those_that_are_elementwise_update_parts_as_they_update_the_whole(name):
    draw = np.random.default_rng(0).normal
    params, *grads = (
        {"kernel": jnp.asarray(draw(size=(4, 6)), "f"), "bias": jnp.asarray(draw(size=6), "f")}
        for _ in range(4)
    )
    update = parse_optimizer(name)(1e-2)

    def run(params, grads):
        opt_state = update.init(params)
        for grad in grads:
            changes, opt_state = update.update(grad, opt_state, params)
            params = optax.apply_updates(params, changes)
        return params

    parts = map(run, halves(params), zip(*map(halves, grads), strict=True))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), *parts)
    same = np.allclose(vector(joined), vector(run(params, grads)), rtol=1e-6, atol=1e-7)
    assert same == (name in ELEMENTWISE)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("optimizer", "adamw:weight_decay=1e-4,b1=0.8", "adamw:b1=0.8,weight_decay=0.0001"),
        ("schedule", "exponential_decay:decay_rate=0.5,transition_steps=9",
         "exponential_decay:transition_steps=9,decay_rate=5e-1"),
        ("objective", "elbo:free_bits=0.5", "elbo:free_bits=5e-1"),
    ],
)  # fmt: skip
def test_equal_options_have_one_spelling(name, first, second):
    one, other = (jaxvae.TrainConfig(**{name: spec}) for spec in (first, second))
    assert one == other
    assert one.to_dict() == other.to_dict()


def test_rmsprop_follows_keras():
    """Keras: v = 0.9 v + 0.1 g^2; w = w - 1e-3 g / sqrt(v + 1e-7), from v = 0."""
    assert jaxvae.TrainConfig().to_dict()["optimizer"] == "rmsprop"
    update = optimizer(jaxvae.TrainConfig())
    w, v = jnp.float32(2.0), 0.0
    opt_state = update.init(w)
    for g in (0.5, -1e-4, 3.0):
        v = 0.9 * v + 0.1 * g**2
        step, opt_state = update.update(jnp.float32(g), opt_state)
        assert float(step) == pytest.approx(-1e-3 * g / np.sqrt(v + 1e-7), rel=1e-5)


def test_rmsprop_takes_optaxs_options():
    """With epsilon outside the root: w = w - 0.01 g / (sqrt(v) + 0.1)."""
    spec = "rmsprop:decay=0.5,eps=0.1,eps_in_sqrt=false"
    config = jaxvae.TrainConfig(optimizer=spec, learning_rate=0.01)
    assert config.to_dict()["optimizer"] == spec
    update = optimizer(config)
    w, v = jnp.float32(2.0), 0.0
    opt_state = update.init(w)
    for g in (0.5, -0.1, 3.0):
        v = 0.5 * v + 0.5 * g**2
        step, opt_state = update.update(jnp.float32(g), opt_state)
        assert float(step) == pytest.approx(-0.01 * g / (np.sqrt(v) + 0.1), rel=1e-5)


def test_adam_follows_its_paper():
    """Algorithm 1: m and v, each freed of its start at 0; epsilon outside the root."""
    update = optimizer(jaxvae.TrainConfig(optimizer="adam:eps=0.1", learning_rate=0.01))
    w, m, v = jnp.float32(2.0), 0.0, 0.0
    opt_state = update.init(w)
    for t, g in enumerate((0.5, -0.1, 3.0), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = -0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 0.1)
        step, opt_state = update.update(jnp.float32(g), opt_state)
        assert float(step) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamaxw", "lion", "adan"])
def test_weight_decay_spares_all_but_the_kernels_of_the_networks(name):
    """At gradients of 0 an update is the decay alone: -0.5 * 0.1 w."""
    model = replace(
        SMALL, likelihood="gaussian", prior="mixture:components=3", posterior="iaf:steps=1,hidden=4"
    )
    params = jax.tree.map(lambda x: x + 1.0, jaxvae.init(jax.random.key(0), model))
    config = jaxvae.TrainConfig(optimizer=f"{name}:weight_decay=0.1", learning_rate=0.5)
    update = optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = update.update(zeros, update.init(params), params)
    decayed = set()
    for (path, change), w in zip(
        jax.tree_util.tree_leaves_with_path(changes), jax.tree.leaves(params), strict=True
    ):
        part, last = path[0].name, path[-1]
        if np.any(change):
            decayed.add(part)
            np.testing.assert_allclose(change, -0.05 * w, rtol=1e-5)
        else:
            assert w.ndim < 2 or part in ("prior", "likelihood"), (part, last)
    assert decayed == {"encoder", "decoder", "posterior"}
    assert params.prior
    assert params.likelihood


def test_weight_decay_spares_biases_of_attention_and_the_fixed_vectors_of_codes():
    model = replace(SMALL, latent_dim=4, prior="uniform_codes", posterior="vq:codes=4,dim=2")
    params = jaxvae.init(jax.random.key(0), model)
    attention = {"query": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((4, 2, 3))}}
    params = replace(params, encoder={**params.encoder, **attention})
    update = optimizer(jaxvae.TrainConfig(optimizer="adamw:weight_decay=0.1"))
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = update.update(zeros, update.init(params), params)
    for changed in (changes.posterior["kernel"], changes.encoder["query"]["kernel"]):
        assert np.any(changed)
    for same in (changes.posterior["vectors"], changes.encoder["query"]["bias"]):
        assert not np.any(same)


def test_weight_decay_spares_the_learned_input_of_a_ladder():
    model = jaxvae.ModelConfig(image_shape=(4, 4, 1), network="ladder:groups=4x1,width=4,latents=1")
    params = jax.tree.map(lambda x: x + 1.0, jaxvae.init(jax.random.key(0), model))
    update = optimizer(jaxvae.TrainConfig(optimizer="adamw:weight_decay=0.1"))
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = update.update(zeros, update.init(params), params)
    decayed = {
        path[-1].key: bool(np.any(change))
        for path, change in jax.tree_util.tree_leaves_with_path(changes.decoder)
    }
    assert decayed == {"kernel": True, "bias": False, "top": False}


# A warm-up and the length of the run


def test_a_warm_up_may_be_long_but_not_longer_than_the_run():
    schedule = "warmup_cosine_decay_schedule:warmup_steps=5000"
    config = jaxvae.TrainConfig(schedule=schedule, learning_rate=0.5)
    expect_rate(config.schedule, 5001)
    assert rate_at(config.schedule, 0.5, 2500, 20_000) == 0.25
    with refused(f"schedule is {schedule!r}, which optax refuses for a run of 5000 steps: "):
        expect_rate(config.schedule, 5000)


# Objects of optax


def test_an_optax_object_is_an_optimizer(images):
    """The chain of optax's clipping and Adam is what the configuration's own names make."""
    made = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))
    own, named = (
        state_of(**config)
        for config in (
            {"optimizer": made},
            {"optimizer": "adam", "learning_rate": 0.01, "clip_norm": 1.0},
        )
    )
    before = vector(own.params)
    own, named = (jaxvae.train_epoch(state, images)[0] for state in (own, named))
    moved = np.linalg.norm(vector(own.params) - before)
    assert np.linalg.norm(vector(own.params) - vector(named.params)) < 1e-2 * moved
    with refused("learning_rate was given, but the optimizer is an optax.GradientTransformation"):
        jaxvae.train_step(own, images[:16], learning_rate=0.1)


def test_an_optax_object_has_a_schedule_of_its_own():
    made = optax.sgd(optax.linear_schedule(0.1, 0, 10))
    assert jaxvae.TrainConfig(optimizer=made).optimizer is made
    for schedule in "cosine", optax.linear_schedule(0.1, 0, 10):
        with refused("which has its own learning rate: expected the schedule 'constant'"):
            jaxvae.TrainConfig(optimizer=made, schedule=schedule)


def test_a_function_of_the_learning_rate_is_an_optimizer(images):
    """It follows the schedule, as the name does."""
    ends = [
        jaxvae.train_epoch(state_of(optimizer=made, schedule="cosine", epochs=1), images)[0]
        for made in ("adam:b1=0.5", lambda rate: optax.adam(rate, b1=0.5))
    ]
    assert_same_bits(*((end.params, end.opt_state) for end in ends))


# Schedules


def rates(schedule, steps, total, learning_rate=0.1):
    """By jit over a traced learning rate, as training computes them."""
    parsed = parse_schedule(schedule)
    at = jax.jit(jax.vmap(lambda rate, step: rate_at(parsed, rate, step, total), (None, 0)))
    return np.broadcast_to(at(learning_rate, jnp.asarray(steps)), len(steps))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1, 99: 1}),
        ("cosine", {0: 1, 25: 0.5 + 0.125**0.5, 50: 0.5, 75: 0.5 - 0.125**0.5, 100: 0}),
        # optax's: length and peak, or start, are the run's.
        ("constant_schedule", {0: 1, 99: 1}),
        ("cosine_decay_schedule", {0: 1, 25: 0.5 + 0.125**0.5, 50: 0.5, 100: 0}),
        ("linear_schedule:init_value=0.2,end_value=0.05", {0: 2, 50: 1.25, 100: 0.5}),
        ("exponential_decay:decay_rate=0.25,end_value=0.05", {0: 1, 50: 0.5, 99: 0.5}),
        ("cosine_decay_schedule:alpha=0.2", {0: 1, 50: 0.6, 100: 0.2}),
        ("linear_schedule", {0: 1, 25: 0.75, 100: 0}),
        ("linear_schedule:transition_steps=50", {0: 1, 25: 0.5, 50: 0, 99: 0}),
        ("polynomial_schedule:power=2", {0: 1, 50: 0.25, 100: 0}),
        ("exponential_decay:decay_rate=0.25", {0: 1, 50: 0.5, 100: 0.25}),
        ("warmup_constant_schedule:warmup_steps=10", {0: 0, 5: 0.5, 10: 1, 99: 1}),
        ("warmup_cosine_decay_schedule:warmup_steps=20", {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        (
            "warmup_cosine_decay_schedule:warmup_steps=20,init_value=0.02,end_value=0.01",
            {0: 0.2, 10: 0.6, 20: 1, 60: 0.55, 100: 0.1},
        ),
        ("linear_onecycle_schedule:pct_start=0.5,pct_final=1.0", {0: 0.04, 50: 1}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    found = rates(schedule, list(expected), 100)
    np.testing.assert_allclose(found, 0.1 * np.array(list(expected.values())), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_has_a_rate_at_every_step(name):
    needed = {
        "warmup_constant_schedule": "warmup_steps=10",
        "warmup_cosine_decay_schedule": "warmup_steps=10",
        "warmup_exponential_decay_schedule": "warmup_steps=10,decay_rate=0.5",
        "exponential_decay": "decay_rate=0.5",
    }
    found = rates(":".join(filter(None, (name, needed.get(name)))), range(100), 100)
    assert np.all(np.isfinite(found))
    assert np.max(found) == pytest.approx(0.1, rel=0.05)
    assert np.min(found) >= 0


@pytest.mark.parametrize(
    ("steps", "starts"),
    [
        (3280, [0, 1, 4, 13, 40, 121, 364, 1093]),
        (32800, [0, 10, 40, 130, 400, 1210, 3640, 10930]),
        # Stages of 0.03, 0.09, 0.27, 0.8, 2.5, 7.4, 22.2 and 66.7 steps: two begin with none.
        (100, [0, None, None, 1, 2, 4, 12, 34]),
    ],
)
def test_burdas_schedule_has_eight_stages_each_three_times_the_last(steps, starts):
    found = rates("burda", np.arange(steps), steps, 1.0)
    stages = np.round(-7 * np.log10(found)).astype(int)
    assert np.all(np.diff(stages) >= 0)
    assert [int(np.argmax(stages == i)) if i in stages else None for i in range(8)] == starts
    assert found[-1] == pytest.approx(0.1)


@dataclass(frozen=True)
class Halving:
    """A schedule as a user writes it."""

    def rate(self, learning_rate, step, steps):
        return learning_rate * 0.5**step


def test_a_schedule_is_an_optax_object_or_one_of_ones_own(images):
    """Of gradient descent the rate shows in how far a step goes: here the second of a run."""
    objects = {optax.piecewise_constant_schedule(0.1, {1: 0.25}): 0.025, Halving(): 0.05}
    for schedule, rate in objects.items():
        state = state_of(optimizer="sgd", learning_rate=0.1, schedule=schedule, epochs=1)
        state = replace(state, step=jnp.int32(1))
        before, grad = vector(state.params), vector(gradient(state, images[:16]))
        after, _ = train_steps(state, images, np.arange(64).reshape(4, 16), 0, 1)
        moved = vector(after.params) - before
        assert np.linalg.norm(moved + rate * grad) < 1e-3 * np.linalg.norm(moved)


# What is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer": "adm"}, "optimizer is 'adm': expected 'adabelief', 'adadelta', "),
        ({"optimizer": "ADAM"}, "optimizer is 'ADAM': expected "),
        ({"optimizer": "lbfgs"}, "optimizer is 'lbfgs': expected "),
        ({"optimizer": "scale_by_adam"}, "optimizer is 'scale_by_adam': expected "),
        ({"optimizer": "optax.adam"}, "optimizer is 'optax.adam', which is not registered: pass"),
        ({"optimizer": "adam:beta=1"}, "optimizer 'adam' has no option 'beta': expected among "),
        ({"optimizer": "adam:learning_rate=1"}, "'adam' has no option 'learning_rate'"),
        ({"optimizer": "adam:b1"}, "optimizer is 'adam:b1': expected NAME:KEY=VALUE,KEY=VALUE"),
        ({"optimizer": "adam:b1=fast"}, "optimizer is 'adam:b1=fast', which optax refuses: "),
        ({"optimizer": "adam:mu_dtype=x"}, "optimizer is 'adam:mu_dtype=x', which optax refuses"),
        ({"optimizer": 3}, "optimizer is 3: expected "),
        ({"optimizer": None}, "an optax.GradientTransformation or a function that makes one"),
        ({"schedule": "cos"}, "schedule is 'cos': expected 'constant', 'cosine', 'burda', "),
        ({"schedule": "cosine:steps=3"}, "schedule 'cosine' has no option 'steps': it has none"),
        (
            {"schedule": "warmup_cosine_decay_schedule"},
            "schedule is 'warmup_cosine_decay_schedule', which optax refuses: ",
        ),
        (
            {"schedule": "linear_schedule:steps=3"},
            "schedule 'linear_schedule' has no option 'steps': expected among 'init_value', ",
        ),
        ({"schedule": 0.1}, "schedule is 0.1: expected "),
        ({"ema": 1}, "ema is 1: expected a number of at least 0, below 1"),
        ({"ema": -0.1}, "ema is -0.1: expected a number of at least 0"),
        ({"accumulate": 0}, "accumulate is 0: expected at least 1"),
        ({"clip_norm": -1}, "clip_norm is -1: expected a number of at least 0"),
        ({"skip_norm": float("nan")}, "skip_norm is nan: expected a number of at least 0"),
        ({"trainable": "head"}, "trainable is 'head': expected parts among 'encoder', "),
        ({"trainable": ("decoder", "head")}, "expected parts among 'encoder', 'decoder', "),
    ],
)
def test_what_optax_or_the_configuration_does_not_know_is_refused(fields, says):
    with refused(says):
        jaxvae.TrainConfig(**fields)


def test_fsdp_refuses_an_optimizer_that_needs_whole_arrays():
    for name in OPTIMIZERS:
        train = jaxvae.TrainConfig(optimizer=name)
        if name in ELEMENTWISE:
            assert RunConfig(fsdp=True, train=train).fsdp
            continue
        with refused(
            f"optimizer is '{name}'", "fsdp needs an elementwise", "expected 'adabelief', "
        ):
            RunConfig(fsdp=True, train=train)
        with refused(f"optimizer is '{name}'", "fsdp needs an elementwise"):
            replace(RunConfig(train=train), fsdp=True)
    for made in optax.adam(1e-3), lambda rate: optax.adam(rate):
        train = jaxvae.TrainConfig(optimizer=made)
        assert not RunConfig(train=train).fsdp
        with refused("optimizer is ", "fsdp needs an elementwise", "expected 'adabelief', "):
            RunConfig(fsdp=True, train=train)


# What is made of gradients and parameters


def test_the_moving_average_follows_its_formula(images):
    """decay_t = min(0.2, (1 + t) / (10 + t)): 1/10, 2/11, and from the third step on 0.2."""
    state = state_of(ema=0.2, optimizer="sgd", learning_rate=0.1)
    assert_same_bits(state.ema, state.params)
    average = vector(state.params)
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):
        state, _ = jaxvae.train_step(state, images[:16])
        average = decay * average + (1 - decay) * vector(state.params)
        np.testing.assert_allclose(vector(state.ema), average, rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(average - vector(state.params)) > 1e-3
    assert state.eval_params is state.ema


def test_accumulation_is_one_step_on_the_mean_gradient(images):
    config = {"optimizer": "sgd:momentum=0.9", "learning_rate": 0.1}
    start = state = state_of(accumulate=4, **config)
    batches, grads = images.reshape(4, 16, 8, 8, 1), []
    for i, batch in enumerate(batches):
        assert_same_bits(state.params, start.params)
        grads.append(gradient(state, batch))
        state, _ = jaxvae.train_step(state, batch)
        assert int(state.step) == i + 1
    mean = jax.tree.map(lambda *g: sum(g) / 4, *grads)
    update = optimizer(jaxvae.TrainConfig(**config))
    expected = vector(update.update(mean, update.init(start.params), start.params)[0])
    moved = vector(state.params) - vector(start.params)
    assert np.linalg.norm(moved - expected) < 1e-3 * np.linalg.norm(expected)


def never_a_number(params, key, images):
    loss, terms = ELBO()(params, key, images)
    return jnp.nan * loss, terms


@pytest.mark.parametrize(
    ("limit", "objective"), [(1e-3, None), (1e11, never_a_number)], ids=["too long", "NaN"]
)
def test_a_step_whose_gradient_is_too_long_is_skipped_and_counted(images, limit, objective):
    before = replace(state_of(optimizer="adam", skip_norm=limit, ema=0.9), step=jnp.int32(6))
    after, metrics = jaxvae.train_step(before, images[:16], objective=objective)
    assert np.isfinite(metrics["loss"]) == (objective is None)
    assert int(after.step) == 7
    for name in "params", "opt_state", "ema":
        assert_same_bits(getattr(after, name), getattr(before, name))


def test_a_limit_that_is_not_reached_changes_nothing(images):
    free, limited = (
        jaxvae.train_step(state_of(optimizer="adam", skip_norm=norm), images[:16])[0]
        for norm in (0, 1e6)
    )
    np.testing.assert_allclose(vector(limited.params), vector(free.params), rtol=1e-6, atol=1e-8)
    assert np.any(vector(limited.params) != vector(state_of().params))


@pytest.mark.parametrize("parts", ["decoder", ("encoder", "prior")])
def test_only_the_parts_to_train_change(parts, images):
    """Neither by weight decay; the others keep their bits."""
    model = replace(SMALL, prior="mixture:components=3", likelihood="gaussian")
    state = state_of(model, optimizer="adamw:weight_decay=0.1", trainable=parts)
    after, _ = jaxvae.train_step(state, images[:16])
    for part in "encoder", "decoder", "likelihood", "prior":
        before, now = (getattr(s.params, part) for s in (state, after))
        if part in parts:
            moved = [
                np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, now)), strict=True)
            ]
            assert any(moved), part
        else:
            assert_same_bits(before, now)


# On several devices

WIDE = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=64")


def on_devices(state, images, devices):
    """Two steps with the parameters in parts."""
    mesh = devices_for(16, least=16 // devices)
    assert mesh.size == devices
    specs = fsdp_specs(state, mesh)
    if devices > 1:
        assert sum(spec != jax.P() for spec in jax.tree.leaves(specs.params)) >= 4
    rows = jax.P(None, "batch")
    run = data_parallel(_two_steps, mesh, in_specs=(specs, rows), out_specs=specs)
    batches = shard(images[:32].reshape(2, 16, 8, 8, 1), mesh)
    return gather(run(shard(state, mesh, fsdp=True), batches), mesh)


def _two_steps(state, batches, axis_name):
    def step(state, batch):
        return jaxvae.train_step(state, batch, axis_name=axis_name)[0], None

    return jax.lax.scan(step, state, batches)[0]


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"clip_norm": 1}, 0.5),
        ({"skip_norm": 1}, 0.97),
        ({"skip_norm": 1}, 1.03),
        ({"accumulate": 2}, 1),
        ({"trainable": "decoder", "ema": 0.5}, 1),
        ({"optimizer": "adamw:weight_decay=0.5"}, 1),
    ],
    ids=["clip", "skip", "not to skip", "accumulate", "a part", "decay"],
)
def test_with_fsdp_devices_do_what_one_does(config, factor, images):
    """Limits are near the norm of the whole gradient, which no device holds."""
    state = state_of(WIDE, optimizer="sgd:momentum=0.9")
    norm = float(optax.tree.norm(gradient(state, images[:16])))
    config = {n: factor * norm if n.endswith("norm") else x for n, x in config.items()}
    state = state_of(WIDE, **{"optimizer": "sgd:momentum=0.9", "learning_rate": 1e-3} | config)
    one, several = (on_devices(state, images, devices) for devices in (1, 2))
    assert int(one.step) == int(several.step) == 2
    before, *after = (vector((s.params, s.ema)) for s in (state, one, several))
    moved = np.linalg.norm(after[0] - before)
    assert (moved > 0) == (factor != 0.97)
    assert np.linalg.norm(after[1] - after[0]) <= 1e-3 * moved
