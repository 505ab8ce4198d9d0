"""A whole run on vectors from the command line, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from conftest import refused

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.data import load_dataset
from jaxvae.interchange.export import load_safetensors
from jaxvae.runs.config import read_config
from jaxvae.runs.files import read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")

VECTORS = ["--network", "mlp:width=8", "--likelihood", "gaussian"]


@pytest.fixture(scope="module")
def keep_no_programs():
    """Leaves this process's settings and the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """300 rows of two classes, whose means differ."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    lines = ["height,kind,weight,age"]
    for i, (a, b, c) in enumerate(rng.normal(size=(300, 3)) + 3 * (np.arange(300) % 2)[:, None]):
        lines.append(f"{a:.6f},{'ab'[i % 2]},{b:.6f},{c:.6f}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run_dir(keep_no_programs, tmp_path_factory, table):
    path = tmp_path_factory.mktemp("runs") / "run"
    train = ["train", "--data", str(table), "--label-column", "kind", "--run-dir", str(path)]
    train += ["--epochs", "1", "--optimizer", "adam", "--tensorboard"]
    assert main([*train, *VECTORS]) == 0
    return path


def test_train_says_how_the_rows_are_split_and_resume_goes_on(run_dir, table, tmp_path, capsys):
    assert read_config(run_dir).model.image_shape == (3,)
    assert main(["train", "--resume", "--run-dir", str(run_dir), "--epochs", "2"]) == 0
    said = capsys.readouterr().err
    assert "a.csv: 270 training and 30 test examples (every tenth, as there is no test" in said
    assert "examples/s" in said
    assert "explore" not in said
    assert "--out samples.npz" in said
    whole = tmp_path / "whole"
    train = ["train", "--data", str(table), "--label-column", "kind", "--run-dir", str(whole)]
    assert main([*train, *VECTORS, "--epochs", "2", "--optimizer", "adam"]) == 0
    ours, theirs = (read_metrics(path)[-1]["test"] for path in (run_dir, whole))
    assert ours == theirs


def test_evaluate_figures_and_export_of_vectors(run_dir, table, capsys):
    assert main(["evaluate", str(run_dir), "--num-samples", "5"]) == 0
    said = capsys.readouterr().out
    assert "30 test examples, nats per example" in said
    assert "mean squared error of a feature" in said
    assert "accuracy of logistic regression" in said
    data = load_dataset(str(table), label_column="kind")
    params = jaxvae.load(run_dir)
    found = json.loads((run_dir / "evaluation.json").read_text())
    error = np.mean((jaxvae.reconstruct(params, data.test_images) - data.test_images) ** 2)
    assert found["reconstruction_error"] == pytest.approx(float(error), rel=1e-4)

    assert main(["figures", str(run_dir)]) == 0
    drawn = {path.stem for path in (run_dir / "figures").iterdir()}
    assert drawn == {"latents", "aggregate", "units", "traversals", "training"}
    assert not (run_dir / "manifolds").exists()
    assert any((run_dir / "tensorboard").glob("events*"))

    assert main(["export", str(run_dir), "--to", "safetensors", "stablehlo"]) == 0
    back = load_safetensors(run_dir / "export" / "model.safetensors")
    np.testing.assert_array_equal(
        jaxvae.encode(back, data.test_images).mean, jaxvae.encode(params, data.test_images).mean
    )
    assert main(["summary", str(run_dir)]) == 0


def test_samples_are_numbers_in_a_file_which_is_a_data_set_again(run_dir, tmp_path, capsys):
    arrays = []
    for name in ("a.npz", "a.csv"):
        out = str(tmp_path / name)
        assert main(["sample", str(run_dir), "--n", "20", "--out", out]) == 0
        data = load_dataset(out)
        arrays.append(np.concatenate([data.test_images, data.train_images]))
    np.testing.assert_array_equal(*arrays)
    assert arrays[0].shape == (20, 3)
    assert np.ptp(arrays[0]) > 0


def test_a_sweep_of_conditional_models_of_vectors_with_few_labels(table, tmp_path, capsys):
    flags = ["--data", str(table), "--label-column", "kind", "--num-classes", "2", *VECTORS]
    flags += ["--classifier", "--objective", "m2", "--labelled", "4"]
    run = ["train", *flags, "--epochs", "1", "--run-dir", str(tmp_path / "many")]
    assert main([*run, "--seeds", "2"]) == 0
    said = capsys.readouterr().err
    assert (
        "4 training examples have a label: at least 13 of a batch, so each comes 6.5 time" in said
    )
    drawn = {path.stem for path in (tmp_path / "many/seed-1/figures").iterdir()}
    assert drawn == {"latents", "aggregate", "units", "traversals", "training"}


COVARIATES = ["--covariate-columns", "kind,age"]


@pytest.fixture(scope="module")
def with_covariates(keep_no_programs, tmp_path_factory, table):
    path = tmp_path_factory.mktemp("runs") / "covariates"
    train = ["train", "--data", str(table), "--run-dir", str(path), *COVARIATES, *VECTORS]
    assert main([*train, "--epochs", "1", "--conditions", "decoder"]) == 0
    return path


def test_a_run_with_covariates_resumes_and_encodes_other_data_as_its_own(
    with_covariates, table, tmp_path, capsys
):
    config = read_config(with_covariates)
    assert config.model.image_shape == (2,)
    assert (config.model.num_covariates, config.model.conditions) == (3, "decoder")
    assert [c.name for c in config.covariates] == ["kind", "age"]
    assert main(["train", "--resume", "--run-dir", str(with_covariates), "--epochs", "2"]) == 0
    whole = tmp_path / "whole"
    train = ["train", "--data", str(table), "--run-dir", str(whole), *COVARIATES, *VECTORS]
    assert main([*train, "--epochs", "2", "--conditions", "decoder"]) == 0
    ours, theirs = (read_metrics(path)[-1]["test"] for path in (with_covariates, whole))
    assert ours == theirs

    (tmp_path / "two.csv").write_text("height,kind,weight,age\n1,a,2,3\n3,b,4,5\n")
    two, out = str(tmp_path / "two.csv"), tmp_path / "out.csv"
    assert main(["reconstruct", str(whole), "--data", two, "--out", str(out)]) == 0
    of_age = config.covariates[1]
    age = (np.array([3, 5]) - of_age.mean) / of_age.std
    covariates = np.float32(np.column_stack([np.eye(2), age]))
    params, x = jaxvae.load(whole), np.float32([[1, 2], [3, 4]])
    expected = jaxvae.decode(params, jaxvae.encode(params, x).mean, covariates).mean
    found = load_dataset(str(out), covariate_columns=config.covariates)
    x = np.concatenate([found.test_images, found.train_images])
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    assert [list(column) for column in found.covariate_columns.values()] == [["a", "b"], [3, 5]]
    # The test rows are every tenth.
    impute = ["impute", str(whole), "--num-samples", "5", "--split", "test", "--out", str(out)]
    assert main(impute) == 0
    rows = [line.split(",") for line in table.read_text().splitlines()]
    written = [line.replace('"', "").split(",") for line in out.read_text().splitlines()]
    assert written[0] == ["height", "weight", "kind", "age"]
    assert [row[2] for row in written[1:]] == [row[1] for row in rows[1::10]]
    assert [float(row[3]) for row in written[1:]] == [float(row[3]) for row in rows[1::10]]
    for command in ("evaluate", "score", "encode"):
        words = [] if command == "evaluate" else ["--out", str(tmp_path / "any.npz")]
        words += [] if command == "encode" else ["--num-samples", "5"]
        assert main([command, str(whole), *words]) == 0
    (tmp_path / "two.csv").write_text("height,kind,weight,age\n1,a,2,3\n3,c,4,5\n")
    capsys.readouterr()
    assert main(["encode", str(whole), "--data", two, "--out", str(out)]) == 2
    assert "row 2, column 'kind' holds 'c': expected 'a' or 'b'" in capsys.readouterr().err


def test_a_run_that_starts_from_another_has_its_covariates(with_covariates, table, tmp_path):
    lines = table.read_text().splitlines()
    (tmp_path / "part.csv").write_text("\n".join([lines[0], *lines[100:250]]) + "\n")
    train = ["train", "--data", str(tmp_path / "part.csv"), *COVARIATES, *VECTORS, "--epochs", "1"]
    train += ["--conditions", "decoder", "--run-dir", str(tmp_path / "run")]
    assert main([*train, "--start-from", str(with_covariates)]) == 0
    ours, theirs = (read_config(path).covariates for path in (tmp_path / "run", with_covariates))
    assert ours == theirs


def test_samples_have_covariates_of_training_examples_or_those_given(
    with_covariates, table, tmp_path, capsys
):
    params, out = jaxvae.load(with_covariates), tmp_path / "a.csv"
    data = load_dataset(str(table), covariate_columns="kind,age")
    rows = data.train_covariates[np.random.default_rng(3).integers(270, size=6)]
    of_b = rows.copy()
    of_b[:, :2] = 0, 1
    sample = ["sample", str(with_covariates), "--n", "6", "--seed", "3", "--out", str(out)]
    for words, covariates in (([], rows), (["--covariates", "kind=b"], of_b)):
        assert main([*sample, *words]) == 0
        expected = jaxvae.sample(params, jax.random.key(3), 6, covariates)
        np.testing.assert_allclose(np.loadtxt(out, delimiter=","), expected, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main([*sample, "--covariates", "kind=c"]) == 2
    assert "column 'kind' holds 'c': expected 'a' or 'b'" in capsys.readouterr().err
    for given in ("kind=a,kind=b", "kind=a,", ","):
        assert main([*sample, "--covariates", given]) == 2
        assert f"--covariates is '{given}': expected NAME=VALUE,NAME" in capsys.readouterr().err
    assert main([*sample, "--covariates", "age=1e39"]) == 2
    assert "column 'age' holds 1e+39: expected a number near" in capsys.readouterr().err


WRONG = {
    "a network for images": (
        ["train", "--data", "TABLE", "--likelihood", "gaussian"],
        "the network 'conv' is for images", "choose 'mlp'",
    ),
    "values beyond the likelihood's": (
        ["train", "--data", "TABLE", "--network", "mlp"],
        "a.csv has values from -", "expected numbers between 0 and 1", "'gaussian'",
    ),
    "binarization": (
        ["train", "--data", "TABLE", *VECTORS, "--binarization", "dynamic"],
        "binarization is 'dynamic'", "a.csv does not hold images", "expected 'none'",
    ),
    "a cell that is no number": (
        ["train", "--data", "BAD", *VECTORS], "bad.csv, row 2, column 'b' holds 'x'"
    ),
    "a text column": (
        ["train", "--data", "TABLE", *VECTORS, "--label-column", "age"],
        "a.csv, column 'age' holds labels",
    ),
    "a picture of vectors": (
        ["sample", "RUN", "--n", "2", "--out", "a.png"], "a.png: expected a file name ending in .n"
    ),
    "an explorer of vectors": (
        ["explore", "RUN", "--out", "a.html"], "the explorer shows images", "(3,)"
    ),
    "other data": (["evaluate", "RUN", "--data", "TWO"], "has no column 'kind'"),
    "conditions without covariates": (
        ["train", "--data", "TABLE", *VECTORS, "--conditions", "encoder"],
        "conditions is 'encoder', but the model has no classes and no covariates",
    ),
    "covariates and classes": (
        ["train", "--data", "TABLE", *VECTORS, "--covariate-columns", "age", "--num-classes", "2"],
        "num_classes is 2 and num_covariates 1: expected one of them to be 0",
    ),
    "covariates of a run without": (
        ["sample", "RUN", "--n", "2", "--out", "a.csv", "--covariates", "age=3"],
        "--covariates was given, but the model has no covariates",
    ),
    "covariates of images": (
        ["train", "--covariate-columns", "age"], "covariate_columns is 'age', but mnist-5k is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_code_2(
    case, run_dir, table, tmp_path, capsys, monkeypatch
):
    words, *says = WRONG[case]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n3,x\n")
    (tmp_path / "two.csv").write_text("a,b\n1,2\n3,4\n")
    monkeypatch.chdir(tmp_path)
    places = {"TABLE": table, "BAD": "bad.csv", "TWO": "two.csv", "RUN": run_dir}
    if words[:3] == ["train", "--data", "TABLE"] and "--label-column" not in words:
        words = [*words, "--label-column", "kind"]
    assert main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for text in says:
        assert text in error


def test_fit_takes_vectors_and_sources(table):
    data = load_dataset(str(table), label_column="kind")
    model = jaxvae.ModelConfig(network="mlp:width=8", likelihood="gaussian")
    train = jaxvae.TrainConfig(batch_size=32, epochs=1)
    rows = [*map(tuple, zip(data.train_images, data.train_labels.tolist(), strict=True))]

    class Source:
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            return rows[i]

    results = [
        jaxvae.fit(given, model, train, progress=False).history
        for given in (data.train_images, Source())
    ]
    assert results[0][0]["test"] == results[1][0]["test"]
    with refused("the data has values from", "'gaussian'"):
        jaxvae.fit(data.train_images, jaxvae.ModelConfig(network="mlp"), train, progress=False)
