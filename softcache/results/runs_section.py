"""The section of a report about runs: each student next to its baseline, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softcache.cache import Cache
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.models.evaluate import data_digest
from softcache.results import student_figures
from softcache.results.by_class import errors_by_class
from softcache.results.compare import open_joined
from softcache.results.metrics import gradient_similarity
from softcache.results.multi_label_section import scores_table
from softcache.results.page import Section, Table
from softcache.results.students import Student, group_runs, measure_students
from softcache.results.verdict import Verdict, students_verdict, teacher_from_runs, teacher_name
from softcache.train.run_folder import Run, open_run

GRADIENT_STUDENTS = 12  # whose gradients are compared at most, one run of each

UNKNOWN = "\N{EN DASH}"  # in a cell


def runs_section(
    runs: Mapping[str, Run],
    caches: Sequence[Cache],
    data: str | None,
    eval_data: str | None,
    specs: Sequence[str],
    verdict: Verdict,
    *,
    same_classes: bool = False,
) -> Section:
    """What the students learned; the conclusions go to `verdict`. For `same_classes`, see report()."""
    section = Section("What the students learned")
    baselines = {
        f"{name}/baseline": open_run(run.folder / "baseline", trust_code=run.trust_code)
        for name, run in runs.items()
        if (run.folder / "baseline" / "config.json").exists() and f"{name}/baseline" not in runs
    }
    students = group_runs({**runs, **baselines})
    evaluation = open_source(eval_data) if eval_data else None
    measure_students(students, specs, evaluation, same_classes=same_classes)
    facts = next((run.facts for run in runs.values() if run.facts.get("teachers")), {})
    if not caches and teacher_from_runs(facts):
        verdict.paragraphs.append(("The teacher", teacher_from_runs(facts)))
    verdict.students_summary, verdict.students = students_verdict(students)
    verdict.warnings += [
        f"{warning[0].upper()}{warning[1:]}."
        for student in students
        for measurement in student.measured.values()
        for warning in measurement.warnings
    ]
    if any(len(student.seeds) > 1 for student in students):
        section.notes.append(
            "Runs that differ only in their seed are one student: ± is the standard deviation over its "
            "seeds, bands and vertical error bars span its lowest and highest value."
        )
    section.add_figure(
        "Learning curves",
        student_figures.curves(students),
        "Training loss and test error by epoch of " + "; ".join(s.label for s in students),
        "Filled markers and solid lines: soft targets. Open markers and dashed lines: hard labels. The two "
        "kinds of training loss have different scales.",
    )
    teacher = _teacher_point(facts, caches, evaluation)
    points = student_figures.cost_points(students)
    if points:
        section.add_figure(
            "Accuracy against cost",
            student_figures.accuracy_against_cost(points, teacher),
            "; ".join(
                f"{p.label} {p.accuracy.mean:.2f}% with {p.parameters:,} parameters" for p in points
            ),
            "Horizontal error bars span the 10th to the 90th percentile of single runs on this machine"
            + (
                ". The teacher does not run here, so it has no latency."
                if teacher is not None
                else "."
            ),
        )
    section.blocks.append(students_table(students, facts, teacher))
    scores = scores_table(students)
    if scores is not None:
        section.blocks.append(scores)
    by_class = class_table(students)
    if by_class is not None:
        section.blocks.append(by_class)
    if sum(len(student.runs) for student in students) > len(students):
        section.blocks.append(runs_table(students, facts, teacher))
    if scores is None:
        _add_gradients(section, students, caches, data, specs)
    return section


def _teacher_point(
    facts: Mapping[str, Any], caches: Sequence[Cache], evaluation: Source | None
) -> student_figures.TeacherPoint | None:
    """The teacher's accuracy, if it was counted on the data that the students are evaluated on."""
    known = facts.get("teacher_evaluation")
    if evaluation is not None:
        digest = data_digest(evaluation)
        counted = [known, *(cache.header.evaluation for cache in caches[:1])]
        known = next((one for one in counted if one and one["digest"] == digest), None)
    if not known:
        return None
    parameters = sum(int(teacher["parameters"]) for teacher in facts.get("teachers") or [])
    return student_figures.TeacherPoint(100 * (1 - known["errors"] / known["samples"]), parameters)


def _teacher_cells(
    facts: Mapping[str, Any], teacher: student_figures.TeacherPoint | None
) -> tuple[str, str, str] | None:
    """Name, parameters and accuracy of the teacher; None if the runs know no teacher."""
    teachers = facts.get("teachers") or []
    if not teachers:
        return None
    parameters = sum(int(one["parameters"]) for one in teachers)
    accuracy = UNKNOWN if teacher is None else f"{teacher.accuracy:.2f}%"
    return (
        f"teacher: {teacher_name(teachers)}",
        f"{parameters:,}" if parameters else UNKNOWN,
        accuracy,
    )


def students_table(
    students: Sequence[Student],
    facts: Mapping[str, Any],
    teacher: student_figures.TeacherPoint | None,
) -> Table:
    """The teacher, then every student with its cost, its accuracy, and its gain over its baseline.

    Args:
        students: the students, measured.
        facts: the contents of config.json of a run that has a teacher.
        teacher: the teacher's accuracy on the same data, if it is known.
    """
    with_ece = any(student.ece() for student in students)
    rows: list[tuple[str, ...]] = []
    cells = _teacher_cells(facts, teacher)
    if cells:
        name, parameters, accuracy = cells
        rows.append(
            (
                name,
                UNKNOWN,
                parameters,
                UNKNOWN,
                UNKNOWN,
                accuracy,
                *([UNKNOWN] if with_ece else []),
                UNKNOWN,
            )
        )
    for student in students:
        spread, gain, ece = student.accuracy(), student.gain(), student.ece()
        noise = f" ± {100 * spread.deviation:.2f}" if spread and spread.count > 1 else ""
        median = 1e3 * float(np.median(student.seconds))
        rows.append(
            (
                student.label,
                str(len(student.seeds)),
                f"{student.parameters:,}",
                f"{student.macs:,}",
                f"{median:.3g}",
                UNKNOWN if spread is None else f"{100 * spread.mean:.2f}{noise}%",
                *([UNKNOWN if ece is None else f"{ece.mean:.4f}"] if with_ece else []),
                UNKNOWN
                if gain is None
                else f"{100 * gain.mean:+.2f} ± {100 * gain.noise:.2f}".replace(
                    "-", "\N{MINUS SIGN}"
                ),
            )
        )
    headers = (
        "model", "seeds", "parameters", "MACs", "ms", "accuracy", *(["ECE"] if with_ece else []),
        "gain over baseline",
    )  # fmt: skip
    return Table(
        "Students",
        headers,
        rows,
        "MACs and median milliseconds are for one sample on the CPU. The baseline is the same student "
        "trained on hard labels; its gain is in percentage points, ± its standard error.",
    )


def class_table(students: Sequence[Student]) -> Table | None:
    """Errors of the first run of each student in the hardest classes; None without evaluation data."""
    runs = {student.label: next(iter(student.runs.items())) for student in students}
    measured = {
        student.label: student.measured[runs[student.label][0]].quality for student in students
    }
    predictions = {label: one.predictions for label, one in measured.items() if one is not None}
    counts = {run.classes for _, run in runs.values()}
    if not predictions or len(counts) > 1:
        return None
    first = next(iter(runs.values()))[1]
    names = first.class_names or [str(number) for number in range(first.classes)]
    return Table(
        "Errors by class",
        ("class", *predictions),
        errors_by_class(predictions, names),
        "The classes with the largest share of errors. The balanced error is the mean over all classes, "
        "each of the same weight. One run of each student.",
    )


def runs_table(
    students: Sequence[Student],
    facts: Mapping[str, Any],
    teacher: student_figures.TeacherPoint | None,
) -> Table:
    """The teacher, then every run; the arguments are as for students_table()."""
    rows: list[tuple[str, ...]] = []
    cells = _teacher_cells(facts, teacher)
    if cells:
        rows.append((cells[0], UNKNOWN, UNKNOWN, cells[2]))
    for student in students:
        for name, run in student.runs.items():
            error = student.measured[name].error
            accuracy = UNKNOWN if error is None else f"{1 - error:.2%}"
            rows.append((name, student.label, str(run.facts["settings"]["seed"]), accuracy))
    return Table("Runs", ("run", "student", "seed", "accuracy"), rows, text_columns=2)


def _add_gradients(
    section: Section,
    students: Sequence[Student],
    caches: Sequence[Cache],
    data: str | None,
    specs: Sequence[str],
) -> None:
    """How similar the gradients of batches are under soft targets and under hard labels."""
    if not caches or not (data or caches[0].header.embeds_inputs):
        section.notes.append(
            "To compare the gradients of batches under soft targets and hard labels, name the cache too, "
            "with --data if it does not store its samples."
        )
        return
    cache = caches[0]
    if cache.header.rows is not None:  # a batch of a few samples has thousands of rows
        return
    joined = open_joined(cache.path, data)
    similarity = {}
    for student in students[:GRADIENT_STUDENTS]:
        run = next(iter(student.runs.values()))
        if run.classes == cache.header.classes:
            model = run.model(specs)
            similarity[student.label] = gradient_similarity(model, joined, cache.header.temperature)
    similarity = {label: values for label, values in similarity.items() if values}
    if not similarity:
        return
    section.add_figure(
        "How similar the gradients of batches are",
        student_figures.gradients(similarity),
        "Mean cosine similarity: "
        + "; ".join(
            f"{label} " + ", ".join(f"{kind} {value:.3f}" for kind, value in values.items())
            for label, values in similarity.items()
        ),
        "Where gradients are more similar under soft targets than under hard labels, one batch says more "
        "about the others, and each step is worth more (Hinton et al., arXiv 1503.02531). One run of each "
        "student, after training.",
    )
