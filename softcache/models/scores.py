"""Scores besides the number of errors: of sets of labels, and of samples with many rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from softcache.models.multi_label import MultiLabelScores

# the columns of tables: the name of a score, its title and how it is written
COLUMNS = {
    "mean_average_precision": ("mAP", "{:.2%}"),
    "micro_f1": ("micro F1", "{:.2%}"),
    "macro_f1": ("macro F1", "{:.2%}"),
    "perplexity": ("perplexity", "{:,.3f}"),
    "nats_per_byte": ("nats per byte", "{:.4f}"),
    "ece": ("ECE", "{:.4f}"),
    "mean_iou": ("mIoU", "{:.2%}"),
    "teacher_kl": ("KL to teacher", "{:.4f}"),
    "teacher_agreement": ("agreement", "{:.2%}"),
    "acceptance": ("acceptance", "{:.2%}"),
}


@dataclass(frozen=True)
class RowScores:
    """Scores of a model of samples with many rows; None where a score has no meaning or was not measured.

    Attributes:
        ece: expected calibration error of the top class of a row.
        perplexity: of a language model: exp of the mean negative log-likelihood of a token, in nats.
        nats_per_byte: of a language model: the same divided among the bytes of the text.
        mean_iou: of pixels: mean over the classes of intersection over union.
        teacher_kl: KL(teacher ‖ model) of a row in nats, on training samples.
        teacher_agreement: share of these rows where both have the same top class.
        acceptance: mean of sum_c min(p_c, q_c): how often speculative decoding would accept a draft of the
            model (Leviathan et al., arXiv 2211.17192, theorem 3.5).
    """

    ece: float | None = None
    perplexity: float | None = None
    nats_per_byte: float | None = None
    mean_iou: float | None = None
    teacher_kl: float | None = None
    teacher_agreement: float | None = None
    acceptance: float | None = None

    def __str__(self) -> str:
        names = self.line()
        return ", ".join(
            f"{COLUMNS[name][0]} {COLUMNS[name][1].format(value)}" for name, value in names.items()
        )

    def line(self) -> dict[str, float]:
        """The scores as a line of metrics holds them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Scores = MultiLabelScores | RowScores


def scores_from(facts: Mapping[str, Any]) -> Scores | None:
    """The scores that a header, a run folder or a line of metrics holds; None if it has none."""
    of_rows = any(field.name in facts for field in fields(RowScores))
    kind: type[Scores] = RowScores if of_rows else MultiLabelScores
    values = {field.name: facts[field.name] for field in fields(kind) if field.name in facts}
    numbers = all(type(v) in (int, float) and math.isfinite(v) for v in values.values())
    if not values or not numbers or (kind is MultiLabelScores and len(values) < len(fields(kind))):
        return None
    return kind(**{name: float(value) for name, value in values.items()})


def with_teacher(scores: Scores | None, known: Scores | None) -> Scores | None:
    """New scores of a student with what was known of how close it is to its teacher."""
    if not isinstance(scores, RowScores) or not isinstance(known, RowScores):
        return scores
    return replace(
        scores,
        teacher_kl=known.teacher_kl,
        teacher_agreement=known.teacher_agreement,
        acceptance=known.acceptance,
    )


def score_names(scores: Sequence[Scores | None]) -> list[str]:
    """The scores that any of these have, in the order of COLUMNS."""
    present = {name for one in scores if one is not None for name in one.line()}
    return [name for name in COLUMNS if name in present]


def score_headers(names: Sequence[str]) -> list[str]:
    """The titles of columns of scores."""
    return [COLUMNS[name][0] for name in names]


def score_cells(scores: Scores | None, names: Sequence[str]) -> list[str]:
    """Scores as cells of a table, a dash for each that is missing."""
    line = {} if scores is None else scores.line()
    return [COLUMNS[name][1].format(line[name]) if name in line else "-" for name in names]
