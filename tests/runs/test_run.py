"""A run is a directory that can be killed at any instant and go on as if nothing had happened."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import KEPT_BY_COMMANDS, OnDisk, OwnDecoder, OwnEncoder, SignalAt, refused

import jaxvae
from jaxvae import figures
from jaxvae.data import Dataset
from jaxvae.errors import Damaged, OtherData, Preempted, TrainingFailed
from jaxvae.figures.animation import keep_frame
from jaxvae.figures.pictures import labels_of
from jaxvae.runs import directory, drawing, evaluation, files, inference, loop, sweep
from jaxvae.runs.checkpoints import open_checkpoints, write
from jaxvae.runs.config import RunConfig, configured, read_config, resumed, run_keys
from jaxvae.runs.data import describe, labelled_counts, load_run_data, train_conditions
from jaxvae.runs.files import read_metrics
from jaxvae.runs.fit_prior import fit_prior
from jaxvae.runs.inference import encode_all, open_run
from jaxvae.runs.tensorboard import TensorBoard

pytestmark = pytest.mark.usefixtures("compile_quickly")

NETWORK = "mlp:width=8"


def trained(run_dir, flags, *, resume=False):
    config = resumed(run_dir, flags) if resume else configured(flags)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    return loop.train(run_dir, config, data)


def draw(run_dir, params):
    config = read_config(run_dir)
    return drawing.draw(run_dir, config, load_run_data(config), params)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, npz):
    """A finished run of two epochs and its last state."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2, "seed": 3}
    return run_dir, trained(run_dir, flags)


# A run of many choices, and its 512 training images are eight batches.
CHOICES = {
    "batch_size": 64,
    "network": NETWORK,
    "likelihood": "discretized_logistic",
    "prior": "mixture:components=5",
    "num_classes": 3,
    "objective": "iwae:num_samples=2",
    "warmup": "linear:steps=10",
    "optimizer": "adamw:weight_decay=0.001",
    "ema": 0.9,
    "learning_rate": 3e-4,
}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, npz):
    """A finished run of many choices, two epochs, and its last state."""
    run_dir = tmp_path_factory.mktemp("runs") / "conditional"
    return run_dir, trained(run_dir, {**CHOICES, "data": str(npz), "epochs": 2})


def test_config_json_holds_what_the_run_was_told(finished, npz):
    run_dir, _ = finished
    assert json.loads((run_dir / "config.json").read_text()) == {
        "jaxvae": jaxvae.__version__,
        "data": str(npz),
        "label_column": None,
        "covariate_columns": None,
        "labelled": 0,
        "data_dir": None,
        "manual_dir": None,
        "resize": None,
        "crop": False,
        "seed": 3,
        "start_from": None,
        "fsdp": False,
        "workers": 0,
        "model": jaxvae.ModelConfig((8, 8, 1), network=NETWORK).to_dict()
        | {"image_shape": [8, 8, 1]},
        "train": jaxvae.TrainConfig(batch_size=64, epochs=2).to_dict(),
        "data_seen": [
            {
                "train_images": 512,
                "test_images": 100,
                "sha256": describe(load_run_data(RunConfig(data=str(npz)))).sha256,
                "step": 0,
            }
        ],
        "covariates": [],
        "changes": [],
    }


def test_a_network_of_ones_own_is_trained_resumed_and_measured(tmp_path, npz, monkeypatch):
    network = OwnEncoder(2), OwnDecoder((8, 8, 1))
    flags = {"data": str(npz), "batch_size": 128, "epochs": 1, "network": network}
    run_dir = tmp_path / "mine"
    once = trained(run_dir, flags)
    assert json.loads((run_dir / "config.json").read_text())["model"]["network"] == "own"
    assert_leaves_equal(jaxvae.load(run_dir, network=network), once.params)
    says = (
        f"{run_dir}: the network is a pair of Flax modules, which are not saved: pass network=(enc"
    )
    for read in (read_config, lambda run_dir: resumed(run_dir, {"epochs": 2})):
        with refused(says):
            read(run_dir)
    with refused("pair of Flax modules, which are not saved: pass"):
        evaluation.measure(run_dir, 2)
    state = trained(run_dir, {"epochs": 2, "network": network}, resume=True)
    assert int(state.step) == 8
    assert_leaves_equal(jaxvae.load(run_dir, network=network), state.params)
    found = evaluation.measure(run_dir, 2, network=network)
    assert found["step"] == 8
    monkeypatch.setattr("jaxvae.figures.draw_all", lambda *args: [])
    config = read_config(run_dir, network=network)
    assert drawing.draw(run_dir, config, load_run_data(config), state.params) == []
    from_it = configured({**flags, "start_from": str(run_dir), "image_shape": (8, 8, 1)})
    first = directory.first_state(jax.random.key(0), from_it)
    assert_leaves_equal(first.params, state.params)
    with refused(f"{tmp_path}/mlp: network is own, but the recorded one is {NETWORK}: pass that"):
        resumed(trained_mlp(tmp_path, npz), {"network": network})


def trained_mlp(tmp_path, npz):
    run_dir = tmp_path / "mlp"
    config = configured({"data": str(npz), "network": NETWORK})
    directory.write_config(run_dir, config)
    return run_dir


def test_settings_that_a_run_does_not_have_are_refused(finished):
    for flags, name in (
        ({"lr": 3}, "'lr' (do you mean 'learning_rate'?)"),
        ({"train": jaxvae.TrainConfig()}, "'train' (do you mean 'trainable'?)"),
        ({"model": {}}, "'model'"),
    ):
        for read in (configured, sweep.configured, lambda flags: resumed(finished[0], flags)):
            with refused(
                f"a run has no field {name}: expected accumulate, batch_size, beta, ", "warmup"
            ):
                read(flags)


def test_components_that_a_run_does_not_have_are_refused(finished):
    for read in (jaxvae.load, jaxvae.restore, read_config, inference.open_run):
        with refused("a run has no component 'pior' (do you mean 'prior'?): expected likelihood"):
            read(finished[0], pior="mixture")


def test_metrics_jsonl_holds_a_line_for_every_epoch(finished):
    lines = read_metrics(finished[0])
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 8), (2, 16)]
    for line in lines:
        assert set(line) == {"epoch", "step", "train", "test", "seconds"}
        for split in ("train", "test"):
            assert set(line[split]) == {"loss", "elbo", "log_likelihood", "kl"}
            terms = line[split]["log_likelihood"] - line[split]["kl"]
            assert line[split]["elbo"] == pytest.approx(terms, rel=1e-4)


def test_the_last_checkpoint_is_the_last_state(finished):
    run_dir, state = finished
    assert_leaves_equal(jaxvae.load(run_dir), state.params)


def test_the_test_metrics_are_those_of_the_test_images(finished, npz):
    run_dir, state = finished
    _, test_images = jaxvae.load_data(str(npz))
    _, key = run_keys(read_config(run_dir))
    terms = jaxvae.elbo(state.params, key, test_images)
    recorded = read_metrics(run_dir)[-1]["test"]
    assert recorded["elbo"] == pytest.approx(float(terms.value.mean()), rel=1e-5)


def test_a_conditional_run_is_trained_and_measured_with_its_labels(conditional, npz):
    run_dir, state = conditional
    _, (images, labels) = jaxvae.load_data(str(npz), labels=True)
    _, key = run_keys(read_config(run_dir))
    recorded = [line["test"]["elbo"] for line in read_metrics(run_dir)]
    terms = jaxvae.elbo(state.eval_params, key, images, labels)
    assert recorded[1] == pytest.approx(float(terms.value.mean()), rel=1e-5)
    others = jaxvae.elbo(state.eval_params, key, images, (labels + 1) % 3)
    assert recorded[1] != pytest.approx(float(others.value.mean()), rel=1e-5)
    assert recorded[0] < recorded[1]


def test_a_measurement_is_of_the_latest_model_and_is_written_down(conditional, npz):
    run_dir, state = conditional
    found = evaluation.measure(run_dir, num_samples=20)
    evaluation.write_evaluation(run_dir, found)
    assert json.loads((run_dir / "evaluation.json").read_text()) == found
    _, (images, labels) = jaxvae.load_data(str(npz), labels=True)
    _, key = run_keys(read_config(run_dir))
    for name, value in read_metrics(run_dir)[-1]["test"].items():
        if name != "loss":
            assert found[name] == pytest.approx(value, rel=1e-5)
    log_px = jaxvae.log_likelihood(state.eval_params, key, images, 20, labels)
    assert found["log_p_x"] == pytest.approx(float(log_px.mean()), rel=1e-5)
    bits = -found["log_p_x"] / math.log(2) / 64
    assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-5)
    means = jaxvae.reconstruct(state.eval_params, images, labels)
    error = float(np.mean((images / 255 - means) ** 2))
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-4)
    parts = found["mutual_information"] + found["marginal_kl"]
    assert abs(parts - found["kl"]) < 0.5
    assert found["active_units"] in (0, 1, 2)
    for probe in ("logistic_regression", "nearest_neighbors"):
        assert 0 <= found[probe] <= 1
    assert (found["step"], found["images"], found["num_samples"]) == (16, 100, 20)


def test_bits_per_dimension_are_of_grey_levels_alone(finished):
    found = evaluation.measure(finished[0], num_samples=2)
    assert "bits_per_dimension" not in found
    assert found["log_p_x"] < 0


def test_a_conditional_run_is_drawn(conditional, npz):
    run_dir, _ = conditional
    paths = draw(run_dir, jaxvae.load(run_dir))
    assert {"classes", "samples", "training"} < {path.stem for path in paths}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_classes_take_part_in_no_model_that_knows_of_none(npz):
    data = load_run_data(RunConfig(data=str(npz)))
    for classes, kind in ((0, type(None)), (3, np.ndarray)):
        model = jaxvae.ModelConfig(num_classes=classes)
        assert isinstance(data.conditions(model, "test"), kind)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "has no {split} labels: expected classes from 0 to 2, as num_classes is 3"),
        (np.arange(40) % 4, "has {split} labels from 0 to 3: expected classes from 0 to 2"),
        (np.arange(40) % 3 - 1, "has {split} labels from -1 to 1: expected classes from 0 to 2"),
    ],
    ids=["none", "too many", "negative"],
)
def test_labels_that_are_missing_or_out_of_range_leave_no_directory(tmp_path, split, labels, says):
    arrays = {name: np.zeros((40, 8, 8), np.uint8) for name in ("x_train", "x_test")}
    arrays |= {"y_train": np.arange(40) % 3, "y_test": np.arange(40) % 3, f"y_{split}": labels}
    data = tmp_path / "data.npz"
    np.savez(data, **{name: array for name, array in arrays.items() if array is not None})
    with refused(str(data), says.format(split=split)):
        trained(tmp_path / "run", {"data": str(data), "num_classes": 3, "batch_size": 8})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["none", "dynamic", "fixed"])
def test_binarized_images_are_the_same_in_every_run(npz, kind):
    """Test images are 0/1, training images where it is fixed; elsewhere they stay grey."""
    flags = {"data": str(npz), "binarization": kind}
    data, again = (load_run_data(configured({**flags, "seed": seed})) for seed in (1, 2))
    grey = load_run_data(RunConfig(data=str(npz)))
    drawn = {"none": [], "dynamic": ["test"], "fixed": ["train", "test"]}[kind]
    for split in ("train", "test"):
        name = f"{split}_images"
        ours, before = getattr(data, name), getattr(grey, name)
        np.testing.assert_array_equal(ours, getattr(again, name))
        assert ours.dtype == np.uint8
        if split not in drawn:
            np.testing.assert_array_equal(ours, before)
            continue
        assert set(np.unique(ours)) == {0, 255}
        p = before / 255
        spread = np.sqrt(np.sum(p * (1 - p), axis=0))
        assert np.all(np.abs(np.sum(ours / 255 - p, axis=0)) < 5 * spread)
    np.testing.assert_array_equal(data.test_labels, grey.test_labels)


def test_a_binarized_run_is_measured_on_black_and_white(tmp_path, npz):
    flags = {"data": str(npz), "network": NETWORK, "binarization": "dynamic", "epochs": 1}
    state = trained(tmp_path, flags)
    config = read_config(tmp_path)
    images = load_run_data(config).test_images
    _, key = run_keys(config)
    # By the definition: the log-probability of pixels that are 0 or 1, and nothing else.
    posterior = jaxvae.encode(state.params, images)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(len(images)))
    z, _ = posterior.sample_and_log_prob(keys)
    p = np.float64(jaxvae.decode(state.params, z).mean)
    log_px = np.sum(np.log(np.where(images == 255, p, 1 - p)), axis=(1, 2, 3))
    recorded = read_metrics(tmp_path)[-1]["test"]
    assert recorded["log_likelihood"] == pytest.approx(np.mean(log_px), rel=1e-4)


def test_a_run_starts_from_anothers_parameters(finished, tmp_path, npz, monkeypatch):
    run_dir, state = finished
    monkeypatch.chdir(run_dir.parent)
    flags = {"data": str(npz), "network": NETWORK, "start_from": run_dir.name, "seed": 4}
    flags |= {"objective": "stl", "optimizer": "adam", "learning_rate": 1e-9, "epochs": 1}
    config = configured(flags)
    assert config.start_from == str(run_dir)
    after = trained(tmp_path / "next", flags)
    first = directory.first_state(run_keys(config)[0], read_config(tmp_path / "next"))
    assert_leaves_equal(first.params, state.params)
    assert int(first.step) == 0
    fresh = jaxvae.create_train_state(run_keys(config)[0], state.params.config, config.train)
    assert_leaves_equal(first.opt_state, fresh.opt_state)
    np.testing.assert_array_equal(*map(jax.random.key_data, (first.key, fresh.key)))
    for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    before, now = (read_metrics(d)[-1]["test"] for d in (run_dir, tmp_path / "next"))
    assert now["kl"] == pytest.approx(before["kl"], rel=1e-3)


def test_an_average_starts_from_the_parameters_of_the_other_run(finished, tmp_path, npz):
    run_dir, state = finished
    flags = {"data": str(npz), "network": NETWORK, "start_from": str(run_dir), "epochs": 1}
    config = configured({**flags, "ema": 0.999, "image_shape": (8, 8, 1)})
    first = directory.first_state(jax.random.key(0), config)
    assert_leaves_equal(first.ema, state.params)
    after = trained(tmp_path / "next", {**flags, "ema": 0.999, "learning_rate": 1e-9})
    for a, b in zip(*map(jax.tree.leaves, (after.ema, state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_a_run_that_has_started_needs_the_other_no_longer(finished, tmp_path, npz):
    other = shutil.copytree(finished[0], tmp_path / "other")
    flags = {"data": str(npz), "network": NETWORK, "start_from": str(other), "epochs": 1}
    trained(tmp_path / "run", flags)
    shutil.rmtree(other)
    assert int(trained(tmp_path / "run", {"epochs": 2}, resume=True).step) == 8
    with refused(f"--start-from is {finished[0]}, but", f"started with {other}: leave it out"):
        resumed(tmp_path / "run", {"start_from": str(finished[0])})


def test_a_start_from_a_run_takes_its_model(conditional, tmp_path):
    run_dir = str(conditional[0])
    model = jaxvae.load(run_dir).config
    flags = {"start_from": run_dir, "epochs": 1}
    config = configured(flags, directory.with_model_to_start_from(RunConfig(), flags))
    assert config.model == model
    assert config.train == jaxvae.TrainConfig(epochs=1)
    # Except for what was given, which is refused if it differs.
    flags["latent_dim"] = 3
    config = configured(flags, directory.with_model_to_start_from(RunConfig(), flags))
    assert config.model == replace(model, latent_dim=3)
    given = RunConfig(start_from=run_dir, model=jaxvae.ModelConfig(network="residual"))
    assert directory.with_model_to_start_from(given, {}) == given
    assert directory.with_model_to_start_from(RunConfig(), {"epochs": 1}) == RunConfig()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"network": "conv"},
            f"network {NETWORK}: expected conv, as in the run that starts from it",
        ),
        ({"latent_dim": 3}, "latent_dim 2: expected 3"),
        ({"num_classes": 3}, "num_classes 0: expected 3"),
        ({"prior": "vamp"}, "prior standard_normal: expected vamp"),
    ],
)
def test_a_start_from_another_model_is_refused_and_leaves_no_directory(
    finished, tmp_path, npz, flags, says
):
    flags = {"data": str(npz), "network": NETWORK, "start_from": str(finished[0]), **flags}
    with refused(f"{finished[0]} has a model with {says}"):
        trained(tmp_path / "run", flags)
    with refused("nowhere holds no checkpoint: expected the run directory of `jaxvae train`"):
        trained(tmp_path / "run", {**flags, "start_from": "nowhere"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"posterior": "iaf", "objective": "stl"}, "expected the posterior 'gaussian'"),
        ({"prior": "mixture", "objective": "elbo:free_bits=1"}, "free_bits needs the KL of every"),
    ],
)
def test_a_model_and_an_objective_that_do_not_go_together_leave_no_directory(
    tmp_path, npz, flags, says
):
    with refused(says):
        trained(tmp_path / "run", {"data": str(npz), "network": NETWORK, **flags})
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_there_were_choices_goes_on(finished, tmp_path):
    """As an older version wrote it: a config.json without the fields that came later."""
    run_dir = shutil.copytree(finished[0], tmp_path / "old")
    config = json.loads((run_dir / "config.json").read_text())
    del config["start_from"]
    config["model"] = {name: config["model"][name] for name in ("image_shape", "latent_dim")}
    config["train"] = {n: config["train"][n] for n in ("batch_size", "epochs", "learning_rate")}
    (run_dir / "config.json").write_text(json.dumps(config))
    again = resumed(run_dir, {"network": "conv", "objective": "elbo", "warmup": "none"})
    assert again.model == jaxvae.ModelConfig((8, 8, 1))
    with refused("--objective is iwae, but", "started with elbo: leave it out"):
        resumed(run_dir, {"objective": "iwae"})


def test_a_resumed_run_may_change_its_learning_rate_which_is_recorded(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    data = load_run_data(read_config(run_dir))
    flags = {"learning_rate": 1e-4, "schedule": "cosine", "clip_norm": 50.0, "epochs": 3}
    # Killed before its first step, then resumed without flags.
    directory.start(run_dir, resumed(run_dir, flags), data, resume=True)
    after = trained(run_dir, {}, resume=True)
    state = jaxvae.restore(finished[0])
    given = {name: value for name, value in flags.items() if name != "data"}
    state = replace(state, config=replace(state.config, **given))
    by_hand, _ = jaxvae.train_epoch(state, data.train_images)
    for a, b in zip(*map(jax.tree.leaves, (after.params, by_hand.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    changes = [
        {"step": 16, "field": "learning_rate", "before": 1e-3, "after": 1e-4},
        {"step": 16, "field": "schedule", "before": "constant", "after": "cosine"},
        {"step": 16, "field": "clip_norm", "before": 0.0, "after": 50.0},
    ]
    assert json.loads((run_dir / "config.json").read_text())["changes"] == changes
    trained(run_dir, {"clip_norm": 0.0, "epochs": 4}, resume=True)
    trained(run_dir, {"epochs": 5}, resume=True)
    last = {"step": 24, "field": "clip_norm", "before": 50.0, "after": 0.0}
    assert read_config(run_dir).to_dict()["changes"] == [*changes, last]


def test_what_a_resumed_run_may_not_change_is_refused_with_what_to_do(finished):
    run_dir = finished[0]
    says = f"but {run_dir} was started with 64: leave it out, or start a new run without --resume ("
    with refused("--batch-size is 32, ", says, f"(with --start-from {run_dir} it starts from this"):
        resumed(run_dir, {"batch_size": 32})
    with pytest.raises(jaxvae.InputError) as error:
        resumed(run_dir, {"network": "conv"})
    assert str(error.value).endswith("leave it out, or start a new run without --resume")


def test_a_data_set_of_one_class_is_measured_without_its_probes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.full(40, 7))
    flags = {"data": str(tmp_path / "one.npz"), "network": NETWORK, "batch_size": 8, "epochs": 1}
    trained(tmp_path / "run", flags)
    found = evaluation.measure(tmp_path / "run", num_samples=2)
    assert "elbo" in found
    assert "nearest_neighbors" not in found


def test_a_run_goes_on_for_more_epochs(tmp_path, npz):
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64}
    once = trained(tmp_path / "once", {**flags, "epochs": 2})
    trained(tmp_path / "twice", {**flags, "epochs": 1})
    twice = trained(tmp_path / "twice", {"epochs": 2}, resume=True)
    assert_leaves_equal(once.params, twice.params)
    assert without_seconds(tmp_path / "once") == without_seconds(tmp_path / "twice")


def changed(arrays, how):
    """The arrays of a data set, changed."""
    pixel = arrays["x_train"].copy()
    pixel[100, 3, 3] ^= 1
    more = {f"{name}_train": np.concatenate([arrays[f"{name}_train"]] * 2) for name in "xy"}
    fewer = {f"{name}_train": arrays[f"{name}_train"][:300] for name in "xy"}
    return (
        arrays
        | {
            "a pixel": {"x_train": pixel},
            "a label": {"y_test": 2 - arrays["y_test"]},
            "more": more,
            "fewer": fewer,
            "too few": {name: array[:50] for name, array in fewer.items()},
        }[how]
    )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "a pixel",
            "it also has 512 training and 100 test images, but with other pixels or labels",
        ),
        (
            "a label",
            "it also has 512 training and 100 test images, but with other pixels or labels",
        ),
        ("more", "it has 1,024 training and 100 test images instead of 512 training and 100"),
        ("fewer", "it has 300 training and 100 test images instead of 512 training and 100"),
        ("too few", "it has 50 training and 100 test images instead of 512 training and 100"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(finished, tmp_path, npz, how, says):
    """Neither of the same name nor of another, and nothing of the run is changed."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    other = tmp_path / "other.npz"
    np.savez(other, **changed(dict(np.load(npz)), how))
    before = contents(run_dir)
    with refused(
        f"{other} is not the data set that {run_dir} was trained on: {says}",
        "; pass the original data set with --data",
        f"--start-from {run_dir}",
    ):
        trained(run_dir, {"data": str(other), "epochs": 3}, resume=True)
    assert contents(run_dir) == before
    config = replace(read_config(run_dir), data=str(other))
    (run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    with refused(says):
        trained(run_dir, {"epochs": 3}, resume=True)


def test_data_that_have_moved_can_be_named_again(finished, tmp_path, npz):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    moved = shutil.copy(npz, tmp_path / "moved.npz")
    trained(run_dir, {"data": str(moved), "epochs": 3}, resume=True)
    config = read_config(run_dir)
    assert config.data == str(moved)
    assert config.data_seen == read_config(finished[0]).data_seen
    once = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 3, "seed": 3}
    assert_leaves_equal(jaxvae.load(run_dir), trained(tmp_path / "once", once).params)


def test_other_data_are_taken_on_request_and_recorded(finished, tmp_path, npz):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    arrays, other = dict(np.load(npz)), tmp_path / "other.npz"
    np.savez(other, **changed(arrays, "more"))
    flags = {"data": str(other), "epochs": 3}
    with refused("16 batches per epoch instead of 8, which cannot change; pass the original"):
        started(run_dir, flags, new_data=True)
    np.savez(other, **changed(arrays, "a pixel"))
    with refused("accept this one with --new-data"):
        started(run_dir, flags)
    config, data = started(run_dir, flags, new_data=True)
    first, second = config.data_seen
    assert (first.step, second.step) == (0, 16)
    assert second == replace(describe(data), step=16)
    assert read_config(run_dir) == config
    loop.train(run_dir, config, data)
    assert [line["step"] for line in read_metrics(run_dir)] == [8, 16, 24]
    trained(run_dir, {"epochs": 4}, resume=True)  # now it is the run's own
    with refused("is not the data set"):
        trained(run_dir, {"data": str(npz), "epochs": 5}, resume=True)


def started(run_dir, flags, **options):
    config = resumed(run_dir, flags)
    data = load_run_data(config)
    return directory.start(run_dir, config, data, resume=True, **options), data


def test_a_run_without_a_record_of_its_data_goes_on_and_gets_one(finished, tmp_path, npz):
    """As an older version wrote it; data of another number of batches are refused all the same."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    seen = config.pop("data_seen")
    (run_dir / "config.json").write_text(json.dumps(config))
    other = tmp_path / "other.npz"
    np.savez(other, **changed(dict(np.load(npz)), "more"))
    before = contents(run_dir)
    with refused(f"{other} is not the data set", "16 batches per epoch instead of 8"):
        trained(run_dir, {"data": str(other), "epochs": 3}, resume=True)
    assert contents(run_dir) == before
    trained(run_dir, {}, resume=True)
    assert json.loads((run_dir / "config.json").read_text())["data_seen"] == seen


def test_a_run_without_a_record_of_its_data_is_known_by_any_of_its_lines(finished, tmp_path, npz):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    config = replace(read_config(run_dir), data_seen=())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text(lines[1])
    data = load_run_data(config)
    assert directory.start(run_dir, config, data, resume=True).data_seen
    data = data._replace(train_images=data.train_images[:256], train_labels=data.train_labels[:256])
    with refused("4 batches per epoch instead of 8"):
        directory.start(run_dir, config, data, resume=True)


def test_a_digest_is_of_all_images_in_memory_and_of_some_on_disk():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1000, 4, 4, 1), np.uint8)
    labels = np.arange(1000)
    data = Dataset(images, labels, images[:9], None)
    first = describe(data)
    assert (first.train_images, first.test_images) == (1000, 9)
    assert describe(data) == first
    others = [
        data._replace(train_images=images[::-1]),
        data._replace(train_labels=None),
        data._replace(test_labels=np.arange(9)),
        data._replace(train_images=images.reshape(1000, 2, 8, 1)),
        data._replace(train_images=images.astype(np.float32)),
    ]
    for i in (0, 1, 501, 999):
        other = images.copy()
        other[i, 2, 2] ^= 1
        others.append(data._replace(train_images=other))
    assert len({first.sha256, *(describe(one).sha256 for one in others)}) == 1 + len(others)
    on_disk = data._replace(train_images=OnDisk(images))
    assert describe(on_disk) == describe(data._replace(train_images=OnDisk(images.copy())))
    assert on_disk.train_images.read == 256
    assert describe(on_disk) != describe(data._replace(train_images=OnDisk(images[:-1])))
    for i in (0, 999):
        other = images.copy()
        other[i, 2, 2] ^= 1
        assert describe(data._replace(train_images=OnDisk(other))) != describe(on_disk)


def test_a_measurement_on_other_data_says_so(finished, tmp_path, npz):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    other = tmp_path / "other.npz"
    np.savez(other, **changed(dict(np.load(npz)), "fewer"))
    config = replace(read_config(run_dir), data=str(other))
    (run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.warns(OtherData, match=f"{other} is not the data set that {run_dir} was trained"):
        evaluation.measure(run_dir, num_samples=2)
    third = shutil.copy(other, tmp_path / "third.npz")
    with pytest.warns(OtherData, match=f"{third} is not the data set that {run_dir} was trained"):
        evaluation.measure(run_dir, num_samples=2, data_name=str(third))


def test_a_run_of_many_choices_goes_on_bit_for_bit(conditional, tmp_path, npz):
    run_dir, state = conditional
    trained(tmp_path, {**CHOICES, "data": str(npz), "epochs": 1})
    again = {"epochs": 2, "objective": "iwae:num_samples=2", "num_classes": 3}
    twice = trained(tmp_path, again, resume=True)
    assert_leaves_equal((twice.params, twice.opt_state, twice.ema),
                        (state.params, state.opt_state, state.ema))  # fmt: skip
    assert without_seconds(tmp_path) == without_seconds(run_dir)
    assert read_config(tmp_path) == read_config(run_dir)


def assert_leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def without_seconds(run_dir):
    return [{**line, "seconds": 0} for line in read_metrics(run_dir)]


def test_a_line_beyond_the_last_checkpoint_is_taken_back(finished, tmp_path, npz):
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 1, "seed": 3}
    trained(tmp_path, flags)
    whole = (tmp_path / "metrics.jsonl").read_text()
    later = json.dumps({**json.loads(whole), "epoch": 2, "step": 16}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + later + '{"epoch": 3, "st')
    trained(tmp_path, {}, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_a_run_killed_again_and_again_goes_on_bit_for_bit(tmp_path, npz):
    """SIGKILL in mid-epoch, then while a checkpoint is written, then while figures are drawn.

    `experiments/reliability/kill.py` does it a hundred times, at random moments.
    """
    environment = os.environ | {
        **KEPT_BY_COMMANDS,
        "PYTHONPATH": str(Path(jaxvae.__file__).parents[1]),
    }
    killed = tmp_path / "killed"
    metrics = killed / "metrics.jsonl"

    def command(name, *more):
        flags = ["--data", str(npz), "--network", NETWORK, "--batch-size", "2", "--epochs", "5"]
        words = [sys.executable, "-m", "jaxvae", "train", "--run-dir", str(tmp_path / name)]
        return [*words, *(more or flags)]

    def kill_when(told, *more):
        with subprocess.Popen(command("killed", *more), stderr=-3, env=environment) as training:
            while not told():
                assert training.poll() is None, "the run ended before it could be killed"
                time.sleep(0.002)
            training.send_signal(signal.SIGKILL)
        assert training.returncode == -signal.SIGKILL

    def epochs():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def half_written(pattern):
        return any(killed.glob(pattern))

    kill_when(lambda: epochs() == 2)
    kill_when(lambda: epochs() > 2 and half_written("checkpoints/*tmp*"), "--resume")
    kill_when(lambda: half_written("figures/*.png"), "--resume")
    assert len(read_metrics(killed)) == 5
    for one in (command("killed", "--resume"), command("whole")):
        subprocess.run(one, check=True, capture_output=True, env=environment)

    for a, b in zip(*(saved(tmp_path / name) for name in ("killed", "whole")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert without_seconds(killed) == without_seconds(tmp_path / "whole")
    names = [path.name for path in killed.rglob("*")]
    assert not [name for name in names if "tmp" in name or ".part" in name or "damaged" in name]


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (lambda text: None, "lacks the lines of 2 of 2 epochs, from epoch 1 on"),
        (lambda text: "", "lacks the lines of 2 of 2 epochs, from epoch 1 on"),
        (lambda text: text.splitlines()[0] + "\n", "lacks the lines of 1 of 2 epochs, from epo"),
        (lambda text: text + "\n", None),
    ],
    ids=["all", "emptied", "one", "none"],
)
def test_a_run_goes_on_without_lines_that_are_lost(finished, tmp_path, left, says):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    path = run_dir / "metrics.jsonl"
    kept = left(path.read_text())
    path.unlink()
    if kept is not None:
        path.write_text(kept)
    with pytest.warns(Damaged, match=says) if says else nullcontext():
        trained(run_dir, {"epochs": 3}, resume=True)
    known = [json.loads(line)["epoch"] for line in (kept or "").splitlines() if line]
    assert [line["epoch"] for line in read_metrics(run_dir)] == [*known, 3]
    assert path.read_text().startswith((kept or "").rstrip("\n"))


def test_a_run_whose_lines_are_lost_is_drawn(finished, tmp_path):
    history = [{**line, "epoch": line["epoch"] + 4} for line in read_metrics(finished[0])]
    assert figures.training(history[:1]).axes[0].get_xlim() == (4.7, 5.3)


@pytest.mark.parametrize(
    "name",
    ["figures", "manifolds", "checkpoints", "checkpoints/16", "tensorboard", "tensorboard/00000"],
)
def test_nothing_is_written_outside_of_a_run_directory(finished, tmp_path, name):
    """Where a folder of a stranger's run leads elsewhere, it is refused before anything is done."""
    run_dir, outside = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    if name == "checkpoints/16":
        outside.rmdir()
        (run_dir / name).rename(outside)
    (outside / "5.orbax-checkpoint-tmp").mkdir()
    (outside / "0001.png").write_text("of somebody else")
    shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).symlink_to(outside)
    before = {path: path.read_bytes() if path.is_file() else None for path in outside.rglob("*")}
    state = finished[1]
    config = read_config(run_dir)
    data = load_run_data(config)
    with refused(f"{name} is a symbolic link: expected a regular file or folder"):
        if name == "figures":
            draw(run_dir, state.params)
        elif name == "manifolds":
            keep_frame(run_dir, {"epoch": 1}, state.params)
        elif name.startswith("tensorboard"):
            loop.train(run_dir, config, data, callbacks=[TensorBoard()])
        else:
            with open_checkpoints(run_dir) as checkpoints:
                write(checkpoints, replace(state, step=state.step + 1), {})
    after = {path: path.read_bytes() if path.is_file() else None for path in outside.rglob("*")}
    assert after == before


@pytest.mark.parametrize("name", ["checkpoints/100/weights", "manifolds/0001.png"])
def test_a_run_is_not_started_among_checkpoints_of_something_else(tmp_path, npz, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("of another program")
    with refused(f"{tmp_path / name.split('/')[0]} exists already but does not belong to a run"):
        trained(tmp_path, {"data": str(npz), "network": NETWORK, "epochs": 1})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def saved(run_dir):
    state = jaxvae.restore(run_dir)
    return [*jax.tree.leaves((state.params, state.opt_state, state.step)),
            jax.random.key_data(state.key)]  # fmt: skip


def test_a_run_is_not_started_over_another(finished, npz):
    run_dir, _ = finished
    before = (run_dir / "config.json").read_text()
    with pytest.raises(jaxvae.InputError, match="already holds a run: resume it"):
        trained(run_dir, {"data": str(npz)})
    assert (run_dir / "config.json").read_text() == before


@pytest.mark.parametrize("seeds", [1, 2])
def test_of_two_runs_that_start_at_once_the_first_has_the_directory(
    tmp_path, npz, monkeypatch, seeds
):
    """Another one starts after this one has found the directory free."""
    first, second = (configured({"data": str(npz), "seed": seed}) for seed in (1, 2))
    data = load_run_data(first)

    def meanwhile(*_):
        monkeypatch.undo()
        directory.start(tmp_path, first, data, resume=False)

    monkeypatch.setattr(directory, "check_first_step", meanwhile)
    with refused(f"{tmp_path} already holds a run"):
        if seeds == 1:
            directory.start(tmp_path, second, data, resume=False)
        else:
            sweep.start(tmp_path, {"a": first, "b": second}, data, resume=False)
    assert read_config(tmp_path).seed == 1
    assert not (tmp_path / "sweep.json").exists()


def test_a_batch_larger_than_the_data_leaves_no_directory(tmp_path, npz):
    with pytest.raises(jaxvae.InputError, match="batch_size is 513: expected at most"):
        trained(tmp_path / "run", {"data": str(npz), "batch_size": 513})
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_the_recorded_one(finished):
    run_dir, _ = finished
    assert resumed(run_dir, {"epochs": 7, "seed": 3}).train.epochs == 7
    with pytest.raises(jaxvae.InputError, match=r"--batch-size is 32, but .* started with 64"):
        resumed(run_dir, {"batch_size": 32})


def test_images_of_another_shape_do_not_go_on(finished, tmp_path):
    run_dir, _ = finished
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((100, 9, 8), np.uint8))
    config = read_config(run_dir)
    data = load_run_data(RunConfig(data=str(other)))
    with pytest.raises(jaxvae.InputError, match=r"shape \(9, 8, 1\), but .* \(8, 8, 1\)"):
        directory.start(run_dir, config, data, resume=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a run directory: expected one made by `jaxvae train`"),
        ("{", "config.json is damaged"),
        ("[]", "config.json is damaged: expected an object"),
        ('{"seed": "x"}', "config.json is damaged: seed is 'x'"),
        ('{"model": {"latent_dim": -1}}', "config.json is damaged: latent_dim is -1"),
    ],
)
def test_a_directory_that_is_not_a_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(jaxvae.InputError, match=says):
        read_config(tmp_path)


def test_images_on_disk_are_trained_on_as_images_in_memory_are(finished, npz, tmp_path):
    """The same batches in the same order, read ahead of the steps."""
    run_dir, state = finished
    config = configured({"data": str(npz), "network": NETWORK, "batch_size": 64, "seed": 3})
    config = replace(config, train=replace(config.train, epochs=2))
    data = load_run_data(config)
    data = data._replace(train_images=OnDisk(data.train_images))
    config = directory.start(tmp_path / "disk", config, data, resume=False)
    streamed = loop.train(tmp_path / "disk", config, data)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, streamed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert without_seconds(run_dir) == without_seconds(tmp_path / "disk")


def test_ctrl_c_saves_in_mid_epoch_and_the_run_goes_on_bit_for_bit(tmp_path, npz, monkeypatch):
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", 128)  # two steps
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2}
    once = trained(tmp_path / "once", flags)
    config = configured(flags)
    data = load_run_data(config)
    config = directory.start(tmp_path / "cut", config, data, resume=False)
    stop = SignalAt(6, signal.SIGINT)
    with pytest.raises(Preempted, match="saved after step 12; resume with: jaxvae train --resume"):
        loop.train(tmp_path / "cut", config, data, callbacks=[stop])
    assert_leaves_equal(once.params, trained(tmp_path / "cut", {}, resume=True).params)
    assert without_seconds(tmp_path / "once") == without_seconds(tmp_path / "cut")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, npz):
    config = configured({"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2})
    data = load_run_data(config)
    config = directory.start(tmp_path, config, data, resume=False)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tmp_path, config, data, callbacks=[SignalAt(1, signal.SIGINT, times=2)])


def test_two_trainings_do_not_share_a_directory(finished, tmp_path, npz):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    before = contents(run_dir)
    with files.locked(run_dir):
        for resume in (False, True):
            with refused(f"{run_dir} "):
                trained(run_dir, {"epochs": 9} if resume else {"data": str(npz)}, resume=resume)
        config = read_config(run_dir)
        with refused(f"{run_dir} is being trained by process {os.getpid()} on"):
            loop.train(run_dir, config, load_run_data(config))
    assert contents(run_dir) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("model", "likelihood", "gaussian", "has likelihood gaussian, but the checkpoint of step"),
        ("train", "beta", 0.5, "step 16 was trained with 1.0: correct config.json"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(
    finished, tmp_path, part, name, value, says
):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config[part][name] = value
    (run_dir / "config.json").write_text(json.dumps(config))
    before = contents(run_dir)
    with refused(f"{run_dir}/config.json has {name} {value}, but", says):
        trained(run_dir, {"epochs": 3}, resume=True)
    assert contents(run_dir) == before


def test_a_run_falls_back_on_an_older_checkpoint_and_comes_to_the_same_end(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    for step in (8, 16):
        assert (run_dir / "checkpoints" / str(step)).is_dir()
    (run_dir / "checkpoints" / "16" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.warns(
        Damaged, match=r"16 is damaged \(state/manifest.ocdbt is not .*step 8 instead"
    ):
        state = trained(run_dir, {}, resume=True)
    assert_leaves_equal(state.params, finished[1].params)
    assert without_seconds(run_dir) == without_seconds(finished[0])
    assert (run_dir / "checkpoints" / "16.damaged").is_dir()


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    for step in (8, 16):
        (run_dir / "checkpoints" / str(step) / "config" / "metadata").unlink()
    before = contents(run_dir)
    with refused("holds no intact checkpoint (step 16: config/metadata is"):
        trained(run_dir, {}, resume=True)
    assert contents(run_dir) == before
    shutil.rmtree(run_dir / "checkpoints")
    with refused("holds no checkpoint, but its metrics.jsonl lists finished epochs"):
        trained(run_dir, {}, resume=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte, where this user may make one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_training_and_loses_nothing(small_disk, tmp_path, npz):
    """The run goes on as if nothing had happened when there is room again."""
    flags = {"data": str(npz), "network": "mlp:width=8", "batch_size": 64, "epochs": 2}
    run_dir = small_disk / "run"
    trained(run_dir, {**flags, "epochs": 1})
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 4096))
    with pytest.raises(TrainingFailed, match=r"run cannot be written: 0.0 MB are free, .* resume"):
        trained(run_dir, {"epochs": 2}, resume=True)
    assert int(jaxvae.restore(run_dir).step) == 8
    (small_disk / "ballast").unlink()
    state = trained(run_dir, {"epochs": 2}, resume=True)
    assert_leaves_equal(state.params, trained(tmp_path / "once", flags).params)
    assert without_seconds(run_dir) == without_seconds(tmp_path / "once")
    assert not [path for path in run_dir.rglob("*") if "tmp" in path.name or ".part" in path.name]


def test_a_read_only_disk_is_refused(small_disk, finished):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    shutil.copy(finished[0] / "config.json", run_dir)
    config = read_config(run_dir)
    data = load_run_data(config)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place, resume in ((small_disk / "other", False), (run_dir, True)):
        with refused("cannot be written: Read-only file system"):
            directory.start(place, config, data, resume=resume)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_run_of_a_newer_version_is_left_alone(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"jaxvae": "9.0", "novelty": 1}))
    with refused("config.json was made by jaxvae 9.0, and this is"):
        resumed(run_dir, {})


# ---- Few labels ----

FEW = {"num_classes": 3, "classifier": True, "objective": "m2:alpha=10", "labelled": 12,
       "network": "mlp:width=8", "batch_size": 64, "epochs": 1, "seed": 5}  # fmt: skip


def test_a_few_labels_of_each_class_are_kept_and_the_others_hidden(npz):
    config = configured(FEW | {"data": str(npz)})
    data = load_run_data(config)
    labels = train_conditions(data, config)
    rows = np.flatnonzero(labels >= 0)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [4, 4, 4])
    np.testing.assert_array_equal(labels[rows], data.train_labels[rows])
    np.testing.assert_array_equal(train_conditions(data, config), labels)
    assert np.any(train_conditions(data, replace(config, seed=6)) != labels)
    np.testing.assert_array_equal(
        train_conditions(data, replace(config, labelled=0)), data.train_labels
    )
    # In 8 steps.
    assert labelled_counts(data, config) == (12, 7, pytest.approx(56 / 12))
    assert labelled_counts(data, replace(config, labelled=0)) is None


def test_a_run_with_few_labels_learns_resumes_and_reports_its_error(npz, tmp_path):
    flags = FEW | {"data": str(npz), "learning_rate": 1e-2, "optimizer": "adam"}
    run = tmp_path / "run"
    trained(run, flags | {"epochs": 5})
    trained(run, {"epochs": 6}, resume=True)
    found = evaluation.measure(run, 5)
    data, params = load_run_data(read_config(run)), jaxvae.load(run)
    wrong = np.argmax(jaxvae.classify(params, data.test_images), 1) != data.test_labels
    assert found["classification_error"] == pytest.approx(np.mean(wrong))
    assert np.mean(wrong) < 0.1
    # A prior is fitted with the same few labels.
    fitted = fit_prior(run, "mixture:components=2", epochs=1, progress=False)
    assert fitted.params.config.prior != params.config.prior
    assert fitted.before == pytest.approx(read_metrics(run)[-1]["test"], rel=1e-5)


def test_missing_labels_in_the_data_are_filled_in_by_the_classifier(tmp_path, npz):
    arrays = dict(np.load(npz))
    for name in ("y_train", "y_test"):
        arrays[name] = np.where(np.arange(len(arrays[name])) % 4, -1, arrays[name])
    np.savez(tmp_path / "few.npz", **arrays)
    flags = FEW | {"data": str(tmp_path / "few.npz"), "labelled": 0}
    trained(tmp_path / "run", flags)
    data, params = load_run_data(read_config(tmp_path / "run")), jaxvae.load(tmp_path / "run")
    y = np.argmax(jaxvae.classify(params, data.test_images), 1)
    y = np.where(data.test_labels < 0, y, data.test_labels)
    key = run_keys(read_config(tmp_path / "run"))[1]
    expected = jaxvae.elbo(params, key, data.test_images).value.mean()
    assert evaluation.measure(tmp_path / "run", 2)["elbo"] == pytest.approx(
        float(expected), rel=1e-4
    )
    found = encode_all(open_run(tmp_path / "run", split="test"))
    mean = jaxvae.encode(params, data.test_images, y).mean
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-5)
    q = jaxvae.classify(params, data.test_images)
    np.testing.assert_allclose(found["probabilities"], q, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(labels_of(params, data, np.arange(8)), y[:8])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"objective": "elbo"},
            "some training labels are hidden or missing: expected the objective",
        ),
        ({"classifier": False}, "expected ModelConfig(num_classes=..., classifier=True)"),
        ({"labelled": 10}, "labelled is 10: expected a multiple of num_classes, 3"),
        ({"labelled": 3000}, "labelled is 3000, 1000 of each class, but class 0 has"),
    ],
)
def test_few_labels_that_do_not_go_with_the_run_leave_no_directory(npz, tmp_path, change, says):
    with refused(says):
        trained(tmp_path / "run", FEW | {"data": str(npz)} | change)
    assert not (tmp_path / "run").exists()
