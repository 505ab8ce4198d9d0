"""Columns of covariates: as numbers, from every source, and what is refused in one line."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import refused

from jaxvae.data import as_dataset, load_dataset
from jaxvae.data.covariates import Covariate, rows_with

N = 30
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(N, 2)).round(3))
AGE = RNG.normal(40, 9, N).round(2)
BATCH = np.array(["b1", "b0", "b2"])[np.arange(N) % 3]
DONOR = np.arange(N) % 2 + 7
TRAIN = np.arange(N) % 10 != 0


def expected(train=TRAIN):
    """By hand: one-hot batches, the standardised age, one-hot donors."""
    age = (AGE - AGE[train].mean()) / AGE[train].std()
    batch = BATCH[:, None] == ["b0", "b1", "b2"]
    return np.column_stack([batch, age, DONOR[:, None] == [7, 8]]).astype(np.float32)


def csv(path, **columns):
    columns = {"x": X[:, 0], "batch": BATCH, "age": AGE, "y": X[:, 1], "donor": DONOR} | columns
    rows = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def parquet(path):
    columns = {"x": X[:, 0], "batch": BATCH, "age": AGE, "y": X[:, 1], "donor": DONOR}
    columns["batch"] = pa.array(list(BATCH)).dictionary_encode()
    pa.parquet.write_table(pa.table(columns), path)
    return str(path)


def npz(path):
    np.savez(path, images=X, batch=BATCH, age=AGE, donor=DONOR)
    return str(path)


def h5ad(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["X"] = X
        file["obs/age"], file["obs/donor"] = AGE, DONOR
        group = file.create_group("obs/batch")
        group["categories"] = ["b1", "b0", "b2"]
        group["codes"] = np.int8(np.arange(N) % 3)
    return str(path)


SOURCES = {"a.csv": csv, "a.parquet": parquet, "a.npz": npz, "a.h5ad": h5ad}
COLUMNS = "batch,age, donor:categorical"


@pytest.mark.parametrize("name", SOURCES)
def test_numbers_are_standardised_and_text_is_one_hot(tmp_path, name):
    data = load_dataset(SOURCES[name](tmp_path / name), covariate_columns=COLUMNS)
    np.testing.assert_array_equal(data.train_images, X[TRAIN])
    assert data.columns in (None, ("x", "y"))
    for found, rows in ((data.train_covariates, TRAIN), (data.test_covariates, ~TRAIN)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected()[rows], rtol=1e-5, atol=1e-6)
    assert list(data.covariate_columns) == ["batch", "age", "donor"]
    for name, values in (("batch", BATCH), ("age", AGE)):
        np.testing.assert_array_equal(data.covariate_columns[name], values)


def test_an_npz_file_with_a_split_has_the_training_examples_first(tmp_path):
    first = np.arange(N) < 20
    parts = {"x": X, "batch": BATCH, "age": AGE, "donor": DONOR}
    arrays = {f"{name}_train": x[first] for name, x in parts.items()}
    arrays |= {f"{name}_test": x[~first] for name, x in parts.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_dataset(str(tmp_path / "a.npz"), covariate_columns=COLUMNS)
    np.testing.assert_allclose(data.train_covariates, expected(first)[first], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.test_covariates, expected(first)[~first], rtol=1e-5, atol=1e-6)


def test_other_data_are_encoded_as_the_training_data_were(tmp_path):
    covariates = load_dataset(csv(tmp_path / "a.csv"), covariate_columns=COLUMNS).covariates
    assert [Covariate.from_dict(c.to_dict()) for c in covariates] == list(covariates)
    other = csv(tmp_path / "b.csv", batch=["b2"] * N, age=AGE + 1000)
    data = load_dataset(other, covariate_columns=covariates)
    np.testing.assert_array_equal(data.test_covariates[:, :3], np.tile([0, 0, 1], (3, 1)))
    age = (AGE + 1000 - AGE[TRAIN].mean()) / AGE[TRAIN].std()
    np.testing.assert_allclose(data.train_covariates[:, 3], age[TRAIN], rtol=1e-5)


def test_a_constant_column_is_zero(tmp_path):
    data = load_dataset(csv(tmp_path / "a.csv", age=[3] * N), covariate_columns="age,batch")
    assert not data.train_covariates[:, 0].any()


@pytest.mark.parametrize(
    ("columns", "given", "says"),
    [
        ({}, "sex", "a.csv has no column 'sex', one of the covariate_columns: expected one of x,"),
        ({}, "age,,batch", "covariate_columns is 'age,,batch': expected different names"),
        ({}, "age,age", "covariate_columns is 'age,age': expected different names"),
        (
            {"age": [*AGE[:5], "", *AGE[6:]]},
            "age,batch",
            "a.csv, row 6, column 'age' is empty, NaN or",
        ),
        ({"batch": ["", *BATCH[1:]]}, "batch", "a.csv, row 1, column 'batch' is empty, NaN or"),
        ({"batch": ["q", *BATCH[1:]]}, "batch", "row 1, column 'batch' holds 'q': expected 'b0'"),
        ({"batch": ["q"] * N}, (Covariate("batch"),), "'batch' holds 'q': expected numbers, as in"),
    ],
)
def test_what_is_refused(tmp_path, columns, given, says):
    path = csv(tmp_path / "a.csv", **columns)
    with refused(says):
        load_dataset(path, covariate_columns=given)


def test_sources_without_columns_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "a.npz", images=X, age=AGE[:5])
    for name in ("mnist-5k", str(tmp_path / "a.npy")):
        with refused(f"covariate_columns is 'age', but {name} is not a .csv"):
            load_dataset(name, covariate_columns="age")
    with refused("a.npz has no batch: expected an array of shape (30,), a covariate of each"):
        load_dataset(str(tmp_path / "a.npz"), covariate_columns="batch")
    with refused("a.npz has shape (5,) of age: expected an array of shape (30,)"):
        load_dataset(str(tmp_path / "a.npz"), covariate_columns="age")


def test_labels_of_two_axes_are_covariates():
    c = RNG.normal(size=(N, 2))
    data = as_dataset(((X, c), (X[:4], c[:4])))
    assert data.train_labels is None
    np.testing.assert_array_equal(data.test_covariates, np.float32(c[:4]))
    with refused("the test covariates are of shape (4, 1): expected shape (4, covariates)"):
        as_dataset(((X, c), (X[:4], c[:4, :1])))
    with refused("the test covariates are missing"):
        as_dataset(((X, c), X[:4]))
    with refused("test covariate 1 holds NaN"):
        as_dataset(((X, c), (X[:4], np.where(np.arange(4)[:, None] == 1, np.nan, c[:4]))))


def test_values_are_given_by_name_in_every_row():
    covariates = Covariate("batch", categories=("a", "b")), Covariate("age", 40.0, 10.0)
    rows = np.float32([[1, 0, 0.3], [0, 1, -2]])
    found = rows_with(rows, covariates, {"batch": "b"})
    np.testing.assert_array_equal(found, np.float32([[0, 1, 0.3], [0, 1, -2]]))
    found = rows_with(rows, covariates, {"age": "55", "batch": "a"})
    np.testing.assert_array_equal(found, [[1, 0, 1.5], [1, 0, 1.5]])
    with refused("covariates has 'sex': expected 'batch' or 'age'"):
        rows_with(rows, covariates, {"sex": "f"})
    with refused("column 'batch' holds 'c': expected 'a' or 'b'"):
        rows_with(rows, covariates, {"batch": "c"})
    with refused("column 'age' holds 'old': expected numbers"):
        rows_with(rows, covariates, {"age": "old"})
    with refused("the run has no covariate columns"):
        rows_with(rows, (), {"age": "1"})
