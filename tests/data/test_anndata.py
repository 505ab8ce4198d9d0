"""AnnData files: dense and sparse matrices, labels, and what is refused in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from scipy import sparse

from jaxvae import load_data
from jaxvae.data import load_dataset

h5py = pytest.importorskip("h5py")

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(0.7, (20, 6))
SMFISH = Path(__file__).parents[2].parent / "shared/data/smfish.h5ad"


def write(path, x, **obs):
    with h5py.File(path, "w") as file:
        if sparse.issparse(x):
            group = file.create_group("X")
            group.attrs.update({"encoding-type": f"{x.format}_matrix", "shape": x.shape})
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(x, name)
        else:
            file["X"] = x
        for name, column in obs.items():
            if isinstance(column, tuple):
                group = file.create_group(f"obs/{name}")
                group["categories"], group["codes"] = column
            else:
                file[f"obs/{name}"] = column
    return str(path)


@pytest.mark.parametrize(
    "stored",
    [np.asarray, np.float64, sparse.csr_matrix, sparse.csc_matrix],
    ids=["integers", "floats", "CSR", "CSC"],
)
def test_the_rows_of_x_are_the_examples(tmp_path, stored):
    data = load_dataset(write(tmp_path / "a.h5ad", stored(COUNTS)))
    assert data.every_tenth
    assert data.train_images.dtype == np.float32
    np.testing.assert_array_equal(data.test_images, COUNTS[::10])
    np.testing.assert_array_equal(data.train_images, np.delete(COUNTS, [0, 10], axis=0))


def test_a_column_of_obs_has_the_labels(tmp_path):
    codes = np.int8([2, 0, 1, 1] * 5)
    names = np.array(["x", "y", "z"], object)[codes]
    path = write(
        tmp_path / "a.h5ad", COUNTS, cell=(["x", "y", "z"], codes), text=names, batch=codes
    )
    for column in ("cell", "text", "batch"):
        data = load_dataset(path, label_column=column)
        np.testing.assert_array_equal(data.test_labels, codes[::10])
        assert data.train_labels.dtype == np.int64


@pytest.mark.skipif(not SMFISH.exists(), reason="the file of counts is not at hand")
def test_a_file_of_counts_as_anndata_writes_it():
    (train, labels), (test, _) = load_data(str(SMFISH), labels=True, label_column="str_labels")
    assert train.shape == (4077, 33)
    assert test.shape == (453, 33)
    assert np.array_equal(train, np.round(train))
    assert set(labels) == set(range(6))


def elsewhere(tmp_path):
    write(tmp_path / "other.h5ad", COUNTS)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["X"] = h5py.ExternalLink(tmp_path / "other.h5ad", "X")


def stored_outside(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(8 * 12))
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file.create_dataset("X", (4, 3), "f8", external=[(tmp_path / "raw", 0, 96)])


def of_kind(kind):
    def make(tmp_path):
        with h5py.File(write(tmp_path / "a.h5ad", sparse.csr_matrix(COUNTS)), "a") as file:
            file["X"].attrs["encoding-type"] = kind

    return make


def with_index(value):
    def make(tmp_path):
        with h5py.File(write(tmp_path / "a.h5ad", sparse.csr_matrix(COUNTS)), "a") as file:
            file["X/indices"][3] = value

    return make


WRONG = {
    "not HDF5": (lambda path: (path / "a.h5ad").write_text("x,y"), "a.h5ad cannot be read"),
    "without X": (lambda path: h5py.File(path / "a.h5ad", "w").close(), "it has no 'X'"),
    "a vector": (lambda path: write(path / "a.h5ad", COUNTS[0]), "its X has shape (6,)"),
    "text": (lambda path: write(path / "a.h5ad", [[b"a"]]), "expected a matrix"),
    "NaN": (
        lambda path: write(path / "a.h5ad", np.where(COUNTS == 3, np.nan, COUNTS)),
        "of X is NaN or infinite: expected a finite number",
    ),
    "a link to another file": (elsewhere, "its 'X' is in another place"),
    "numbers in another file": (stored_outside, "its 'X' is in another place"),
    "another encoding": (of_kind("awkward-array"), "stored as 'awkward-array': expected a dense"),
    "a column beyond the shape": (with_index(6), "a.h5ad cannot be read"),
    "a negative column": (with_index(-1), "a.h5ad cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_anndata_file_of_numbers_is_refused(tmp_path, case):
    make, says = WRONG[case]
    make(tmp_path)
    with refused("a.h5ad", says):
        load_data(str(tmp_path / "a.h5ad"))


def test_nan_is_told_by_its_row_and_column(tmp_path):
    x = COUNTS.astype(float)
    x[6, 2] = np.inf
    with refused("a.h5ad, row 7, column 3 of X is NaN or infinite"):
        load_data(write(tmp_path / "a.h5ad", x))


def test_a_sparse_matrix_larger_than_memory_is_refused(tmp_path):
    path = write(tmp_path / "a.h5ad", sparse.csr_matrix((10**5, 10**9), dtype=np.float32))
    with refused("it would take", "this machine's memory"):
        load_data(path)


def test_wrong_label_columns_are_refused(tmp_path):
    codes = np.int8([0, 1, -1, 1] * 5)
    path = write(tmp_path / "a.h5ad", COUNTS, cell=(["x", "y"], codes), share=np.linspace(0, 1, 20))
    with refused("a.h5ad has no column 'batch' in obs", "expected one of cell, share"):
        load_data(path, label_column="batch")
    with refused("a.h5ad, row 3, column 'cell' of obs is missing"):
        load_data(path, label_column="cell")
    with refused("column 'share' holds labels", "float64"):
        load_data(path, label_column="share")


def test_without_h5py_the_remedy_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5ad", COUNTS)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with refused("h5py is not installed", "pip install h5py"):
        load_data(path)
