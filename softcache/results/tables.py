"""What people look at: tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from softcache.cache import Cache
from softcache.models.evaluate import Evaluation


@dataclass(frozen=True)
class Row:
    """A model in the final table."""

    name: str
    parameters: int
    evaluation: Evaluation | None


def models_table(rows: Sequence[Row]) -> str:
    """Parameters, their share of the first row's, and test errors; the first row is the teacher."""
    first = rows[0].parameters
    lines = [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.parameters / first:.1%}" if first else "-",
            f"{row.evaluation.errors:,} of {row.evaluation.samples:,}" if row.evaluation else "-",
            f"{row.evaluation.accuracy:.2%}" if row.evaluation else "-",
        )
        for row in rows
    ]
    return tabulate(
        lines,
        headers=("model", "parameters", f"share of {rows[0].name}'s", "test errors", "accuracy"),
        colalign=("left", "right", "right", "right", "right"),
        disable_numparse=True,
    )


def cache_line(cache: Cache) -> str:
    """One line that says what a dump came to."""
    header = cache.header
    summary = header.summary or {}
    agreement = summary.get("agreement")
    agrees = "" if agreement is None else f", top class is the label in {agreement:.2%}"
    return (
        f"{cache.path}: {header.samples:,} samples x {header.views} view(s), {header.classes:,} "
        f"classes, {header.encoding.name}, {header.file_bytes:,} bytes; entropy "
        f"{summary.get('entropy', 0.0):.3f} nats{agrees}; content id {cache.content_id()}"
    )
