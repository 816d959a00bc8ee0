"""What a run says of itself: what it goes on only with, config.json, the model card, the last table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache._version import __version__
from softcache.cache import Cache
from softcache.data.source import Source
from softcache.join.joined_data import JoinedData
from softcache.models.evaluate import Evaluation, data_digest
from softcache.models.spec import public_name
from softcache.models.weights import file_sha256
from softcache.results.tables import Row, models_table
from softcache.train.card import model_card
from softcache.train.config import STUDENT_FIELDS, StudentConfig, TrainConfig
from softcache.train.student import Learner
from softcache.util.files import replace_file

# what may change between a run that was stopped and the one that goes on
MAY_CHANGE = (
    "out",
    "workers",
    "verify",
    "overwrite",
    "checkpoint_minutes",
    "device",
    "tensorboard",
)


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    card = model_card(facts)
    replace_file(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def lasting_settings(
    config: TrainConfig,
    sources: Sequence[Source],
    caches: Sequence[Cache],
    eval_source: Source | None,
) -> dict[str, Any]:
    """What a run that was stopped goes on only with, as JSON: settings, data, caches, code."""
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in (*MAY_CHANGE, *STUDENT_FIELDS, "variants", "data", "cache")
    }
    return settings | {
        "seed": config.seed,
        "eval_data": eval_source.name if eval_source else None,
        "data": [[source.name, len(source)] for source in sources],
        # of an unfinished cache the content will yet change
        "cache": [
            [cache.content_id() if cache.complete else None, cache.header.views] for cache in caches
        ],
        "students": [
            public_settings(student) | {"code": code_digests(student)}
            for student in config.students
        ],
    }


def public_settings(student: StudentConfig) -> dict[str, Any]:
    """A student's settings without the folders of this machine."""
    return dataclasses.asdict(student) | {
        "student": public_name(student.student),
        "init": student.init and student.init.name,
    }


def code_digests(student: StudentConfig) -> list[str]:
    """SHA-256 of the files of a student's own: its code, its first weights."""
    place = student.student.rpartition(":")[0] or student.student
    files = [Path(place), *([student.init] if student.init else [])]
    return [file_sha256(file) for file in files if file.is_file()]


def run_facts(
    config: TrainConfig,
    learner: Learner,
    parts: Sequence[JoinedData],
    eval_source: Source | None,
) -> dict[str, Any]:
    """What config.json says of a run: the settings, and whose soft targets it learned from."""
    settings = dataclasses.asdict(config) | public_settings(learner.config)
    settings |= {
        "data": [part.source.name for part in parts],
        "eval_data": eval_source.name if eval_source else None,
        "cache": [path.name for path in config.caches],
        "out": learner.folder.name,
    }
    del settings["variants"]
    caches = [part.cache for part in parts if part.cache]
    return {
        "softcache": __version__,
        "input_shape": list(parts[0].input_shape()),
        "input_dtype": str(parts[0].first_input().dtype).removeprefix("torch."),
        "classes": parts[0].classes,
        "class_names": list(caches[0].class_names if caches else parts[0].source.class_names),
        "embedded": not config.datas,  # the samples came from the cache itself
        # of an unfinished cache the content, and so its id, will yet change
        "content_ids": [cache.content_id() if cache.complete else None for cache in caches],
        "temperature": learner.temperature,
        "teachers": [dict(teacher) for teacher in caches[0].header.teachers] if caches else [],
        "teacher_evaluation": teacher_evaluation(caches, eval_source),
        "settings": settings,
    }


def teacher_evaluation(
    caches: Sequence[Cache], eval_source: Source | None
) -> Mapping[str, Any] | None:
    """The teacher's errors by the first cache's header, if they were counted on the same data."""
    known = caches[0].header.evaluation if caches else None
    same = known and eval_source and known["digest"] == data_digest(eval_source)
    return known if same else None


def final_table(
    learners: Sequence[Learner], caches: Sequence[Cache], eval_source: Source | None
) -> str:
    """Teachers by what the first cache's header says of them, then the students."""
    rows = [Row(learner.name, learner.parameters, learner.evaluation) for learner in learners]
    if not caches:
        return models_table(rows)
    known = teacher_evaluation(caches, eval_source)
    evaluation = Evaluation(known["errors"], known["samples"]) if known else None
    parameters = sum(teacher["parameters"] for teacher in caches[0].header.teachers)
    return models_table([Row("teacher", parameters, evaluation), *rows])
