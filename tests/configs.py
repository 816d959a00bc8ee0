"""Settings of a dump or a training run, changed for a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from softcache.train.config import StudentConfig, TrainConfig
from softcache.util.settings import settings_of

Config = TypeVar("Config")

OF_A_STUDENT = {field.name for field, _ in settings_of(StudentConfig)}


def replace(config: Config, **options: Any) -> Config:  # fields of any type
    """dataclasses.replace(); of a TrainConfig, settings of a student go to all its students."""
    if not isinstance(config, TrainConfig):
        return dataclasses.replace(config, **options)  # type: ignore[type-var]
    own = {name: options.pop(name) for name in [*options] if name in OF_A_STUDENT}
    if "seed" in own:
        options["seed"] = own["seed"]
    students: Sequence[StudentConfig | Mapping[str, Any]] = options.pop("students", config.students)
    options["students"] = tuple(
        dataclasses.replace(student, **own)
        if isinstance(student, StudentConfig)
        else dataclasses.replace(config.students[0], **own | dict(student))
        for student in students
    )
    if "cache" in options:
        cache = options.pop("cache")
        options["caches"] = (cache,) if isinstance(cache, Path) else tuple(cache or ())
    if isinstance(options.get("data"), str):
        options["data"] = (options["data"],)
    return dataclasses.replace(config, **options)
