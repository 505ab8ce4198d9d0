"""Training from Python in one call."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SignalAt, refused

import jaxvae
from jaxvae.data import Dataset, load_dataset
from jaxvae.errors import OtherData, Preempted, TrainingFailed
from jaxvae.runs import directory, evaluation, fit, loop, sweep
from jaxvae.runs.config import RunConfig, read_config, resumed, run_keys
from jaxvae.runs.files import IN_PYTHON, read_metrics
from jaxvae.training.optimizer import SCHEDULES

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODEL = jaxvae.ModelConfig(network="mlp:width=8")
TRAIN = jaxvae.TrainConfig(batch_size=64, epochs=2)


@pytest.fixture
def data(npz):
    return load_dataset(str(npz))


def fitted(data, model=MODEL, train=TRAIN, **options):
    return jaxvae.fit(data, model, train, progress=False, **options)


@pytest.fixture(scope="module")
def expected(npz):
    """The same training, by what `fit` is put together from."""
    config = RunConfig(data=str(npz), seed=3, model=MODEL, train=TRAIN)
    data = load_dataset(str(npz))
    config = directory.with_shape(config, data)
    records = []

    class Keeps(jaxvae.Callback):
        def epoch(self, record, params):
            records.append(record)

    return loop.train(None, config, data, callbacks=[Keeps()]), records


def assert_leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def without_seconds(records):
    return [{**record, "seconds": 0} for record in records]


@pytest.mark.parametrize("with_run_dir", [False, True])
@pytest.mark.parametrize("as_name", [False, True], ids=["dataset", "name"])
def test_the_result_is_that_of_the_same_training_bit_for_bit(
    npz, data, expected, tmp_path, as_name, with_run_dir
):
    state, records = expected
    run_dir = tmp_path / "run" if with_run_dir else None
    result = fitted(str(npz) if as_name else data, seed=3, run_dir=run_dir)
    assert_leaves_equal(result.params, state.params)
    assert_leaves_equal(result.state.params, state.params)
    assert_leaves_equal(result.state.opt_state, state.opt_state)
    assert int(result.state.step) == 16
    assert without_seconds(result.history) == without_seconds(records)
    assert result.params.config.image_shape == (8, 8, 1)
    assert isinstance(result, jaxvae.FitResult)
    if with_run_dir:
        assert result.history == read_metrics(run_dir)
        assert_leaves_equal(jaxvae.load(run_dir), result.params)
        config = read_config(run_dir)
        assert config.data == (str(npz) if as_name else IN_PYTHON)
        assert (config.seed, config.train) == (3, TRAIN)
    else:
        assert list(tmp_path.iterdir()) == []


def test_data_are_arrays_of_any_rank_or_pairs_of_them():
    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8), np.uint8)
    train = jaxvae.TrainConfig(batch_size=64, epochs=1)
    held_out = np.arange(150) % 10 == 0
    for one in (images, images[..., None], jnp.asarray(images)):
        result = fitted(one, train=train)
        pair = fitted((images[~held_out], images[held_out, :, :, None]), train=train)
        assert_leaves_equal(result.params, pair.params)
        assert without_seconds(result.history) == without_seconds(pair.history)
        assert int(result.state.step) == 2
    bare = Dataset(images[~held_out, ..., None], None, images[held_out, ..., None], None)
    assert_leaves_equal(fitted(bare, train=train).params, pair.params)
    floats = fitted(images.astype(np.float64) / 255, train=train)
    for x, y in zip(*map(jax.tree.leaves, (floats.params, pair.params)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_a_data_set_with_labels_trains_a_conditional_model(data):
    model = jaxvae.ModelConfig(network="mlp:width=8", num_classes=3)
    result = fitted(data, model)
    _, key = run_keys(RunConfig())
    labels = data.test_labels.astype(np.int32)
    terms = jaxvae.elbo(result.params, key, data.test_images, labels)
    recorded = result.history[-1]["test"]["elbo"]
    assert recorded == pytest.approx(float(terms.value.mean()), rel=1e-5)
    pairs = (data.train_images, data.train_labels.tolist()), (data.test_images, data.test_labels)
    assert_leaves_equal(fitted(pairs, model).params, result.params)
    with refused("has no train labels: expected classes from 0 to 2"):
        fitted((data.train_images, data.test_images), model)


def test_the_defaults_are_those_of_the_configurations(monkeypatch):
    told = []

    def train(run_dir, config, data, callbacks):
        told.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(KeyboardInterrupt):
        jaxvae.fit("mnist-5k")
    assert told == [RunConfig()]


@pytest.mark.parametrize("as_name", [False, True], ids=["dataset", "name"])
def test_the_same_call_resumes_what_was_interrupted(
    npz, data, expected, tmp_path, monkeypatch, as_name
):
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", 128)  # two steps
    data = str(npz) if as_name else data
    for n, step in ((3, 6), (4, 14)):
        with pytest.raises(Preempted, match=f"saved after step {step}"):
            fitted(data, seed=3, run_dir=tmp_path, callbacks=[SignalAt(n)])
    result = fitted(data, seed=3, run_dir=tmp_path)
    assert_leaves_equal(result.params, expected[0].params)
    once = fitted(data, seed=3)  # in as many dispatches
    assert without_seconds(result.history) == without_seconds(once.history)


def test_the_same_call_on_a_finished_run_changes_nothing(data, tmp_path):
    first = fitted(data, run_dir=str(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = fitted(data, run_dir=str(tmp_path / "run"))
    assert_leaves_equal(again.params, first.params)
    assert again.history == first.history
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_call_with_more_epochs_trains_on(data, tmp_path, expected):
    fitted(data, train=jaxvae.TrainConfig(batch_size=64, epochs=1), seed=3, run_dir=tmp_path)
    result = fitted(data, seed=3, run_dir=tmp_path)
    assert_leaves_equal(result.params, expected[0].params)
    assert [record["epoch"] for record in result.history] == [1, 2]


def test_a_call_with_another_learning_rate_trains_on_as_the_command_does(data, finished, tmp_path):
    other = {"learning_rate": 1e-4, "schedule": "cosine", "clip_norm": 50.0, "epochs": 3}
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("fit", "command")]
    by_fit = fitted(data, train=replace(TRAIN, **other), run_dir=runs[0])
    config = directory.start(runs[1], resumed(runs[1], other), data, resume=True)
    assert_leaves_equal(by_fit.params, loop.train(runs[1], config, data).eval_params)
    changes = read_config(runs[0]).changes
    assert [(change.step, change.field, change.after) for change in changes] == [
        (16, "learning_rate", 1e-4), (16, "schedule", "cosine"), (16, "clip_norm", 50.0)
    ]  # fmt: skip
    assert changes == read_config(runs[1]).changes


def test_data_that_have_moved_are_named_anew(npz, tmp_path, monkeypatch):
    """And a name is that of the same file from another working directory."""
    shutil.copy(npz, tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    one = jaxvae.TrainConfig(batch_size=64, epochs=1)
    fitted("a.npz", train=one, run_dir="run")
    assert read_config(tmp_path / "run").data == str(tmp_path / "a.npz")
    (tmp_path / "a.npz").rename("b.npz")
    assert len(fitted("b.npz", run_dir="run").history) == 2
    monkeypatch.chdir("/")
    assert read_config(tmp_path / "run").data == str(tmp_path / "b.npz")
    assert evaluation.measure(tmp_path / "run", 2)["step"] == 16


def test_data_from_python_are_not_taken_for_a_path_of_that_name(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / IN_PYTHON).mkdir()
    one = jaxvae.TrainConfig(batch_size=64, epochs=1)
    for train in (one, TRAIN):
        fitted(data, train=train, run_dir="run")
        assert read_config(tmp_path / "run").data == IN_PYTHON


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 4}, "seed is 4, but"),
        ({"model": jaxvae.ModelConfig(network="mlp:width=9")}, "network is mlp:width=9, but"),
        ({"model": jaxvae.ModelConfig(network="mlp:width=8", latent_dim=3)}, "latent_dim is 3"),
        ({"train": jaxvae.TrainConfig(batch_size=32)}, "batch_size is 32, but"),
        ({"train": jaxvae.TrainConfig(batch_size=64, objective="stl")}, "objective is stl, but"),
    ],
    ids=["seed", "network", "latents", "batch", "objective"],
)
def test_another_run_in_the_directory_is_refused(finished, data, options, says):
    before = contents(finished)
    with refused(says, f"{finished} was started with", "pass that, or another run_dir"):
        fitted(data, run_dir=finished, **options)
    assert contents(finished) == before


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    fitted(load_dataset(str(npz)), run_dir=run_dir)
    return run_dir


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_data_than_the_runs_are_refused(finished, data):
    before = contents(finished)
    other = data._replace(train_images=data.train_images[::-1])
    with refused(f"is not the data set that {finished} was trained on", "other pixels or labels"):
        fitted(other, run_dir=finished)
    with refused("has images of shape (8, 7, 1)"):
        fitted(data.train_images[:, :, :7], run_dir=finished)
    assert contents(finished) == before


def test_a_sweep_in_the_directory_is_refused(data, npz, tmp_path):
    models = sweep.configured({"data": str(npz), "network": "mlp:width=8"}, 2)
    sweep.start(tmp_path, models, data, resume=False)
    with refused(f"{tmp_path} already holds a run"):
        fitted(data, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros(8, np.uint8), "images of shape (8,): expected (images, height, width)"),
        (np.zeros((0, 8, 8), np.uint8), "holds no images"),
        (np.full((40, 8, 8), 2.0), "images between 2 and 2: expected floats between 0 and 1"),
        (np.full((40, 8, 8), np.nan), "holds NaN or infinity"),
        ((np.zeros((40, 8, 8), np.uint8), np.zeros((40, 9, 8), np.uint8)), "expected one shape"),
        (np.zeros((40, 1, 8, 8), np.uint8), "whose channels seem to come first"),
        (np.zeros((40, 8, 8), np.uint8), "batch_size is 64: expected at most the number of"),
        ([[1], [2, 3], [4]], "the data cannot be read as an array"),
        ((np.zeros((40, 8, 8), np.uint8),) * 3, "the data: a tuple of 3 parts: expected "),
        (
            ((np.zeros((40, 8, 8), np.uint8), np.zeros(40)),) * 2,
            "labels of shape (40,) and type float64: expected one whole number for each image",
        ),
        ({"train": 3}, "the data holds images of shape (): expected (images, height, width)"),
        (None, "the data holds images of shape ()"),
        ("nowhere.images", "nowhere.images is not a file, and data is 'nowhere.images'"),
        ("none.npz", "none.npz does not exist: expected mnist-5k"),
        ("/nowhere/none.npz", "/nowhere/none.npz does not exist: expected"),
    ],
    ids=["flat", "empty", "large", "nan", "two shapes", "channels", "few", "ragged", "three",
         "labels",
         "dict", "none", "module", "file", "file elsewhere"],
)  # fmt: skip
@pytest.mark.parametrize("with_run_dir", [False, True])
def test_wrong_data_are_refused_and_leave_no_directory(tmp_path, wrong, says, with_run_dir):
    with refused(says):
        fitted(wrong, run_dir=tmp_path / "run" if with_run_dir else None)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused_and_leave_no_directory(data, tmp_path):
    run_dir = tmp_path / "run"
    with refused("model is ", "expected a ModelConfig"):
        jaxvae.fit(data, TRAIN, MODEL, run_dir=run_dir)
    with refused("train is ", "expected a TrainConfig"):
        jaxvae.fit(data, MODEL, {"epochs": 2}, run_dir=run_dir)
    with refused("seed is -1: expected at least 0"):
        fitted(data, seed=-1, run_dir=run_dir)
    with refused("callback is <built-in function print>: expected an object with the methods"):
        fitted(data, callbacks=[print], run_dir=run_dir)
    stl = jaxvae.TrainConfig(batch_size=64, objective="stl")
    flow = jaxvae.ModelConfig(network="mlp:width=8", posterior="iaf:steps=1")
    warmup = "warmup_cosine_decay_schedule:warmup_steps"
    for place in (run_dir, None):
        with refused("expected the posterior 'gaussian'"):
            fitted(data, flow, stl, run_dir=place)
        with refused("which optax refuses for a run of ", " steps"):
            fitted(data, MODEL, replace(TRAIN, schedule=f"{warmup}=500"), run_dir=place)
    assert list(tmp_path.iterdir()) == []


def test_callbacks_follow_it_and_may_end_it(data, tmp_path):
    class Ends(jaxvae.Callback):
        def start(self, training):
            self.run_dir, self.last = training.run_dir, None

        def epoch(self, record, params):
            return record["epoch"] == 1

        def end(self, params):
            self.last = params

    for run_dir in (None, tmp_path):
        ends = Ends()
        result = fitted(data, callbacks=iter([ends]), run_dir=run_dir)
        assert [record["epoch"] for record in result.history] == [1]
        assert ends.run_dir == run_dir
        assert_leaves_equal(ends.last, result.params)


def test_progress_is_shown_unless_it_is_unwanted(data, capsys):
    jaxvae.fit(data, MODEL, TRAIN)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("ELBO -" in line and line.endswith("images/s") for line in lines)
    fitted(data)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_parameters_are_the_average_where_there_is_one(data, tmp_path):
    train = jaxvae.TrainConfig(batch_size=64, epochs=1, ema=0.9)
    result = fitted(data, train=train, run_dir=tmp_path)
    assert_leaves_equal(result.params, result.state.ema)
    assert_leaves_equal(jaxvae.load(tmp_path), result.state.ema)
    _, key = run_keys(RunConfig())
    recorded = result.history[-1]["test"]["elbo"]
    of_average, of_last = (
        float(jaxvae.elbo(params, key, data.test_images).value.mean())
        for params in (result.params, result.state.params)
    )
    assert recorded == pytest.approx(of_average, rel=1e-5)
    assert recorded != pytest.approx(of_last, rel=1e-3)


def test_binarized_images_are_those_of_the_run(data):
    train = jaxvae.TrainConfig(batch_size=64, epochs=1, binarization="dynamic")
    seen = []

    class Sees(jaxvae.Callback):
        def start(self, training):
            seen.append(training.data)

    fitted(data, train=train, callbacks=[Sees()])
    assert set(np.unique(seen[0].test_images)) == {0, 255}
    np.testing.assert_array_equal(seen[0].train_images, data.train_images)


def test_a_training_that_diverges_says_so_without_a_directory(data):
    train = jaxvae.TrainConfig(batch_size=64, epochs=1, learning_rate=9e5)
    with pytest.raises(
        TrainingFailed, match=r"is NaN or infinite .*; no checkpoint was saved; train again"
    ):
        fitted(data, train=train)


def test_interrupted_without_a_directory_it_names_none(data, monkeypatch):
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", 128)  # two steps
    with pytest.raises(Preempted, match=r"^stopped after step 4$"):
        fitted(data, callbacks=[SignalAt(2)])


def test_functions_that_are_defined_in_a_cell_are_handed_over_again(data, tmp_path):
    """A closure and a lambda, whose paths nothing could import."""

    def objective(params, keys, images):
        terms = jaxvae.elbo(params, keys, images)
        return -terms.value, terms

    train = jaxvae.TrainConfig(64, 1, objective=objective, schedule=lambda step: 1e-3)
    assert "<lambda>" in SCHEDULES.spec(train.schedule)
    fitted(data, train=train, run_dir=tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["train"]
    assert "<locals>.objective" in recorded["objective"]
    assert jaxvae.load(tmp_path).config.latent_dim == 2  # to use it, neither is needed
    longer = jaxvae.TrainConfig(64, 2, objective=objective, schedule=train.schedule)
    assert len(fitted(data, train=longer, run_dir=tmp_path).history) == 2
    with refused("schedule is ", "pass it as an object (schedule=...)"):
        fitted(data, run_dir=tmp_path)


def test_a_run_of_data_from_python_is_measured_on_what_is_named(finished, npz, tmp_path):
    with refused(
        "the data of this run were passed as arrays in Python: name a data set with --data"
    ):
        evaluation.measure(finished, 2)
    assert evaluation.measure(finished, 2, data_name=str(npz))["images"] == 100
    arrays = dict(np.load(npz))
    np.savez(tmp_path / "other.npz", **{**arrays, "x_test": arrays["x_test"][::-1]})
    other = str(tmp_path / "other.npz")
    with pytest.warns(OtherData, match=f"^{other} is not the data set that"):
        evaluation.measure(finished, 2, data_name=other)


def test_it_is_public():
    assert jaxvae.fit is fit.fit


def test_fit_takes_missing_entries_if_the_objective_does():
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    x[::3, 1] = np.nan
    model = jaxvae.ModelConfig(network="mlp:width=8", likelihood="gaussian")
    train = jaxvae.TrainConfig(batch_size=32, epochs=1)
    with refused("the data: train example", "holds NaN or infinity"):
        jaxvae.fit(x, model, train, progress=False)
    found = jaxvae.fit(x, model, replace(train, objective="miwae"), progress=False)
    assert np.isfinite(found.history[0]["test"]["elbo"])


def test_covariates_are_labels_of_two_axes(tmp_path):
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    model = jaxvae.ModelConfig(network="mlp:width=4", likelihood="gaussian", conditions="decoder")
    pair = (x[:30], c[:30]), (x[30:], c[30:])
    results = [
        jaxvae.fit(pair, model, jaxvae.TrainConfig(10, epochs), run_dir=path, progress=False)
        for path, epochs in ((tmp_path, 1), (tmp_path, 2), (None, 2))
    ]
    assert results[1].params.config.num_covariates == 2
    assert results[1].history[-1]["test"] == results[2].history[-1]["test"]
    with refused("has no covariates: expected 2, as num_covariates is 2"):
        jaxvae.fit(
            (x[:30], x[30:]), model, jaxvae.TrainConfig(10, 2), run_dir=tmp_path, progress=False
        )
    with refused("has 2 covariates: expected 3, as num_covariates is 3"):
        jaxvae.fit(pair, replace(model, num_covariates=3), jaxvae.TrainConfig(10), progress=False)
