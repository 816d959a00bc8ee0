"""Compare students: what each of them costs, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from softcache.cache.reader import open_trainable
from softcache.cache.verdict import Predictions
from softcache.data.open import open_source
from softcache.data.rows import TOKEN
from softcache.data.source import Source
from softcache.errors import DataError, SettingsError, printable
from softcache.join.joined_data import JoinedData
from softcache.join.match import join
from softcache.join.samples import open_samples
from softcache.models.evaluate import as_predictions, evaluate
from softcache.models.evaluate_rows import evaluate_rows, row_model
from softcache.models.scores import (
    RowScores,
    Scores,
    score_cells,
    score_headers,
    score_names,
    scores_from,
    with_teacher,
)
from softcache.models.weights import parameter_count
from softcache.results.by_class import errors_by_class
from softcache.results.eval_data import eval_data_for, judge_predictions
from softcache.results.metrics import (
    count_macs,
    divergence_from_teacher,
    latencies,
    measure_quality,
)
from softcache.train.run_folder import Run, expand, open_run
from softcache.util.log import verdict

BATCHES = (1, 64)  # batch sizes whose latency is measured

OWN_COLUMNS = ("ece", "teacher_kl")  # scores that the table has for all students
NOISE = 0.1  # relative; latencies that differ by less count as equal


@dataclass(frozen=True)
class StudentMetrics:
    """A student's metrics; None if they were not measured.

    Attributes:
        name: the student's run folder.
        parameters: number of parameters.
        macs: multiply-accumulate operations (MACs) for one sample.
        bytes: size of the weights file.
        seconds: latency on the CPU by batch size.
        error: share of the evaluation samples that it gets wrong.
        ece: expected calibration error (ECE).
        kl: mean KL(teacher ‖ student) in nats, at the temperature of the cache.
        predictions: what it predicts for the evaluation samples.
    """

    name: str
    parameters: int
    macs: int
    bytes: int
    seconds: Mapping[int, float]
    error: float | None
    ece: float | None
    kl: float | None
    predictions: Predictions | None = None
    scores: Scores | None = None

    def beats(self, other: StudentMetrics) -> bool:
        """Whether it is at least as good in error, parameters and latency, and better in one of them.

        Latencies that differ by less than NOISE count as equal. Where an error was not measured, neither
        beats the other.
        """
        if self.error is None or other.error is None:
            return False
        pairs = [
            (self.error, other.error, 0.0),
            (self.parameters, other.parameters, 0.0),
            (self.seconds[BATCHES[0]], other.seconds[BATCHES[0]], NOISE),
        ]
        as_good = all(value <= rival * (1 + noise) for value, rival, noise in pairs)
        return as_good and any(value * (1 + noise) < rival for value, rival, noise in pairs)


def compare(
    folders: Sequence[Path],
    *,
    eval_data: str | None = None,
    cache: Path | None = None,
    data: str | None = None,
    student: Sequence[str] = (),
    same_classes: bool = False,
    trust_code: bool = False,
    strict: bool = False,
) -> str:
    """A table of students; * marks those that are Pareto-optimal in error, parameters and latency.

    With evaluation data, a second table has the errors of each student in the hardest classes.

    Args:
        folders: run folders of `softcache train`, or folders that contain some.
        eval_data: labelled data for the test error and the ECE; without them, the test error comes from
            the evaluation at the end of training, and there is no ECE.
        cache: the cache on whose first view the KL to the teacher is measured.
        data: the samples of the cache, if it does not store them.
        student: specifications of students whose code is the user's own, with the path to their file.
        same_classes: the classes of the evaluation data are those of the students in the same order, whatever
            they are called.
        trust_code: load a student in a .pt2 file even if the file may run code.
        strict: raise an error if the errors of a student cannot be right.

    Raises:
        SoftcacheError: a folder is not a finished run, or the data or the cache do not fit it.
        DataError: with `strict`, the errors of a student cannot be right.
    """
    runs = {str(folder): open_run(folder, trust_code=trust_code) for folder in expand(folders)}
    if not runs:
        raise SettingsError("no run to compare; name run folders of softcache train")
    source = open_source(eval_data) if eval_data else None
    joined = open_joined(cache, data) if cache else None
    students = measure_all(
        runs, source, joined, student=student, same_classes=same_classes, strict=strict
    )
    named = score_names([metrics.scores for metrics in students])
    scores = [name for name in named if name not in OWN_COLUMNS]
    rows = [
        (
            ("  " if any(other.beats(metrics) for other in students) else "* ") + metrics.name,
            f"{metrics.parameters:,}",
            f"{metrics.macs:,}",
            f"{metrics.bytes:,}",
            *(f"{1e3 * metrics.seconds[batch]:.2f}" for batch in BATCHES),
            "-" if metrics.error is None else f"{metrics.error:.2%}",
            "-" if metrics.kl is None or math.isnan(metrics.kl) else f"{metrics.kl:.4f}",
            "-" if metrics.ece is None else f"{metrics.ece:.4f}",
            *score_cells(metrics.scores, scores),
        )
        for metrics in students
    ]
    headers = (
        "student", "parameters", "MACs", "bytes", *(f"ms, batch {batch}" for batch in BATCHES),
        "test error", "KL to teacher", "ECE", *score_headers(scores),
    )  # fmt: skip
    align = ("left", *["right"] * (len(headers) - 1))
    table = tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
    threads = torch.get_num_threads()
    table = f"{table}\n* Pareto-optimal in error, parameters and latency ({threads} CPU threads)"
    predictions = {one.name: one.predictions for one in students if one.predictions is not None}
    counts = {run.classes for run in runs.values()}
    if not predictions or len(counts) > 1:
        return printable(table)
    first = next(iter(runs.values()))
    names = first.class_names or [str(number) for number in range(first.classes)]
    by_class = tabulate(
        errors_by_class(predictions, names),
        headers=("error by class", *predictions),
        colalign=("left", *["right"] * len(predictions)),
        disable_numparse=True,
    )
    return printable(f"{table}\n\n{by_class}")


def measure_all(
    runs: Mapping[str, Run],
    source: Source | None,
    joined: JoinedData | None,
    *,
    student: Sequence[str] = (),
    same_classes: bool = False,
    strict: bool = False,
) -> list[StudentMetrics]:
    """Measure the students of all runs, in the order of `runs`.

    Args:
        source: labelled data for the test error and the ECE.
        joined: the cache for the KL to the teacher, with its samples.
        student: as for compare(), like the others.
    """
    models = {name: run.model(student) for name, run in runs.items()}
    seconds = {
        batch: latencies(models, {name: run.example(batch) for name, run in runs.items()})
        for batch in BATCHES
    }
    students = []
    for name, run in runs.items():
        facts, model = run.facts, models[name]
        error = facts["errors"] / facts["samples"] if "errors" in facts else None
        ece, kl, predictions = None, None, None
        scores = scores_from(facts)
        if source is not None and run.multi_label:
            aligned = eval_data_for(run, source, same_classes=same_classes)
            result = evaluate(model, aligned, run.classes, torch.device("cpu"), multi_label=True)
            error, scores = 1 - result.accuracy, result.scores
        elif source is not None and run.unit is not None:
            aligned = eval_data_for(run, source, same_classes=same_classes)
            device = torch.device("cpu")
            result = evaluate_rows(row_model(model, run.classes), aligned, run.classes, device)
            error, scores = 1 - result.accuracy, with_teacher(result.scores, scores)
            predictions = as_predictions(result) if run.unit != TOKEN else None
        elif source is not None:
            aligned = eval_data_for(run, source, same_classes=same_classes)
            quality = measure_quality(model, aligned, run.classes)
            error, ece = quality.error, quality.calibration.error
            predictions = quality.predictions
        for warning in judge_predictions(run, predictions) if predictions is not None else ():
            if strict:
                raise DataError(f"{warning}. Leave --strict out to compare all the same")
            verdict(warning)
        if isinstance(scores, RowScores):
            ece, kl = scores.ece, scores.teacher_kl
        if joined is not None and joined.cache is not None:
            kl = divergence_from_teacher(model, joined, joined.cache.header.temperature)
        students.append(
            StudentMetrics(
                name,
                parameter_count(model),
                count_macs(model, run.example(1)),
                run.weights.stat().st_size,
                {batch: seconds[batch][name] for batch in BATCHES},
                error,
                ece,
                kl,
                predictions,
                scores,
            )
        )
    return students


def open_joined(path: Path, data: str | None, augment: str | None = None) -> JoinedData:
    """Join a cache to its samples on the CPU; all samples of an epoch are in the same view.

    Args:
        path: the cache.
        data: the specification of its samples, if it does not store them.
        augment: all of the cache's own augmentation, if that has a callable, with the path to its file.

    Raises:
        SoftcacheError: the cache or the data cannot be read, or do not fit each other.
    """
    cache = open_trainable(path)
    return join(
        open_samples(cache, data),
        cache,
        augment=augment,
        temperatures=[cache.header.temperature],
        device=torch.device("cpu"),
        rotate=False,
    )
