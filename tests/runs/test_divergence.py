"""A loss that is no number ends a training at once, and nothing bad is saved."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SignalAt

import jaxvae
from jaxvae.errors import Diverged, Preempted, TrainingFailed
from jaxvae.runs import directory, loop, sweep
from jaxvae.runs.checkpoints import steps_of
from jaxvae.runs.config import configured
from jaxvae.runs.data import load_run_data
from jaxvae.runs.divergence import DivergenceCheck, _finite
from jaxvae.runs.files import read_metrics
from jaxvae.training.step import shuffle, train_steps

pytestmark = pytest.mark.usefixtures("compile_quickly")


def batches_of_64(state, model):
    return shuffle(state, 64)


def poisoned(params, keys, images):
    """The ELBO, but NaN for an image whose first pixel is 255."""
    terms = jaxvae.elbo(params, keys, images)
    bad = jnp.where(images[:, 0, 0, 0] == 255, jnp.nan, 0.0)
    return -terms.value + bad, terms


def test_the_step_the_images_and_the_last_good_checkpoint_are_named(tmp_path, npz):
    flags = {"data": str(npz), "network": "mlp:width=8", "batch_size": 32, "epochs": 1}
    config = configured({**flags, "objective": poisoned})
    data = load_run_data(config)
    clean = np.minimum(data.train_images, 254)
    config = directory.start(tmp_path, config, data, resume=False)
    state = loop.train(tmp_path, config, data._replace(train_images=clean))
    before = (tmp_path / "metrics.jsonl").read_text()
    # An image of the third batch of the second epoch.
    at_start = replace(state, config=replace(state.config, epochs=2))
    batch = np.asarray(shuffle(at_start, len(clean)))[2]
    clean[batch[5], 0, 0, 0] = 255
    config = replace(config, train=replace(config.train, epochs=2))
    with pytest.raises(TrainingFailed) as failed:
        loop.train(tmp_path, config, data._replace(train_images=clean))
    told = str(failed.value)
    assert "the loss is NaN or infinite at step 19 (epoch 2, batch 3: training images" in told
    assert ", ".join(map(str, batch[:8])) + ", ...; all are listed in" in told
    assert f"the last good checkpoint is step 16 in {tmp_path}" in told
    assert "\n" not in told
    written = json.loads((tmp_path / "diverged.json").read_text())
    assert written == {"step": 19, "epoch": 2, "batch": 3, "images": batch.tolist()}
    assert steps_of(tmp_path) == [16]
    assert (tmp_path / "metrics.jsonl").read_text() == before
    # A resumed run that succeeds removes it.
    loop.train(tmp_path, config, data._replace(train_images=np.minimum(clean, 254)))
    assert not (tmp_path / "diverged.json").exists()


MANY = {"network": "mlp:width=8", "batch_size": 64, "epochs": 2, "learning_rate": [9e5, 1e-3]}


def swept(run_dir, flags, *, resume=False, **options):
    models = sweep.resumed(run_dir, flags) if resume else sweep.configured(flags)
    data = load_run_data(next(iter(models.values())))
    models = sweep.start(run_dir, models, data, resume=resume)
    return sweep.train(run_dir, models, data, **options)


def test_one_of_many_models_that_diverges_is_left_out_and_the_others_go_on(
    tmp_path, npz, monkeypatch
):
    """At once, and bit for bit the same after a stop in the middle of an epoch."""
    monkeypatch.setattr(sweep, "_IMAGES_PER_DISPATCH", 256)  # two steps of both models
    flags = {**MANY, "data": str(npz)}
    models = sweep.configured(flags)
    bad, good = models
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    told = f"the loss of {bad} is NaN or infinite .*no checkpoint was saved.* other models continue"
    with pytest.warns(Diverged, match=told):
        states = swept(once, flags)
    with pytest.warns(Diverged), pytest.raises(Preempted):
        swept(stopped, flags, callbacks=[SignalAt(3)])
    again = swept(stopped, {}, resume=True)  # without a word, as it was told
    for a, b in zip(*map(jax.tree.leaves, (states.params, again.params)), strict=True):
        assert len(a) == 1
        np.testing.assert_array_equal(a, b)
    for run_dir in (once, stopped):
        assert [steps_of(run_dir / name) for name in models] == [[], [8, 16]]
        assert read_metrics(run_dir / bad) == []
        for whole, alone in zip(read_metrics(run_dir), read_metrics(run_dir / good), strict=True):
            assert list(whole["models"]) == [good]
            assert whole["train"] == alone["train"]
            assert np.isfinite([*alone["train"].values(), *alone["test"].values()]).all()
        written = json.loads((run_dir / bad / "diverged.json").read_text())
        assert written["model"] == bad
        lines = list(sweep.results(run_dir, models))
        assert lines[0].startswith("learning rate 0.001, beta 1: test ELBO -")
        assert lines[1].startswith(f"{bad} has diverged and was left out")
    assert int(swept(once, {"epochs": 3}, resume=True).step[0]) == 24


def test_a_sweep_of_which_all_models_diverge_ends_and_so_does_its_resume(tmp_path, npz):
    flags = {**MANY, "data": str(npz), "learning_rate": [9e5, 8e5]}
    with pytest.warns(Diverged), pytest.raises(TrainingFailed, match="all models have diverged"):
        swept(tmp_path, flags)
    with pytest.raises(TrainingFailed, match=f"all models of {tmp_path} have diverged"):
        swept(tmp_path, {}, resume=True)


def test_parameters_of_one_of_many_models_that_are_no_numbers_are_left_out(tmp_path):
    states = jax.tree.map(lambda x: jnp.stack([x, x, x]), _state())
    divergence = DivergenceCheck(tmp_path, batches_of_64, 4, ("a", "b", "c"))
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.inf), states.params)
    with pytest.warns(Diverged, match="a parameter of b is NaN or infinite after step 0"):
        divergence.check_finite(replace(states, params=bad), {"elbo": np.zeros(3)})
    assert divergence.diverged == {1}
    assert json.loads((tmp_path / "b" / "diverged.json").read_text())["model"] == "b"
    with pytest.warns(Diverged, match="the test elbo of c is NaN"):
        divergence.check_finite(states, {"elbo": np.array([0, np.nan, np.nan])})
    np.testing.assert_array_equal(divergence.mask_diverged([1, 2, 3]), [1, np.nan, np.nan])


def test_whether_numbers_are_finite_is_asked_in_one_program():
    """Devices that hold parts of the parameters wait for each other in it."""
    state = _state()
    traced = jax.make_jaxpr(lambda tree: _finite(tree, False))((state.params, state.opt_state))
    assert len(traced.eqns) == 1


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    state = _state()
    divergence = DivergenceCheck(tmp_path, batches_of_64, 4)
    divergence.check_finite(state, {"elbo": -3.0})
    bad = replace(state, params=jax.tree.map(lambda x: x * jnp.inf, state.params))
    with pytest.raises(TrainingFailed, match="a parameter is NaN or infinite after step 0"):
        divergence.check_finite(bad, {})
    with pytest.raises(TrainingFailed, match="the test elbo is NaN or infinite"):
        divergence.check_finite(state, {"elbo": np.nan, "kl": 1.0})


def test_finite_counts_the_steps_before_the_first_bad_one(images):
    state = _state(batch_size=8, objective=poisoned)
    images = np.minimum(images, 254)
    batches = np.arange(64).reshape(8, 8)
    images[[30, 50], 0, 0, 0] = 255  # of the batches 3 and 6
    for first, last, finite in ((0, 8, 3), (0, 3, 3), (3, 8, 0), (4, 6, 2), (4, 8, 2)):
        copy = jax.tree.map(jnp.copy, state)
        _, totals = train_steps(copy, images, batches, first, last)
        assert int(totals["finite"]) == finite


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((1, 8, 8, 1), np.uint8),
        lambda: np.full((16, 8, 8, 1), 255, np.uint8),
        lambda: np.full((16, 8, 8, 1), 0.5, np.float32),
        lambda: np.full((16, 8, 8, 1), 1e-38, np.float32),
        lambda: np.full((16, 8, 8, 1), np.finfo(np.float32).tiny / 2, np.float32),
        lambda: np.nextafter(np.ones((16, 8, 8, 1), np.float32), np.float32(0)),
    ],
    ids=["a single one", "saturated", "constant", "small", "subnormal", "just below 1"],
)
@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian",
                                        "discretized_logistic"])  # fmt: skip
def test_extreme_images_train(make, likelihood):
    images = make()
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=8", likelihood=likelihood)
    train_config = jaxvae.TrainConfig(batch_size=len(images))
    state = jaxvae.create_train_state(jax.random.key(0), config, train_config)
    for _ in range(3):
        state, metrics = jaxvae.train_epoch(state, images)
    DivergenceCheck("", batches_of_64, 1).check_finite(state, jax.device_get(metrics))


def test_a_thousand_latents_train(images):
    config = jaxvae.ModelConfig((8, 8, 1), 1000, network="mlp:width=8")
    train_config = jaxvae.TrainConfig(batch_size=16, clip_norm=1.0)
    state = jaxvae.create_train_state(jax.random.key(0), config, train_config)
    first = None
    for _ in range(5):
        state, metrics = jaxvae.train_epoch(state, images)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first
    assert jaxvae.sample(state.params, jax.random.key(1), 3).shape == (3, 8, 8, 1)


def test_a_run_directory_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(TrainingFailed, match="no checkpoint was saved"):
        DivergenceCheck(tmp_path, batches_of_64, 1).check_finite(_state(), {"elbo": np.inf})
    assert read_metrics(tmp_path) == []


def test_a_training_without_a_run_directory_names_none():
    divergence = DivergenceCheck(None, batches_of_64, 4)
    with pytest.raises(
        TrainingFailed, match="after step 0; no checkpoint was saved; train again with"
    ):
        divergence.check_finite(_state(), {"elbo": np.inf})
    with pytest.raises(
        TrainingFailed, match=r"training images [\d, ]+, \.\.\.\); no checkpoint was saved; tr"
    ):
        divergence.check_losses(replace(_state(batch_size=16), step=jnp.int32(1)), 1, 0)


def _state(**train):
    config = jaxvae.ModelConfig((8, 8, 1), 2, network="mlp:width=8")
    return jaxvae.create_train_state(jax.random.key(0), config, jaxvae.TrainConfig(**train))
