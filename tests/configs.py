"""Change the settings of a dump or a training run for a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from softcache.train.config import StudentConfig, TrainConfig
from softcache.util.settings import settings_of

Config = TypeVar("Config")
STUDENT_FIELDS = {field.name for field, _ in settings_of(StudentConfig)}


def replace(config: Config, **options: Any) -> Config:  # fields of any type
    """dataclasses.replace(); settings of a student are applied to all students of a TrainConfig.

    `cache` and `data` take one value or several, as on the command line.
    """
    if not isinstance(config, TrainConfig):
        return dataclasses.replace(config, **options)  # type: ignore[type-var]
    student_options = {name: options.pop(name) for name in [*options] if name in STUDENT_FIELDS}
    if "seed" in student_options:
        options["seed"] = student_options["seed"]
    students: Sequence[StudentConfig | Mapping[str, Any]] = options.pop("students", config.students)
    options["students"] = tuple(
        dataclasses.replace(student, **student_options)
        if isinstance(student, StudentConfig)
        else dataclasses.replace(config.students[0], **student_options | dict(student))
        for student in students
    )
    if "cache" in options:
        cache = options.pop("cache")
        options["caches"] = (cache,) if isinstance(cache, Path) else tuple(cache or ())
    if isinstance(options.get("data"), str):
        options["data"] = (options["data"],)
    return dataclasses.replace(config, **options)
