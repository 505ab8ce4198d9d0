"""Tables: CSV and Parquet files, with an example in each row."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from jaxvae.data.arrays import expect_memory, reading
from jaxvae.data.covariates import Covariates, column_names, expect_columns, with_covariates
from jaxvae.data.dataset import Dataset, number_classes, split_every_tenth
from jaxvae.errors import InputError
from jaxvae.storage import write_atomic

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MOST_HEADER = 2**24  # characters


def load_table(
    path: Path,
    label_column: str | None,
    covariates: Covariates = None,
    *,
    missing: bool = False,
    unlabelled: bool = False,
) -> Dataset:
    """Load a table of numbers: a .csv, .tsv or .parquet file.

    The first line of a text file is its header, unless all of its cells are numbers or empty; the
    columns are then named 1, 2, 3, ... Rows are counted from 1, without the header.

    Args:
      path: the file.
      label_column: name of the column of classes, whole numbers or text, which is not a part of
        the examples. Text is numbered in alphabetical order.
      covariates: columns of covariates, as for `with_covariates`, which are not a part of the
        examples either.
      missing: whether numbers may be missing: an empty cell, NaN or null, which becomes NaN.
      unlabelled: whether the column of classes may have empty cells, whose label is -1.

    Returns:
      The examples, float32 [N, columns], and the labels. Every tenth row is a test example.

    Raises:
      InputError: the file is damaged, a row has another number of cells than the first, or a cell
        holds no finite number.
    """
    with reading(path):
        table = _parquet(path) if path.suffix == ".parquet" else _text(path)
    names = [str(name) for name in table.column_names]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"{path} has two columns named {twice!r}: expected different names")
    if not table.num_rows:
        raise InputError(f"{path} has no rows: expected an example in each row")
    labels, of_labels = None, [] if label_column is None else [label_column]
    expect_columns(of_labels, names, path, "the label_column")
    expect_columns(column_names(covariates), names, path, "one of the covariate_columns")
    if label_column is not None:
        name = f"{path}, column {label_column!r}"
        labels = _labels(table[label_column], name, unlabelled=unlabelled)
    columns = {name: _values(table[name]) for name in column_names(covariates)}
    names = [name for name in names if name not in (*of_labels, *columns)]
    if not names:
        raise InputError(f"{path} has no column of numbers: expected at least one")
    with reading(path):
        expect_memory(4 * table.num_rows * len(names))
        examples = np.empty((table.num_rows, len(names)), np.float32)
    for i, name in enumerate(names):
        examples[:, i] = _numbers(table[name], name, path, missing=missing)
    data = split_every_tenth(examples, labels)._replace(columns=tuple(names))
    return with_covariates(data, columns, covariates, path)


def write_table(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with a row for each example, atomically.

    Args:
      path: an .npz file, which holds the arrays as they are; or a .csv or .parquet file, in which
        an array [N] is a column, and one [N, d] is d columns with _1, _2, ... after its name. As
        for `load_table`, a .csv file has no header if all names are numbers.
      arrays: [N, ...], by name.

    Raises:
      InputError: the file cannot be written.
    """
    suffix = path.suffix.lower()

    def write(file: BinaryIO) -> None:
        if suffix == ".npz":
            np.savez(file, **arrays)  # type: ignore[arg-type]
            return
        columns: dict[str, np.ndarray] = {}
        for name, x in arrays.items():
            each = {name: x} if x.ndim == 1 else {f"{name}_{i + 1}": c for i, c in enumerate(x.T)}
            columns |= {name: np.ascontiguousarray(c) for name, c in each.items()}
        table = pa.table(columns)
        if suffix == ".parquet":
            pa.parquet.write_table(table, file)
            return
        header = not all(map(_is_number, columns))
        pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=header))

    try:
        write_atomic(path, write)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def _parquet(path: Path) -> pa.Table:
    # A column can be far larger than its file, as that has a repeated value only once.
    with path.open("rb") as file:
        about = pa.parquet.ParquetFile(file)
        expect_memory(8 * about.metadata.num_rows * about.metadata.num_columns)
        return about.read()


def _text(path: Path) -> pa.Table:
    expect_memory(path.stat().st_size)
    delimiter = _DELIMITERS[path.suffix]
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = next(csv.reader([file.readline(_MOST_HEADER)], delimiter=delimiter), [])
    if not first:
        raise ValueError("its first line is empty: expected a header, or numbers")
    numbered = all(cell == "" or _is_number(cell) for cell in first)
    names = [str(i + 1) for i in range(len(first))] if numbered else None
    ragged: list[Any] = []

    def keep(row: Any) -> str:
        ragged.append(row)
        return "skip"

    # One thread, as several do not count the rows.
    table = pa.csv.read_csv(
        path,
        pa.csv.ReadOptions(column_names=names, use_threads=False),
        pa.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=keep),
    )
    if ragged:
        row = ragged[0]
        raise InputError(
            f"{path}, row {row.number - (not numbered)} has {row.actual_columns} cells: expected "
            f"{row.expected_columns}, as many as the first line"
        )
    return table


def _numbers(column: pa.ChunkedArray, name: str, path: Path, *, missing: bool) -> np.ndarray:
    """Convert a column to float32 numbers, which are finite or, with `missing`, NaN."""
    kind = column.type
    of_numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean,
                  pa.types.is_decimal, pa.types.is_null)  # fmt: skip
    if any(is_kind(kind) for is_kind in of_numbers):
        with np.errstate(over="ignore"):
            numbers = column.to_numpy().astype(np.float64).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(numbers) & ~(missing & np.isnan(numbers)))
        remedy = ""
    else:
        cells = column.to_pylist()
        bad = np.array([i for i, cell in enumerate(cells) if not _is_number(cell)] or [0])
        remedy = (
            "; if it is a column of classes, give its name as label_column (--label-column); of a "
            "covariate, as covariate_columns (--covariate-columns)"
        )
    if not bad.size:
        return numbers
    cell = column[int(bad[0])].as_py()
    holds = "is empty or NaN" if cell is None or cell != cell else f"holds {cell!r}"
    raise InputError(
        f"{path}, row {bad[0] + 1}, column {name!r} {holds}: expected a finite number{remedy}"
    )


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column to numbers, in which NaN is missing, or to objects."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.to_numpy().astype(np.float64)
    return np.array(column.to_pylist(), object)


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _labels(column: pa.ChunkedArray, name: str, *, unlabelled: bool) -> np.ndarray:
    cells = column.to_pylist()
    empty = np.array([cell is None or cell == "" or cell != cell for cell in cells])
    if empty.any() and not unlabelled:
        raise InputError(
            f"{name}, row {np.argmax(empty) + 1} is empty: expected a class in every row"
        )
    labels = np.full(len(cells), -1, np.int64)
    if not empty.all():
        classes = np.asarray([cell for cell, no in zip(cells, empty, strict=True) if not no])
        if empty.any() and classes.dtype.kind == "f" and (classes == classes.round()).all():
            classes = classes.astype(np.int64)  # whole numbers beside empty cells are floats
        labels[~empty] = number_classes(classes, name)
    return labels
