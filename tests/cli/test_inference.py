"""The commands that apply a trained model to a data set, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.data import load_dataset
from jaxvae.data.tables import load_table
from jaxvae.figures import latents
from jaxvae.runs.config import read_config, run_keys
from jaxvae.runs.data import load_run_data
from jaxvae.runs.evaluation import measure

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_no_programs")

VECTORS = ["--network", "mlp:width=8", "--likelihood", "gaussian", "--epochs", "1"]


@pytest.fixture(scope="module")
def keep_no_programs():
    """Leaves this process's settings and the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        patch.setattr("jaxvae.runs.drawing.draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(150, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def of_vectors(keep_no_programs, tmp_path_factory, vectors):
    """A run on a table, 150 rows of two classes."""
    folder = tmp_path_factory.mktemp("vectors")
    rows = [f"{a},{'ab'[i % 2]},{b},{c}" for i, (a, b, c) in enumerate(vectors.tolist())]
    (folder / "a.csv").write_text("\n".join(["height,kind,weight,age", *rows]))
    train = ["train", "--data", str(folder / "a.csv"), "--label-column", "kind", *VECTORS]
    assert main([*train, "--batch-size", "32", "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def of_images(keep_no_programs, tmp_path_factory, npz):
    path = tmp_path_factory.mktemp("images") / "run"
    train = ["train", "--data", str(npz), "--network", "mlp:width=8", "--epochs", "1"]
    assert main([*train, "--run-dir", str(path)]) == 0
    return path


def test_encode_writes_latents_and_labels_in_the_order_of_the_file(
    of_vectors, vectors, tmp_path, capsys
):
    posterior = jaxvae.encode(jaxvae.load(of_vectors), vectors)
    for name in ("a.npz", "a.csv", "a.parquet"):
        out = tmp_path / name
        assert main(["encode", str(of_vectors), "--out", str(out)]) == 0
        assert f"{name}: 150 examples; mean [150, 2], log_var [150, 2]" in capsys.readouterr().out
        if name == "a.npz":
            with np.load(out) as found:
                assert set(found) == {"mean", "log_var", "labels"}
                columns = np.concatenate([found["mean"], found["log_var"]], axis=1)
                labels = found["labels"]
        else:
            data = load_table(out, "labels")
            assert data.columns == ("mean_1", "mean_2", "log_var_1", "log_var_2")
            columns, labels = np.empty((150, 4)), np.empty(150)
            test = np.arange(150) % 10 == 0
            columns[test], columns[~test] = data.test_images, data.train_images
            labels[test], labels[~test] = data.test_labels, data.train_labels
        np.testing.assert_array_equal(labels, np.arange(150) % 2)
        np.testing.assert_allclose(columns[:, :2], posterior.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(columns[:, 2:], posterior.log_var, rtol=1e-5, atol=1e-6)


def test_encode_takes_other_data_and_one_split(of_images, images, tmp_path):
    np.save(tmp_path / "x.npy", images)
    words = ["encode", str(of_images), "--data", str(tmp_path / "x.npy"), "--split", "test"]
    assert main([*words, "--best", "--out", str(tmp_path / "z.npz")]) == 0
    with np.load(tmp_path / "z.npz") as found:
        posterior = jaxvae.encode(jaxvae.load(of_images, "best"), images[::10])
        np.testing.assert_allclose(found["mean"], posterior.mean, rtol=1e-5, atol=1e-6)


def test_score_writes_a_sorted_table_and_prints_its_first_rows(of_vectors, tmp_path, capsys):
    out = tmp_path / "a.csv"
    assert main(["score", str(of_vectors), "--num-samples", "3", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 150 examples; the most unusual by log_likelihood:"
    assert len(said) == 7
    header, first, *_ = rows = out.read_text().replace('"', "").splitlines()
    assert len(rows) == 151
    assert said[1].split() == header.split(",")
    assert [*map(float, said[2].split())] == pytest.approx(
        [*map(float, first.split(","))], abs=1e-4
    )
    assert not out.with_suffix(".png").exists()


def test_score_of_images_agrees_with_evaluate_and_draws_the_extremes(of_images, tmp_path):
    out = tmp_path / "a.npz"
    words = ["score", str(of_images), "--split", "test", "--num-samples", "5"]
    assert main([*words, "--by", "reconstruction_error", "--out", str(out)]) == 0
    found = measure(of_images, 5)
    with np.load(out) as scores:
        means = {name: np.mean(scores[name]) for name in scores}
        assert np.all(np.diff(scores["reconstruction_error"]) <= 0)
    assert means["log_likelihood"] == pytest.approx(found["log_p_x"], rel=1e-5)
    assert means["elbo"] == pytest.approx(found["elbo"], rel=1e-5)
    assert means["kl"] == pytest.approx(found["kl"], rel=1e-4)
    assert means["reconstruction_error"] == pytest.approx(found["reconstruction_error"], rel=1e-4)
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.format == "PNG"


def test_reconstruct_writes_a_data_set_like_the_data(of_vectors, of_images, vectors, npz, tmp_path):
    means = jaxvae.reconstruct(jaxvae.load(of_vectors), vectors)
    out = str(tmp_path / "a.csv")
    assert main(["reconstruct", str(of_vectors), "--out", out]) == 0
    data = load_table(tmp_path / "a.csv", "kind")
    assert data.columns == ("height", "weight", "age")
    np.testing.assert_allclose(data.test_images, means[::10], rtol=1e-5, atol=1e-6)

    out = tmp_path / "a.npz"
    assert main(["reconstruct", str(of_images), "--split", "test", "--out", str(out)]) == 0
    test_images = load_dataset(str(npz)).test_images
    means = np.asarray(jaxvae.reconstruct(jaxvae.load(of_images), test_images))
    with np.load(out) as found:
        np.testing.assert_allclose(found["images"], means, atol=1e-5)
        assert len(found["labels"]) == 100

    out = tmp_path / "a.png"
    assert main(["reconstruct", str(of_images), "--split", "test", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        grid = np.asarray(picture)
    assert grid.shape == (80, 80)  # ten rows of ten
    np.testing.assert_allclose(grid[8:16, 16:24], 255 * means[12, ..., 0], atol=0.6)


def test_a_table_with_missing_cells_end_to_end(tmp_path, vectors, capsys):
    hidden = np.random.default_rng(1).random(vectors.shape) < 0.2
    hidden[:, 0] &= ~hidden.all(axis=1)
    rows = [
        ",".join("" if h else str(x) for x, h in zip(*row, strict=True))
        for row in zip(vectors.tolist(), hidden, strict=True)
    ]
    table, run = str(tmp_path / "a.csv"), str(tmp_path / "run")
    Path(table).write_text("\n".join(["a,b,c", *rows]))
    train = ["train", "--data", table, "--run-dir", run, "--batch-size", "32", *VECTORS]
    assert main(train) == 2
    assert "is empty or NaN: expected a finite number" in capsys.readouterr().err
    assert main([*train, "--objective", "miwae:num_samples=2"]) == 0
    assert main(["evaluate", run, "--num-samples", "5"]) == 0
    found = json.loads(Path(run, "evaluation.json").read_text())
    params, part = jaxvae.load(run), np.where(hidden, np.nan, vectors)
    key = run_keys(read_config(Path(run)))[1]
    log_px = jaxvae.log_likelihood(params, key, part[::10], 5)
    assert found["log_p_x"] == pytest.approx(float(np.mean(log_px)), rel=1e-4)
    assert np.isfinite(found["reconstruction_error"])

    out = tmp_path / "filled.csv"
    capsys.readouterr()
    assert main(["impute", run, "--num-samples", "50", "--out", str(out)]) == 0
    assert f"150 examples, {hidden.sum()} missing entries" in capsys.readouterr().out
    assert out.read_text().splitlines()[0] == '"a","b","c"'
    filled = np.loadtxt(out, delimiter=",", skiprows=1)
    expected = jaxvae.impute(params, key, part, 50).mean
    np.testing.assert_allclose(filled, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.float32(filled[~hidden]), vectors[~hidden])
    for command in ("encode", "score", "reconstruct"):
        assert main([command, run, "--out", str(tmp_path / f"{command}.npz")]) == 0
        with np.load(tmp_path / f"{command}.npz") as arrays:
            assert all(np.isfinite(arrays[name]).all() for name in arrays)
    (axes,) = latents(params, load_run_data(read_config(Path(run)))).axes
    assert np.isfinite(axes.collections[0].get_offsets()).all()


def test_masked_images_are_inpainted_and_scored_by_any_run(of_images, images, tmp_path, capsys):
    x = np.float32(images / 255)
    x[:, :3] = np.nan
    np.save(tmp_path / "x.npy", x)
    given = [str(of_images), "--data", str(tmp_path / "x.npy"), "--num-samples", "5"]
    out = tmp_path / "y.npz"
    assert main(["impute", *given, "--draws", "2", "--out", str(out)]) == 0
    assert "64 images, 1,536 missing entries" in capsys.readouterr().out
    with np.load(out) as found:
        np.testing.assert_array_equal(found["images"][:, 3:], x[:, 3:])
        assert np.all((found["images"] >= 0) & (found["images"] <= 1))
        assert found["draws"].shape == (2, 64, 8, 8, 1)
    assert main(["score", *given, "--out", str(tmp_path / "s.csv")]) == 0
    capsys.readouterr()
    assert main(["encode", *given[:3], "--out", str(out)]) == 2
    assert "train image 0 holds NaN or infinity" in capsys.readouterr().err


WRONG = {
    "a picture of latents": (
        ["encode", "RUN", "--out", "z.png"],
        "z.png: expected a file name ending in .npz, .csv or .parquet",
    ),
    "a picture of vectors": (
        ["reconstruct", "RUN", "--out", "x.png"],
        "x.png: expected a file name ending in .npz, .csv or .parquet, as the examples have shape",
    ),
    "no samples": (
        ["score", "RUN", "--num-samples", "0", "--out", "s.csv"],
        "--num-samples is 0: expected at least 1",
    ),
    "draws in a table": (
        ["impute", "RUN", "--draws", "2", "--out", "x.csv"],
        "--draws is 2, but --out is x.csv: expected a file name ending in .npz",
    ),
    "fewer draws than none": (
        ["impute", "RUN", "--draws", "-1", "--out", "x.npz"],
        "--draws is -1",
    ),
    "imputed images as a table": (["impute", "IMAGES", "--out", "x.csv"], "ending in .npz"),
    "no such folder": (
        ["encode", "RUN", "--out", "nowhere/z.npz"], "there is no folder nowhere; make it first"
    ),
    "data of another shape": (
        ["encode", "RUN", "--data", "TWO", "--out", "z.npz"], "two.csv holds examples of shape (",
    ),
    "the data themselves": (
        ["impute", "RUN", "--data", "TWO", "--out", "./two.csv"],
        "--out is two.csv, the file that is read: expected another name",
    ),
    "a folder": (
        ["encode", "RUN", "--out", "folder.csv"],
        "--out is folder.csv, which is a folder: expected a file name",
    ),
    "a table of images": (
        ["reconstruct", "IMAGES", "--out", "x.csv"],
        "x.csv: expected a file name ending in .npz or .png",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_code_2(
    case, of_vectors, of_images, tmp_path, capsys, monkeypatch
):
    words, *says = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.csv").write_text("a,kind,b\n1,x,2\n3,y,4\n")
    (tmp_path / "folder.csv").mkdir()
    places = {"RUN": of_vectors, "IMAGES": of_images, "TWO": "two.csv"}
    assert main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for text in says:
        assert text in error
    assert (tmp_path / "two.csv").read_text().startswith("a,kind,b")
