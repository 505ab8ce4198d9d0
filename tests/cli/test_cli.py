"""The command line: what each command does, and that wrong input ends in one line and code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import matplotlib as mpl
import numpy as np
import pytest
from conftest import moved
from PIL import Image

import jaxvae
from jaxvae.cli.commands import _COMMANDS, _drop_oldest, _program_name, main
from jaxvae.cli.parser import SHELLS, config_fields, make_parser
from jaxvae.interchange.export import load_safetensors
from jaxvae.runs.config import RunConfig, as_flag, read_config
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")

NETWORK = "mlp:width=8"
FLAGS = [as_flag(name) for name in config_fields()]


@pytest.fixture(scope="module")
def keep_no_programs():
    """Leaves this process's settings and the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def run_dir(keep_no_programs, tmp_path_factory, npz):
    path = tmp_path_factory.mktemp("runs") / "run"
    train = ["train", "--data", str(npz), "--run-dir", str(path), "--epochs", "2"]
    train += ["--network", NETWORK]
    assert main([*train, "--latent-dim", "3", "--learning-rate", "0.0005"]) == 0
    return path


@pytest.fixture(scope="module")
def conditional(keep_no_programs, tmp_path_factory, npz):
    """A run of many choices, each told by its flag."""
    path = tmp_path_factory.mktemp("runs") / "conditional"
    flags = {
        "data": npz,
        "run-dir": path,
        "epochs": 1,
        "network": "mlp:width=20",
        "likelihood": "discretized_logistic",
        "prior": "mixture:components=5",
        "posterior": "iaf:steps=1",
        "num-classes": 3,
        "objective": "iwae:num_samples=2",
        "warmup": "linear:steps=10",
        "optimizer": "adamw:eps=1e-4,weight_decay=1e-3",
        "schedule": "warmup_cosine_decay_schedule:warmup_steps=2",
        "learning-rate": 3e-4,
        "ema": 0.9,
        "clip-norm": 100,
        "skip-norm": 1e6,
        "accumulate": 2,
        "patience": 3,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words]) == 0
    return path


def test_every_choice_has_a_flag(conditional):
    config = read_config(conditional)
    assert config.model == jaxvae.ModelConfig(
        (8, 8, 1),
        2,
        network="mlp:width=20",
        likelihood="discretized_logistic",
        prior="mixture:components=5",
        posterior="iaf:steps=1",
        num_classes=3,
    )
    assert config.train == jaxvae.TrainConfig(
        epochs=1,
        objective="iwae:num_samples=2",
        warmup="linear:steps=10",
        optimizer="adamw:eps=1e-4,weight_decay=1e-3",
        schedule="warmup_cosine_decay_schedule:warmup_steps=2",
        learning_rate=3e-4,
        ema=0.9,
        clip_norm=100,
        skip_norm=1e6,
        accumulate=2,
        patience=3,
    )
    recorded = json.loads((conditional / "config.json").read_text())["train"]
    assert recorded["optimizer"] == "adamw:eps=0.0001,weight_decay=0.001"
    assert recorded["schedule"] == "warmup_cosine_decay_schedule:warmup_steps=2"
    kinds = (RunConfig, jaxvae.ModelConfig, jaxvae.TrainConfig)
    of_a_run = {field.name for kind in kinds for field in fields(kind)}
    of_a_run -= {"model", "train", "data_seen", "changes"}
    of_a_run -= {"image_shape", "num_covariates", "covariates"}  # from the data
    assert set(config_fields()) == of_a_run


def test_the_help_of_a_flag_is_the_docstring_of_its_field_and_names_the_components(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for config in (RunConfig, jaxvae.ModelConfig, jaxvae.TrainConfig):
        docs = " ".join(config.__doc__.split())
        for field in fields(config):
            if field.name not in config_fields():
                continue
            _, _, says = docs.partition(f"{field.name}: ")
            assert re.split("[.:;,(]", says)[0] in told
            assert f"{as_flag(field.name)} " in told
    for registry in filter(None, config_fields().values()):
        names = list(registry)
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        assert f": {listed}" in told


def test_flags_that_are_gone_are_refused_in_one_line(capsys):
    """Their values are options of the components now."""
    for flag in ("--width 8", "--prior-components 5", "--flow-steps 1", "--num-samples 2",
                 "--free-bits 1", "--mmd-weight 1", "--warmup-steps 4", "--epsilon 1",
                 "--divide"):  # fmt: skip
        assert main(["train", *flag.split()]) == 2
        told = capsys.readouterr().err
        assert told.startswith("jaxvae: unrecognized arguments: ")
        assert told.count("\n") == 1


def test_a_run_of_many_choices_is_evaluated_sampled_and_drawn(conditional, tmp_path, capsys):
    assert (conditional / "figures" / "classes.png").exists()
    assert main(["evaluate", str(conditional), "--num-samples", "3"]) == 0
    _, table = printed(capsys.readouterr().out)
    assert "bits per dimension, of log p(x)" in table
    assert main(["sample", str(conditional), "--n", "4", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (16, 16)
    assert main(["summary", str(conditional)]) == 0
    told = capsys.readouterr().out
    assert "posterior, iaf" in told
    assert "prior, mixture" in told


def test_pictures_of_any_size_are_resized_as_the_output_says(tmp_path, capsys):
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (8 + i, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    run = tmp_path / "run"
    train = ["train", "--data", str(tmp_path), "--network", "mlp:width=4", "--batch-size", "6"]
    assert main([*train, "--run-dir", str(run)]) == 2
    assert "with --resize 9x12" in capsys.readouterr().err
    train += ["--resize", "8x6", "--crop", "--epochs", "1", "--run-dir", str(run)]
    assert main(train) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path} has pictures that were cropped and resized to 8x6" in said
    assert "18 training and 2 test images (every tenth, as there is no test split); run dir" in said
    assert main(["evaluate", str(run), "--num-samples", "2"]) == 0
    assert read_config(run).model.image_shape == (8, 6, 3)


def test_a_run_starts_from_another(run_dir, npz, tmp_path):
    train = ["train", "--data", str(npz), "--epochs", "1"]  # with the model of that run
    path = tmp_path / "next"
    assert main([*train, "--start-from", str(run_dir), "--run-dir", str(path)]) == 0
    assert read_config(path).start_from == str(run_dir)
    assert read_config(path).model == read_config(run_dir).model
    before, after = (read_metrics(folder) for folder in (run_dir, path))
    assert after[0]["train"]["elbo"] > before[0]["train"]["elbo"]


def printed(text):
    """The head and the numbers of the table that `jaxvae evaluate` prints."""
    head, *rows = text.splitlines()
    table = {}
    for row in rows:
        name, number = row.rsplit(maxsplit=1)
        table[name.strip()] = number
    return head, table


def test_evaluate_prints_one_table_of_what_it_writes_down(run_dir, capsys):
    assert main(["evaluate", str(run_dir), "--num-samples", "20"]) == 0
    told = capsys.readouterr()
    head, table = printed(told.out)
    written = json.loads((run_dir / "evaluation.json").read_text())
    assert told.err == f"evaluation: {run_dir / 'evaluation.json'}\n"
    assert head == f"{run_dir}, step 8: 100 test images, nats per image"
    names = {
        "ELBO": "elbo",
        "log-likelihood E[log p(x|z)]": "log_likelihood",
        "KL(q(z|x) || p(z))": "kl",
        "mutual information I(n; z)": "mutual_information",
        "KL(q(z) || p(z))": "marginal_kl",
        "log p(x), 20 samples": "log_p_x",
        "active units": "active_units",
        "mean squared error of a pixel": "reconstruction_error",
        "accuracy of logistic regression": "logistic_regression",
        "accuracy of 5 nearest neighbors": "nearest_neighbors",
    }
    assert list(table) == list(names)
    for row, name in names.items():
        digits = len(table[row].partition(".")[2])
        assert float(table[row]) == round(written[name], digits)
    about = {"step", "data", "images", "num_samples", "seconds", "devices"}
    assert set(written) == set(names.values()) | about


def test_evaluate_prints_the_bounds_that_it_writes_down(conditional, capsys):
    numbers = ["--num-images", "16", "--num-steps", "3", "--num-chains", "2", "--num-samples", "5"]
    assert main(["evaluate", str(conditional), "--method", "ais", *numbers]) == 0
    told = capsys.readouterr()
    written = json.loads((conditional / "ais.json").read_text())
    assert told.err == f"evaluation: {conditional / 'ais.json'}\n"
    head, columns, *rows = told.out.splitlines()
    step = written["step"]
    assert head == (f"{conditional}, step {step}: 16 images, 2 chains of 3 steps, nats per image")
    assert columns.split() == ["test", "simulated"]
    test, simulated = written["test"], written["simulated"]
    gap, bias = (simulated["upper"] - simulated[name] for name in ("lower", "importance_sampling"))
    expected = {
        "ELBO": [test["elbo"], simulated["elbo"]],
        "importance sampling, 5 samples": [
            test["importance_sampling"],
            simulated["importance_sampling"],
        ],
        "AIS, lower bound": [test["lower"], simulated["lower"]],
        "AIS, upper bound": [simulated["upper"]],
        "upper - lower bound": [gap],
        "upper bound - importance sampling": [bias],
    }
    table = {row[:38].strip(): row[38:].split() for row in rows}
    assert table == {name: [f"{x:.3f}" for x in values] for name, values in expected.items()}
    assert {
        name: written[name] for name in ("images", "num_samples", "num_steps", "num_chains")
    } == {
        "images": 16,
        "num_samples": 5,
        "num_steps": 3,
        "num_chains": 2,
    }


def test_evaluate_prints_what_it_cannot_write_down(run_dir, tmp_path, capsys):
    """Where the directory cannot be written, which root could; here the name is taken."""
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "evaluation.json").unlink(missing_ok=True)
    (copy / "evaluation.json" / "in the way").mkdir(parents=True)
    assert main(["evaluate", str(copy), "--num-samples", "2"]) == 0
    told = capsys.readouterr()
    head, table = printed(told.out)
    assert head.startswith(f"{copy}, step 8: 100 test images")
    assert "ELBO" in table
    assert told.err.startswith(f"jaxvae: evaluation.json was not written: {copy} cannot be written")
    assert told.err.count("\n") == 1


def test_train_goes_on_with_moved_data_and_with_new_data_on_request(run_dir, npz, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    moved, other = tmp_path / "moved.npz", tmp_path / "other.npz"
    shutil.copy(npz, moved)
    arrays = dict(np.load(npz))
    np.savez(other, **{**arrays, "x_test": arrays["x_test"][::-1]})
    train = ["train", "--resume", "--run-dir", str(copy), "--data"]
    assert main([*train, str(moved)]) == 0
    moved.unlink()
    capsys.readouterr()
    assert main(train[:-1]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"jaxvae: {moved} does not exist: expected ")
    assert told.endswith("; if the data have moved, pass their path with --data\n")
    assert main([*train, str(other)]) == 2
    assert "accept this one with --new-data" in capsys.readouterr().err
    assert main([*train, str(other), "--new-data"]) == 0
    assert len(read_config(copy).data_seen) == 2
    capsys.readouterr()
    np.savez(other, **arrays)
    assert main(["figures", str(copy)]) == 0
    told = capsys.readouterr().err
    assert told.startswith(
        f"jaxvae: {other} is not the data set that {copy} was trained on: it also has"
    )
    assert told.count("\n") == 1


def test_a_diverged_model_of_many_is_told_and_the_others_are_drawn(npz, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "--data", str(npz), "--run-dir", str(run), "--network", NETWORK]
    assert main([*train, "--epochs", "1", "--learning-rate", "9e5", "1e-3"]) == 0
    bad, good = "learning-rate-900000.0_seed-0", "learning-rate-0.001_seed-0"
    told = capsys.readouterr().err
    assert f"jaxvae: the loss of {bad} is NaN or infinite at step " in told
    assert f"{bad} has diverged and was left out: see {run / bad / 'diverged.json'}" in told
    assert f"explore {run / good}" in told
    assert not (run / bad / "figures").exists()
    assert (run / good / "figures" / "training.png").exists()


def test_train_makes_a_run_directory_and_tells_each_epoch_in_a_line(npz, tmp_path, capsys):
    """Where there is no terminal."""
    run_dir = tmp_path / "run"
    train = ["train", "--data", str(npz), "--run-dir", str(run_dir), "--network", NETWORK]
    assert main([*train, "--latent-dim", "3", "--epochs", "2"]) == 0
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "manifolds",
        "figures",
    }
    assert jaxvae.load(run_dir).config.latent_dim == 3
    told = capsys.readouterr().err.splitlines()
    names = {path.name for path in (run_dir / "figures").iterdir()}
    assert {"manifold_20.png", "samples.png", "training.png", "manifold.gif"} < names
    assert "512 training and 100 test images" in told[0]
    for line, epoch in zip(told[1:3], ("1/2", "2/2"), strict=True):
        assert line.startswith(f"epoch {epoch}  ELBO -")
        assert line.endswith("images/s")
    first = run_dir / "figures" / "manifold_15.png"
    assert told[3] == f"{len(names)} figures; the first: {first}"
    assert first.exists()


def test_what_a_training_says_to_try_next_works(npz, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--data", str(npz), "--run-dir", "run", "--network", NETWORK, "--epochs", "1"]
    assert main(train) == 0
    told = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()[3:]]
    assert [line.split()[1] for line in told] == ["explore", "evaluate", "sample", "train"]
    for line in told:
        program, *arguments = line.replace("epochs N", "epochs 2").split()
        assert program == "jaxvae"
        assert main(arguments) == 0


def test_a_copied_line_calls_the_program_as_the_user_did(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for called, name in {
        ".venv/bin/jaxvae": ".venv/bin/jaxvae",
        "/somewhere/jaxvae/__main__.py": "python -m jaxvae",
        "pytest": "jaxvae",
    }.items():
        monkeypatch.setattr("sys.argv", [called])
        assert _program_name() == name


def test_train_resume_of_a_finished_run_changes_nothing(run_dir):
    before = (run_dir / "metrics.jsonl").read_text()
    assert main(["train", "--resume", "--run-dir", str(run_dir)]) == 0
    assert (run_dir / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def many(keep_no_programs, tmp_path_factory, npz):
    path = tmp_path_factory.mktemp("runs") / "many"
    train = ["train", "--data", str(npz), "--run-dir", str(path), "--epochs", "1"]
    train += ["--network", NETWORK, "--seeds", "2", "--beta", "0.5", "--learning-rate", "1e-3"]
    assert main(train) == 0
    return path


def test_train_of_many_seeds_makes_a_run_directory_of_each(many, tmp_path, capsys):
    assert {path.name for path in many.iterdir()} == {
        ".lock",
        "sweep.json",
        "metrics.jsonl",
        "seed-0",
        "seed-1",
    }
    for name in ("seed-0", "seed-1"):
        assert (many / name / "figures" / "training.png").exists()
        assert main(["evaluate", str(many / name), "--num-samples", "2"]) == 0
        recorded = read_metrics(many / name)[-1]["test"]
        assert f"{recorded['elbo']:.3f}" in capsys.readouterr().out
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(many / name), "--n", "1", "--out", str(out)]) == 0


def test_train_of_many_goes_on_and_tells_mean_and_spread(many, tmp_path, capsys):
    copy = shutil.copytree(many, tmp_path / "copy")
    assert main(["train", "--resume", "--run-dir", str(copy), "--epochs", "2"]) == 0
    told = capsys.readouterr().err.splitlines()
    line = read_metrics(copy)[-1]
    spread = f"{line['test']['elbo']:.2f} ± {line['test_sd']['elbo']:.2f}"
    assert f"2 models; run directories {copy}/seed-0, ..." in told[0]
    assert told[1].startswith("epoch 2/2  ELBO ")
    assert f"{spread} test" in told[1]
    assert told[2] == f"learning rate 0.001, beta 0.5: test ELBO {spread} over 2 seeds"


def test_evaluate_prints_the_recorded_test_elbo(run_dir, capsys):
    assert main(["evaluate", str(run_dir), "--num-samples", "20"]) == 0
    _, table = printed(capsys.readouterr().out)
    recorded = read_metrics(run_dir)[-1]["test"]
    for row, name in (("ELBO", "elbo"), ("KL(q(z|x) || p(z))", "kl")):
        assert float(table[row]) == pytest.approx(recorded[name], rel=1e-5, abs=6e-4)


def test_explore_writes_a_page_into_the_run_or_where_it_is_told(conditional, tmp_path, capsys):
    assert main(["explore", str(conditional)]) == 0
    assert capsys.readouterr().out == f"{conditional / 'explorer.html'}\n"
    page = (conditional / "explorer.html").read_text()
    assert "<h1>conditional</h1>" in page
    assert main(["explore", str(conditional), "--best", "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text() == page  # of one epoch, the latest is the best


def test_data_that_are_not_the_models_are_refused_by_figures_and_explore(
    conditional, npz, tmp_path, capsys
):
    x = np.zeros((20, 12, 8, 1), np.uint8)
    np.savez(tmp_path / "shape.npz", x_train=x, x_test=x)
    with np.load(npz) as found:
        np.savez(tmp_path / "labels.npz", x_train=found["x_train"], x_test=found["x_test"])
    expected = {
        "shape": "holds images of shape (12, 8, 1): expected (8, 8, 1)",
        "labels": "has no train labels: expected classes from 0 to 2",
    }
    for name, says in expected.items():
        for command in ("figures", "explore"):
            assert main([command, str(conditional), "--data", str(tmp_path / f"{name}.npz")]) == 2
            assert says in capsys.readouterr().err


def test_sample_writes_a_picture_that_the_seed_decides(run_dir, tmp_path, capsys):
    pictures = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(run_dir), "--n", "9", "--out", str(out), "--seed", seed]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        with Image.open(out) as picture:
            pictures.append(np.asarray(picture))
    assert pictures[0].shape == (24, 24)
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_figures_draws_again(run_dir, capsys):
    (run_dir / "figures" / "samples.png").unlink()
    assert main(["figures", str(run_dir), "--best"]) == 0
    assert str(run_dir / "figures" / "samples.png") in capsys.readouterr().out.splitlines()
    assert (run_dir / "figures" / "samples.png").exists()


def test_figures_are_vectors_where_asked_for(run_dir, capsys):
    assert main(["figures", str(run_dir), "--format", "svg"]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.suffix for path in drawn if path.name != "manifold.gif"} == {".svg"}
    assert run_dir / "figures" / "training.svg" in drawn
    assert all(path.exists() for path in drawn)


def test_export_writes_the_runs_model_and_tells_where(run_dir, tmp_path, capsys):
    export = ["export", str(run_dir), "--to", "safetensors", "stablehlo", "--out", str(tmp_path)]
    assert main(export) == 0
    told = capsys.readouterr().out.splitlines()
    assert sorted(told) == sorted(map(str, tmp_path.iterdir()))
    assert len(told) == 4
    back = load_safetensors(tmp_path / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, back, jaxvae.load(run_dir)))


def test_export_writes_the_formats_that_it_can(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    export = ["export", str(run_dir), "--to", "onnx", "safetensors", "--out", str(tmp_path)]
    assert main(export) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnx cannot be written: onnx is not installed: pip install onnx; written to" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_summary_prints_the_default_model_or_a_runs(run_dir, capsys):
    assert main(["summary"]) == 0
    assert capsys.readouterr().out.strip().endswith("550,629 parameters")
    assert main(["summary", str(run_dir)]) == 0
    assert "8 x 8 x 1" in capsys.readouterr().out


def test_every_command_but_the_plainest_has_examples_which_it_takes(capsys):
    helps = [["--help"]] + [[name, "--help"] for name in _COMMANDS if name != "benchmark"]
    for arguments in helps:
        with pytest.raises(SystemExit):
            main(arguments)
        _, examples = capsys.readouterr().out.split("\nexamples:\n")
        for line in re.sub(r"\\\n +", "", examples).strip().splitlines():
            words = re.split(r"   +| > ", line.strip())[0].split()
            assert words.pop(0) == "jaxvae"
            if words != ["COMMAND", "--help"]:
                make_parser(_COMMANDS).parse_args(words)


def test_compress_and_decompress_restore_the_images(run_dir, tmp_path, capsys):
    x, file, y = (str(tmp_path / name) for name in ("x.npy", "x.jaxvae", "y.npz"))
    images = np.random.default_rng(0).integers(0, 2, (40, 8, 8, 1), np.uint8) * np.uint8(255)
    np.save(x, images)
    assert main(["compress", str(run_dir), "--data", x, "--out", file]) == 0
    says = capsys.readouterr().out
    size = Path(file).stat().st_size
    assert (
        f"x.jaxvae: 40 images, {size:,} bytes, {images.size / 8 / size:.2f} times smaller" in says
    )
    per_dimension, initial, elbo = (
        float(re.search(before + r" (\d\.\d{4})", says)[1])
        for before in ("bits per dimension:", "and", "by the ELBO")
    )
    assert per_dimension + initial == pytest.approx(8 * size / images.size, abs=2e-4)
    header = 8 * 300 / images.size
    assert elbo * 0.9 < per_dimension < elbo * 1.1 + header

    assert main(["decompress", str(run_dir), file, "--out", y]) == 0
    assert "y.npz: 40 images" in capsys.readouterr().out
    with np.load(y, allow_pickle=False) as restored:
        np.testing.assert_array_equal(restored["images"], images)

    test = ["--split", "test", "--data", x, "--out", file]
    assert main(["compress", str(run_dir), *test]) == 0
    assert main(["decompress", str(run_dir), file, "--out", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4

    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    capsys.readouterr()
    assert main(["decompress", str(run_dir), file, "--out", y]) == 2
    assert capsys.readouterr().err.startswith(f"jaxvae: {file}: it is damaged")
    assert main(["compress", str(run_dir), "--out", file]) == 2
    assert "pixels that are 0 or 1" in capsys.readouterr().err
    for taken in (run_dir / "config.json", run_dir):
        before = (run_dir / "config.json").read_bytes()
        assert main(["compress", str(run_dir), "--data", x, "--out", str(taken)]) == 2
        assert "exists already and is not a file of compressed" in capsys.readouterr().err
        assert (run_dir / "config.json").read_bytes() == before


def test_a_file_is_decompressed_after_more_training_by_the_parameters_that_were_kept(
    run_dir, tmp_path, capsys
):
    x, file, kept = (str(tmp_path / name) for name in ("x.npy", "x.jaxvae", "kept"))
    images = np.random.default_rng(0).integers(0, 2, (16, 8, 8, 1), np.uint8) * np.uint8(255)
    np.save(x, images)
    assert main(["compress", str(run_dir), "--data", x, "--out", file]) == 0
    assert main(["export", str(run_dir), "--to", "hub", "--out", kept]) == 0
    state = jaxvae.restore(run_dir)
    jaxvae.save(run_dir, replace(state, params=moved(state.params, 0.1), step=state.step + 1))
    out = ["--out", str(tmp_path / "y.npy")]
    capsys.readouterr()
    assert main(["decompress", str(run_dir), file, *out]) == 2
    assert "or by this one before further training" in capsys.readouterr().err
    assert main(["decompress", kept, file, *out]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), images)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_the_shell_completes_commands_flags_and_names(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("explore", "clip-norm", "discretized_logistic", "residual", "safetensors",
                 "adamw", "warmup_cosine_decay_schedule", "cyclical", "bfloat16"):  # fmt: skip
        assert word in script


def test_bash_completes(tmp_path, capsys):
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("no bash here")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "jaxvae.bash"
    script.write_text(capsys.readouterr().out)
    for line, expected in {
        "jaxvae ex": "export explore",
        "jaxvae train --cli": "--clip-norm",
        "jaxvae train --objective d": "dreg",
        "jaxvae train --optimizer adamw": "adamw",
        "jaxvae train --compute-dtype b": "bfloat16",
    }.items():
        words = line.split()
        ask = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        ask += '_shtab_jaxvae jaxvae; echo "${COMPREPLY[*]}"'
        told = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=True)
        assert told.stdout.split() == expected.split(), told


def test_help_and_version(capsys):
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    assert capsys.readouterr().out.endswith(f"jaxvae {jaxvae.__version__}\n")


def test_an_interrupted_training_says_how_to_go_on(npz, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxvae.runs.loop.train", interrupt)
    path = tmp_path / "run"
    assert main(["train", "--data", str(npz), "--run-dir", str(path)]) == 1
    expected = f"jaxvae: interrupted; resume with: jaxvae train --resume --run-dir {path}"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    monkeypatch.setattr("jaxvae.runs.directory.check_first_step", interrupt)
    assert main(["train", "--data", str(npz), "--run-dir", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == "jaxvae: interrupted\n"
    assert not (tmp_path / "none").exists()


COUNT = """
import json, sys
import jax
from jaxvae.cli.commands import main

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
code = main(sys.argv[1:])
print(json.dumps([code, events.count("cache_hits"), events.count("cache_misses")]))
"""


def counted(arguments, **environment):
    """A command in a process of its own: exit code, programs found and made, standard error."""
    ours = {"PYTHONPATH": str(Path(jaxvae.__file__).parents[1]), "MPLCONFIGDIR": mpl.get_cachedir()}
    theirs = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    theirs["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as compile_quickly
    command = [sys.executable, "-c", COUNT, *map(str, arguments)]
    done = subprocess.run(
        command, env=theirs | ours | environment, capture_output=True, text=True, check=True
    )
    return [*json.loads(done.stdout.splitlines()[-1]), done.stderr]


def test_a_second_start_compiles_nothing(npz, tmp_path):
    train = ["train", "--data", npz, "--network", NETWORK, "--epochs", "1", "--run-dir"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, _, compiled, _ = counted([*train, tmp_path / "first"], **cache)
    assert code == 0
    assert compiled > 10
    assert len(list((tmp_path / "cache" / "jaxvae" / "xla").glob("*-cache"))) == compiled
    code, found, compiled_again, _ = counted([*train, tmp_path / "second"], **cache)
    assert (code, compiled_again) == (0, 0)
    assert found >= compiled


def test_a_cache_that_cannot_be_written_is_done_without(run_dir, npz, tmp_path):
    sample = ["sample", run_dir, "--n", "1", "--out", tmp_path / "a.png"]
    *counts, told = counted(sample, XDG_CACHE_HOME=str(npz))
    assert counts == [0, 0, 0]
    assert "cache" not in told


def test_a_cache_of_the_users_own_is_taken(run_dir, tmp_path):
    sample = ["sample", run_dir, "--n", "1", "--out", tmp_path / "a.png"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    environment = {"JAX_COMPILATION_CACHE_DIR": str(theirs), "XDG_CACHE_HOME": str(ours)}
    assert counted(sample, **environment)[0] == 0
    assert theirs.exists()
    assert not (ours / "jaxvae").exists()


def test_the_cache_drops_what_was_used_longest_ago(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    _drop_oldest(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    _drop_oldest(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 2


WRONG = {
    "no command": ("", "required"),
    "unknown command": ("fly", "invalid choice"),
    "unknown flag": ("train --speed 3", "unrecognized arguments: --speed"),
    "missing file": ("train --data {tmp}/none.npz", "none.npz does not exist: expected mnist-5k"),
    "zero epochs": ("train --epochs 0", "epochs is 0: expected at least 1"),
    "epochs in words": ("train --epochs ten", "invalid int value: 'ten'"),
    "half precision": ("train --compute-dtype half", "compute_dtype is 'half': expected 'float32'"),
    "negative rate": ("train --learning-rate -1", "learning_rate is -1.0: expected a number above"),
    "negative rate of two": (
        "train --learning-rate 1e-3 -1",
        "learning_rate is -1.0: expected a number above",
    ),
    "negative beta": ("train --beta -1", "beta is -1.0: expected a number of at least 0"),
    "beta twice": ("train --beta 1 4 1", "--beta has a repeated value: expected each value once"),
    "a billion seeds": (
        "train --seeds 1000000000",
        "--seeds 1000000000 with these values of --learning-rate and --beta gives 1000000000 "
        "models: expected at most 10,000",
    ),
    "a billion samples": (
        "sample {run} --n 1000000000 --out {tmp}/a.png",
        "--n is 1000000000, which needs 1,536 GB: expected at most the ",
    ),
    "a seed beyond 64 bits": (
        "sample {run} --n 1 --out {tmp}/a.png --seed 99999999999999999999",
        "--seed is 99999999999999999999: expected at most 4294967295",
    ),
    "a seed beyond 64 bits to train": (
        "train --seed 99999999999999999999",
        "seed is 99999999999999999999: expected at most 4294967295",
    ),
    "new data of a new run": ("train --new-data", "--new-data is for a resumed run: pass"),
    "no seeds": ("train --seeds 0", "--seeds is 0: expected at least 1"),
    "large batch of many": ("train --data {npz} --seeds 2 --batch-size 1000", "batch_size is 1000"),
    "many over one": ("train --data {npz} --seeds 2 --run-dir {run}", "already holds a run"),
    "one over many": ("train --data {npz} --run-dir {many}", "already holds a run"),
    "one goes on as many": ("train --resume --run-dir {run} --seeds 2", "--seeds asks for several"),
    "one of two rates": (
        "train --resume --run-dir {run} --learning-rate 1 2",
        "--learning-rate asks for several models, but",
    ),
    "more seeds": ("train --resume --run-dir {many} --seeds 3", "--seeds cannot change when"),
    "evaluate many": (
        "evaluate {many}",
        "is a sweep: expected the run directory of one of its models",
    ),
    "figures as an animation": ("figures {run} --format mp4", "invalid choice: 'mp4'"),
    "tensorboard of many": (
        "train --data {npz} --seeds 2 --tensorboard --run-dir {tmp}/x",
        "--tensorboard is for a single model, but 2 are trained: leave it out",
    ),
    "shards of many": (
        "train --data {npz} --seeds 2 --fsdp --run-dir {tmp}/x",
        "--fsdp is for a single model, but 2 are trained: leave it out",
    ),
    "figures of many": ("figures {many}", "is a sweep: expected"),
    "negative seed": ("train --seed -1", "seed is -1: expected at least 0"),
    "large batch": ("train --data {npz} --batch-size 1000", "batch_size is 1000: expected at most"),
    "unknown data set": ("train --data tfds:no_such_set", "no data set 'no_such_set'"),
    "unknown network": ("train --network cnn", "network is 'cnn': expected 'conv', 'mlp', "),
    "a network of one's own": ("train --network own", "pass network=(encoder, decoder)"),
    "unknown likelihood": ("train --likelihood beta", "likelihood is 'beta': expected 'bern"),
    "unknown prior": ("train --prior flow", "prior is 'flow': expected 'standard_normal', 'mix"),
    "unknown posterior": (
        "train --posterior flow",
        "posterior is 'flow': expected 'gaussian', ",
    ),
    "unknown objective": ("train --objective elob", "objective is 'elob': expected 'elbo', 'stl'"),
    "unknown warm-up": ("train --warmup cosine", "warmup is 'cosine': expected 'none', 'linear'"),
    "unknown schedule": ("train --schedule step", "schedule is 'step': expected 'constant', 'cos"),
    "unknown optimizer": ("train --optimizer sdg", "optimizer is 'sdg': expected 'adabelief', "),
    "unknown option": (
        "train --optimizer adamw:decay=1",
        "optimizer 'adamw' has no option 'decay': expected among 'b1', 'b2', 'eps', ",
    ),
    "what optax refuses": (
        "train --optimizer adamw:eps=big",
        "optimizer is 'adamw:eps=big', which optax refuses: ",
    ),
    "option without a value": (
        "train --prior mixture:components",
        "expected NAME:KEY=VALUE,KEY=VALUE, not 'components' in it",
    ),
    "option twice": (
        "train --prior mixture:components=3,components=4",
        "expected the option 'components' once",
    ),
    "unknown binarization": ("train --binarization all", "binarization is 'all': expected 'none'"),
    "no components": (
        "train --prior mixture:components=0",
        "prior 'mixture': components is 0: expected at least 1",
    ),
    "no flow": (
        "train --posterior iaf:steps=0",
        "posterior 'iaf': steps is 0: expected at least 1",
    ),
    "vamp with classes": ("train --prior vamp --num-classes 9", "pseudo-inputs have no classes"),
    "too few classes": (
        "train --data {npz} --num-classes 2 --run-dir {tmp}/x",
        "has train labels from 0 to 2: expected classes from 0 to 1, as num_classes is 2",
    ),
    "no labels": (
        "train --data {bare} --num-classes 2 --batch-size 3 --run-dir {tmp}/x",
        "has no train labels: expected classes from 0 to 1",
    ),
    "warm-up without steps": (
        "train --warmup linear",
        "warmup 'linear' needs the option 'steps': expected linear:steps=VALUE",
    ),
    "several samples": (
        "train --objective mmd:num_samples=2",
        "objective 'mmd' has no option 'num_samples': expected among 'weight'",
    ),
    "free bits": (
        "train --objective iwae:free_bits=1",
        "objective 'iwae' has no option 'free_bits': expected among 'num_samples' or 'backward'",
    ),
    "a part that is none": (
        "train --trainable head",
        "trainable is ['head']: expected parts among",
    ),
    "an average of all": ("train --ema 1", "ema is 1.0: expected a number of at least 0, below 1"),
    "a schedule of an optimizer": (
        "train --schedule polynomial_schedule:power=two",
        "schedule is 'polynomial_schedule:power=two', which optax refuses: ",
    ),
    "free bits of a mixture": (
        "train --data {npz} --network mlp:width=8 --prior mixture --objective elbo:free_bits=1 "
        "--run-dir {tmp}/x",
        "free_bits needs the KL of every latent or group: expected the posterior 'gaussian' and",
    ),
    "path of a flow": (
        "train --data {npz} --network mlp:width=8 --posterior iaf --objective stl "
        "--run-dir {tmp}/x",
        "train a flow by 'elbo', 'iwae' or 'mmd'",
    ),
    "start from nothing": (
        "train --data {npz} --start-from {tmp} --run-dir {tmp}/x",
        "holds no checkpoint",
    ),
    "start from another": (
        "train --data {npz} --start-from {run} --latent-dim 2 --run-dir {tmp}/x",
        "has a model with latent_dim 3: expected 2, as in the run that starts from it",
    ),
    "another likelihood": (
        "train --resume --run-dir {run} --likelihood gaussian",
        "--likelihood is gaussian, but",
    ),
    "another objective of many": (
        "train --resume --run-dir {many} --objective iwae",
        "--objective is iwae, but",
    ),
    "NaN": ("train --data {nan}", "image 1 holds NaN or infinity"),
    "wrong shape": ("train --data {flat}", "images of shape (4,): expected (images, height"),
    "resume what": (
        "train --resume",
        "--resume needs the directory of the run: pass --run-dir DIR",
    ),
    "resume nothing": ("train --resume --run-dir {tmp}", "is not a run directory"),
    "run over run": ("train --data {npz} --run-dir {run}", "already holds a run"),
    "run in a file": ("train --data {npz} --run-dir {npz}/x", "cannot be written"),
    "another batch": ("train --resume --run-dir {run} --batch-size 9", "--batch-size is 9, but"),
    "another type": (
        "train --resume --run-dir {run} --compute-dtype bfloat16",
        "--compute-dtype is bfloat16, but",
    ),
    "evaluate nothing": ("evaluate {tmp}", "is not a run directory"),
    "no samples": ("evaluate {run} --num-samples 0", "--num-samples is 0: expected at least 1"),
    "no steps": (
        "evaluate {run} --method ais --num-steps 0",
        "--num-steps is 0: expected at least 1",
    ),
    "chains of importance sampling": (
        "evaluate {run} --num-chains 4",
        "--num-chains is for --method ais: pass that too, or leave --num-chains out",
    ),
    "an unknown method": ("evaluate {run} --method hmc", "invalid choice: 'hmc'"),
    "sample none": ("sample {run} --n 0 --out {tmp}/a.png", "--n is 0: expected at least 1"),
    "sample a jpeg": (
        "sample {run} --n 1 --out {tmp}/a.jpg",
        "expected a file name ending in .png",
    ),
    "sample nowhere": ("sample {run} --n 1 --out {tmp}/no/a.png", "cannot be written"),
    "sample of data": (
        "sample {run} --n 1 --out {tmp}/a.png --data {npz}",
        "--data was given, of which samples take the covariates, but the model has none: leave it",
    ),
    "sample of no run": ("sample {tmp} --n 1 --out {tmp}/a.png", "is not a run directory"),
    "figures of no run": ("figures {tmp}/none", "is not a run directory"),
    "export nothing": ("export {tmp} --to safetensors", "is not a run directory"),
    "export to what": ("export {run}", "the following arguments are required: --to"),
    "export to words": (
        "export {run} --to text --out {tmp}/x",
        "the format is 'text': expected st",
    ),
    "export into a file": ("export {run} --to safetensors --out {npz}/x", "cannot be written"),
    "import nothing": ("import {tmp}/no.h5 --run-dir {tmp}/x", "no.h5 does not exist: expected a"),
    "import data": (
        "import {npz} --run-dir {tmp}/x",
        "has no config.json: expected a .keras",
    ),
    "import over a run": ("import {npz} --run-dir {run}", "already holds a run"),
    "explore a jpeg": (
        "explore {run} --out {tmp}/a.jpg",
        "expected a file name ending in .html",
    ),
    "explore no run": ("explore {tmp}", "is not a run directory"),
    "explore nowhere": ("explore {run} --out {tmp}/no/a.html", "written: there is no folder"),
    "compress nowhere": ("compress {run} --out {tmp}/no/a", "which cannot be written: there is no"),
    "decompress nowhere": ("decompress {run} {npz} --out {tmp}/no/a.npz", "there is no folder"),
    "decompress over files": (
        "decompress {run} {npz} --out {tmp}",
        "exists already: expected a new folder, or a file name ending in .npz or .npy",
    ),
    "summary of no run": ("summary {npz}", "is not a run directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_code_2(case, run_dir, many, npz, tmp_path, capsys):
    arguments, says = WRONG[case]
    images = np.random.default_rng(0).random((30, 4, 4))
    images[1, 2, 2] = np.nan
    np.savez(tmp_path / "nan.npz", x_train=images, x_test=images[2:])
    np.save(tmp_path / "flat.npy", images[0, 0])
    places = {"tmp": tmp_path, "npz": npz, "run": run_dir, "many": many}
    np.savez(tmp_path / "bare.npz", x_train=images[2:], x_test=images[2:])
    places |= {name: tmp_path / f"{name}.npz" for name in ("nan", "bare")}
    places |= {"flat": tmp_path / "flat.npy"}
    capsys.readouterr()
    assert main(arguments.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("jaxvae: ")
    assert says in captured.err
    assert not (tmp_path / "x").exists()


words = st.one_of(
    st.sampled_from([*FLAGS, "--seeds", "--resume", "--run-dir", "train", "sample", "--", "-1"]),
    st.sampled_from(["nan", "inf", "-0", "1e999", "0x10", "9" * 400, "\N{SNOWMAN}", "", " ", "\n"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20).filter(lambda text: "\0" not in text),
)


@hypothesis.given(st.lists(words, max_size=6))
@hypothesis.settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_command_lines_of_every_wrong_kind_end_in_one_line_and_code_2(capsys, tmp_path, given):
    """What would be right fails at last for want of the data."""
    capsys.readouterr()
    hypothesis.assume(not {"-h", "--help"} & set(given))
    missing = str(tmp_path / "missing.npz")
    assert main(["train", *given, "--data", missing, "--run-dir", str(tmp_path / "x")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("jaxvae: ")
    assert len(told.err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_model_too_large_for_the_machine_is_refused(npz, tmp_path, capsys):
    train = ["train", "--data", str(npz), "--run-dir", str(tmp_path / "x"), "--network", NETWORK]
    assert main([*train, "--latent-dim", "1000000000"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxvae: the model needs ")
    assert told.count("\n") == 1
    assert not (tmp_path / "x").exists()
