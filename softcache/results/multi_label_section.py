"""The parts of a report about samples with any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.cache import Cache
from softcache.files.describe import describe
from softcache.models.multi_label import HEADERS, average_precision, score
from softcache.results.page import Section, Table
from softcache.results.students import Spread, Student
from softcache.results.verdict import Verdict

ROWS = 4096  # of the first view that are measured, at most
VALUES = 1 << 24  # log-odds that are decoded for it, at most
SHOWN_CLASSES = 30


def multi_label_section(cache: Cache, verdict: Verdict) -> Section:
    """What the teacher knows, by class; the conclusion goes to `verdict`."""
    header = cache.header
    public = replace(cache, path=Path(cache.path.name))
    section = Section(f"What the teacher knows: {public.path}", facts=describe(public))
    count = max(1, min(header.samples, ROWS, VALUES // header.classes))
    rows = np.unique(np.linspace(0, header.samples - 1, count).astype(np.int64))
    rows = rows[cache.labels[rows] >= 0]
    if not len(rows):
        verdict.paragraphs.append(("The teacher", "No sample has labels to compare it with."))
        return section
    odds, sets = cache.rows(0, rows, 1.0), cache.label_sets(rows)
    scores, wrong = score(sets, odds)
    verdict.paragraphs.append(
        (
            "The teacher",
            f"On {len(rows):,} labelled samples in their first view: {scores}; it takes at least one class "
            f"wrongly in {wrong / len(rows):.1%} of them.",
        )
    )
    names, probabilities = cache.class_names, 1 / (1 + np.exp(-odds.astype(np.float64)))
    lines = []
    for number in np.flatnonzero(sets.any(0)):
        applies = sets[:, number] > 0
        name = names[number] if number < len(names) else str(number)
        precision = average_precision(applies, odds[:, number])
        lines.append((precision, name, applies.mean(), probabilities[:, number].mean()))
    lines.sort()
    section.blocks.append(
        Table(
            "Classes that the teacher finds hardest",
            ("class", "average precision", "samples that have it", "mean probability"),
            [
                (name, f"{precision:.2%}", f"{share:.2%}", f"{mean:.2%}")
                for precision, name, share, mean in lines[:SHOWN_CLASSES]
            ],
            "At temperature 1. A mean probability far from the share of samples is a teacher that is not "
            "calibrated.",
        )
    )
    return section


def scores_table(students: Sequence[Student]) -> Table | None:
    """Mean average precision and F1 of each student over its seeds; None if there are none."""
    rows = []
    for student in students:
        measured = [one.scores.line() for one in student.measured.values() if one.scores]
        if measured:
            spreads = [Spread.of([line[name] for line in measured]) for name in measured[0]]
            cells = [
                f"{spread.mean:.2%}" + (f" ± {spread.deviation:.2%}" if spread.count > 1 else "")
                for spread in spreads
            ]
            rows.append((student.label, *cells))
    caption = "A class is taken to apply if its probability is above 1/2."
    return Table("Any number of labels", ("student", *HEADERS), rows, caption) if rows else None
