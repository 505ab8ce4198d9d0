"""Callbacks: when they are called and with what, and early stopping."""

import signal

import jax
import numpy as np
import pytest
from conftest import SignalAt, refused

import jaxvae
from jaxvae.errors import Preempted, TrainingFailed
from jaxvae.runs import directory, loop, sweep
from jaxvae.runs.callbacks import AnimationFrames, EarlyStopping, Training, expect_callbacks
from jaxvae.runs.config import configured, resumed, run_keys
from jaxvae.runs.data import load_run_data
from jaxvae.runs.files import read_metrics, truncate_history

pytestmark = pytest.mark.usefixtures("compile_quickly")

FLAGS = {"network": "mlp:width=8", "batch_size": 128, "epochs": 2}  # of 512 images: four steps


@pytest.fixture(autouse=True)
def two_steps_per_dispatch(monkeypatch):
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", 256)


@pytest.fixture
def flags(npz):
    return {**FLAGS, "data": str(npz)}


def trained(run_dir, flags, *callbacks, resume=False):
    config = resumed(run_dir, flags) if resume else configured(flags)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    return loop.train(run_dir, config, data, callbacks=callbacks)


class Heard(jaxvae.Callback):
    """Writes down what it is told, in a list that several may share."""

    def __init__(self, name="", calls=None, *, ends_after=None, fails_in=None):
        self.name, self.calls = name, [] if calls is None else calls
        self.ends_after, self.fails_in = ends_after, fails_in
        self.params, self.records, self.metrics = [], [], []

    def tell(self, what, *more):
        self.calls.append((self.name + what, *more))
        if what == self.fails_in:
            raise RuntimeError(f"{self.name} fails")

    def start(self, training):
        self.training = training
        self.params.append(jax.device_get(training.params))
        self.tell("start")

    def dispatch(self, images, metrics):
        self.metrics.append(dict(metrics))
        self.tell("dispatch", images)

    def epoch(self, record, params):
        self.records.append(record)
        self.params.append(jax.device_get(params))  # whose memory training takes back
        self.tell("epoch", record["epoch"])
        return record["epoch"] == self.ends_after

    def end(self, params):
        self.last = params
        self.tell("end", params is not None)


EPOCH = [("dispatch", 256), ("dispatch", 256)]


def test_callbacks_are_told_in_order_and_of_what_is_recorded(tmp_path, flags):
    heard = Heard()
    state = trained(tmp_path, flags, heard)
    assert heard.calls == [
        ("start",), *EPOCH, ("epoch", 1), *EPOCH, ("epoch", 2), ("end", True)
    ]  # fmt: skip
    training = heard.training
    assert isinstance(training, Training)
    assert (training.epochs, training.images, training.step, training.done) == (2, 512, 0, 0)
    assert training.history == []
    assert training.run_dir == tmp_path
    assert training.config == resumed(tmp_path, {})
    assert len(training.data.test_images) == 100
    assert heard.records == read_metrics(tmp_path)
    for record, *of_epoch in zip(heard.records, heard.metrics[::2], heard.metrics[1::2],
                                 strict=True):  # fmt: skip
        for name in ("loss", "elbo", "log_likelihood", "kl"):
            mean = np.mean([metrics[name] for metrics in of_epoch])
            assert record["train"][name] == pytest.approx(mean, rel=1e-6)
    first = directory.first_state(run_keys(training.config)[0], training.config)
    assert_leaves_equal(heard.params[0], first.params)
    assert_leaves_equal(heard.params[2], state.params)
    assert_leaves_equal(heard.last, state.params)


def test_an_epoch_is_told_before_its_checkpoint_and_after_its_line(tmp_path, flags):
    class Looks(jaxvae.Callback):
        def epoch(self, record, params):
            saved = [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")]
            assert str(record["step"]) not in saved
            assert read_metrics(tmp_path)[-1] == record

    trained(tmp_path, flags, Looks())


def test_several_are_told_in_their_order_and_ended_in_the_reverse(tmp_path, flags):
    calls = []
    trained(tmp_path, {**flags, "epochs": 1}, Heard("a ", calls), Heard("b ", calls))
    names = [name for name, *_ in calls]
    assert names == [
        "a start", "b start", *["a dispatch", "b dispatch"] * 2, "a epoch", "b epoch", "b end",
        "a end",
    ]  # fmt: skip


def test_any_of_several_ends_a_training_and_the_others_are_told_of_its_last_epoch(tmp_path, flags):
    calls = []
    ends, other = Heard("ends ", calls, ends_after=2), Heard("other ", calls)
    state = trained(tmp_path, {**flags, "epochs": 9}, ends, other)
    assert int(state.step) == 8
    assert int(jaxvae.restore(tmp_path).step) == 8  # this epoch is saved
    assert len(read_metrics(tmp_path)) == 2
    assert calls[-4:] == [("ends epoch", 2), ("other epoch", 2), ("other end", True),
                          ("ends end", True)]  # fmt: skip
    assert_leaves_equal(ends.last, state.params)


def test_a_resumed_training_tells_what_is_over(tmp_path, flags):
    trained(tmp_path, flags)
    heard = Heard()
    state = trained(tmp_path, {"epochs": 3}, heard, resume=True)
    assert heard.calls == [("start",), *EPOCH, ("epoch", 3), ("end", True)]
    training = heard.training
    assert (training.epochs, training.step, training.done) == (3, 8, 2)
    assert training.history == read_metrics(tmp_path)[:2]
    assert_leaves_equal(heard.params[1], state.params)
    finished = Heard()
    trained(tmp_path, {}, finished, resume=True)
    assert finished.calls == [("start",), ("end", True)]
    assert_leaves_equal(finished.last, state.params)


def test_lines_that_are_lost_are_epochs_that_are_over(tmp_path, flags):
    trained(tmp_path, flags)
    (tmp_path / "metrics.jsonl").unlink()
    heard = Heard()
    with pytest.warns(jaxvae.errors.Damaged):
        trained(tmp_path, {"epochs": 3}, heard, AnimationFrames(), resume=True)
    assert (heard.training.step, heard.training.done, heard.training.history) == (8, 2, [])
    assert [path.name for path in (tmp_path / "manifolds").iterdir()] == ["0003.png"]


@pytest.mark.parametrize("where", ["start", "dispatch", "epoch", "end"])
def test_an_error_ends_the_callbacks_that_have_started_without_parameters(tmp_path, flags, where):
    calls = []
    before, fails, after = (Heard(name, calls) for name in ("a ", "b ", "c "))
    fails.fails_in = where
    with pytest.raises(RuntimeError, match="b  fails"):
        trained(tmp_path, {**flags, "epochs": 1}, before, fails, after)
    ends = [call for call in calls if call[0].endswith("end")]
    whole = where == "end"  # the training was
    started = ["c ", "b ", "a "] if where != "start" else ["a "]
    assert ends == [(f"{name}end", whole) for name in started]
    assert trained(tmp_path, {}, resume=True).step == 4


def test_a_signal_ends_callbacks_without_parameters_and_saves(tmp_path, flags):
    heard = Heard()
    with pytest.raises(Preempted, match="saved after step 6"):
        trained(tmp_path, flags, heard, SignalAt(3))
    assert heard.calls == [("start",), *EPOCH, ("epoch", 1), EPOCH[0], ("end", False)]
    again = Heard()
    trained(tmp_path, {}, again, resume=True)
    assert again.calls == [("start",), EPOCH[0], ("epoch", 2), ("end", True)]
    assert (again.training.step, again.training.done) == (6, 1)


def test_a_second_ctrl_c_ends_them_as_well(tmp_path, flags):
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, flags, heard, SignalAt(1, signal.SIGINT, times=2))
    assert heard.calls == [("start",), EPOCH[0], ("end", False)]


def test_a_diverged_training_ends_them_without_parameters(tmp_path, flags):
    heard = Heard()
    with pytest.raises(TrainingFailed, match="is NaN or infinite"):
        trained(tmp_path, {**flags, "learning_rate": 9e5}, heard)
    assert heard.calls[-1] == ("end", False)


def test_a_disk_that_is_full_at_the_start_ends_in_one_line(tmp_path, flags):
    class Writes(jaxvae.Callback):
        def start(self, training):
            raise OSError(28, "No space left on device")

    with pytest.raises(
        TrainingFailed, match="cannot be written: No space left on device; correct that"
    ):
        trained(tmp_path, flags, Writes())


def test_without_a_run_directory_there_are_no_frames(flags):
    config = configured(flags)
    data = load_run_data(config)
    with refused("animation frames are written to the run directory: expected a run_dir"):
        loop.train(None, directory.with_shape(config, data), data, callbacks=[AnimationFrames()])


def test_frames_are_of_the_untrained_model_and_of_every_epoch(tmp_path, flags):
    """The first one also where the first epoch was interrupted."""
    with pytest.raises(Preempted):
        trained(tmp_path, flags, AnimationFrames(), SignalAt(1))
    untrained = (tmp_path / "manifolds" / "0000.png").read_bytes()
    trained(tmp_path, {}, AnimationFrames(), resume=True)
    names = sorted(path.name for path in (tmp_path / "manifolds").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png"]
    assert (tmp_path / "manifolds" / "0000.png").read_bytes() == untrained


def test_of_many_models_they_are_told_the_means(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(sweep, "_IMAGES_PER_DISPATCH", 512)  # two steps of both models
    models = sweep.configured({**flags, "epochs": 9}, 2)
    data = load_run_data(next(iter(models.values())))
    models = sweep.start(tmp_path, models, data, resume=False)
    heard = Heard(ends_after=1)
    states = sweep.train(tmp_path, models, data, callbacks=[heard])
    assert heard.calls == [
        ("start",), ("dispatch", 512), ("dispatch", 512), ("epoch", 1), ("end", True)
    ]  # fmt: skip
    assert heard.training.images == 1024
    assert heard.training.config == models["seed-0"]
    assert heard.records == read_metrics(tmp_path)
    means = [metrics["elbo"] for metrics in heard.metrics]
    assert heard.records[0]["train"]["elbo"] == pytest.approx(np.mean(means), rel=1e-6)
    assert_leaves_equal(heard.last, states.params)
    assert int(states.step[0]) == 4


# Early stopping.


def stops(patience, elbos, history=()):
    """After how many of these epochs it ends a training, the earlier ones being over."""
    stopping = EarlyStopping(patience)
    lines = [{"epoch": i, "test": {"elbo": elbo}} for i, elbo in enumerate([*history, *elbos], 1)]
    before, rest = lines[: len(history)], lines[len(history) :]
    training = Training(None, None, 99, 1, len(before), len(before), before, None, None)
    if stopping.start(training):
        return 0
    return next((i for i, line in enumerate(rest, 1) if stopping.epoch(line, None)), None)


@pytest.mark.parametrize(
    ("patience", "elbos", "after"),
    [
        (1, [-3, -2, -1], None),
        (1, [-3, -2, -2.5, -1], 3),
        (2, [-3, -2, -2.5, -1, -1, -1.5, 0], 6),  # no better than before is not better
        (2, [-3, -4, -5, -6], 3),
        (3, [-1, -2, -3], None),
    ],
)
def test_a_training_ends_once_the_best_epoch_is_so_many_epochs_ago(patience, elbos, after):
    assert stops(patience, elbos) == after
    for done in range(len(elbos)):  # and so it does where it is resumed
        if after is None or done < after:
            left = stops(patience, elbos[done:], elbos[:done])
            assert left == (after and after - done)


def test_a_training_that_was_ended_is_over():
    assert stops(2, [0], [-3, -4, -5]) == 0
    assert stops(3, [-6], [-3, -4, -5]) == 1
    assert stops(1, [-1]) is None


def test_epochs_without_a_line_count():
    stopping = EarlyStopping(2)
    history = [{"epoch": 1, "test": {"elbo": -3.0}}]
    assert stopping.start(Training(None, None, 9, 1, 12, 3, history, None, None))
    assert not stopping.start(Training(None, None, 9, 1, 12, 3, [], None, None))


@pytest.fixture
def worse(monkeypatch):
    """Test ELBOs that are best after the second epoch."""
    elbos = {4: -30.0, 8: -20.0, 12: -21.0, 16: -22.0, 20: -23.0}
    real = loop.evaluator

    def measuring(*args):
        measure = real(*args)
        steps = iter(sorted(elbos))
        return lambda params: {**measure(params), "elbo": elbos[next(steps)]}

    monkeypatch.setattr(loop, "evaluator", measuring)


def test_patience_ends_a_run_which_stays_ended(tmp_path, flags, worse):
    """Until it is given more patience."""
    state = trained(tmp_path, {**flags, "epochs": 9, "patience": 2})
    assert int(state.step) == 16
    assert int(jaxvae.restore(tmp_path).step) == 16
    assert int(jaxvae.restore(tmp_path, "best").step) == 8
    before = (tmp_path / "metrics.jsonl").read_text()
    heard = Heard()
    again = trained(tmp_path, {}, heard, resume=True)
    assert heard.calls == [("start",), ("end", True)]
    assert_leaves_equal(again.params, state.params)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert int(trained(tmp_path, {"patience": 3}, Heard(ends_after=5), resume=True).step) == 20


def test_a_killed_run_ends_where_it_would_have_ended(tmp_path, flags, worse):
    """Killed after the line and the checkpoint of the third epoch, and resumed."""
    heard = Heard(ends_after=3)
    trained(tmp_path, {**flags, "epochs": 9, "patience": 2}, heard)
    truncate_history(tmp_path, 3)
    # The measurements of the resumed process start again: of epoch 4 the first one, -30.
    assert int(trained(tmp_path, {}, resume=True).step) == 16


def test_what_is_no_callback_is_refused():
    for one in (print, None, EarlyStopping, "tensorboard", lambda record, params: None):
        with refused("callback is ", "expected an object with the methods start, dispatch, epoch"):
            expect_callbacks([jaxvae.Callback(), one])
    ours = [jaxvae.Callback(), EarlyStopping(3)]
    assert expect_callbacks(iter(ours)) == ours


def assert_leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
