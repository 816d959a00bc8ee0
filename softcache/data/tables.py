"""CSV and Parquet tables of numbers as samples, and labels from a column of any type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.source import UNLABELLED, ArraySource
from softcache.errors import DataError, MissingDataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.spec import Spec

LABEL = "label"  # the label column if none is named

Labels = tuple[npt.NDArray[np.int64], tuple[str, ...]]  # labels (N,) and class names
Column = Any  # a pyarrow.ChunkedArray
Table = Any  # a pyarrow.Table
Module = Any


def read_table(
    kind: str, path: Path, options: Mapping[str, str]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], tuple[str, ...]]:
    """Read the inputs, labels and class names of a table.

    Options: label=COLUMN (`label=` for none), inputs=A,B (by default all other columns), classes=X,Y
    (the class names in order, if the labels are words).

    Args:
        kind: csv or parquet.

    Returns:
        Inputs (N, columns) float32, labels (N,) int64, and the class names, empty if labels are numbers.

    Raises:
        SettingsError: a column does not exist, or the label column must be named.
        DataError: the file cannot be read as a table, or a column holds anything but numbers.
    """
    spec = f"{kind}:{path}"
    table = _read(kind, path)
    label = _label_column(table.column_names, options, spec)
    inputs = options["inputs"].split(",") if "inputs" in options else table.column_names
    inputs = [name for name in inputs if name != label]
    for name in [*inputs, *([label] if label else [])]:
        if table.column_names.count(name) != 1:
            raise SettingsError(
                f"{spec} has {'no column' if name not in table.column_names else 'two columns'} {name!r}; "
                f"it has {', '.join(table.column_names)}"
            )
    if not inputs or not len(table):
        raise DataError(
            f"{spec} has {len(table)} rows and {len(inputs)} input columns; expected at least one of each"
        )
    columns = [_numbers(table.column(name), f"{spec}: column {name!r}") for name in inputs]
    if label is None:
        return np.stack(columns, 1), np.full(len(table), UNLABELLED, np.int64), ()
    classes = tuple(options["classes"].split(",")) if options.get("classes") else ()
    labels, names = class_labels(table.column(label), classes, f"{spec}: column {label!r}")
    return np.stack(columns, 1), labels, names


def class_labels(column: Column, classes: tuple[str, ...], where: str) -> Labels:
    """Labels (N,) from an Arrow column of whole numbers or words; a null is a missing label.

    Args:
        classes: the class names in order; empty for the words of the column, sorted.
        where: the column, for error messages.

    Returns:
        The labels and the class names.

    Raises:
        DataError: the column holds other values, or a word that is not a class.
    """
    arrow = import_extra("pyarrow", extra="data", what="a table")
    compute = import_extra("pyarrow.compute", extra="data", what="a table")
    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        words = [word.as_py() for word in compute.unique(column)]
        names = classes or tuple(sorted(word for word in words if word is not None))
        unknown = sorted(word for word in words if word is not None and word not in names)
        if unknown:
            raise DataError(f"{where} has {unknown[0]!r}; expected one of {', '.join(names)[:200]}")
        labels = compute.index_in(column, value_set=arrow.array(names, column.type))
        return _filled(labels, compute), names
    kinds = arrow.types
    if not (kinds.is_integer(column.type) or kinds.is_boolean(column.type)):
        numbers = _numbers(column, where)
        if not (numbers == numbers.round()).all():
            raise DataError(
                f"{where} has {numbers[numbers != numbers.round()][0]}, which is not a class number; "
                "expected whole numbers from 0"
            )
    return _filled(column.cast(arrow.int64()), compute), classes


def _filled(column: Column, compute: Module) -> npt.NDArray[np.int64]:
    filled = compute.fill_null(column, UNLABELLED)
    return np.asarray(filled.to_numpy(), np.int64)


def _read(kind: str, path: Path) -> Table:
    reader = import_extra(f"pyarrow.{kind}", extra="data", what=f"a table of {kind}:")
    if not path.is_file():
        raise MissingDataError(f"{kind}:{path}: no such file")
    try:
        return reader.read_csv(path) if kind == "csv" else reader.read_table(path)
    except Exception as error:  # Arrow raises errors of many types on damaged files
        raise DataError(
            f"{kind}:{path} cannot be read as a table ({' '.join(str(error).split())[:300]})"
        ) from error


def _label_column(columns: list[str], options: Mapping[str, str], spec: str) -> str | None:
    if "label" in options:
        return options["label"] or None
    if LABEL in columns:
        return LABEL
    raise SettingsError(
        f"{spec} has columns {', '.join(columns)}; name the label with ?label=COLUMN, or add ?label= if "
        "there is none"
    )


def _numbers(column: Column, where: str) -> npt.NDArray[np.float32]:
    arrow = import_extra("pyarrow", extra="data", what="a table")
    kinds = arrow.types
    if kinds.is_boolean(column.type):
        column = column.cast(arrow.int8())
    if not (kinds.is_integer(column.type) or kinds.is_floating(column.type)):
        raise DataError(
            f"{where} holds {column.type}; expected numbers: choose the columns with ?inputs=A,B, or use "
            "hfds: for texts"
        )
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise DataError(f"{where} has no value in row {row}; expected a number in every row")
    return np.asarray(column.to_numpy(), np.float32)


def open_table(spec: Spec) -> ArraySource:
    """Open a table as a source with one sample per row.

    Raises:
        SettingsError: a split is given, a column does not exist, or the label column must be named.
        DataError: the file cannot be read as a table of numbers.
    """
    if spec.split:
        raise SettingsError(
            f"{spec.kind}:{spec.place}@{spec.split}: a table has no splits; use one file per split"
        )
    inputs, labels, class_names = read_table(spec.kind, spec.path, spec.options)
    return ArraySource(spec.public_name, inputs, labels, class_names)
