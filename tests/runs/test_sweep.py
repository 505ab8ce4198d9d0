"""Many models at once: each is the model trained alone, in a run directory like any other."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import OnDisk, OwnDecoder, OwnEncoder, SignalAt, refused

import jaxvae
from jaxvae.errors import Preempted
from jaxvae.runs import directory, loop, sweep
from jaxvae.runs.checkpoints import write
from jaxvae.runs.config import read_config, resumed, run_keys
from jaxvae.runs.data import load_run_data, train_conditions
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")

NETWORK = "mlp:width=8"


def trained(run_dir, flags, seeds=1, *, resume=False):
    models = sweep.resumed(run_dir, flags) if resume else sweep.configured(flags, seeds)
    data = load_run_data(next(iter(models.values())))
    models = sweep.start(run_dir, models, data, resume=resume)
    return models, sweep.train(run_dir, models, data)


def trained_alone(run_dir, config):
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=False)
    return loop.train(run_dir, config, data)


@pytest.fixture(scope="module")
def eight(tmp_path_factory, npz):
    """Eight models, two epochs: their directory, configurations and stacked states."""
    run_dir = tmp_path_factory.mktemp("runs") / "eight"
    flags = {"data": str(npz), "network": NETWORK, "epochs": 2, "batch_size": 64, "seed": 5}
    flags |= {"learning_rate": [1e-3, 2e-4], "beta": [0.5, 4.0]}
    return run_dir, *trained(run_dir, flags, seeds=2)


def without_seconds(folder):
    return [{**line, "seconds": 0} for line in read_metrics(folder)]


def saved(folder):
    return jax.tree.leaves(jaxvae.load(folder))


def test_every_combination_is_named(eight):
    _, models, _ = eight
    assert list(models) == [
        f"learning-rate-{rate}_beta-{beta}_seed-{seed}"
        for rate in ("0.001", "0.0002")
        for beta in ("0.5", "4.0")
        for seed in (5, 6)
    ]
    assert list(sweep.configured({}, 2)) == ["seed-0", "seed-1"]


@pytest.mark.parametrize("i", [0, 3, 6])
def test_a_model_of_many_is_the_one_trained_alone(eight, tmp_path, i):
    run_dir, models, states = eight
    name = list(models)[i]
    alone = trained_alone(tmp_path, models[name])
    apart = [
        (np.linalg.norm(a[i] - b), np.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True)
    ]
    differences, norms = np.array(apart).T
    assert np.linalg.norm(differences) < 1e-3 * np.linalg.norm(norms)
    lines = zip(read_metrics(run_dir / name), read_metrics(tmp_path), strict=True)
    for ours, theirs in lines:
        assert (ours["epoch"], ours["step"]) == (theirs["epoch"], theirs["step"])
        for split in ("train", "test"):
            assert ours[split] == pytest.approx(theirs[split], rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory, npz):
    """Four conditional models, warmed up, three epochs of one step each."""
    run_dir = tmp_path_factory.mktemp("runs") / "warmed"
    flags = {"data": str(npz), "network": NETWORK, "num_classes": 3, "batch_size": 512, "epochs": 3}
    flags |= {"warmup": "linear:steps=4", "beta": [1.0, 6.0], "binarization": "dynamic"}
    return run_dir, *trained(run_dir, flags, seeds=2)


def test_every_beta_is_warmed_up(warmed):
    """In steps of a quarter, as the loss tells: -log_likelihood + weight * beta * kl."""
    run_dir, models, _ = warmed
    for name, config in models.items():
        losses = [line["train"] for line in read_metrics(run_dir / name)]
        for means, share in zip(losses, (0, 0.25, 0.5), strict=True):
            weight = share * config.train.beta
            assert means["loss"] == pytest.approx(
                weight * means["kl"] - means["log_likelihood"], rel=1e-5
            )


def test_conditional_models_of_many_are_trained_and_measured_with_their_labels(
    warmed, tmp_path, npz
):
    run_dir, models, states = warmed
    name = list(models)[-1]
    alone = trained_alone(tmp_path, models[name])
    for a, b in zip(*map(jax.tree.leaves, (states.params, alone.params)), strict=True):
        np.testing.assert_allclose(a[-1], b, rtol=1e-3, atol=1e-5)
    test = load_run_data(models[name])
    _, key = run_keys(models[name])
    terms = jaxvae.elbo(jaxvae.load(run_dir / name), key, test.test_images, test.test_labels)
    recorded = read_metrics(run_dir / name)[-1]["test"]
    assert recorded["elbo"] == pytest.approx(float(terms.value.mean()), rel=1e-4)


def test_each_model_of_many_has_the_few_labels_of_its_own_seed(tmp_path, npz):
    flags = {"data": str(npz), "network": NETWORK, "num_classes": 3, "classifier": True}
    flags |= {"objective": "m2:alpha=10", "labelled": 12, "batch_size": 64, "epochs": 1}
    models, states = trained(tmp_path / "both", flags, seeds=2)
    alone = trained_alone(tmp_path / "alone", models["seed-1"])
    for a, b in zip(*map(jax.tree.leaves, (states.params, alone.params)), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5)
    of_seeds = [train_conditions(load_run_data(config), config) for config in models.values()]
    assert np.any(of_seeds[0] != of_seeds[1])


def test_labels_that_are_missing_leave_no_directory(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 8, 8), np.uint8))
    flags = {"data": str(tmp_path / "data.npz"), "num_classes": 3, "batch_size": 8}
    with refused("has no train labels: expected classes from 0 to 2"):
        trained(tmp_path / "run", flags, seeds=2)
    assert not (tmp_path / "run").exists()


def test_many_models_start_from_one(eight, tmp_path, npz):
    run_dir, models, _ = eight
    first = str(run_dir / next(iter(models)))
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 512, "epochs": 1}
    flags |= {"start_from": first, "learning_rate": [1e-9, 2e-9]}
    _, states = trained(tmp_path / "run", flags)
    for a, b in zip(*map(jax.tree.leaves, (states.params, jaxvae.load(first))), strict=True):
        for one in a:
            np.testing.assert_allclose(one, b, atol=1e-6)
    with refused(f"{first} has a model with latent_dim 2: expected 3"):
        trained(tmp_path / "other", {**flags, "latent_dim": 3}, seeds=2)
    assert not (tmp_path / "other").exists()


def test_every_model_has_a_run_directory_of_its_own(eight):
    run_dir, models, states = eight
    for i, (name, config) in enumerate(models.items()):
        assert read_config(run_dir / name) == config
        state = jaxvae.restore(run_dir / name)
        assert state.config == config.train
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(states.params), strict=True):
            np.testing.assert_array_equal(a, b[i])


def test_learning_rate_beta_and_seed_each_make_another_model(eight):
    run_dir, models, _ = eight
    last = [read_metrics(run_dir / name)[-1]["test"]["elbo"] for name in models]
    assert len(set(last)) == 8
    losses = [read_metrics(run_dir / name)[0]["train"] for name in models]
    for config, means in zip(models.values(), losses, strict=True):
        loss = config.train.beta * means["kl"] - means["log_likelihood"]
        assert means["loss"] == pytest.approx(loss, rel=1e-5)


def test_metrics_are_means_and_standard_deviations_over_the_models(eight):
    run_dir, models, _ = eight
    for epoch, line in enumerate(read_metrics(run_dir)):
        ones = [read_metrics(run_dir / name)[epoch] for name in models]
        for split in ("train", "test"):
            assert line["models"][list(models)[3]][split] == ones[3][split]
            for metric, mean in line[split].items():
                values = [one[split][metric] for one in ones]
                assert mean == pytest.approx(np.mean(values))
                assert line[f"{split}_sd"][metric] == pytest.approx(np.std(values, ddof=1))


def test_results_are_over_the_seeds_of_each_combination(eight):
    run_dir, models, _ = eight
    lines = list(sweep.results(run_dir, models))
    assert len(lines) == 4
    elbos = [read_metrics(run_dir / name)[-1]["test"]["elbo"] for name in list(models)[:2]]
    assert lines[0] == (
        f"learning rate 0.001, beta 0.5: test ELBO {np.mean(elbos):.2f} "
        f"± {np.std(elbos, ddof=1):.2f} over 2 seeds"
    )


def test_a_sweep_goes_on_bit_for_bit_from_the_last_epoch_that_all_have(tmp_path, npz):
    """As after a kill between two models' checkpoints, and in the first epoch."""
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64}
    once, parts, scratch = (tmp_path / name for name in ("once", "parts", "scratch"))
    models, _ = trained(once, {**flags, "epochs": 2}, seeds=2)
    trained(parts, {**flags, "epochs": 1}, seeds=2)
    shutil.copytree(parts, scratch)
    shutil.rmtree(scratch / "seed-1" / "checkpoints")
    behind = tmp_path / "behind"
    shutil.copytree(parts / "seed-1", behind)
    trained(parts, {"epochs": 2}, resume=True)
    shutil.rmtree(parts / "seed-1")
    shutil.copytree(behind, parts / "seed-1")
    for folder in (parts, scratch):
        trained(folder, {"epochs": 2}, resume=True)
        assert without_seconds(folder) == without_seconds(once)
        for name in models:
            assert without_seconds(folder / name) == without_seconds(once / name)
            for a, b in zip(saved(folder / name), saved(once / name), strict=True):
                np.testing.assert_array_equal(a, b)


def test_sigterm_saves_every_model_in_mid_epoch(tmp_path, npz, monkeypatch):
    monkeypatch.setattr(sweep, "_IMAGES_PER_DISPATCH", 256)  # two steps of both models
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2}
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    models, _ = trained(once, flags, seeds=2)
    data = load_run_data(next(iter(models.values())))
    sweep.start(stopped, models, data, resume=False)
    with pytest.raises(Preempted, match="saved after step 12; resume with"):
        sweep.train(stopped, models, data, callbacks=[SignalAt(6)])
    trained(stopped, {}, resume=True)
    assert without_seconds(stopped) == without_seconds(once)
    for name in models:
        assert without_seconds(stopped / name) == without_seconds(once / name)
        for a, b in zip(saved(stopped / name), saved(once / name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_model_that_a_kill_left_ahead_is_saved_at_earlier_steps(tmp_path, npz, monkeypatch):
    """Killed between two models' checkpoints, and after that stopped at an earlier step."""
    monkeypatch.setattr(sweep, "_IMAGES_PER_DISPATCH", 128)  # a step of both models
    flags = {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 1}
    models = sweep.configured(flags, 2)
    data = load_run_data(next(iter(models.values())))
    models = sweep.start(tmp_path, models, data, resume=False)
    with pytest.raises(Preempted, match="saved after step 5"):
        sweep.train(tmp_path, models, data, callbacks=[SignalAt(5)])
    shutil.rmtree(tmp_path / "seed-1" / "checkpoints")
    for step in (3, 4):
        with pytest.raises(Preempted, match=f"saved after step {step}"):
            sweep.train(tmp_path, models, data, callbacks=[SignalAt(3 if step == 3 else 1)])
        assert {int(jaxvae.restore(tmp_path / name).step) for name in models} == {step}


def test_models_are_saved_from_the_host(tmp_path, npz, monkeypatch):
    """A slice of what several devices share would be a program in which they wait."""
    written = []

    def seen(checkpoints, state, *more):
        written.extend(len(x.sharding.device_set) for x in jax.tree.leaves(state))
        return write(checkpoints, state, *more)

    monkeypatch.setattr(sweep, "write", seen)
    _, states = trained(tmp_path, {"data": str(npz), "network": NETWORK, "epochs": 1}, seeds=2)
    assert set(written) == {1}
    for i in range(2):
        for a, b in zip(jax.tree.leaves(states), whole(tmp_path / f"seed-{i}"), strict=True):
            np.testing.assert_array_equal(*map(numbers, (a[i], b)))


def whole(folder):
    return jax.tree.leaves(jaxvae.restore(folder))


def numbers(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_images_on_disk_are_for_one_model(tmp_path, npz):
    models = sweep.configured({"data": str(npz)}, 2)
    data = load_run_data(next(iter(models.values())))
    data = data._replace(train_images=OnDisk(data.train_images))
    with refused(f"{npz} is read from disk image by image", "train one model at a time"):
        sweep.start(tmp_path / "run", models, data, resume=False)
    assert not (tmp_path / "run").exists()


def test_more_models_than_the_machine_can_hold_are_refused(tmp_path, npz, monkeypatch):
    for flags, seeds in (({}, 10**9), ({"beta": [1.0, 2.0]}, 5001), ({}, 10**5000)):
        with refused("--seeds", "models: expected at most 10,000"):
            sweep.configured(flags, seeds)
    monkeypatch.setattr(directory, "memory", lambda: 10**6)
    models = sweep.configured({"data": str(npz)}, 3)
    data = load_run_data(next(iter(models.values())))
    with refused("3 models need 0 GB for parameters and optimizer state"):
        sweep.start(tmp_path / "run", models, data, resume=False)
    assert not (tmp_path / "run").exists()


def own_loss(params, key, images, labels=None):
    terms = jaxvae.elbo(params, key, images, labels)
    return -terms.value, terms


@pytest.mark.parametrize(
    ("name", "own"),
    [("learning_rate", {"optimizer": optax.sgd(1e-3)}), ("beta", {"objective": own_loss})],
)
def test_values_that_no_model_would_use_are_refused(name, own):
    flag = "--" + name.replace("_", "-")
    with refused(f"{flag} has several values, but the {next(iter(own))} is your own"):
        sweep.configured({name: [1.0, 2.0], **own})
    assert len(sweep.configured({name: [1.0], **own}, 2)) == 2


def test_a_sweep_goes_on_with_its_own_data_alone(tmp_path, npz):
    flags = {"data": str(npz), "network": NETWORK, "epochs": 1}
    trained(tmp_path / "run", flags, seeds=2)
    moved, other = tmp_path / "moved.npz", tmp_path / "other.npz"
    shutil.copy(npz, moved)
    arrays = dict(np.load(npz))
    np.savez(other, **{**arrays, "x_train": arrays["x_train"][::-1]})
    with refused(f"{other} is not the data set that {tmp_path}/run/seed-0 was trained on"):
        trained(tmp_path / "run", {"data": str(other), "epochs": 2}, resume=True)
    models, _ = trained(tmp_path / "run", {"data": str(moved), "epochs": 2}, resume=True)
    for name, config in models.items():
        assert read_config(tmp_path / "run" / name) == config
        assert config.data == str(moved)
        assert len(config.data_seen) == 1


def test_a_model_of_many_goes_on_alone(eight, tmp_path):
    run_dir, models, _ = eight
    name = next(iter(models))
    shutil.copytree(run_dir / name, tmp_path / name)
    config = resumed(tmp_path / name, {"epochs": 3})
    state = loop.train(tmp_path / name, config, load_run_data(config))
    assert int(state.step) == 24
    assert len(read_metrics(tmp_path / name)) == 3


def test_other_models_than_the_recorded_ones_do_not_go_on(eight):
    run_dir, _, _ = eight
    for name, value in (("seeds", 3), ("seed", 1), ("learning_rate", [1e-3]), ("beta", [1.0])):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(
            jaxvae.InputError, match=f"{flag} cannot change when a sweep is resumed"
        ):
            sweep.resumed(run_dir, {name: value})
    with pytest.raises(jaxvae.InputError, match=r"--batch-size is 32, but .* started with 64"):
        sweep.resumed(run_dir, {"batch_size": 32})


def test_a_run_is_not_started_over_a_sweep_nor_a_sweep_over_a_run(eight, tmp_path):
    run_dir, models, _ = eight
    config = next(iter(models.values()))
    data = load_run_data(config)
    with pytest.raises(jaxvae.InputError, match="already holds a run"):
        directory.start(run_dir, config, data, resume=False)
    directory.start(tmp_path / "seed-1", config, data, resume=False)
    two = {"seed-0": config, "seed-1": config}
    with pytest.raises(jaxvae.InputError, match="seed-1 already holds a run"):
        sweep.start(tmp_path, two, data, resume=False)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["seed-1"]


def test_networks_of_ones_own_are_trained_at_once_and_resumed(tmp_path, npz):
    network = OwnEncoder(2), OwnDecoder((8, 8, 1))
    flags = {"data": str(npz), "batch_size": 128, "epochs": 1, "network": network}
    trained(tmp_path, flags, seeds=2)
    with refused(
        f"{tmp_path}: the network is a pair of Flax modules, which are not saved: pass netw"
    ):
        sweep.resumed(tmp_path, {"epochs": 2})
    _, states = trained(tmp_path, {"epochs": 2, "network": network}, resume=True)
    params = jaxvae.load(tmp_path / "seed-1", network=network)
    for a, b in zip(*map(jax.tree.leaves, (params, states.params)), strict=True):
        np.testing.assert_array_equal(a, b[1])


def test_a_damaged_sweep_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text('{"seed-0": {"seed": "x"}}')
    with pytest.raises(jaxvae.InputError, match=r"sweep\.json is damaged: seed is 'x'"):
        sweep.resumed(tmp_path, {})


def test_a_sweep_of_no_models_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with refused("sweep.json is damaged: it holds no models"):
        sweep.resumed(tmp_path, {})


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "/tmp/x", "..", ".", "", "a\0b", ".lock", "a\\b"]
)
def test_a_models_name_does_not_leave_the_directory(tmp_path, name):
    (tmp_path / "sweep.json").write_text(json.dumps({"seed-0": {}, name: {"seed": 1}}))
    with refused("sweep.json is damaged: a model has the name "):
        sweep.resumed(tmp_path, {})


def test_models_of_other_kinds_are_no_sweep(tmp_path):
    models = {"seed-0": {}, "seed-1": {"seed": 1, "model": {"latent_dim": 3}}}
    (tmp_path / "sweep.json").write_text(json.dumps(models))
    with refused("sweep.json is damaged: its models differ in more than seed, learning_rate and"):
        sweep.resumed(tmp_path, {})


def test_a_models_directory_that_is_a_link_is_refused(eight, tmp_path):
    run_dir, models, _ = eight
    name, outside = list(models)[1], tmp_path / "outside"
    run_dir = shutil.copytree(run_dir, tmp_path / "run")
    (run_dir / name).rename(outside)
    (run_dir / name).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    with refused(f"{name} is a symbolic link: expected a regular file or folder"):
        trained(run_dir, {"epochs": 3}, resume=True)
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


def test_results_are_told_of_lost_metrics(eight, tmp_path):
    run_dir, models, _ = eight
    run_dir = shutil.copytree(run_dir, tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    assert list(sweep.results(run_dir, models)) == list(sweep.results(eight[0], models))
    for name in list(models)[:3]:
        (run_dir / name / "metrics.jsonl").unlink()
    first, second, *_ = sweep.results(run_dir, models)
    assert first == "learning rate 0.001, beta 0.5: test ELBO unknown (metrics.jsonl is missing)"
    assert "over" not in second
