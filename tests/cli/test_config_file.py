"""Configuration files: `jaxvae train --config FILE`."""

import json
import shutil

import numpy as np
import pytest

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.runs import directory, loop
from jaxvae.runs.config import RunConfig, read_config, read_config_file

pytestmark = pytest.mark.usefixtures("compile_quickly", "started")


@pytest.fixture
def started(monkeypatch):
    """Ends a training once its directory is made, as all but the training is of interest here."""

    def train(run_dir, config, data, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
    monkeypatch.setattr(loop, "train", train)


def written(path, content, **places):
    """Write a file; `content` is TOML, or an object that becomes JSON."""
    if not isinstance(content, str):
        content = json.dumps(content)
    for name, value in places.items():
        content = content.replace(f"{{{name}}}", str(value))
    path.write_text(content)
    return path


def configuration(run_dir, *flags):
    """The configuration of the run that a command line starts."""
    assert main(["train", "--run-dir", str(run_dir), *map(str, flags)]) == 1
    return read_config(run_dir)


TABLES = """
data = "{npz}"
seed = 7

[model]
latent_dim = 3
network = "mlp:width=8"
prior = "mixture:components=5"

[train]
batch_size = 64
learning_rate = 1e-4
objective = "iwae:num_samples=3"
trainable = ["decoder", "prior"]
"""
FLAT = """
data = "{npz}"
seed = 7
latent_dim = 3
network = "mlp:width=8"
prior = "mixture:components=5"
batch_size = 64
learning_rate = 1e-4
objective = "iwae:num_samples=3"
trainable = ["prior", "decoder"]
"""
AS_JSON = {
    "data": "{npz}",
    "seed": 7,
    "latent_dim": 3,
    "model": {"network": "mlp:width=8", "prior": "mixture:components=5"},
    "train": {
        "batch_size": 64,
        "learning_rate": 1e-4,
        "objective": "iwae:num_samples=3",
        "trainable": ["decoder", "prior"],
    },
}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.toml", TABLES), ("flat.toml", FLAT), ("a.json", AS_JSON), ("a.conf", TABLES)],
)
def test_a_file_is_toml_or_json_with_tables_or_without(tmp_path, npz, name, content):
    path = written(tmp_path / name, content, npz=npz)
    config = configuration(tmp_path / "run", "--config", path)
    model = jaxvae.ModelConfig((8, 8, 1), 3, network="mlp:width=8", prior="mixture:components=5")
    assert config.model == model
    assert config.train == jaxvae.TrainConfig(
        batch_size=64,
        learning_rate=1e-4,
        objective="iwae:num_samples=3",
        trainable=("decoder", "prior"),
    )
    assert (config.data, config.seed, config.fsdp) == (str(npz), 7, False)


def test_flags_win_over_the_file(tmp_path, npz):
    path = written(tmp_path / "a.toml", TABLES, npz=npz)
    flags = ["--seed", 1, "--latent-dim", 2, "--prior", "mixture", "--learning-rate", 0.1]
    config = configuration(tmp_path / "run", "--config", path, *flags, "--epochs", 3)
    assert (config.seed, config.model.latent_dim, config.train.epochs) == (1, 2, 3)
    assert config.model.to_dict()["prior"] == "mixture"  # as a whole, with its options
    assert config.train.learning_rate == 0.1
    assert config.train.objective == jaxvae.TrainConfig(objective="iwae:num_samples=3").objective


def test_what_a_flag_replaces_may_be_wrong_in_the_file(tmp_path, npz):
    path = written(tmp_path / "a.toml", TABLES.replace("mixture:", "mixtur:"), npz=npz)
    assert configuration(tmp_path / "run", "--config", path, "--prior", "vamp:components=9")


def test_several_values_and_seeds_of_a_file_are_many_models(tmp_path, npz, monkeypatch):
    monkeypatch.setattr("jaxvae.runs.sweep.train", loop.train)
    path = written(tmp_path / "a.toml", FLAT, npz=npz)
    train = ["train", "--config", str(path), "--run-dir", str(tmp_path / "run"), "--seeds", "2"]
    assert main([*train, "--beta", "1", "2"]) == 1
    models = json.loads((tmp_path / "run" / "sweep.json").read_text())
    del models["jaxvae"]
    assert list(models) == [
        f"beta-{beta}_seed-{seed}" for beta in ("1.0", "2.0") for seed in (7, 8)
    ]
    assert {model["train"]["learning_rate"] for model in models.values()} == {1e-4}


def test_a_runs_own_configuration_starts_another_like_it(tmp_path, npz):
    path = written(tmp_path / "a.toml", TABLES, npz=npz)
    first = configuration(tmp_path / "first", "--config", path)
    config_json = tmp_path / "first" / "config.json"
    again = configuration(tmp_path / "again", "--config", config_json)
    assert again == first
    other = configuration(tmp_path / "other", "--config", config_json, "--seed", 8)
    assert other.seed == 8
    assert (other.model, other.train, other.data) == (first.model, first.train, first.data)


def test_the_configuration_of_a_run_on_other_data_is_taken(tmp_path, npz):
    """The shape of images and the record of the data are those of the new run."""
    first = configuration(tmp_path / "first", "--data", npz, "--network", "mlp:width=8")
    np.savez(tmp_path / "b.npz", images=np.zeros((300, 6, 5), np.uint8))
    flags = ["--config", tmp_path / "first" / "config.json", "--data", tmp_path / "b.npz"]
    config = configuration(tmp_path / "second", *flags)
    assert config.model.image_shape == (6, 5, 1)
    assert config.data_seen != first.data_seen
    assert len(config.data_seen) == 1


def test_the_configuration_of_a_run_of_version_0_1_is_taken(tmp_path, npz):
    old = {
        "jaxvae": "0.1.0", "data": "{npz}", "data_dir": None, "manual_dir": None, "seed": 1,
        "start_from": None, "divide": True, "workers": 0,
        "model": {"image_shape": [8, 8, 1], "latent_dim": 2, "network": "mlp", "width": 8,
                  "prior": "mixture", "prior_components": 5, "flow_steps": 4},
        "train": {"batch_size": 64, "epochs": 2, "optimizer": "adam", "epsilon": 1e-4,
                  "objective": "iwae", "num_samples": 3, "free_bits": 0.0, "mmd_weight": 100.0,
                  "warmup": "linear", "warmup_steps": 4},
        "data_seen": [{"train_images": 9, "test_images": 9, "sha256": "0", "step": 0}],
    }  # fmt: skip
    path = written(tmp_path / "config.json", old, npz=npz)
    config = configuration(tmp_path / "run", "--config", path, "--batch-size", 128)
    assert config.fsdp
    model = jaxvae.ModelConfig((8, 8, 1), network="mlp:width=8", prior="mixture:components=5")
    assert config.model == model
    assert config.train == jaxvae.TrainConfig(
        batch_size=128,
        epochs=2,
        optimizer="adam:eps=1e-4",
        objective="iwae:num_samples=3",
        warmup="linear:steps=4",
    )
    assert config.data_seen[0].train_images == 512


def test_a_relative_path_in_a_file_is_kept_as_an_absolute_one(tmp_path, npz, monkeypatch):
    shutil.copy(npz, tmp_path / "small.npz")
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "a.toml", FLAT, npz="small.npz")
    assert configuration(tmp_path / "run", "--config", path).data == str(tmp_path / "small.npz")


WRONG = {
    "nothing": (None, "cannot be read: No such file or directory"),
    "a folder": ("folder", "cannot be read: Is a directory"),
    "neither": ("<model/>", "is not valid TOML: "),
    "bytes": (b"data = '\xff'", "is not valid TOML: "),
    "a key twice": ("seed = 1\nseed = 2", "is not valid TOML: "),
    "an unknown field": (
        "speed = 3", "a run has no field 'speed' (do you mean 'seed'?): expected accumulate, "
    ),
    "an unknown field of the model": (
        "[model]\nspeed = 3", "ModelConfig has no field 'speed': expected classifier, compute"
    ),
    "an unknown table": ("[data_set]\nname = 3", "a run has no field 'data_set'"),
    "a field of another table": (
        "[model]\nepochs = 3", "ModelConfig has no field 'epochs': expected classifier, compute"
    ),
    "contradictory": (
        "epochs = 2\n[train]\nepochs = 3",
        "epochs is given at the top level and in table train: expected it once",
    ),
    "twice alike": (
        "prior = 'vamp'\n[model]\nprior = 'vamp'",
        "prior is given at the top level and in table model: expected it once",
    ),
    "a table that is none": ("model = 'mlp'", "model is 'mlp': expected a table of named fields"),
    "a wrong value": ("[train]\nepochs = 0", "epochs is 0: expected at least 1"),
    "a wrong value at the top": ("epochs = 0", "epochs is 0: expected at least 1"),
    "a wrong type": ("epochs = 'ten'", "epochs is 'ten': expected a whole number"),
    "several values": ("learning_rate = [1e-3, 1e-4]", "learning_rate is [0.001, 0.0001]: "),
    "a date": ("seed = 2026-01-31", "seed is "),
    "a number as data": ("data = 3", "data is 3: expected a string"),
    "an unknown component": ("prior = 'mixtur'", "prior is 'mixtur': expected 'standard_normal'"),
    "an unknown option": (
        "prior = 'mixture:number=3'", "prior 'mixture' has no option 'number': expected among "
    ),
    "a component of one's own": (
        "prior = 'os.system:x=1'", "pass it as an object (prior=...), or on the command line"
    ),
    "modules of one's own": ("network = 'own'", "a pair of Flax modules, which are not saved"),
    "data of one's own": ("data = 'os.getcwd'", "--data os.getcwd"),
    "what does not go together": ("prior = 'vamp'\nnum_classes = 3", "vamp"),
    "a newer version": ("jaxvae = '99.0'", "was made by jaxvae 99.0, and this is"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_ends_in_one_line_that_names_it(tmp_path, capsys, case):
    content, says = WRONG[case]
    path = tmp_path / "a.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", "--config", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxvae: ")
    assert says in told
    assert told.count("\n") == 1
    if case != "data of one's own":
        assert str(path) in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"model": []}', "[" * 100_000, "null"])
def test_json_that_is_no_object_is_refused(tmp_path, capsys, content):
    path = written(tmp_path / "a.json", content)
    assert main(["train", "--config", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_is_for_a_new_run(tmp_path, npz, capsys):
    path = written(tmp_path / "a.toml", FLAT, npz=npz)
    configuration(tmp_path / "run", "--config", path)
    capsys.readouterr()
    resume = ["train", "--resume", "--run-dir", str(tmp_path / "run"), "--config", str(path)]
    assert main(resume) == 2
    assert "--config is for a new run, but a resumed run keeps its" in capsys.readouterr().err


def test_an_empty_file_is_the_defaults(tmp_path):
    assert read_config_file(written(tmp_path / "a.toml", "")) == RunConfig()
    assert read_config_file(written(tmp_path / "a.json", {})) == RunConfig()


def test_every_field_survives_a_file(tmp_path):
    """As config.json is written, and as TOML of it would be."""
    config = RunConfig(
        data="mnist-5k", seed=3, fsdp=True, workers=2,
        model=jaxvae.ModelConfig((8, 8, 1), 4, "residual:width=8", "gaussian", "vamp:components=3",
                                 "iaf:steps=1", 0, "bfloat16"),
        train=jaxvae.TrainConfig(
            32, 5, 0.1, "lion:b1=0.5", "cosine_decay_schedule:alpha=0.5", "mmd:weight=3", 0.5,
            "cyclical:steps=9", "dynamic", 1.0, 2.0, 3, 0.9, ("encoder",), 4),
    )  # fmt: skip
    directory.write_config(tmp_path, config)
    assert read_config_file(tmp_path / "config.json") == config
    lines = [f"{name} = {json.dumps(value)}" for name, value in
             {**config.model.to_dict(), **config.train.to_dict(), **config.to_dict()}.items()
             if not isinstance(value, dict) and value is not None]  # fmt: skip
    assert read_config_file(written(tmp_path / "a.toml", "\n".join(lines))) == config
