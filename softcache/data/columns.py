"""Columns of Arrow tables as arrays: numbers and words as inputs, class numbers and names as labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.source import UNLABELLED
from softcache.errors import DataError
from softcache.util.extras import import_extra

Labels = tuple[npt.NDArray[np.int64], tuple[str, ...]]  # labels (N,) and class names
Column = Any  # a pyarrow.ChunkedArray
Module = Any


@dataclass(frozen=True)
class InputColumn:
    """One input of every sample.

    Attributes:
        values: (N,) float32; NaN where the cell is empty, infinity where float32 is too narrow.
        words: the words that the numbers 0, 1, … in `values` stand for, sorted; empty for numbers.
    """

    values: npt.NDArray[np.float32]
    words: tuple[str, ...] = ()


def class_labels(column: Column, classes: tuple[str, ...], where: str) -> Labels:
    """Labels (N,) from a column of class numbers or words; an empty cell is a missing label.

    Args:
        column: whole numbers as integers, floats or booleans; or words.
        classes: the class names in order; empty for the words of the column, sorted.
        where: the column, for error messages.

    Returns:
        The labels and the class names.

    Raises:
        DataError: the column holds other values, or a word that is not a class.
    """
    arrow, column = _plain(column)
    kinds = arrow.types
    if _is_text(column, kinds):
        found = _words(column)
        names = classes or tuple(found)
        unknown = [word for word in found if word not in names]
        if unknown:
            raise DataError(f"{where} has {unknown[0]!r}; expected one of {', '.join(names)[:200]}")
        return _positions(column, names).astype(np.int64), names
    if kinds.is_floating(column.type) or kinds.is_decimal(column.type):
        return _whole_numbers(column.cast(arrow.float64()), where), classes
    if not (
        kinds.is_integer(column.type) or kinds.is_boolean(column.type) or kinds.is_null(column.type)
    ):
        raise DataError(
            f"{where} holds {column.type}; expected class numbers from 0, or the names of the classes"
        )
    try:
        numbers = column.cast(arrow.int64())
    except arrow.ArrowInvalid as error:
        raise DataError(f"{where}: {error}; expected class numbers from 0") from error
    return _filled(numbers), classes


def input_column(column: Column, where: str) -> InputColumn:
    """The values of an input column: numbers and booleans as they are, words as 0, 1, … in sorted order.

    Words that are all numbers, such as '1.5', are read as numbers.

    Args:
        where: the column, for error messages.

    Raises:
        DataError: the column holds anything else, such as dates; or numbers, and a few words among them.
    """
    arrow, column = _plain(column)
    kinds = arrow.types
    if _is_text(column, kinds):
        return _text_input(column, where)
    if kinds.is_null(column.type) or kinds.is_decimal(column.type):
        column = column.cast(arrow.float64())
    if kinds.is_boolean(column.type):
        column = column.cast(arrow.int8())
    if not (kinds.is_integer(column.type) or kinds.is_floating(column.type)):
        raise DataError(
            f"{where} holds {column.type}; expected numbers or words: {_advice(column)}"
        )
    return InputColumn(_float32(column.to_numpy()))


def _text_input(column: Column, where: str) -> InputColumn:
    words = _words(column)
    others = [word for word in words if not _is_number(word)]
    codes = _positions(column, words)
    empty = codes == UNLABELLED
    if words and not others:
        numbers = np.array([float(word) for word in words])[codes]
        return InputColumn(_float32(np.where(empty, np.nan, numbers)))
    if 2 * len(others) < len(words):
        row = int(np.flatnonzero(codes == words.index(others[0]))[0])
        raise DataError(
            f"{where} holds numbers, but has {others[0]!r} in row {row}; expected a number: empty this "
            "cell and add ?missing=mean or ?missing=nan, or choose other columns with ?inputs=A,B"
        )
    return InputColumn(_float32(np.where(empty, np.nan, codes)), tuple(words))


def _float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinity, which tables refuse
        return values.astype(np.float32)


def _plain(column: Column) -> tuple[Module, Column]:
    """The pyarrow module, and the column as plain values: no dictionary, no views of strings."""
    arrow = import_extra("pyarrow", extra="data", what="a table")
    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if str(column.type) == "string_view":
        column = column.cast(arrow.large_string())
    return arrow, column


def _is_text(column: Column, kinds: Module) -> bool:
    return bool(kinds.is_string(column.type) or kinds.is_large_string(column.type))


def _words(column: Column) -> list[str]:
    """The different words of a text column, sorted; empty cells and blanks are not words."""
    compute = import_extra("pyarrow.compute", extra="data", what="a table")
    words = (word.as_py() for word in compute.unique(column))
    return sorted(word for word in words if word is not None and word.strip())


def _positions(column: Column, words: list[str] | tuple[str, ...]) -> npt.NDArray[np.int64]:
    """The position (N,) of each word of a text column in `words`; UNLABELLED where it is not there."""
    arrow = import_extra("pyarrow", extra="data", what="a table")
    compute = import_extra("pyarrow.compute", extra="data", what="a table")
    return _filled(compute.index_in(column, value_set=arrow.array(words, column.type)))


def _filled(column: Column) -> npt.NDArray[np.int64]:
    compute = import_extra("pyarrow.compute", extra="data", what="a table")
    return np.asarray(compute.fill_null(column, UNLABELLED).to_numpy(), np.int64)


def _whole_numbers(column: Column, where: str) -> npt.NDArray[np.int64]:
    """Labels from floats, as a program writes whole numbers where some are missing; NaN is missing."""
    numbers = np.asarray(column.to_numpy(), np.float64)
    numbers = np.where(np.isnan(numbers), UNLABELLED, numbers)
    invalid = (numbers != np.round(numbers)) | (np.abs(numbers) > 2**53)
    if invalid.any():
        raise DataError(
            f"{where} has {numbers[invalid][0]}, which is not a class number; expected whole numbers "
            "from 0"
        )
    return numbers.astype(np.int64)


def _is_number(word: str) -> bool:
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False


def _advice(column: Column) -> str:
    """What to do about an input column that holds neither numbers nor words."""
    choose = "choose other columns with ?inputs=A,B"
    name = str(column.type)
    if name.startswith(("date", "time", "duration")):
        return f"write it as a number, such as days since a fixed date, or {choose}"
    if "binary" in name:
        return f"save the file as UTF-8 if these are words, or {choose}"
    return f"use hfds: for lists, or {choose}"
