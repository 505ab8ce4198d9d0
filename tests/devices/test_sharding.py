"""Work shared out among devices gives what one device gives."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxvae
from jaxvae.devices import sharding
from jaxvae.devices.sharding import (
    data_parallel,
    devices_for,
    divisible,
    fsdp_specs,
    gather,
    replicated,
    shard,
)
from jaxvae.evaluation.evaluate import evaluate


@pytest.mark.parametrize(
    ("images", "devices"), [(128, 8), (16, 2), (24, 3), (10, 1), (100, 5), (7, 1), (56, 7)]
)
def test_devices_share_a_batch_equally_and_take_enough_of_it_each(images, devices):
    assert devices_for(images).size == devices


@pytest.mark.parametrize(
    ("images", "filled", "devices"),
    [(100, 104, 8), (41, 45, 5), (17, 18, 2), (7, 7, 1), (128, 128, 8)],
)
def test_a_batch_is_filled_up_so_that_every_device_has_a_part(images, filled, devices):
    assert divisible(images) == filled
    assert devices_for(filled).size == devices


def test_an_epoch_shared_by_devices_is_the_epoch_of_one(compile_quickly):
    config = jaxvae.ModelConfig((6, 5, 1), 2)
    images = np.random.default_rng(0).integers(0, 256, (70, 6, 5, 1)).astype(np.uint8)

    def fresh():
        train_config = jaxvae.TrainConfig(batch_size=32)
        return jaxvae.create_train_state(jax.random.key(0), config, train_config)

    alone, metrics = jaxvae.train_epoch(fresh(), images)
    mesh = devices_for(32)
    state, images = jax.device_put((fresh(), images), replicated(mesh))
    shared, shared_metrics = data_parallel(jaxvae.train_epoch, mesh, donate_argnums=(0,))(
        state, images
    )

    assert mesh.size == 4
    assert state.step.is_deleted()
    assert int(shared.step) == int(alone.step) == 2
    assert shared.params.encoder["mean"]["bias"].sharding.is_fully_replicated
    for name, value in metrics.items():
        np.testing.assert_allclose(shared_metrics[name], value, rtol=1e-4)


@pytest.mark.parametrize("count", [64, 60, 61])
def test_a_test_set_shared_by_devices_has_the_same_means(count, compile_quickly):
    params = jaxvae.init(jax.random.key(0), jaxvae.ModelConfig((6, 5, 1), 2))
    images = np.random.default_rng(0).random((count, 6, 5, 1), np.float32)
    mesh = devices_for(count)
    arguments = jax.device_put((params, jax.random.key(1), images), replicated(mesh))
    shared = data_parallel(evaluate, mesh)(*arguments)
    for name, value in evaluate(params, jax.random.key(1), images).items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "config", "devices"),
    [
        ("", "", sharding.cores()),
        ("--xla_force_host_platform_device_count=3", "", 3),
        ("", "jax.config.update('jax_num_cpu_devices', 5)", 5),
    ],
    ids=["unsaid", "by XLA_FLAGS", "by jax.config"],
)
def test_every_core_is_a_device_unless_the_user_chose(flags, config, devices):
    lines = [
        "import jax, jaxvae.devices.sharding",
        config,
        "jaxvae.devices.sharding.make_cores_devices()",
        "print(len(jax.devices()))",
    ]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    program = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout.strip() == str(devices)


STEPS = 20
IMAGES = np.random.default_rng(0).integers(0, 256, (64 * STEPS, 6, 5, 1)).astype(np.uint8)


def fresh():
    # A gradient's norm over all devices' parts, too, decides how far it is cut down.
    config = jaxvae.TrainConfig(batch_size=64, optimizer="adam", clip_norm=5.0)
    model = jaxvae.ModelConfig((6, 5, 1), 2, network="mlp:width=128")
    return jaxvae.create_train_state(jax.random.key(0), model, config)


def by_pmap(devices):
    state = jax.tree.map(lambda x: jnp.stack([x] * devices), fresh())
    epoch = jax.pmap(
        partial(jaxvae.train_epoch, axis_name="batch"),
        axis_name="batch",
        in_axes=(0, None),
        devices=jax.devices()[:devices],
    )
    state, _ = epoch(state, IMAGES)
    return jax.tree.map(lambda x: x[-1], state)


def by_jit(devices, fsdp=False):
    mesh = devices_for(64, least=64 // devices)
    state = shard(fresh(), mesh, fsdp)
    specs = fsdp_specs(state, mesh) if fsdp else jax.P()
    epoch = data_parallel(
        jaxvae.train_epoch, mesh, (0,), in_specs=(specs, jax.P()), out_specs=(specs, jax.P())
    )
    state, _ = epoch(state, shard(IMAGES, mesh))
    if fsdp and devices > 1:
        parts = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
        held = sum(x.addressable_data(0).size for x in parts)
        assert held * devices == sum(x.size for x in parts)
        assert held * devices > 0.9 * sum(x.size for x in jax.tree.leaves(state.params))
    return gather(state, mesh)


@pytest.fixture(scope="module")
def on_one_device(compile_quickly):
    return jaxvae.train_epoch(fresh(), IMAGES)[0]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "train", [by_pmap, by_jit, partial(by_jit, fsdp=True)], ids=["pmap", "jit", "in parts"]
)
def test_twenty_steps_are_the_same_run_on_any_number_of_devices(
    train, devices, on_one_device, compile_quickly
):
    """In float32, as it is used; `tests/training/test_step.py` looks more closely, in float64."""
    state = train(devices)
    assert int(state.step) == int(on_one_device.step) == STEPS
    one, several = (ravel_pytree(s.params)[0] for s in (on_one_device, state))
    assert np.linalg.norm(several - one) < 1e-3 * np.linalg.norm(one)
    key = jax.random.key(1)
    elbos = [float(evaluate(s.params, key, IMAGES)["elbo"]) for s in (on_one_device, state)]
    assert abs(elbos[1] - elbos[0]) < 0.2
