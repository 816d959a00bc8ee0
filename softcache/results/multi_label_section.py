"""The parts of a report about samples with any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.cache import Cache
from softcache.files.describe import describe
from softcache.models.multi_label import average_precision, score
from softcache.models.scores import COLUMNS, RowScores, score_headers, score_names
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
    every = [one.scores for student in students for one in student.measured.values()]
    names = score_names(every)
    many_rows = any(isinstance(scores, RowScores) for scores in every)
    for student in students:
        measured = [one.scores.line() for one in student.measured.values() if one.scores]
        if measured:
            cells = [
                _spread([line[name] for line in measured if name in line], COLUMNS[name][1])
                for name in names
            ]
            rows.append((student.label, *cells))
    title, caption = (
        "Any number of labels",
        "A class is taken to apply if its probability is above 1/2.",
    )
    if many_rows:
        title, caption = (
            "Scores of rows",
            "On the evaluation data; those of the teacher on training samples.",
        )
    return Table(title, ("student", *score_headers(names)), rows, caption) if rows else None


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and deviation of a score over the seeds; a dash if none has it."""
    if not values:
        return "-"
    spread = Spread.of(values)
    deviation = f" ± {form.format(spread.deviation)}" if spread.count > 1 else ""
    return form.format(spread.mean) + deviation
