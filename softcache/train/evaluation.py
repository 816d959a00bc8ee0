"""The evaluation of a student after an epoch, and what a line of metrics holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.join.joined_data import JoinedData
from softcache.models.evaluate import Evaluation, evaluate
from softcache.models.evaluate_rows import evaluate_rows, row_model
from softcache.models.scores import RowScores
from softcache.train.teacher_figures import teacher_figures

CLASS_ERRORS = "class_errors"  # in a line of metrics: the errors of each class
MOST_CLASSES = 1000  # of which the errors are written one by one


@dataclass(frozen=True)
class Compared:
    """What an evaluation has to know of a student.

    Attributes:
        classes: number of its outputs.
        multi_label: whether samples have any number of labels.
        part: samples with many rows, whose soft targets it is compared with if they have any.
        temperature: at which it is compared with them.
    """

    classes: int
    device: torch.device
    multi_label: bool
    part: JoinedData | None
    temperature: float


def evaluate_student(
    model: nn.Module, source: Source, student: Compared, workers: int
) -> Evaluation:
    """Evaluate a model in eval mode on labelled data, and compare it with its teacher where rows are many.

    Raises:
        DataError: a label is missing or out of range.
        ModelError: the model raises, or returns something else than logits.
    """
    if layout_of_source(source) is None:
        return evaluate(
            model,
            source,
            student.classes,
            student.device,
            workers,
            multi_label=student.multi_label,
        )
    rows = row_model(model, student.classes)
    result = evaluate_rows(rows, source, student.classes, student.device, workers)
    part = student.part
    if part is None or part.cache is None or not isinstance(result.scores, RowScores):
        return result
    figures = teacher_figures(rows, part, student.temperature, student.device)
    return replace(result, scores=replace(result.scores, **figures))


def scores_of_epoch(
    evaluation: Evaluation | None, model: nn.Module, student: Compared
) -> dict[str, Any]:
    """What a line of metrics holds of an epoch's evaluation, or without one of what the teacher says."""
    if evaluation is not None:
        return evaluation_line(evaluation, student.classes)
    return teacher_line(model.eval(), student)


def teacher_line(model: nn.Module, student: Compared) -> dict[str, float]:
    """What a line of metrics holds of a model in eval mode without labels: how close it is to its teacher.

    Empty where samples have one row each, or without a cache.
    """
    part = student.part
    if part is None or part.cache is None:
        return {}
    rows = row_model(model, student.classes)
    return teacher_figures(rows, part, student.temperature, student.device)


def evaluation_line(evaluation: Evaluation, classes: int) -> dict[str, Any]:
    """What a line of metrics holds of an evaluation."""
    line: dict[str, Any] = {"errors": evaluation.errors, "samples": evaluation.samples}
    if evaluation.scores is not None:
        line |= evaluation.scores.line()
    if evaluation.labels is None or "perplexity" in line:
        return line
    line["balanced_accuracy"] = evaluation.balanced_accuracy
    if classes <= MOST_CLASSES:
        line[CLASS_ERRORS] = evaluation.errors_by_class(classes)[0].tolist()
    return line
