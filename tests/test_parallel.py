"""Work shared out among devices gives what one device gives."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxvae
from jaxvae import parallel
from jaxvae.evaluation import evaluate
from jaxvae.parallel import devices_for, everywhere, share


@pytest.mark.parametrize(
    ("images", "devices"), [(128, 8), (16, 2), (24, 3), (10, 1), (100, 5), (7, 1), (56, 7)]
)
def test_devices_share_a_batch_equally_and_take_enough_of_it_each(images, devices):
    assert devices_for(images).size == devices


def test_an_epoch_shared_by_devices_is_the_epoch_of_one(compile_quickly):
    config = jaxvae.ModelConfig((6, 5, 1), 2)
    images = np.random.default_rng(0).integers(0, 256, (70, 6, 5, 1)).astype(np.uint8)

    def fresh():
        train_config = jaxvae.TrainConfig(batch_size=32)
        return jaxvae.create_train_state(jax.random.key(0), config, train_config)

    alone, metrics = jaxvae.train_epoch(fresh(), images)
    mesh = devices_for(32)
    state, images = jax.device_put((fresh(), images), everywhere(mesh))
    shared, shared_metrics = share(jaxvae.train_epoch, mesh, donate_argnums=(0,))(state, images)

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
    arguments = jax.device_put((params, jax.random.key(1), images), everywhere(mesh))
    shared = share(evaluate, mesh)(*arguments)
    for name, value in evaluate(params, jax.random.key(1), images).items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "config", "devices"),
    [
        ("", "", parallel.cores()),
        ("--xla_force_host_platform_device_count=3", "", 3),
        ("", "jax.config.update('jax_num_cpu_devices', 5)", 5),
    ],
    ids=["unsaid", "by XLA_FLAGS", "by jax.config"],
)
def test_every_core_is_a_device_unless_the_user_chose(flags, config, devices):
    lines = [
        "import jax, jaxvae.parallel",
        config,
        "jaxvae.parallel.make_cores_devices()",
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
