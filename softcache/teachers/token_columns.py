"""Columns of lists of lists, one for each token, as arrays: of JSON, of Arrow, and of what vLLM returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from softcache.errors import ModelError
from softcache.util.extras import import_extra

Indices = npt.NDArray[np.int64]

SERVED = "prompt_logprobs"


class Nested(NamedTuple):
    """A list for each token of a document.

    Attributes:
        counts: (rows,) the length of each list.
        values: (entries,) what they hold, one after the other.
    """

    counts: Indices
    values: npt.NDArray[Any]


def nested(value: Any, where: str, name: str) -> Nested:  # noqa: ANN401  # whatever a file holds
    """A list of lists of numbers; an inner list may be null.

    Raises:
        ModelError: it is none.
    """
    if isinstance(value, Nested):
        return value
    if not isinstance(value, list | tuple) or not all(
        row is None or isinstance(row, list | tuple) for row in value
    ):
        raise ModelError(f"{where}: {name} is no list of lists; expected one for each token")
    counts = np.array([0 if row is None else len(row) for row in value], np.int64)
    try:
        values = np.array(list(chain.from_iterable(row or () for row in value)))
    except ValueError:
        values = np.empty((), object)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iufb"):
        raise ModelError(f"{where}: {name} holds {values.dtype}; expected lists of numbers")
    return Nested(counts, values if values.size else np.empty(0, np.int64))


def served(value: Any, where: str) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:  # noqa: ANN401
    """Counts, ids and log-probabilities of `prompt_logprobs`: null, or {id: {"logprob": x}} or {id: x}.

    Raises:
        ModelError: it is anything else.
    """
    if not isinstance(value, list | tuple):
        raise ModelError(f"{where}: {SERVED} is {type(value).__name__}; expected a list")
    counts, ids, log_probs = [], [], []
    for place, row in enumerate(value):
        if row is not None and not isinstance(row, Mapping):
            raise ModelError(
                f"{where}, row {place}: {SERVED} has {type(row).__name__}; expected null or an object of "
                "log-probabilities by token id"
            )
        entries = {} if row is None else row
        counts.append(len(entries))
        for token, entry in entries.items():
            try:
                ids.append(int(str(token).removeprefix("token_id:")))
                log_probs.append(float(entry["logprob"] if isinstance(entry, Mapping) else entry))
            except (ValueError, TypeError, KeyError) as error:
                raise ModelError(
                    f"{where}, row {place}: {SERVED} has {str(token)[:40]!r}: {str(entry)[:80]}; expected a "
                    "token id and its log-probability"
                ) from error
    return np.array(counts, np.int64), np.array(ids, np.int64), np.array(log_probs, np.float32)


def arrow_records(table: Any) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401  # a table or batch of pyarrow
    """The rows of a table; lists of lists of numbers do not become Python objects, of which they are many."""
    columns = {name: _arrow_column(table.column(name)) for name in table.schema.names}
    for number in range(table.num_rows):
        yield {name: column[number] for name, column in columns.items()}


def _arrow_column(column: Any) -> list[Any]:  # noqa: ANN401  # an array of pyarrow
    arrow = import_extra("pyarrow", extra="data", what="Parquet")
    compute = import_extra("pyarrow.compute", extra="data", what="Parquet")
    if isinstance(column, arrow.ChunkedArray):
        column = column.combine_chunks()

    def is_list(kind: Any) -> bool:  # noqa: ANN401
        types = arrow.types
        return bool(
            types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        )

    def lengths(lists: Any) -> Indices:  # noqa: ANN401
        return np.asarray(
            compute.fill_null(compute.list_value_length(lists), 0).to_numpy(zero_copy_only=False),
            np.int64,
        )

    if not is_list(column.type) or not is_list(column.type.value_type):
        return list(column.to_pylist())
    inner = compute.list_flatten(column)
    counts, values = lengths(inner), compute.list_flatten(inner)
    entries = values.to_numpy(zero_copy_only=False)
    stops = offsets_of(lengths(column))
    firsts = offsets_of(counts)[stops]
    valid = column.is_valid().to_pylist()
    return [
        Nested(counts[stops[n] : stops[n + 1]], entries[firsts[n] : firsts[n + 1]])
        if valid[n]
        else None
        for n in range(len(column))
    ]


def offsets_of(lengths: Any) -> Indices:  # noqa: ANN401  # a list or an array
    """Where each of several parts of these lengths begins, and the end of the last, (parts + 1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
