"""CSV and Parquet files: what is read, and what is refused in one line."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import refused

from jaxvae import load_data
from jaxvae.data import load_dataset
from jaxvae.data.tables import load_table, write_table

ROWS = np.arange(40, dtype=np.float32).reshape(20, 2) / 4
KINDS = ["b", "a", "c", "a"] * 5


def write(path, rows, header="x,y", delimiter=","):
    lines = [header] if header else []
    lines += [delimiter.join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [("a.csv", "x,y", ","), ("a.csv", "x,2", ","), ("a.csv", "", ","), ("a.tsv", "x\ty", "\t")],
)
def test_each_row_is_an_example_and_every_tenth_is_held_out(tmp_path, name, header, delimiter):
    path = write(tmp_path / name, ROWS, header, delimiter)
    data = load_dataset(path)
    assert data.every_tenth
    assert data.train_images.dtype == data.test_images.dtype == np.float32
    np.testing.assert_array_equal(data.test_images, ROWS[::10])
    np.testing.assert_array_equal(data.train_images, np.delete(ROWS, [0, 10], axis=0))
    assert data.train_labels is None


def test_parquet_holds_the_same(tmp_path):
    columns = {
        "x": pa.array(ROWS[:, 0], pa.float32()),
        "n": pa.array(range(20), pa.int8()),
        "yes": pa.array([True, False] * 10),
        "kind": pa.array(KINDS).dictionary_encode(),
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    (_, labels), (test, test_labels) = load_data(path, labels=True, label_column="kind")
    np.testing.assert_array_equal(test, [[ROWS[0, 0], 0, 1], [ROWS[10, 0], 10, 1]])
    numbered = ["abc".index(kind) for kind in KINDS]
    np.testing.assert_array_equal(labels, np.delete(numbered, [0, 10]))
    np.testing.assert_array_equal(test_labels, [1, 2])
    with refused("a.parquet, row 1, column 'kind' holds 'b': expected a finite number"):
        load_data(path)


@pytest.mark.parametrize("kinds", [KINDS, [3, 0, 1, 2] * 5])
def test_an_empty_class_is_no_label_where_that_is_allowed(tmp_path, kinds):
    cells = ["" if i in (0, 7) else kind for i, kind in enumerate(kinds)]
    rows = [(x, kind, y) for (x, y), kind in zip(ROWS, cells, strict=True)]
    path = write(tmp_path / "a.csv", rows, "x,kind,y")
    with refused("column 'kind', row 1 is empty: expected a class in every row"):
        load_dataset(path, label_column="kind")
    data = load_dataset(path, label_column="kind", unlabelled=True)
    numbers = np.unique(kinds, return_inverse=True)[1]
    numbers[[0, 7]] = -1
    np.testing.assert_array_equal(data.test_labels, numbers[::10])
    np.testing.assert_array_equal(data.train_labels, np.delete(numbers, [0, 10]))


@pytest.mark.parametrize(
    ("classes", "labels"), [(KINDS, [1, 2]), (range(5, 25), [5, 15]), ([True] * 20, [1, 1])]
)
def test_a_named_column_has_the_labels(tmp_path, classes, labels):
    rows = [(x, kind, y) for (x, y), kind in zip(ROWS, classes, strict=True)]
    path = write(tmp_path / "a.csv", rows, "x,kind,y")
    data = load_dataset(path, label_column="kind")
    np.testing.assert_array_equal(data.test_images, ROWS[::10])
    np.testing.assert_array_equal(data.test_labels, labels)
    assert data.train_labels.dtype == np.int64


def test_a_column_without_a_header_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "a.csv", [(*row, 3) for row in ROWS], "")
    assert set(load_dataset(path, label_column="3").train_labels) == {3}


WRONG = {
    "text": ("x,y\n1,2\n3,red\n", "a.csv, row 2, column 'y' holds 'red'", "--label-column"),
    "an empty cell": ("x,y\n1,2\n3,4\n,6\n", "a.csv, row 3, column 'x' is empty or NaN"),
    "NaN": ("x,y\n1,nan\n", "a.csv, row 1, column 'y' is empty or NaN"),
    "infinity": ("1,2\n3,inf\n", "a.csv, row 2, column '2' holds inf: expected a finite number"),
    "beyond float32": ("x,y\n1,2\n1e39,2\n", "a.csv, row 2, column 'x' holds 1e+39"),
    "an empty column": ("x,y\n1,\n2,\n", "a.csv, row 1, column 'y' is empty or NaN"),
    "a date": ("x,y\n1,2020-01-01\n", "a.csv, row 1, column 'y' holds", "expected a finite number"),
    "a row too short": ("x,y\n1,2\n3\n", "a.csv, row 2 has 1 cells: expected 2"),
    "a row too long": ("1,2\n3,4\n5,6,7\n", "a.csv, row 3 has 3 cells: expected 2"),
    "a column twice": ("x,x\n1,2\n", "a.csv has two columns named 'x'"),
    "a header alone": ("x,y\n", "a.csv has no rows"),
    "one row": ("x,y\n1,2\n", "a.csv has no train examples: expected at least one"),
    "nothing": ("", "a.csv cannot be read: its first line is empty"),
    "no text": ("x,y\n1,\xff\n".encode("latin-1"), "a.csv"),
    "a binary file": (bytes(range(256)) * 9, "a.csv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_table_of_numbers_is_refused_by_row_and_column(tmp_path, case):
    content, *says = WRONG[case]
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(*says):
        load_data(str(path))


def test_wrong_label_columns_are_refused(tmp_path, npz):
    rows = [(x, y, kind) for (x, y), kind in zip(ROWS, [*KINDS[:-1], ""], strict=True)]
    path = write(tmp_path / "a.csv", rows, "x,y,kind")
    with refused("a.csv has no column 'colour'", "expected one of x, y, kind"):
        load_data(path, label_column="colour")
    with refused("a.csv, column 'kind', row 20 is empty: expected a class in every row"):
        load_data(path, label_column="kind")
    with refused("a.csv, column 'x' holds labels", "float64", "expected one whole number"):
        load_data(write(tmp_path / "a.csv", ROWS), label_column="x")
    for name in (str(npz), "mnist-5k"):
        with refused("label_column is 'kind'", "leave it out"):
            load_data(name, label_column="kind")


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-9] + bytes(9)])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"x": [1.0, 2.0]}), path)
    path.write_bytes(damage(path.read_bytes()))
    with refused("a.parquet cannot be read"):
        load_data(str(path))


def test_a_parquet_file_of_more_numbers_than_memory_holds_is_refused(tmp_path, monkeypatch):
    pa.parquet.write_table(pa.table({"x": np.zeros(100_000)}), tmp_path / "a.parquet")
    monkeypatch.setattr("jaxvae.data.arrays.memory", lambda: 100_000)
    with refused("a.parquet cannot be read: it would take 800,000 bytes"):
        load_data(str(tmp_path / "a.parquet"))


def test_numpy_files_hold_vectors_too(tmp_path):
    np.save(tmp_path / "a.npy", ROWS.astype(np.float64))
    np.savez(tmp_path / "a.npz", x_train=ROWS, y_train=range(20), x_test=ROWS[:3], y_test=range(3))
    np.savez(tmp_path / "b.npz", images=ROWS.astype(int), labels=range(20))
    assert load_dataset(str(tmp_path / "a.npy")).every_tenth
    np.testing.assert_array_equal(load_data(str(tmp_path / "a.npy"))[1], ROWS[::10])
    data = load_dataset(str(tmp_path / "a.npz"))
    assert not data.every_tenth
    np.testing.assert_array_equal(data.test_images, ROWS[:3])
    train, _ = load_data(str(tmp_path / "b.npz"))
    assert train.dtype == np.float32
    assert train.shape == (18, 2)
    np.save(tmp_path / "c.npy", np.where(ROWS == 3, np.nan, ROWS))
    with refused("c.npy: train example 5 holds NaN or infinity"):
        load_data(str(tmp_path / "c.npy"))
    np.save(tmp_path / "d.npy", np.arange(5))
    with refused("d.npy holds images of shape (5,)", "(examples, features)"):
        load_data(str(tmp_path / "d.npy"))


def test_missing_numbers_are_nan_where_they_are_allowed(tmp_path):
    cells = [[1, None, 3], [None, 5.5, 6], [7, float("nan"), 9]]
    (tmp_path / "a.csv").write_text("1,,3\n,5.5,6\n7,NaN,9\n")
    columns = {str(i + 1): pa.array([row[i] for row in cells]) for i in range(3)}
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        data = load_table(tmp_path / name, None, missing=True)
        assert data.columns == ("1", "2", "3")
        rows = np.concatenate([data.test_images, data.train_images])
        np.testing.assert_array_equal(rows, np.array(cells, np.float32))
        with refused(f"{name}, row 2, column '1' is empty or NaN"):
            load_table(tmp_path / name, None)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,inf\n")
    with refused("row 2, column 'b' holds inf"):
        load_table(tmp_path / "a.csv", None, missing=True)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_written_table_is_read_again(name, tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    path = tmp_path / name
    write_table(path, {"x": x, "kind": np.arange(30)})
    data = load_table(path, "kind")
    assert data.columns == ("x_1", "x_2")
    np.testing.assert_array_equal(data.test_images, x[::10])
    np.testing.assert_array_equal(data.test_labels, [0, 10, 20])
    write_table(path, {"1": x[:, 0], "2": x[:, 1]})
    np.testing.assert_array_equal(load_table(path, None).test_images, x[::10])
    with refused("cannot be written"):
        write_table(tmp_path / "none" / name, {"x": x})
