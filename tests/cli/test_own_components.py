"""Components of the user's own on the command line: by dotted path, where the user types it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.runs.config import read_config
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")

MODULE = '''
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxvae
from jaxvae.data import Dataset
from jaxvae.models.distributions import Gaussian
from jaxvae.objectives import draw

with open(__file__ + ".imported", "a") as file:
    file.write("once\\n")


@dataclass(frozen=True)
class Wide:
    """A Gaussian prior of another scale."""

    scale: float = 1.0

    def init(self, key, config):
        return {}

    def bind(self, learned, params):
        shape = (params.config.latent_dim,)
        return _Wide(self.scale, *shape)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wide:
    scale: float
    latents: int

    def log_prob(self, z):
        log_scale = jnp.log(self.scale * jnp.sqrt(2 * jnp.pi))
        return -jnp.sum((z / self.scale) ** 2 / 2 + log_scale, axis=-1)

    def sample(self, key, n):
        return self.scale * jax.random.normal(key, (n, self.latents))


@dataclass(frozen=True)
class Halved:
    """The ELBO, a part of it."""

    part: float = 0.5
    num_samples = 1
    across_batch = False

    def __call__(self, params, key, images, labels=None, *, beta=1.0, axis_name=None):
        terms = draw(params, key, images, labels).elbo(exact=False)
        return -self.part * (terms.log_likelihood - beta * terms.kl), terms


def slow(learning_rate, factor=0.1):
    return optax.sgd(factor * learning_rate)


class Counts(jaxvae.Callback):
    def __init__(self, ends_after=99):
        self.ends_after = ends_after

    def epoch(self, record, params):
        print("counted", record["epoch"])
        return record["epoch"] == self.ends_after


count = Counts(1)


def squares(size=4):
    images = np.zeros((100, 6, 6, 1), np.uint8)
    images[:, 1:1 + size, 2:4] = 255
    return Dataset(images[:80], None, images[80:], None)


array = squares().train_images
'''


@pytest.fixture(scope="module")
def keep_no_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        patch.setattr("jaxvae.runs.drawing.draw", lambda *_: [Path("a.png")])
        yield


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own on sys.path; its name."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "mine_vae.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield folder / "mine_vae.py.imported"
    sys.modules.pop("mine_vae", None)


@pytest.fixture
def train(tmp_path, npz):
    """Runs `jaxvae train` with more flags; returns its exit code."""

    def run(*flags, data=npz):
        words = ["train", "--run-dir", tmp_path / "run", "--network", "mlp:width=8"]
        words += ["--batch-size", 64, "--epochs", 2]
        return main([*map(str, [*words, *(["--data", data] if data else []), *flags])])

    return run


def test_a_dotted_path_is_looked_for_in_the_current_directory_too(
    module, train, tmp_path, monkeypatch
):
    folder = str(module.parent)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != folder])
    monkeypatch.chdir(folder)
    before = list(sys.path)
    assert train("--prior", "mine_vae.Wide:scale=2", "--epochs", 1) == 0
    assert sys.path == before


def said(capsys):
    """The one line that a refused command says."""
    told = capsys.readouterr().err
    assert told.startswith("jaxvae: ")
    assert told.count("\n") == 1
    return told


def test_a_prior_with_options_is_trained_and_named_again_by_each_command(
    module, train, tmp_path, npz, capsys
):
    prior = ["--prior", "mine_vae.Wide:scale=2"]
    assert train(*prior, "--epochs", 1) == 0
    run, out = tmp_path / "run", tmp_path / "a.png"
    suggested = capsys.readouterr().err.splitlines()[-4:]
    assert all(f" {run} --prior mine_vae.Wide:scale=2 " in line for line in suggested)
    spec = read_config_of(run)["model"]["prior"]
    assert spec == "mine_vae.Wide:scale=2"
    commands = {
        "sample": [run, "--n", 2, "--out", out],
        "evaluate": [run, "--num-samples", 2],
        "figures": [run],
        "export": [run, "--to", "safetensors", "--out", tmp_path / "export"],
        "explore": [run],
        "summary": [run],
    }
    del sys.modules["mine_vae"]
    module.unlink()
    for name, words in commands.items():
        capsys.readouterr()
        assert main([name, *map(str, words)]) == 2
        told = said(capsys)
        assert "mine_vae.Wide" in told
        assert "--prior" in told
        assert "mine_vae" not in sys.modules  # nothing was imported
    assert not module.exists()
    for name, words in commands.items():
        assert main([name, *map(str, words), *prior]) == 0
    assert module.exists()
    capsys.readouterr()
    resume = ["train", "--resume", "--run-dir", str(run), "--epochs", "2"]
    assert main(resume) == 2
    assert "--prior" in said(capsys)
    assert main([*resume, *prior]) == 0
    assert len(read_metrics(run)) == 2
    for other, says in {
        "mine_vae.Wide:scale=3": f"the recorded one is {spec}: pass that one",
        "mine_vae.Wide": f"prior is mine_vae.Wide, but the recorded one is {spec}: pass that one",
        "mixture": "prior is 'mixture': expected a dotted path, such as package.module.Name",
    }.items():
        capsys.readouterr()
        assert main(["sample", *map(str, commands["sample"]), "--prior", other]) == 2
        assert says in said(capsys)


def test_an_objective_and_an_optimizer_are_needed_to_resume_alone(module, train, tmp_path, capsys):
    own = ["--objective", "mine_vae.Halved:part=0.25", "--optimizer", "mine_vae.slow"]
    assert train(*own, "--epochs", 1, "--beta", 0.5) == 0
    run = tmp_path / "run"
    metrics = read_metrics(run)[0]["train"]
    loss = -0.25 * (metrics["log_likelihood"] - 0.5 * metrics["kl"])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert main(["evaluate", str(run), "--num-samples", "2"]) == 0
    capsys.readouterr()
    resume = ["train", "--resume", "--run-dir", str(run), "--epochs", "2"]
    assert main([*resume, *own[:2]]) == 2
    assert "--optimizer mine_vae.slow" in said(capsys)
    assert main([*resume, *own]) == 0
    assert read_config_of(run)["train"]["optimizer"] == "mine_vae.slow"


def read_config_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_file_with_a_dotted_path_imports_nothing_until_it_is_typed(
    module, train, tmp_path, npz, capsys
):
    """Also of a run's own config.json, whose component a flag hands over."""
    path = tmp_path / "a.toml"
    path.write_text("prior = 'mine_vae.Wide:scale=2'")
    assert train("--config", path) == 2
    assert "on the command line with --prior" in said(capsys)
    assert not module.exists()
    assert not (tmp_path / "run").exists()
    assert train("--config", path, "--prior", "mine_vae.Wide:scale=2", "--epochs", 1) == 0
    config = tmp_path / "run" / "config.json"
    again = ["train", "--config", str(config), "--run-dir", str(tmp_path / "again")]
    capsys.readouterr()
    assert main(again) == 2
    assert "mine_vae.Wide" in said(capsys)
    assert main([*again, "--prior", "mine_vae.Wide:scale=2"]) == 0
    for x, y in zip(read_metrics(tmp_path / "again"), read_metrics(tmp_path / "run"), strict=True):
        assert x["test"] == y["test"]


def test_a_run_starts_from_one_with_a_component_of_ones_own(module, train, tmp_path, npz):
    prior = ["--prior", "mine_vae.Wide:scale=2"]
    assert train(*prior, "--epochs", 1) == 0
    run, other = tmp_path / "run", str(tmp_path / "other")
    assert train(*prior, "--start-from", run, "--run-dir", other, "--epochs", 1) == 0
    first, second = (read_metrics(tmp_path / name)[0]["train"] for name in ("run", "other"))
    assert second["elbo"] > first["elbo"]


@pytest.mark.parametrize(
    ("paths", "counted"),
    [
        (["mine_vae.Counts"], ["counted 1", "counted 2"]),
        (["mine_vae.Counts:ends_after=1"], ["counted 1"]),
        (["mine_vae.count"], ["counted 1"]),
        (["mine_vae.Counts", "mine_vae.Counts"], ["counted 1", "counted 1"] + ["counted 2"] * 2),
        (["jaxvae.runs.callbacks.EarlyStopping:patience=9", "mine_vae.count"], ["counted 1"]),
    ],
    ids=["class", "option", "object", "twice", "two"],
)
def test_callbacks_follow_a_training(module, train, capsys, paths, counted):
    flags = [word for path in paths for word in ("--callback", path)]
    assert train(*flags) == 0
    assert capsys.readouterr().out.splitlines() == counted


def test_callbacks_follow_many_models(module, train, capsys):
    assert train("--callback", "mine_vae.count", "--seeds", 2) == 0
    assert capsys.readouterr().out.splitlines() == ["counted 1"]


@pytest.mark.parametrize("name", ["mine_vae.squares", "mine_vae.array"])
def test_data_are_a_function_or_an_array_of_ones_own(module, train, tmp_path, capsys, name):
    assert train("--batch-size", 8, "--epochs", 1, data=name) == 0
    run = tmp_path / "run"
    config = read_config(run)
    assert config.data == name
    assert config.model.image_shape == (6, 6, 1)
    capsys.readouterr()
    evaluate = ["evaluate", str(run), "--num-samples", "2"]
    resume = ["train", "--resume", "--run-dir", str(run), "--epochs", "2"]
    for command in (evaluate, resume):
        assert main(command) == 2
        assert f"--data {name}" in said(capsys)
        assert main([*command, "--data", name]) == 0
        capsys.readouterr()
    assert len(read_metrics(run)) == 2


def test_a_file_of_such_a_name_is_a_file(module, train, tmp_path, npz, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = dict(np.load(npz))
    np.savez(tmp_path / "mine_vae.npz", **arrays)
    assert train("--epochs", 1, data="mine_vae.npz") == 0
    assert not module.exists()
    assert read_config(tmp_path / "run").data == str(tmp_path / "mine_vae.npz")


WRONG = {
    "no module": (
        "--prior nowhere.Prior",
        "prior is 'nowhere.Prior', which cannot be imported: No",
    ),
    "no attribute": (
        "--prior mine_vae.Narrow",
        "which cannot be imported: module 'mine_vae' has no",
    ),
    "no such option": (
        "--prior mine_vae.Wide:width=2",
        "prior 'mine_vae.Wide' has no option 'width': expected among 'scale'",
    ),
    "options of an object": ("--callback mine_vae.count:x=1", "has no option 'x'"),
    "another kind": ("--prior mine_vae.Counts", "prior is "),
    "no component": ("--likelihood os.sep", "likelihood is '/'"),
    "no objective": ("--objective os.sep", "objective is '/'"),
    "no optimizer": ("--optimizer mine_vae.array", "optimizer is "),
    "no callback": ("--callback mine_vae.squares", "expected an object with the methods start, "),
    "no path": ("--callback Counts", "expected a dotted path, such as package.module.Name"),
    "an empty part": ("--callback .Counts", "expected a dotted path, such as package.module.Name"),
    "no images": ("--data os.sep", "images"),
    "no data": ("--data mine_vae.nothing", "mine_vae.nothing is not a file, and data is "),
    "no file": ("--data mine_vae.npz", "mine_vae.npz does not exist: expected mnist-5k, "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_component_ends_in_one_line_and_leaves_no_directory(
    module, train, tmp_path, capsys, case
):
    flags, says = WRONG[case]
    assert train(*flags.split()) == 2
    assert says in said(capsys)
    assert not (tmp_path / "run").exists()


def test_components_that_are_typed_are_those_of_python(module, train, tmp_path, npz):
    """A run of the command line is the run of `fit` with the object."""
    prior = ["--prior", "mine_vae.Wide:scale=2"]
    assert train(*prior, "--epochs", 1) == 0
    import mine_vae

    model = jaxvae.ModelConfig(network="mlp:width=8", prior=mine_vae.Wide(2))
    config = jaxvae.TrainConfig(batch_size=64, epochs=1)
    result = jaxvae.fit(str(npz), model, config, progress=False)
    assert result.history[0]["test"] == read_metrics(tmp_path / "run")[0]["test"]
    loaded = jaxvae.load(tmp_path / "run", prior=mine_vae.Wide(2))
    assert loaded.config == result.params.config
