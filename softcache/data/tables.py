"""CSV and Parquet tables as samples, one per row, with columns that have names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data.columns import InputColumn, class_labels, input_column
from softcache.data.source import UNLABELLED, ArraySource, Source, WrappedSource
from softcache.data.spec import named_classes
from softcache.data.table_columns import TableColumns, finite_or_none
from softcache.errors import DataError, MissingDataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.log import inform, warn
from softcache.util.spec import Spec

LABEL = "label"  # the label column if none is named
MISSING = ("nan", "mean")  # what missing= makes of empty cells
SHOWN = 6  # names in a message
FREE_TEXT = 20  # columns with more words than this may be names or free text instead of categories
CHUNK = 10_000  # rows read at a time for statistics

Table = Any  # a pyarrow.Table


@dataclass(frozen=True)
class TableSource(ArraySource):
    """The rows of a table.

    Attributes:
        columns: the names of the input columns, in the order of `inputs` (N, columns).
        categories: for each input column of words, what the numbers 0, 1, … stand for.
        filled: (N, columns) which cells were empty and hold the mean of their column; None if none do.
    """

    columns: tuple[str, ...] = ()
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    filled: npt.NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        """The samples at `indices`, copied."""
        filled = None if self.filled is None else self.filled[indices]
        return replace(super().take(indices), filled=filled)


def open_table(spec: Spec) -> TableSource:
    """Open a table as a source with one sample per row.

    Options: label=COLUMN (`label=` for none), inputs=A,B (by default all other columns), classes=X,Y (the
    class names in order if the labels are words), missing=nan|mean (by default an empty cell is refused).

    Raises:
        SettingsError: a split is given, a column does not exist, the label column must be named, or an
            option has another form.
        DataError: the file cannot be read as a table, or a cell does not fit.
    """
    if spec.split:
        raise SettingsError(
            f"{spec.kind}:{spec.place}@{spec.split}: a table has no splits; use one file per split"
        )
    where, options = f"{spec.kind}:{spec.path}", spec.options
    missing = options.get("missing")
    if missing not in (None, *MISSING):
        raise SettingsError(f"{where}: missing {missing!r}; expected missing=nan or missing=mean")
    table = _read(spec.kind, spec.path)
    label = _label_column(table.column_names, options, where)
    names = options["inputs"].split(",") if "inputs" in options else table.column_names
    names = [name for name in names if name != label]
    _check_columns(table, [*names, *([label] if label else [])], where)
    if not names or not len(table):
        raise DataError(
            f"{where} has {len(table)} rows and {len(names)} input columns; expected at least one of each"
        )
    columns = {
        name: input_column(table.column(name), f"{where}: column {name!r}") for name in names
    }
    inputs = np.stack([column.values for column in columns.values()], 1)
    _check_finite(inputs, names, table, where)
    filled = _fill_missing(inputs, columns, table, missing, where)
    _describe(inputs, columns, where)
    labels = np.full(len(table), UNLABELLED, np.int64)
    class_names: tuple[str, ...] = ()
    if label is not None:
        column, classes = table.column(label), named_classes(options, where)
        labels, class_names = class_labels(column, classes, f"{where}: column {label!r}")
        _describe_gaps(labels, label, where)
    categories = {name: column.words for name, column in columns.items() if column.words}
    return TableSource(
        spec.public_name, inputs, labels, class_names, tuple(names), categories, filled
    )


def align_columns(source: Source, reference: TableColumns | None) -> Source:
    """A table with the columns, the numbers for words, and the means in empty cells of another table.

    Columns are matched by name. Columns that the reference does not have are left out.

    Args:
        source: the table to align, such as evaluation data.
        reference: which columns come in which order, such as those of the training data.

    Returns:
        A source with the columns of the reference; `source` itself if it has them already, or if either
        has no column names.

    Raises:
        DataError: a column of the reference is missing, holds words in one table and numbers in the other,
            or has a word that the reference does not have.
    """
    if reference is None:
        return source
    if isinstance(source, WrappedSource):
        return cast(Source, replace(source, source=align_columns(source.source, reference)))
    if not isinstance(source, TableSource) or not source.columns:
        return source
    columns = reference.names
    absent = [name for name in columns if name not in source.columns]
    surplus = [name for name in source.columns if name not in columns]
    if absent:
        raise DataError(
            f"{source.name} has no column {_listed(absent)}, which {reference.whose} has"
            f"{f', but has {_listed(surplus)}' if surplus else ''}; expected the columns "
            f"{_listed(columns)}: give both tables the same columns, or choose them with ?inputs=A,B"
        )
    if columns == source.columns and reference.words == source.categories:
        return _with_means_of(source, reference)
    order = [source.columns.index(name) for name in columns]
    inputs = source.inputs[:, order]
    filled = None if source.filled is None else source.filled[:, order]
    for position, name in enumerate(columns):
        inputs[:, position] = _renumbered(inputs[:, position], name, source, reference)
    if surplus:
        inform(
            f"note: {source.name} has columns that {reference.whose} does not have, which are left out: "
            f"{_listed(surplus)}"
        )
    if columns != tuple(name for name in source.columns if name in columns):
        inform(
            f"note: the columns of {source.name} are in another order than those of {reference.whose}; "
            f"matched by name, as {_listed(columns)}"
        )
    aligned = replace(
        source, inputs=inputs, columns=columns, categories=dict(reference.words), filled=filled
    )
    return _with_means_of(aligned, reference)


def _with_means_of(source: TableSource, reference: TableColumns) -> TableSource:
    """The table with the reference's means in empty cells: a row must not depend on the rest of its file."""
    if source.filled is None or not reference.means:
        return source
    means = np.array(
        [np.nan if mean is None else mean for mean in reference.means], source.inputs.dtype
    )
    inputs = np.where(source.filled & ~np.isnan(means), means, source.inputs)
    if np.array_equal(inputs, source.inputs, equal_nan=True):
        return source
    inform(f"note: empty cells of {source.name} are filled with the means of {reference.whose}")
    return replace(source, inputs=inputs)


def columns_of(source: Source) -> TableColumns | None:
    """The columns of a table, or of the table inside other sources; None for other data."""
    table = unwrapped(source)
    if not isinstance(table, TableSource) or not table.columns:
        return None
    means = tuple(
        None if name in table.categories else finite_or_none(_mean(table, position))
        for position, name in enumerate(table.columns)
    )
    return TableColumns(table.name, table.columns, dict(table.categories), means)


def check_same_columns(source: Source, first: Source) -> None:
    """Raise DataError if two tables do not have the same columns, with the same words, in the same order."""
    own, expected = columns_of(source), columns_of(first)
    if (
        own is None
        or expected is None
        or (own.names, own.words) == (expected.names, expected.words)
    ):
        return
    raise DataError(
        f"{source.name} and {first.name} were dumped with other columns, or other words in them: "
        f"{_listed(own.names)} and {_listed(expected.names)}; train a student from each"
    )


def _mean(table: TableSource, position: int) -> float:
    """What an empty cell of a column holds or would hold; NaN if the column has no values."""
    values = table.inputs[:, position]
    if table.filled is not None and table.filled[:, position].any():
        return float(values[table.filled[:, position]][0])
    known = values[~np.isnan(values)]
    return float(np.float32(known.mean(dtype=np.float64))) if len(known) else np.nan


def unwrapped(source: Source) -> Source:
    """The source of arrays or files inside others that only change its order or its labels."""
    while isinstance(source, WrappedSource):
        source = source.source
    return source


def column_statistics(source: Source) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each column over all rows, labelled or not.

    NaN is left out. A constant column has standard deviation 1, and one without any value mean 0.
    Chunks are combined as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).

    Args:
        source: samples (N, columns).

    Returns:
        The means (columns,) and the standard deviations (columns,), float32.
    """
    chunks = (range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK))
    rows = (np.asarray(source.fetch(chunk)[0], np.float64) for chunk in chunks)
    counts: npt.NDArray[Any] = np.zeros(1)
    means: npt.NDArray[Any] = np.zeros(1)
    squares: npt.NDArray[Any] = np.zeros(1)  # sums of squared differences from the mean
    lowest: npt.NDArray[Any] = np.full(1, np.inf)
    highest: npt.NDArray[Any] = np.full(1, -np.inf)
    for chunk in rows:  # (B, columns)
        known = ~np.isnan(chunk)
        count = known.sum(0)
        mean = np.where(known, chunk, 0).sum(0) / count.clip(1)
        square = np.square(np.where(known, chunk - mean, 0)).sum(0)
        total = counts + count
        step = mean - means
        share = count / total.clip(1)
        squares = squares + square + step**2 * counts * share
        means, counts = means + step * share, total
        lowest = np.minimum(lowest, np.where(known, chunk, np.inf).min(0))
        highest = np.maximum(highest, np.where(known, chunk, -np.inf).max(0))
    std = np.where(lowest < highest, np.sqrt(squares / counts.clip(1)), 1)
    return torch.from_numpy(means).float(), torch.from_numpy(std).float()


def _renumbered(
    values: npt.NDArray[Any],
    name: str,
    source: TableSource,
    reference: TableColumns,
) -> npt.NDArray[Any]:
    """A column (N,) with the reference's numbers for its words."""
    words, expected = source.categories.get(name, ()), reference.words.get(name, ())
    if words == expected or np.isnan(values).all():
        return values
    if not words or not expected:
        kinds = ("words", "numbers") if words else ("numbers", "words")
        raise DataError(
            f"column {name!r} holds {kinds[0]} in {source.name} and {kinds[1]} in {reference.whose}; "
            "expected the same in both: write the column in the same way, or leave it out with ?inputs=A,B"
        )
    unknown = [word for word in words if word not in expected]
    if unknown:
        raise DataError(
            f"{source.name}: column {name!r} has {_listed(unknown)}, which {reference.whose} does not have; "
            f"expected {_listed(expected)}: leave out these rows, or the column with ?inputs=A,B"
        )
    numbers = np.array([expected.index(word) for word in words], values.dtype)
    known = ~np.isnan(values)
    renumbered = values.copy()
    renumbered[known] = numbers[values[known].astype(np.int64)]
    return renumbered


def _check_columns(table: Table, names: Sequence[str], where: str) -> None:
    for name in names:
        if table.column_names.count(name) != 1:
            raise SettingsError(
                f"{where} has {'no column' if name not in table.column_names else 'two columns'} {name!r}; "
                f"it has {', '.join(table.column_names)}"
            )


def _check_finite(
    inputs: npt.NDArray[np.float32], names: Sequence[str], table: Table, where: str
) -> None:
    if np.isinf(inputs).any():
        position, row = np.argwhere(np.isinf(inputs.T))[0]
        value = table.column(names[position])[int(row)].as_py()
        raise DataError(
            f"{where}: column {names[position]!r} has {value} in row {row}; expected finite numbers, of at "
            f"most {np.finfo(np.float32).max:.2g}: empty this cell and add ?missing=mean or ?missing=nan, "
            "or choose other columns with ?inputs=A,B"
        )


def _fill_missing(
    inputs: npt.NDArray[np.float32],
    columns: Mapping[str, InputColumn],
    table: Table,
    missing: str | None,
    where: str,
) -> npt.NDArray[np.bool_] | None:
    """Refuse NaN in `inputs`, pass it on, or replace it by the mean of its column, in place.

    Returns:
        The cells (N, columns) that were filled; None if none were.
    """
    empty: npt.NDArray[np.bool_] = np.isnan(inputs)
    if missing == "nan" or not empty.any():
        return None
    filled = []
    for position in np.flatnonzero(empty.any(0)):
        name, rows = list(columns)[position], np.flatnonzero(empty[:, position])
        cell = table.column(name)[int(rows[0])].as_py()
        value = "NaN" if isinstance(cell, float) else "no value"
        found = f"{where}: column {name!r} has {value} in row {rows[0]}"
        if missing is None:
            raise DataError(
                f"{found}; expected a number in every row: add ?missing=mean to fill in the mean of the "
                "column, or ?missing=nan if the teacher and the students take NaN"
            )
        if columns[name].words or len(rows) == len(inputs):
            why = "words have no mean" if columns[name].words else "no row has one"
            raise DataError(
                f"{found}, and {why}; use ?missing=nan, or choose other columns with ?inputs=A,B"
            )
        mean = inputs[~empty[:, position], position].mean(dtype=np.float64)
        inputs[rows, position] = mean
        filled.append(f"{name!r} ({len(rows):,} rows, mean {mean:.4g})")
    inform(f"{where}: missing values are filled with the mean of their column: {_cut(filled)}")
    return empty


def _describe(
    inputs: npt.NDArray[np.float32], columns: Mapping[str, InputColumn], where: str
) -> None:
    """Tell what the words became, and warn of columns that cannot be features."""
    words = {name: column.words for name, column in columns.items() if column.words}
    if words:
        parts = (
            f"{name!r} ({_listed(found)} = 0 to {len(found) - 1})" for name, found in words.items()
        )
        inform(f"{where}: words are numbered in sorted order: {_cut(list(parts))}")
    for position, (name, column) in enumerate(columns.items()):
        if len(column.words) > max(FREE_TEXT, len(inputs) // 2):
            warn(
                f"{where}: column {name!r} has {len(column.words):,} different words in {len(inputs):,} "
                "rows, which no other table will share; leave it out with ?inputs=A,B"
            )
        elif len(inputs) > FREE_TEXT and (np.diff(inputs[:, position]) == 1).all():
            warn(f"{where}: column {name!r} only numbers the rows; leave it out with ?inputs=A,B")


def _describe_gaps(labels: npt.NDArray[np.int64], label: str, where: str) -> None:
    gaps = int((labels == UNLABELLED).sum())
    if gaps:
        inform(f"{where}: {gaps:,} of {len(labels):,} rows have no {label!r} and are unlabelled")


def _listed(names: Sequence[str]) -> str:
    return _cut([repr(name) for name in names])


def _cut(parts: Sequence[str]) -> str:
    """The first parts in one phrase, and how many more there are."""
    more = f" and {len(parts) - SHOWN:,} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more


def _read(kind: str, path: Path) -> Table:
    if not path.is_file():
        raise MissingDataError(f"{kind}:{path}: no such file")
    read = _csv_reader() if kind == "csv" else _parquet_reader()
    try:
        return read(path)
    except Exception as error:  # Arrow raises errors of many types on damaged files
        raise DataError(
            f"{kind}:{path} cannot be read as a table ({' '.join(str(error).split())[:300]})"
        ) from error


def _csv_reader() -> Callable[[Path], Table]:
    csv = import_extra("pyarrow.csv", extra="data", what="a table of csv:")
    # by default, Arrow reads an empty cell among words as the word ""
    options = csv.ConvertOptions(strings_can_be_null=True)
    return lambda path: csv.read_csv(path, convert_options=options)


def _parquet_reader() -> Callable[[Path], Table]:
    parquet = import_extra("pyarrow.parquet", extra="data", what="a table of parquet:")
    read: Callable[[Path], Table] = parquet.read_table
    return read


def _label_column(columns: list[str], options: Mapping[str, str], spec: str) -> str | None:
    if "label" in options:
        return options["label"] or None
    if LABEL in columns:
        return LABEL
    raise SettingsError(
        f"{spec} has columns {', '.join(columns)}; name the label with ?label=COLUMN, or add ?label= if "
        "there is none"
    )
