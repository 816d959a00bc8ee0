"""What the columns of a table mean: their names, the words that numbers stand for, and their means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softcache.cache import Cache

MAX_JSON = 1 << 16  # characters; a cache does not describe more columns and words than that


@dataclass(frozen=True)
class TableColumns:
    """The input columns of a table, for other tables to be matched with it by name.

    Attributes:
        whose: the table, cache or run that has these columns, for messages.
        names: their names, in order.
        words: for each column of words, what the numbers 0, 1, … stand for.
        means: for each column, what fills an empty cell; None for words and for columns without values.
    """

    whose: str
    names: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    means: tuple[float | None, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        """An object for each column: its name, and its words or its mean."""
        means = self.means or (None,) * len(self.names)
        columns: list[dict[str, Any]] = []
        for name, mean in zip(self.names, means, strict=True):
            words = {"words": list(self.words[name])} if name in self.words else {}
            columns.append({"name": name, **words, **({} if mean is None else {"mean": mean})})
        return columns


def columns_from_json(columns: Sequence[Mapping[str, Any]], whose: str) -> TableColumns | None:
    """The columns that to_json() described; None if there are none."""
    if not columns:
        return None
    return TableColumns(
        whose,
        tuple(column["name"] for column in columns),
        {column["name"]: tuple(column["words"]) for column in columns if "words" in column},
        tuple(column.get("mean") for column in columns),
    )


def columns_of_cache(cache: Cache) -> TableColumns | None:
    """The columns of the table that a cache was made from; None if its data was no table."""
    return columns_from_json((cache.header.summary or {}).get("columns", ()), str(cache.path))


def columns_field(columns: TableColumns | None) -> dict[str, Any]:
    """The columns as a header's summary keeps them; empty if there are none, or too many to keep."""
    described = columns.to_json() if columns else []
    texts = [text for column in described for text in (column["name"], *column.get("words", ()))]
    printable = all(text.isprintable() and len(text) <= 4096 for text in texts)
    if not described or not printable or len(json.dumps(described)) > MAX_JSON:
        return {}
    return {"columns": described}


def finite_or_none(mean: float) -> float | None:
    """A mean as JSON can hold it."""
    return mean if math.isfinite(mean) else None
