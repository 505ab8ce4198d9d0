"""A run is a directory that can be killed at any instant and go on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxvae
from jaxvae import run
from jaxvae.run import RunConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")


def trained(run_dir, flags, *, resume=False):
    config = run.resumed(run_dir, flags) if resume else run.configured(flags)
    data = run.load_run_data(config)
    config = run.start(run_dir, config, data, resume=resume)
    return run.train(run_dir, config, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, npz):
    """A finished run of two epochs and its last state."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    flags = {"data": str(npz), "batch_size": 64, "epochs": 2, "seed": 3}
    return run_dir, trained(run_dir, flags)


def test_config_json_holds_what_the_run_was_told(finished, npz):
    run_dir, _ = finished
    assert json.loads((run_dir / "config.json").read_text()) == {
        "data": str(npz),
        "data_dir": None,
        "manual_dir": None,
        "seed": 3,
        "model": {"image_shape": [8, 8, 1], "latent_dim": 2, "compute_dtype": "float32"},
        "train": {"batch_size": 64, "epochs": 2, "learning_rate": 1e-3, "beta": 1.0},
    }


def test_metrics_jsonl_holds_a_line_for_every_epoch(finished):
    lines = run.read_metrics(finished[0])
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 8), (2, 16)]
    for line in lines:
        assert set(line) == {"epoch", "step", "train", "test", "seconds"}
        for split in ("train", "test"):
            assert set(line[split]) == {"loss", "elbo", "log_likelihood", "kl"}
            terms = line[split]["log_likelihood"] - line[split]["kl"]
            assert line[split]["elbo"] == pytest.approx(terms, rel=1e-4)


def test_the_last_checkpoint_is_the_last_state(finished):
    run_dir, state = finished
    for a, b in zip(
        jax.tree.leaves(jaxvae.load(run_dir)), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_test_metrics_are_those_of_the_test_images(finished, npz):
    run_dir, state = finished
    _, test_images = jaxvae.load_data(str(npz))
    _, key = run.keys(run.read_config(run_dir))
    terms = jaxvae.elbo(state.params, key, test_images)
    recorded = run.read_metrics(run_dir)[-1]["test"]
    assert recorded["elbo"] == pytest.approx(float(terms.value.mean()), rel=1e-5)


def test_a_run_goes_on_for_more_epochs(tmp_path, npz):
    flags = {"data": str(npz), "batch_size": 64}
    once = trained(tmp_path / "once", {**flags, "epochs": 2})
    trained(tmp_path / "twice", {**flags, "epochs": 1})
    twice = trained(tmp_path / "twice", {"epochs": 2}, resume=True)
    for a, b in zip(jax.tree.leaves(once.params), jax.tree.leaves(twice.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert without_seconds(tmp_path / "once") == without_seconds(tmp_path / "twice")


def without_seconds(run_dir):
    return [{**line, "seconds": 0} for line in run.read_metrics(run_dir)]


def test_a_line_beyond_the_last_checkpoint_is_taken_back(finished, tmp_path, npz):
    flags = {"data": str(npz), "batch_size": 64, "epochs": 1, "seed": 3}
    trained(tmp_path, flags)
    whole = (tmp_path / "metrics.jsonl").read_text()
    later = json.dumps({"epoch": 2, "step": 16}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + later + '{"epoch": 3, "st')
    trained(tmp_path, {}, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, npz):
    """SIGKILL in mid-epoch; parameters, optimiser state and metrics as if it had not been."""

    def command(name, *more):
        flags = ["--data", str(npz), "--batch-size", "2", "--epochs", "5"]
        flags = [] if more else flags
        return [
            sys.executable,
            "-m",
            "jaxvae",
            "train",
            "--run-dir",
            str(tmp_path / name),
            *flags,
            *more,
        ]

    environment = os.environ | {
        "PYTHONPATH": str(Path(jaxvae.__file__).parents[1]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    killed = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, env=environment)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") == 2):
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(run.read_metrics(tmp_path / "killed")) < 5
    for one in (command("killed", "--resume"), command("whole")):
        subprocess.run(one, check=True, capture_output=True, env=environment)

    for a, b in zip(*(saved(tmp_path / name) for name in ("killed", "whole")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(run.read_metrics(tmp_path / "killed")) == 5
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")
    left = [path.name for path in (tmp_path / "killed").rglob("*") if "tmp" in path.name]
    assert not left


def saved(run_dir):
    state = jaxvae.restore(run_dir)
    return [*jax.tree.leaves((state.params, state.opt_state, state.step)),
            jax.random.key_data(state.key)]  # fmt: skip


def test_a_run_is_not_started_over_another(finished, npz):
    run_dir, _ = finished
    before = (run_dir / "config.json").read_text()
    with pytest.raises(jaxvae.InputError, match="already holds a run: go on with it"):
        trained(run_dir, {"data": str(npz)})
    assert (run_dir / "config.json").read_text() == before


def test_a_batch_larger_than_the_data_leaves_no_directory(tmp_path, npz):
    with pytest.raises(jaxvae.InputError, match="batch_size is 513: expected at most"):
        trained(tmp_path / "run", {"data": str(npz), "batch_size": 513})
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_the_recorded_one(finished):
    run_dir, _ = finished
    assert run.resumed(run_dir, {"epochs": 7, "seed": 3}).train.epochs == 7
    with pytest.raises(jaxvae.InputError, match=r"--batch-size is 32, but .* started with 64"):
        run.resumed(run_dir, {"batch_size": 32})


def test_images_of_another_shape_do_not_go_on(finished, tmp_path):
    run_dir, _ = finished
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((100, 9, 8), np.uint8))
    config = run.read_config(run_dir)
    data = run.load_run_data(RunConfig(data=str(other)))
    with pytest.raises(jaxvae.InputError, match=r"shape \(9, 8, 1\), but .* \(8, 8, 1\)"):
        run.start(run_dir, config, data, resume=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a run directory: expected one made by `jaxvae train`"),
        ("{", "config.json is damaged"),
        ("[]", "config.json is damaged: RunConfig is"),
        ('{"seed": "x"}', "config.json is damaged: seed is 'x'"),
        ('{"model": {"latent_dim": -1}}', "config.json is damaged: latent_dim is -1"),
    ],
)
def test_a_directory_that_is_not_a_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(jaxvae.InputError, match=says):
        run.read_config(tmp_path)
