"""MLflow and Weights & Biases hold what the run did, and are read back."""

import importlib.util
import json
import os
import shutil
import struct
import time
from functools import partial

import jax
import pytest
from conftest import SignalAt, refused
from PIL import Image

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.errors import NotTracked, Preempted
from jaxvae.runs import directory, loop, sweep
from jaxvae.runs.config import configured, resumed
from jaxvae.runs.data import load_run_data
from jaxvae.runs.drawing import Figures
from jaxvae.runs.files import read_metrics
from jaxvae.runs.tracking import MLflow, WandB

pytestmark = [
    pytest.mark.usefixtures("compile_quickly", "a_figure"),
    # SQLAlchemy 2.1 deprecates what MLflow 3.17 calls.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

NETWORK = "mlp:width=8"


@pytest.fixture(scope="module")
def a_figure():
    """One figure in place of a dozen."""

    def draw(run_dir, *_):
        path = run_dir / "figures" / "samples.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(path)
        return [path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.runs.drawing.draw", draw)
        yield


@pytest.fixture(scope="module")
def flags(npz):
    return {"data": str(npz), "network": NETWORK, "batch_size": 64, "epochs": 2}


def tracked(run_dir, flags, *callbacks, resume=False):
    config = resumed(run_dir, flags) if resume else configured(flags)
    data = load_run_data(config)
    config = directory.start(run_dir, config, data, resume=resume)
    return loop.train(run_dir, config, data, callbacks=[*callbacks, Figures()])


def tracked_sweep(run_dir, flags, *callbacks):
    models = sweep.configured(flags | {"epochs": 1}, seeds=2)
    data = load_run_data(models["seed-0"])
    models = sweep.start(run_dir, models, data, resume=False)
    sweep.train(run_dir, models, data, callbacks=[*callbacks, Figures()])


def flat(line):
    """The names and values under which an epoch is tracked."""
    metrics = {name: line[name] for name in ("epoch", "seconds") if name in line}
    for split in ("train", "test", "train_sd", "test_sd"):
        metrics |= {f"{split}/{name}": x for name, x in line.get(split, {}).items()}
    return metrics


def histories(lines):
    """The points (step, value) of every metric."""
    return {name: [(x["step"], flat(x)[name]) for x in lines] for name in flat(lines[0])}


def assert_same_model(a, b):
    a, b = jax.device_get((jaxvae.load(a), jaxvae.load(b)))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b))


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # of the artifacts
        yield f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    import mlflow

    return mlflow.MlflowClient(uri)


@pytest.fixture(scope="module")
def run_dir(uri, tmp_path_factory, flags):
    path = tmp_path_factory.mktemp("runs") / "mine"
    tracked(path, flags, MLflow(uri))
    return path


def found(client, run_dir):
    return client.get_run(json.loads((run_dir / "mlflow.json").read_text())["run"])


def assert_mlflow_history(client, run_dir):
    run = found(client, run_dir)
    expected = histories(read_metrics(run_dir))
    assert set(run.data.metrics) == set(expected)
    for name, points in expected.items():
        sent = client.get_metric_history(run.info.run_id, name)
        assert sorted((one.step, one.value) for one in sent) == points


def test_mlflows_metrics_are_the_lines_of_metrics_jsonl(client, run_dir):
    assert_mlflow_history(client, run_dir)
    run = found(client, run_dir)
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "jaxvae"


def test_mlflows_parameters_are_the_configuration(client, run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    expected = {**config.pop("model"), **config.pop("train"), **config}
    del expected["jaxvae"], expected["data_seen"]
    expected["image_shape"] = tuple(expected["image_shape"])
    expected["trainable"] = tuple(expected["trainable"])
    params = found(client, run_dir).data.params
    assert params.keys() == expected.keys()
    assert params["network"] == NETWORK
    assert params["batch_size"] == "64"


def test_mlflows_artifacts_are_a_run_directory(client, run_dir, tmp_path):
    run = found(client, run_dir).info.run_id
    client.download_artifacts(run, "", str(tmp_path))
    assert_same_model(tmp_path, run_dir)
    assert (tmp_path / "figures" / "samples.png").is_file()
    assert read_metrics(tmp_path) == read_metrics(run_dir)


def test_a_run_of_mlflow_continues_with_the_resumed_one(uri, client, run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    tracked(copy, {"epochs": 3}, MLflow(uri), resume=True)
    assert found(client, copy).info.run_id == found(client, run_dir).info.run_id
    assert_mlflow_history(client, copy)


def test_epochs_before_the_tracking_are_sent(uri, client, tmp_path, flags):
    tracked(tmp_path / "run", flags | {"epochs": 1})
    with pytest.raises(Preempted):
        tracked(tmp_path / "run", {"epochs": 3}, MLflow(uri), SignalAt(1), resume=True)
    assert found(client, tmp_path / "run").info.status == "KILLED"
    tracked(tmp_path / "run", {"epochs": 3}, MLflow(uri), resume=True)
    assert_mlflow_history(client, tmp_path / "run")
    assert found(client, tmp_path / "run").info.status == "FINISHED"


def test_a_sweep_in_mlflow_is_a_parent_with_its_models(uri, client, tmp_path, flags):
    run_dir = tmp_path / "seeds"
    tracked_sweep(run_dir, flags, MLflow(uri))
    parent = found(client, run_dir)
    assert parent.info.run_name == "seeds"
    assert_mlflow_history(client, run_dir)
    for seed in range(2):
        folder = run_dir / f"seed-{seed}"
        assert_mlflow_history(client, folder)
        run = found(client, folder)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["seed"] == str(seed)
        assert run.info.run_name == f"seed-{seed}"
        client.download_artifacts(run.info.run_id, "", str(tmp_path))
        assert_same_model(tmp_path, folder)
        shutil.rmtree(tmp_path / "checkpoints")


def test_what_a_server_does_not_take_is_sent_later(uri, client, tmp_path, flags, monkeypatch):
    tracker, sent = MLflow(uri), MLflow._log
    failures = [OSError("the server\nis down")]

    def log(*how):
        if failures:
            raise failures.pop()
        sent(*how)

    monkeypatch.setattr(MLflow, "_log", log)
    says = "MLflow did not take the metrics of run: the server is down; they are sent again"
    with pytest.warns(NotTracked, match=says):
        tracked(tmp_path / "run", flags, tracker)
    assert_mlflow_history(client, tmp_path / "run")


def test_without_a_run_directory_there_are_metrics_only(uri, client, npz):
    model, train = jaxvae.ModelConfig(network=NETWORK), jaxvae.TrainConfig(64, 1)
    tracker = MLflow(uri, "other")
    result = jaxvae.fit(str(npz), model, train, callbacks=[tracker], progress=False)
    (run,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert run.data.metrics == flat(result.history[0])
    assert client.list_artifacts(run.info.run_id) == []


@pytest.mark.parametrize("content", ["[", "{}", '{"run": 3}', '{"run": "../x"}'])
def test_a_damaged_identifier_is_refused(uri, run_dir, tmp_path, content):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "mlflow.json").write_text(content)
    with refused(f"{copy / 'mlflow.json'} is damaged"):
        tracked(copy, {"epochs": 3}, MLflow(uri), resume=True)


def test_a_store_that_cannot_be_used_is_told_in_a_line(uri, run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "mlflow.json").write_text('{"run": "gone"}')
    with refused("MLflow cannot be used: ", "gone", "expected a tracking URI"):
        tracked(copy, {"epochs": 3}, MLflow(uri), resume=True)
    with refused("MLflow cannot be used: ", "expected a tracking URI"):
        tracked(copy, {"epochs": 3}, MLflow("nonsense://x"), resume=True)


def records(path):
    """The records of an offline file of wandb, which has the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 32768 - place % 32768  # in this block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(content):  # not written to the end yet
            return
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def offline(folder):
    """Runs, history and artifacts in the files of a folder, the oldest first."""
    runs, history, artifacts = [], [], []
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    for path in paths:
        for _ in range(100):  # wandb's other process writes the end after `finish` has returned
            found = list(records(path))
            if found and found[-1].HasField("exit"):
                break
            time.sleep(0.1)
        runs += [x.run for x in found if x.HasField("run")]
        artifacts += [x.artifact for x in found if x.HasField("artifact")]
        rows = [x.history.item for x in found if x.HasField("history")]
        history.append(
            [{".".join(x.nested_key): json.loads(x.value_json) for x in row} for row in rows]
        )
    return runs, history, artifacts


@pytest.fixture(scope="module")
def offline_settings(tmp_path_factory):
    pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp(name)))
        yield


def assert_wandb_history(found, run_dir):
    lines = read_metrics(run_dir)
    assert [row["_step"] for row in found] == [line["step"] for line in lines]
    for row, line in zip(found, lines, strict=True):
        assert {name: row[name] for name in flat(line)} == flat(line)


def test_the_offline_file_of_wandb_holds_the_run_and_its_continuation(
    offline_settings, tmp_path, flags
):
    run_dir = tmp_path / "mine"
    tracked(run_dir, flags, WandB())
    (run,), (history,), (artifact,) = offline(run_dir)
    assert (run.project, run.display_name, run.run_group) == ("jaxvae", "mine", "")
    config = {x.key: json.loads(x.value_json) for x in run.config.update}
    assert config["network"] == NETWORK
    assert config["batch_size"] == 64
    assert_wandb_history(history, run_dir)
    assert history[-1]["figures/samples.width"] == 4
    sizes = {x.path: x.size for x in artifact.manifest.contents}
    kept = [*run_dir.glob("checkpoints/16/**/*"), run_dir / "config.json",
            run_dir / "metrics.jsonl", run_dir / "figures" / "samples.png"]  # fmt: skip
    assert sizes == {str(x.relative_to(run_dir)): x.stat().st_size for x in kept if x.is_file()}
    time.sleep(1)  # wandb names its folders by the second
    tracked(run_dir, {"epochs": 3}, WandB(), resume=True)
    (_, again), (_, history), _ = offline(run_dir)
    assert again.run_id == run.run_id
    assert_wandb_history(history, run_dir)  # all of it, as a server may not have the first file


def test_a_sweep_in_wandb_is_a_group(offline_settings, tmp_path, flags):
    run_dir = tmp_path / "seeds"
    tracked_sweep(run_dir, flags, WandB("photos"))
    runs, found, _ = offline(run_dir)
    assert {run.display_name for run in runs} == {"seeds/seed-0", "seeds/seed-1"}
    for run, history in zip(runs, found, strict=True):
        assert (run.project, run.run_group) == ("photos", "seeds")
        assert_wandb_history(history, run_dir / run.display_name.partition("/")[2])


def test_without_a_login_to_wandb_it_is_told_in_a_line(
    offline_settings, npz, monkeypatch, tmp_path
):
    import wandb

    wandb.teardown()  # it has read the environment
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    model, train = jaxvae.ModelConfig(network=NETWORK), jaxvae.TrainConfig(64, 1)
    with refused("Weights & Biases cannot be used: ", "login", "WANDB_MODE=offline"):
        jaxvae.fit(str(npz), model, train, callbacks=[WandB()], progress=False)
    wandb.teardown()


def test_the_command_line_passes_address_and_project(tmp_path, npz, monkeypatch):
    made = []

    class Fake(jaxvae.Callback):
        def __init__(self, kind, *given):
            made.append((kind, *given))

        def end(self, params):
            made.append((tmp_path / "run" / "figures" / "samples.png").is_file())

    monkeypatch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
    monkeypatch.setattr("jaxvae.runs.tracking.MLflow", partial(Fake, "mlflow"))
    monkeypatch.setattr("jaxvae.runs.tracking.WandB", partial(Fake, "wandb"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")  # what the command sets is removed again
    words = ["train", "--data", str(npz), "--network", NETWORK, "--epochs", "1", "--run-dir"]
    assert main([*words, str(tmp_path / "run"), "--mlflow", "sqlite:///x.db", "--wandb"]) == 0
    assert made == [("mlflow", "sqlite:///x.db"), ("wandb", None), True, True]
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


@pytest.mark.parametrize(("tracker", "package"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_a_missing_package_is_named_with_its_extra(tracker, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(f"needs {package}, which is not installed", f'pip install "jaxvae[{package}]"'):
        tracker()
