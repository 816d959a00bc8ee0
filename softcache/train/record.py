"""The records of a run: the settings it can resume with, config.json, the model card, the final table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from softcache._version import __version__
from softcache.cache import Cache
from softcache.data.class_names import all_class_names
from softcache.data.rows import unit_of
from softcache.data.source import Source
from softcache.data.table_columns import columns_field
from softcache.data.tables import columns_of
from softcache.join.joined_data import JoinedData
from softcache.models.evaluate import Evaluation, data_digest
from softcache.models.scores import Scores, score_cells, score_headers, score_names, scores_from
from softcache.models.spec import parse_model
from softcache.models.weights import file_sha256, split_key
from softcache.train.card import model_card
from softcache.train.class_weights import BALANCED
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.student import Student
from softcache.util.files import replace_file
from softcache.util.settings import settings_of

IMBALANCED = 1.5  # ratio of the largest class to the smallest


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the model card README.md."""
    card = model_card(facts)
    replace_file(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def resume_settings(
    config: TrainConfig,
    sources: Sequence[Source],
    caches: Sequence[Cache],
    eval_source: Source | None,
) -> dict[str, Any]:
    """What must be the same for a stopped run to resume, as JSON: settings, data, caches, code."""
    settings = {
        field.name: getattr(config, field.name)
        for field, facts in settings_of(config)
        if facts.affects_result
    }
    return settings | {
        "seed": config.seed,
        "eval_data": eval_source.name if eval_source else None,
        "data": [[source.name, len(source)] for source in sources],
        # the content of an unfinished cache still changes
        "cache": [
            [cache.content_id() if cache.complete else None, cache.header.views] for cache in caches
        ],
        "students": [
            public_settings(student) | {"code": code_digests(student)}
            for student in config.students
        ],
    }


def public_settings(student: StudentConfig) -> dict[str, Any]:
    """The settings of a student with file names instead of paths."""
    return dataclasses.asdict(student) | {
        "student": parse_model(student.student).public_name,
        "loss": student.soft_loss,
        "init": student.init and student.init.name,
        "class_weights": student.class_weights and Path(student.class_weights).name,
    }


def code_digests(student: StudentConfig) -> list[str]:
    """SHA-256 of the user's files: the student's code, its initial weights, the weights of the classes."""
    files = [parse_model(student.student).path]
    files += [split_key(student.init)[0]] if student.init else []
    if student.class_weights not in (None, BALANCED):
        files.append(Path(str(student.class_weights)))
    return [file_sha256(file) for file in files if file.is_file()]


def run_facts(
    config: TrainConfig,
    student: Student,
    parts: Sequence[JoinedData],
    eval_source: Source | None,
    teacher: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of config.json: the settings, and where the soft targets came from.

    Args:
        teacher: what teacher_evaluation() returns.
    """
    settings = {field.name: getattr(config, field.name) for field, _ in settings_of(config)}
    settings |= public_settings(student.config)
    settings |= {
        "data": [part.source.name for part in parts],
        "eval_data": eval_source.name if eval_source else None,
        "cache": [path.name for path in config.caches],
        "out": student.folder.name,
    }
    caches = [part.cache for part in parts if part.cache]
    return {
        "softcache": __version__,
        "input_shape": list(parts[0].input_shape()),
        "input_dtype": str(parts[0].first_input().dtype).removeprefix("torch."),
        "classes": parts[0].classes,
        **({"multi_label": True} if parts[0].multi_label else {}),
        **({"unit": unit_of(parts[0].source)} if parts[0].layout is not None else {}),
        "class_names": list(class_names(parts)),
        **table_facts(parts[0].source),
        "embedded": not config.data,  # the samples came from the cache itself
        # the content of an unfinished cache, and so its id, still changes
        "content_ids": [cache.content_id() if cache.complete else None for cache in caches],
        "temperature": student.temperature,
        "teachers": [dict(teacher) for teacher in caches[0].header.teachers] if caches else [],
        "teacher_evaluation": teacher,
        "settings": settings,
    }


def table_facts(source: Source) -> dict[str, Any]:
    """The columns of a table, with the words that numbers stand for; empty for other data."""
    return columns_field(columns_of(source))


def class_names(parts: Sequence[JoinedData]) -> Sequence[str]:
    """Names of the classes, of the first cache or else of the data; empty if there are none."""
    cache = next((part.cache for part in parts if part.cache), None)
    return all_class_names(cache) if cache else parts[0].source.class_names


def teacher_evaluation(
    caches: Sequence[Cache], eval_source: Source | None, workers: int = 0
) -> Mapping[str, Any] | None:
    """The teacher's errors in the first cache's header, if they were counted on the same data.

    The evaluation data are read to compare their digest: call it once a run.
    """
    evaluation = caches[0].header.evaluation if caches else None
    if not evaluation or not eval_source:
        return None
    return evaluation if evaluation["digest"] == data_digest(eval_source, workers) else None


def final_table(
    students: Sequence[Student],
    caches: Sequence[Cache],
    eval_source: Source | None,
    teacher: Mapping[str, Any] | None,
) -> str:
    """A table of the teachers, as the first cache's header describes them, and the students.

    Balanced accuracies are listed only where the classes of the evaluation data differ much in size.

    Args:
        teacher: what teacher_evaluation() returns.
    """
    language = any(student.criterion == "perplexity" for student in students)
    balanced = not language and is_imbalanced(evaluation_labels(students, eval_source))
    rows = [
        Row(
            student.name,
            student.parameters,
            student.evaluation,
            student.final_line.get("balanced_accuracy") if balanced else None,
            scores_from(student.final_line),
        )
        for student in students
    ]
    if not caches:
        return models_table(rows)
    evaluation = stored_evaluation(teacher) if teacher else None
    parameters = sum(teacher["parameters"] for teacher in caches[0].header.teachers)
    return models_table([Row("teacher", parameters, evaluation), *rows])


def stored_evaluation(facts: Mapping[str, Any]) -> Evaluation:
    """An evaluation from the counts and scores that a header or a run folder holds."""
    return Evaluation(facts["errors"], facts["samples"], scores=scores_from(facts))


def evaluation_labels(
    students: Sequence[Student], eval_source: Source | None
) -> npt.NDArray[Any] | None:
    """The labels (n,) of the evaluation data; None if nobody has kept them."""
    for student in students:
        if student.evaluation is not None and student.evaluation.labels is not None:
            return student.evaluation.labels
    return getattr(eval_source, "labels", None)


def is_imbalanced(labels: npt.NDArray[Any] | None) -> bool:
    """Whether the largest class has at least IMBALANCED times the samples of the smallest that occurs."""
    if labels is None or not len(labels):
        return False
    counts = np.unique(labels, return_counts=True)[1]
    return bool(counts.max() >= IMBALANCED * counts.min())


@dataclass(frozen=True)
class Row:
    """One model in the final table; a balanced accuracy is shown if any row has one."""

    name: str
    parameters: int
    evaluation: Evaluation | None
    balanced_accuracy: float | None = None
    scores: Scores | None = None


def models_table(rows: Sequence[Row]) -> str:
    """Parameters, their share of the first row's, and test errors of each model, as text."""
    first = rows[0].parameters
    balanced = any(row.balanced_accuracy is not None for row in rows)
    scores = [row.evaluation.scores if row.evaluation else row.scores for row in rows]
    names = score_names(scores)
    headers = ["model", "parameters", f"share of {rows[0].name}'s", "test errors", "accuracy"]
    lines = [
        [
            row.name,
            f"{row.parameters:,}",
            f"{row.parameters / first:.1%}" if first else "-",
            f"{row.evaluation.errors:,} of {row.evaluation.samples:,}" if row.evaluation else "-",
            f"{row.evaluation.accuracy:.2%}" if row.evaluation else "-",
            *([_percent(row.balanced_accuracy)] if balanced else []),
            *score_cells(one, names),
        ]
        for row, one in zip(rows, scores, strict=True)
    ]
    return tabulate(
        lines,
        headers=[
            *headers,
            *(["balanced accuracy"] if balanced else []),
            *score_headers(names),
        ],
        colalign=("left", *["right"] * (len(lines[0]) - 1)),
        disable_numparse=True,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
