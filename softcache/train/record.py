"""The records of a run: the settings it can resume with, config.json, the model card, the final table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from softcache._version import __version__
from softcache.cache import Cache
from softcache.data.source import Source
from softcache.join.joined_data import JoinedData
from softcache.models.evaluate import Evaluation, data_digest
from softcache.models.spec import parse_model
from softcache.models.weights import file_sha256
from softcache.train.card import model_card
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.student import Student
from softcache.util.files import replace_file
from softcache.util.settings import settings_of


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
        "init": student.init and student.init.name,
    }


def code_digests(student: StudentConfig) -> list[str]:
    """SHA-256 of the user's files: the code of the student, its initial weights."""
    files = [parse_model(student.student).path, *([student.init] if student.init else [])]
    return [file_sha256(file) for file in files if file.is_file()]


def run_facts(
    config: TrainConfig,
    student: Student,
    parts: Sequence[JoinedData],
    eval_source: Source | None,
) -> dict[str, Any]:
    """The contents of config.json: the settings, and where the soft targets came from."""
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
        "class_names": list(caches[0].class_names if caches else parts[0].source.class_names),
        "embedded": not config.data,  # the samples came from the cache itself
        # the content of an unfinished cache, and so its id, still changes
        "content_ids": [cache.content_id() if cache.complete else None for cache in caches],
        "temperature": student.temperature,
        "teachers": [dict(teacher) for teacher in caches[0].header.teachers] if caches else [],
        "teacher_evaluation": teacher_evaluation(caches, eval_source),
        "settings": settings,
    }


def teacher_evaluation(
    caches: Sequence[Cache], eval_source: Source | None
) -> Mapping[str, Any] | None:
    """The teacher's errors in the first cache's header, if they were counted on the same data."""
    evaluation = caches[0].header.evaluation if caches else None
    if not evaluation or not eval_source:
        return None
    return evaluation if evaluation["digest"] == data_digest(eval_source) else None


def final_table(
    students: Sequence[Student], caches: Sequence[Cache], eval_source: Source | None
) -> str:
    """A table of the teachers, as the first cache's header describes them, and the students."""
    rows = [Row(student.name, student.parameters, student.evaluation) for student in students]
    if not caches:
        return models_table(rows)
    counts = teacher_evaluation(caches, eval_source)
    evaluation = Evaluation(counts["errors"], counts["samples"]) if counts else None
    parameters = sum(teacher["parameters"] for teacher in caches[0].header.teachers)
    return models_table([Row("teacher", parameters, evaluation), *rows])


@dataclass(frozen=True)
class Row:
    """One model in the final table."""

    name: str
    parameters: int
    evaluation: Evaluation | None


def models_table(rows: Sequence[Row]) -> str:
    """Parameters, their share of the first row's, and test errors of each model, as text."""
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
