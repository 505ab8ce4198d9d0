"""Covariates: columns of a source on which a model is conditional, as numbers."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvae.components import Config
from jaxvae.data.dataset import Dataset
from jaxvae.errors import InputError, either, shown
from jaxvae.validation import is_number

_CATEGORICAL = ":categorical"


@dataclass(frozen=True)
class Covariate(Config):
    """How a column becomes numbers, by its values in the training examples.

    A column of numbers becomes (x - mean) / std. A column of categories becomes one-hot columns.

    Attributes:
      name: of the column.
      mean: mean of the numbers.
      std: their standard deviation, or 1 if it is 0.
      categories: the categories, sorted; none of a column of numbers.
    """

    name: str = ""
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"name is {shown(self.name)}: expected a string")
        for name in ("mean", "std"):
            if not is_number(getattr(self, name)):
                raise InputError(f"{name} is {shown(getattr(self, name))}: expected a number")
            object.__setattr__(self, name, float(getattr(self, name)))
        categories = self.categories
        if not isinstance(categories, tuple | list) or not all(
            isinstance(category, str) for category in categories
        ):
            raise InputError(f"categories is {shown(categories)}: expected a list of strings")
        object.__setattr__(self, "categories", tuple(categories))

    def encode(self, column: np.ndarray, subject: str) -> np.ndarray:
        """Return a column as float32 [N, 1], or [N, categories].

        Args:
          column: numbers or text, [N].
          subject: start of the error message: the source and a comma, or nothing.

        Raises:
          InputError: another category than those of the training examples, text instead of
            numbers, or an empty cell.
        """
        _expect_values(column, self.name, subject)
        if not self.categories:
            if not _of_numbers(column):
                raise InputError(
                    f"{subject}column {self.name!r} holds {str(column[0])!r}: expected numbers, as "
                    "in the training data"
                )
            scaled = (column - self.mean) / self.std
            large = np.flatnonzero(np.abs(scaled) > np.finfo(np.float32).max)
            if large.size:
                raise InputError(
                    f"{subject}column {self.name!r} holds {column[large[0]]:g}: expected a number "
                    f"near those of the training data, whose mean is {self.mean:g}"
                )
            return scaled.astype(np.float32)[:, None]
        text = _as_text(column)
        one_hot = text[:, None] == np.array(self.categories)
        unknown = np.flatnonzero(~one_hot.any(axis=1))
        if unknown.size:
            raise InputError(
                f"{subject}row {unknown[0] + 1}, column {self.name!r} holds "
                f"{str(text[unknown[0]])!r}: expected {either(self.categories)}, the categories of "
                "the training examples"
            )
        return one_hot.astype(np.float32)


def rows_with(
    rows: np.ndarray, covariates: Sequence[Covariate], given: Mapping[str, str]
) -> np.ndarray:
    """Return covariates in which some columns have a given value in every row.

    Args:
      rows: float32 [N, covariates].
      covariates: how the columns of the source became them.
      given: a number or a category for the name of a column.

    Returns:
      The covariates.

    Raises:
      InputError: another name, or a value that the column cannot have.
    """
    names = [covariate.name for covariate in covariates]
    if unknown := sorted(set(given) - set(names)):
        raise InputError(
            f"covariates has {unknown[0]!r}: expected {either(tuple(names))}"
            if names
            else "covariates were given, but the run has no covariate columns: leave them out"
        )
    parts = np.split(rows, np.cumsum([len(c.categories) or 1 for c in covariates])[:-1], axis=1)
    for i, covariate in enumerate(covariates):
        if (value := given.get(covariate.name)) is not None:
            column = np.array([value])
            if not covariate.categories:
                with suppress(ValueError):
                    column = column.astype(np.float64)
            parts[i] = np.repeat(covariate.encode(column, "covariates: "), len(rows), axis=0)
    return np.concatenate(parts, axis=1)


Covariates = str | Sequence[Covariate] | None


def column_names(covariates: Covariates) -> tuple[str, ...]:
    """Return the names of the columns, given as text or as the covariates of a run."""
    return tuple(_parsed(covariates) if isinstance(covariates, str) else
                 (covariate.name for covariate in covariates or ()))  # fmt: skip


def with_covariates(
    data: Dataset, columns: Mapping[str, np.ndarray], covariates: Covariates, path: object
) -> Dataset:
    """Add covariates to a data set.

    Args:
      data: the data set.
      columns: by name, numbers or text [N] of all examples, in the order of `Dataset.split_rows`.
      covariates: names, separated by commas, of columns whose mean and standard deviation, or
        whose categories, are taken from the training examples. After NAME:categorical, numbers
        are categories. Or the covariates of a run, which are applied as they are.
      path: of the source, for messages.

    Returns:
      The data set.

    Raises:
      InputError: an empty cell, or a category that is not in the training examples.
    """
    if not covariates:
        return data
    train = data.split_rows("train")
    if isinstance(covariates, str):
        covariates = [
            _fitted(name, columns[name], train, f"{path}, ", categorical=categorical)
            for name, categorical in _parsed(covariates).items()
        ]
    x = np.concatenate([c.encode(columns[c.name], f"{path}, ") for c in covariates], axis=1)
    return data._replace(
        train_covariates=x[train],
        test_covariates=x[~train],
        covariates=tuple(covariates),
        covariate_columns=columns,
    )


def expect_columns(
    wanted: Sequence[str], columns: Sequence[str], path: object, field: str, where: str = ""
) -> None:
    """Raise InputError if a source has no column of a wanted name.

    Args:
      wanted: the names.
      columns: names of the columns of the source.
      path: of the source, for the message.
      field: by which the names are given.
      where: in which part of the source, such as " in obs".

    Raises:
      InputError: a name is not among the columns.
    """
    for name in wanted:
        if name not in columns:
            raise InputError(
                f"{path} has no column {name!r}{where}, {field}: expected one of "
                f"{', '.join(columns[:10])}{', ...' if len(columns) > 10 else ''}"
            )


def _parsed(text: str) -> dict[str, bool]:
    """Return the names of columns, and whether each is said to hold categories."""
    parts = [part.strip() for part in text.split(",")]
    names = [part.removesuffix(_CATEGORICAL) for part in parts]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"covariate_columns is {text!r}: expected different names, separated by commas"
        )
    return {name: part != name for name, part in zip(names, parts, strict=True)}


def _fitted(
    name: str, column: np.ndarray, train: np.ndarray, subject: str, *, categorical: bool
) -> Covariate:
    _expect_values(column, name, subject)
    if categorical or not _of_numbers(column):
        return Covariate(name, categories=tuple(map(str, np.unique(_as_text(column[train])))))
    numbers = column[train].astype(np.float64)
    return Covariate(name, float(numbers.mean()), float(numbers.std()) or 1.0)


def _of_numbers(column: np.ndarray) -> bool:
    return column.dtype.kind in "biuf"


def _as_text(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "f" and (column == column.round()).all():
        column = column.astype(np.int64)  # whole numbers are floats in some sources
    return column.astype(str)


def _expect_values(column: np.ndarray, name: str, subject: str) -> None:
    def is_missing(cell: Any) -> bool:
        return cell is None or cell == "" or cell != cell

    if column.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(column))
    else:
        bad = np.array([i for i, cell in enumerate(column.tolist()) if is_missing(cell)], int)
    if bad.size:
        raise InputError(
            f"{subject}row {bad[0] + 1}, column {name!r} is empty, NaN or infinite: expected a "
            "value of the covariate in every row"
        )
