"""A shared folder is the model of its run, and is refused in a line where it is not."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import OwnDecoder, OwnEncoder, at_once, moved, refused

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.runs import directory
from jaxvae.runs.config import RunConfig, configured, read_config
from jaxvae.runs.files import append_metrics, write_json
from jaxvae.runs.hub import export_run, from_pretrained

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")

SMALL = {"image_shape": (8, 8, 1), "latent_dim": 2, "network": "mlp:width=8"}
STEP = 7


@pytest.fixture(scope="module")
def keep_no_programs():
    """Leaves this process's settings and the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        yield


def run_of(folder, data="mnist-5k", train=None, **model):
    """A run directory after 7 steps, without the training."""
    config = jaxvae.ModelConfig(**SMALL | model)
    train = train or jaxvae.TrainConfig()
    state = jaxvae.create_train_state(jax.random.key(0), config, train)
    ema = None if state.ema is None else moved(state.ema, 0.05, seed=2)
    state = replace(state, params=moved(state.params, 0.05), ema=ema, step=state.step + STEP)
    directory.write_config(
        folder, replace(configured({"data": str(data)}), model=config, train=train)
    )
    jaxvae.save(folder, state)
    return folder


@pytest.fixture(scope="module")
def of_images(tmp_path_factory, npz):
    return run_of(tmp_path_factory.mktemp("runs") / "mine", npz)


@pytest.fixture
def run(of_images, tmp_path):
    return shutil.copytree(of_images, tmp_path / "mine")


@pytest.fixture
def shared(run, tmp_path):
    export_run(run, tmp_path / "shared", ["hub"])
    return tmp_path / "shared"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), *jax.device_get((a, b)))
    )


def card_of(folder):
    """Front matter and text of the model card."""
    empty, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert not empty
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    "model",
    [
        {"num_classes": 3, "prior": "mixture:components=2", "posterior": "iaf:steps=1"},
        {"image_shape": (4, 4, 1), "network": "ladder:groups=2x2z1,width=4"},
        {"posterior": "fsq:levels=3x3", "prior": "uniform_codes", "latent_dim": 4},
        {"train": jaxvae.TrainConfig(ema=0.9)},
        {"image_shape": (5,), "likelihood": "gaussian"},
    ],
    ids=["conditional flow", "ladder", "fsq", "ema", "vectors"],
)
def test_a_shared_model_is_that_of_the_run_bit_for_bit(tmp_path, model):
    run = run_of(tmp_path / "run", **model)
    export_run(run, tmp_path / "shared", ["hub"])
    back = from_pretrained(tmp_path / "shared")
    assert_same(back, jaxvae.load(run))
    assert_same(jaxvae.load(tmp_path / "shared"), back)
    if "train" in model:
        assert_same(back, jaxvae.restore(run).ema)


def test_modules_of_ones_own_are_passed_again(tmp_path):
    network = OwnEncoder(2), OwnDecoder((8, 8, 1))
    run = run_of(tmp_path / "run", network=network)
    export_run(run, tmp_path / "shared", ["hub"], network=network)
    assert "pass `network` to `from_pretrained`" in card_of(tmp_path / "shared")[1]
    assert_same(from_pretrained(tmp_path / "shared", network), jaxvae.load(run, network=network))
    with refused("pass network=(encoder, decoder)"):
        from_pretrained(tmp_path / "shared")


def test_the_configuration_has_no_path_of_the_machine(tmp_path, npz):
    run = tmp_path / "run"
    run_of(run, npz)
    recorded = json.loads((run / "config.json").read_text())
    train = recorded["train"] | {"objective": "secret.Objective"}
    private = {"data_dir": "/home/me", "manual_dir": "/home/me", "start_from": "/home/me/run"}
    write_json(run / "config.json", recorded | private | {"train": train})
    export_run(run, tmp_path / "shared", ["hub"])
    for file in (tmp_path / "shared").iterdir():
        assert b"/home/me" not in file.read_bytes()
        assert str(npz.parent).encode() not in file.read_bytes()
    shared = json.loads((tmp_path / "shared" / "config.json").read_text())
    hidden = {"data": "./small.npz", "data_dir": None, "manual_dir": None, "start_from": None}
    assert shared == recorded | hidden | {"train": train}
    assert "the objective `secret.Objective`" in card_of(tmp_path / "shared")[1]


def test_the_card_has_the_numbers_of_these_parameters_only(run, tmp_path, npz):
    epochs = [
        {"epoch": i + 1, "step": step, "train": test, "test": test}
        for i, (step, test) in enumerate(
            [
                (STEP, {"elbo": -1.5, "log_likelihood": -1.0, "kl": 0.5}),
                (STEP + 1, {"elbo": -3.0, "log_likelihood": -2.0, "kl": 1.0}),
            ]
        )
    ]
    folder = tmp_path / "shared"

    def shown():
        export_run(run, folder, ["hub"])
        front, text = card_of(folder)
        results = [x["results"][0] for x in front.get("model-index", ())]
        return {one["type"]: one["value"] for x in results for one in x["metrics"]}, text

    assert shown()[0] == {}
    for line in epochs:
        append_metrics(run, line)
    assert shown()[0] == {"elbo": -1.5, "log_likelihood": -1.0, "kl": 0.5}
    evaluation = {"num_samples": 9, "elbo": -1.25, "log_p_x": -1.1234, "kl_per_group": [1.0]}
    write_json(run / "evaluation.json", evaluation | {"step": STEP, "data": str(npz)})
    numbers, text = shown()
    assert numbers == {"elbo": -1.25, "log_p_x": -1.123}
    assert "| ELBO | -1.250 |\n| log p(x), 9 samples | -1.123 |" in text
    for other in ({"step": STEP + 1}, {"step": STEP, "data": "other.npz"}):
        write_json(run / "evaluation.json", evaluation | other)
        assert shown()[0]["elbo"] == -1.5
    for damaged in ("[", '{"elbo": 1}', "3"):
        (run / "evaluation.json").write_text(damaged)
        with refused("evaluation.json is damaged"):
            shown()


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    name = 'a "b": #`c`\n---é'
    run = run_of(tmp_path / name)
    test = {"elbo": -1.5, "log_likelihood": -1.0, "kl": 0.5}
    append_metrics(run, {"epoch": 1, "step": STEP, "train": test, "test": test})
    export_run(run, tmp_path / "shared", ["hub"])
    card = hub.ModelCard.load(tmp_path / "shared" / "README.md").data
    assert card.library_name == "jaxvae"
    assert card.license is None
    assert card.pipeline_tag == "unconditional-image-generation"
    assert card.model_name == 'a "b": #?c??---é'
    found = {(x.metric_type, x.metric_value, x.dataset_name) for x in card.eval_results}
    assert found == {(metric, value, "mnist-5k") for metric, value in test.items()}


def test_the_card_shows_two_figures_and_no_link(run, tmp_path):
    folder = run / "figures"
    folder.mkdir()
    for name in ("training", "samples", "manifold_20", "reconstructions"):
        (folder / f"{name}.png").write_text(name)
    paths = export_run(run, tmp_path / "shared", ["hub"])
    assert {path.name for path in paths} == {
        "model.safetensors", "config.json", "README.md", "manifold_20.png", "samples.png"
    }  # fmt: skip
    assert (tmp_path / "shared" / "samples.png").read_text() == "samples"
    assert card_of(tmp_path / "shared")[1].count("](samples.png)") == 1
    (folder / "samples.png").unlink()
    (folder / "samples.png").symlink_to(run / "config.json")
    with refused("figures/samples.png is a symbolic link"):
        export_run(run, tmp_path / "shared", ["hub"])


def test_files_of_others_are_not_overwritten(run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with refused("README.md exists already", "choose another folder with --out"):
        export_run(run, tmp_path, ["hub"])
    export_run(run, tmp_path, ["safetensors"])
    with refused("model.safetensors exists already"):
        export_run(run, tmp_path, ["hub"])
    assert (tmp_path / "README.md").read_text() == "mine"
    export_run(run, run, ["safetensors"])
    with refused("model.safetensors exists already"):
        export_run(run, run, ["hub"])
    assert jaxvae.restore(run).step == STEP  # it is still a run
    with refused("the format is 'h5': expected stablehlo, onnx, safetensors, hub"):
        export_run(run, tmp_path, ["h5"])


def break_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def break_step(folder):
    from safetensors.numpy import load_file, safe_open, save_file

    path = folder / "model.safetensors"
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    config = json.loads(about["jaxvae.ModelConfig"]) | {"step": "seven"}
    save_file(load_file(path), path, {"jaxvae.ModelConfig": json.dumps(config)})


def change(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", content | {"model": content["model"] | fields})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (break_weights, "model.safetensors is damaged"),
        (break_step, "model.safetensors is damaged: step is 'seven'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "with a config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (partial(change, latent_dim=3), "latent_dim 3, but model.safetensors has 2: expected the"),
        (partial(change, prior="antigravity.fly"), "prior is 'antigravity.fly', which is not reg"),
        (lambda folder: os.mkfifo(folder / "pipe") or (folder / "pipe").replace(
            folder / "config.json"), "config.json is damaged: "),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(shared, how, says):
    how(shared)
    with at_once(), refused(str(shared), says):
        from_pretrained(shared)
    assert "antigravity" not in sys.modules


def test_a_component_in_the_weights_is_not_imported(shared):
    from safetensors.numpy import load_file, save_file

    path = shared / "model.safetensors"
    config = {**SMALL, "prior": "antigravity.fly"}
    save_file(load_file(path), path, {"jaxvae.ModelConfig": json.dumps(config)})
    with refused("prior is 'antigravity.fly', which is not registered: pass it as an object"):
        from_pretrained(shared)
    assert "antigravity" not in sys.modules


def test_a_shared_folder_has_one_epoch_and_is_not_resumed(shared, npz):
    with refused("holds the parameters of one epoch only: leave out --best"):
        jaxvae.load(shared, "best")
    with refused("no state of a training", f"--start-from {shared}"):
        jaxvae.fit(str(npz), jaxvae.ModelConfig(**SMALL), run_dir=shared, progress=False)
    assert not (shared / "checkpoints").exists()


@pytest.mark.parametrize(
    "command",
    ["evaluate", "encode --out z.npz", "score --out z.npz", "impute --out z.npz", "figures",
     "reconstruct --out z.npz", "explore", "compress --out z", "fit-prior --prior mixture"],
)  # fmt: skip
def test_commands_ask_for_data_that_are_not_there(shared, command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    name, *words = command.split()
    assert main([name, str(shared), *words]) == 2
    error = capsys.readouterr().err
    assert "small.npz does not exist" in error
    assert error.endswith("pass their path with --data\n")
    assert error.count("\n") == 1


def test_commands_take_a_shared_folder(run, shared, npz, tmp_path, capsys):
    for folder in (run, shared):
        out = tmp_path / f"of-{folder.name}"
        out.mkdir()
        sample = ["sample", str(folder), "--n", "4", "--out", str(out / "samples.png")]
        assert main(sample) == 0
        encode = ["encode", str(folder), "--data", str(npz), "--out", str(out / "z.npz")]
        assert main(encode) == 0
        assert main(["export", str(folder), "--to", "hub", "--out", str(out / "hub")]) == 0
        assert main(["summary", str(folder)]) == 0
        assert "1,300 parameters" in capsys.readouterr().out
    ours, theirs = (tmp_path / f"of-{folder.name}" for folder in (run, shared))
    for name in ("samples.png", "hub/model.safetensors", "hub/config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    with np.load(ours / "z.npz") as a, np.load(theirs / "z.npz") as b:
        np.testing.assert_array_equal(a["mean"], b["mean"])


def test_a_run_starts_from_a_shared_folder(shared, npz):
    flags = {"data": str(npz), "start_from": str(shared)}
    config = configured(flags, directory.with_model_to_start_from(RunConfig(), flags))
    assert config.model == read_config(shared).model
    first = directory.first_state(jax.random.key(1), config)
    assert_same(first.params, from_pretrained(shared))


class Hub(BaseHTTPRequestHandler):
    """A model hub with one model, ann/vae, at one commit, which is its main and its v1."""

    folder = None
    sha = "0123456789" * 4
    asked = None

    def log_message(self, *about):
        pass

    def reply(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def reply_json(self, content):
        self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        files = {one.name: one.read_bytes() for one in self.folder.iterdir()}
        api, page = "/api/models/ann/vae", f"/ann/vae/resolve/{self.sha}/"
        if path in {f"{api}/revision/{name}" for name in ("main", "v1", self.sha)}:
            siblings = [{"rfilename": name} for name in files]
            self.reply_json({"id": "ann/vae", "sha": self.sha, "siblings": siblings})
        elif path == f"{api}/tree/{self.sha}":
            self.reply_json([
                {"type": "file", "path": name, "size": len(x), "oid": self.etag(x)}
                for name, x in files.items()
            ])  # fmt: skip
        elif path.startswith(page) and (name := path.removeprefix(page)) in files:
            about = {"ETag": f'"{self.etag(files[name])}"', "X_Repo_Commit": self.sha}
            self.reply(200, files[name], **about)
        elif path.startswith(f"{api}/"):
            self.reply(404, X_Error_Code="RevisionNotFound")
        else:
            self.reply(404, X_Error_Code="RepoNotFound")

    def etag(self, content):
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(shared, tmp_path, monkeypatch):
    """The address of a hub that has the shared folder as ann/vae."""
    constants = pytest.importorskip("huggingface_hub.constants")
    handler = type("OneHub", (Hub,), {"folder": shared, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        server.asked = handler.asked
        yield server
        server.shutdown()
        thread.join()


def test_a_model_is_downloaded_from_a_hub_once(hub, shared):
    for name in ("ann/vae", "ann/vae@v1", f"ann/vae@{Hub.sha}"):
        assert_same(from_pretrained(name), jaxvae.load(shared))
    fetched = [path.rpartition("/")[2] for path in hub.asked if path.startswith("GET /ann")]
    assert sorted(fetched) == ["config.json", "model.safetensors"]  # and no figure


def test_the_endpoint_is_that_of_the_environment(hub, tmp_path):
    code = "import jaxvae; print(jaxvae.from_pretrained('ann/vae').config.network)"
    places = [str(Path(jaxvae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(places),
    }
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MLP(width=8" in found.stdout


def test_what_a_hub_does_not_have_is_told_in_a_line(hub, shared):
    with at_once(), refused("no folder ann/none", hub.address, "there is no such model"):
        from_pretrained("ann/none")
    with at_once(), refused("it has no revision v2"):
        from_pretrained("ann/vae@v2")
    with at_once(), refused("no folder ann/--vae", "Repo id must use alphanumeric"):
        from_pretrained("ann/--vae")
    (shared / "model.safetensors").unlink()
    with at_once(), refused("it has no model.safetensors"):
        from_pretrained("ann/vae")


def test_a_hub_that_accepts_and_is_silent_is_given_up(monkeypatch, hub):
    monkeypatch.setattr("jaxvae.runs.hub._SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(sys.modules["huggingface_hub"].constants, "ENDPOINT", address)
        with at_once(), refused("no folder ann/vae", "the hub does not answer"):
            from_pretrained("ann/vae")


def test_without_the_hub_what_was_downloaded_is_read(hub, shared, monkeypatch):
    first = from_pretrained("ann/vae")
    hub.shutdown()
    hub.server_close()
    assert_same(from_pretrained("ann/vae"), first)
    with at_once(), refused("no folder ann/other", "the hub does not answer"):
        from_pretrained("ann/other")


def test_a_name_that_is_neither_a_folder_nor_of_a_hub_is_refused(tmp_path, monkeypatch):
    for name in ("vae", "a/b/c", "a b/c", "ann/vae@", tmp_path / "none"):
        with refused(f"{name} does not exist", "OWNER/NAME@REVISION"):
            from_pretrained(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("there is no folder ann/vae", 'pip install "jaxvae[hub]"'):
        from_pretrained("ann/vae")


def test_the_documentations_example_loads_a_folder(shared, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], found)
    assert found["images"].shape == (16, 8, 8, 1)
