"""The profiler's trace is of some steps of the run, and is read back."""

import jax
import pytest
from conftest import SignalAt, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxvae.cli.commands import main
from jaxvae.errors import Preempted
from jaxvae.runs import directory, loop
from jaxvae.runs.config import configured
from jaxvae.runs.data import load_run_data
from jaxvae.runs.profiling import Profiler

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Told:
    """In the place of JAX's profiler: what is asked of it, and how often a dispatch ends."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(jax.profiler, "start_trace", self.start)
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append("stop"))

    def start(self, folder, *, profiler_options):
        assert profiler_options.python_tracer_level == 0
        self.folder = folder
        self.calls.append("start")


def trained(run_dir, npz, monkeypatch, images_per_dispatch, *more):
    """A training of 8 steps; the profiler is told of a dispatch before `more` is."""
    monkeypatch.setattr("jaxvae.training.pipeline._IMAGES_PER_DISPATCH", images_per_dispatch)
    config = configured({"data": str(npz), "network": "mlp:width=8", "batch_size": 64, "epochs": 1})
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=False)
    return loop.train(run_dir, config, data, callbacks=[*more, Profiler()])


class Dispatches(SignalAt):
    """Counts dispatches among the calls, and sends a signal at the n-th."""

    def __init__(self, told, n=0):
        super().__init__(n)
        self.calls = told.calls

    def dispatch(self, images, metrics):
        self.calls.append("dispatched")
        super().dispatch(images, metrics)


def test_the_profile_is_of_the_second_dispatch(tmp_path, npz, monkeypatch):
    told = Told(monkeypatch)
    trained(tmp_path, npz, monkeypatch, 128, Dispatches(told))
    assert told.calls == ["dispatched", "start", "dispatched", "stop", "dispatched", "dispatched"]
    assert told.folder == str(tmp_path / "profile")


def test_of_a_training_without_a_second_dispatch_the_rest_is_profiled(tmp_path, npz, monkeypatch):
    told = Told(monkeypatch)
    trained(tmp_path, npz, monkeypatch, 512, Dispatches(told))
    assert told.calls == ["dispatched", "start", "stop"]


def test_an_interrupted_training_stops_its_trace(tmp_path, npz, monkeypatch):
    told = Told(monkeypatch)
    with pytest.raises(Preempted):
        trained(tmp_path, npz, monkeypatch, 128, Dispatches(told, 1))
    assert told.calls == ["dispatched", "start", "stop"]


def test_without_a_run_directory_it_is_refused(npz):
    config = configured({"data": str(npz), "network": "mlp:width=8"})
    data = load_run_data(config)
    with refused("the profiler trace is written to the run directory: expected a run_dir"):
        loop.train(None, directory.with_shape(config, data), data, callbacks=[Profiler()])


def test_train_writes_a_trace_and_tensorboards_files_where_asked_to(tmp_path, npz, monkeypatch):
    monkeypatch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
    monkeypatch.setattr("jaxvae.runs.drawing.draw", lambda *_: [])
    words = ["train", "--data", str(npz), "--network", "mlp:width=8", "--batch-size", "64"]
    path = tmp_path / "run"
    words += ["--epochs", "2", "--run-dir", str(path)]
    assert main([*words, "--tensorboard", "--profile"]) == 0
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("test/elbo")] == [8, 16]
    assert (path / "tensorboard" / "projector_config.pbtxt").exists()
    traces = [file.name.split(".", 1)[1] for file in (path / "profile").rglob("*.*")]
    assert {"xplane.pb", "trace.json.gz"} <= set(traces)
    (trace,) = (path / "profile").rglob("*.xplane.pb")
    planes = [plane.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes]
    assert "/host:CPU" in planes
