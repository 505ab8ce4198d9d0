"""AnnData files (.h5ad), read by h5py."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxvae.data.arrays import expect_memory, reading
from jaxvae.data.covariates import Covariates, column_names, expect_columns, with_covariates
from jaxvae.data.dataset import Dataset, number_classes, split_every_tenth
from jaxvae.errors import InputError


def load_h5ad(
    path: Path,
    label_column: str | None,
    covariates: Covariates = None,
    *,
    missing: bool = False,
    unlabelled: bool = False,
) -> Dataset:
    """Load the matrix X of an AnnData file, dense or sparse (CSR or CSC).

    Args:
      path: the file.
      label_column: name of the column of `obs` with the classes: a categorical, text or whole
        numbers.
      covariates: columns of `obs`, as for `with_covariates`.
      missing: whether X may hold NaN, as the mark of missing entries.
      unlabelled: whether categories may be missing, whose label is -1.

    Returns:
      The rows of X as examples, float32 [N, columns], and the labels. Every tenth row is a test
      example.

    Raises:
      InputError: h5py is missing; the file is damaged, X holds NaN or infinity, or there is no
        such column.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(
            f"{path} is an AnnData file, but h5py is not installed: pip install h5py"
        ) from None
    with reading(path), h5py.File(path, "r") as file:
        examples = _matrix(_own(file, "X"))
        labels, columns = None, dict[str, np.ndarray]()
        if label_column is not None:
            labels = _labels(_own(file, "obs"), label_column, path, unlabelled=unlabelled)
        if names := column_names(covariates):
            columns = _columns(_own(file, "obs"), names, path)
    bad = np.argwhere(~np.isfinite(examples) & ~(missing & np.isnan(examples)))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{path}, row {row + 1}, column {column + 1} of X is NaN or infinite: expected a "
            "finite number"
        )
    return with_covariates(split_every_tenth(examples, labels), columns, covariates, path)


def _own(group: Any, name: str) -> Any:
    """Return a member of a group of the file, which must not be in another file."""
    import h5py

    if name not in group:
        raise ValueError(f"it has no {name!r}: expected an AnnData file")
    member = group[name]
    elsewhere = not isinstance(group.get(name, getlink=True), h5py.HardLink)
    if isinstance(member, h5py.Dataset):
        elsewhere |= bool(member.external) or member.is_virtual
    if elsewhere:
        raise ValueError(f"its {name!r} is in another place: expected the data themselves")
    return member


def _matrix(x: Any) -> np.ndarray:
    """Read a dense or sparse matrix as float32 [rows, columns]."""
    if not hasattr(x, "keys"):  # not a group
        if x.ndim != 2 or x.dtype.kind not in "biuf":
            raise ValueError(f"its X has shape {x.shape} and type {x.dtype}: expected a matrix")
        expect_memory(4 * x.size)
        return x.astype(np.float32)[:]
    from scipy import sparse

    kinds = {"csr_matrix": sparse.csr_matrix, "csc_matrix": sparse.csc_matrix}
    kind = x.attrs.get("encoding-type", x.attrs.get("h5sparse_format", "") + "_matrix")
    if kind not in kinds:
        raise ValueError(f"its X is stored as {kind!r}: expected a dense, CSR or CSC matrix")
    shape = tuple(int(n) for n in x.attrs.get("shape", x.attrs.get("h5sparse_shape")))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"its X has shape {shape}: expected a matrix")
    parts = [_own(x, name) for name in ("data", "indices", "indptr")]
    expect_memory(4 * shape[0] * shape[1] + sum(part.nbytes for part in parts))
    matrix = kinds[kind](tuple(part[:] for part in parts), shape=shape)
    matrix.check_format(full_check=True)  # indices within the shape
    return matrix.astype(np.float32).toarray()


def _labels(obs: Any, name: str, path: Path, *, unlabelled: bool) -> np.ndarray:
    """Read a column of `obs` as class numbers."""
    expect_columns([name], _names(obs), path, "the label_column", " in obs")
    column = _own(obs, name)
    if not hasattr(column, "keys"):
        text = column.dtype.kind == "O"
        return number_classes(column.asstr()[:] if text else column[:], f"{path}, column {name!r}")
    codes = _own(column, "codes")[:]
    if (missing := np.flatnonzero(codes < 0)).size and not unlabelled:
        raise InputError(
            f"{path}, row {missing[0] + 1}, column {name!r} of obs is missing: expected a class in "
            "every row"
        )
    return codes.astype(np.int64)


def _columns(obs: Any, names: tuple[str, ...], path: Path) -> dict[str, np.ndarray]:
    """Read columns of `obs` as numbers or objects; missing categories are None."""
    expect_columns(names, _names(obs), path, "one of the covariate_columns", " in obs")
    found = {}
    for name in names:
        column = _own(obs, name)
        if not hasattr(column, "keys"):
            found[name] = column.asstr()[:] if column.dtype.kind == "O" else column[:]
            continue
        categories = _own(column, "categories")
        text = categories.asstr()[:] if categories.dtype.kind == "O" else categories[:].astype(str)
        named = np.array([*text, None], object)
        found[name] = named[np.where((codes := _own(column, "codes")[:]) < 0, -1, codes)]
    return found


def _names(obs: Any) -> list[str]:
    return sorted(getattr(obs, "keys", tuple)())
