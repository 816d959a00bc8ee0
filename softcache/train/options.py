"""The options of a training run as a flat list: those of a student, then those that all share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache.errors import SettingsError
from softcache.train.config import StudentConfig, TrainConfig
from softcache.util.settings import Setting, settings_of


def train_settings() -> Iterator[tuple[dataclasses.Field[Any], Setting]]:
    """All settings of a run with one student: first the student's, then the run's."""
    yield from settings_of(StudentConfig)
    yield from settings_of(TrainConfig)


def make_train_config(
    *,
    student: str | Sequence[str] | None = None,
    students: Sequence[Mapping[str, Any]] = ({},),
    cache: Path | str | Sequence[Path | str] | None = None,
    data: str | Sequence[str] = (),
    **options: Any,  # fields of either class
) -> TrainConfig:
    """Make a TrainConfig from flat options, as the command line and Python callers pass them.

    Args:
        student: one or more specifications of students, which share all other options.
        students: settings of single students, which override the shared options.
        cache: one or more caches.
        data: one or more data specifications.
        options: any field of TrainConfig, or any field of StudentConfig to apply to all students.

    Raises:
        SettingsError: an option does not exist, or its value is out of range.
    """
    student_fields = {field.name for field, _ in settings_of(StudentConfig)}
    run_fields = {field.name for field in dataclasses.fields(TrainConfig)}
    shared = {name: value for name, value in options.items() if name in student_fields}
    run_options = {name: value for name, value in options.items() if name not in student_fields}
    unknown = sorted(set(run_options) - run_fields)
    if unknown:
        raise SettingsError(f"{unknown[0]!r} is not a setting of a training run")
    specs: list[str | None] = (
        [student] if student is None or isinstance(student, str) else [*student]
    )
    variants = [
        shared | ({} if spec is None else {"student": spec}) | dict(variant)
        for variant in students
        for spec in specs
    ]
    if not all("student" in variant for variant in variants):
        raise SettingsError("no student; name one with --student")
    caches = [cache] if isinstance(cache, Path | str) else list(cache or ())
    return TrainConfig(
        students=tuple(StudentConfig(**variant) for variant in variants),
        caches=tuple(map(Path, caches)),
        data=(data,) if isinstance(data, str) else tuple(data or ()),
        seed=shared.get("seed", 0),
        **run_options,
    )
