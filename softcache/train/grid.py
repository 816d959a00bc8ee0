"""Many students from one command: several specifications, a grid of settings, tables in a TOML file."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from softcache.errors import SettingsError
from softcache.train.config import StudentConfig
from softcache.util.settings import option_name, settings_of

TABLE = "student"  # of a TOML file, one for each student

Variant = dict[str, Any]


def make_variants(
    students: Sequence[str], grid: Sequence[str], tables: Sequence[Mapping[str, Any]]
) -> list[Variant]:
    """The settings of each student.

    Args:
        students: specifications; each is combined with all of the grid.
        grid: such as `lr=1e-3,2e-3` or `lr=1e-3,2e-3,alpha=0.5,1`.
        tables: settings by the names of their options, one for each student; those without a
            specification stand for all of `students`.

    Raises:
        SettingsError: no student, a name that is no setting of a student, or a value of another type.
    """
    bases: list[Variant] = []
    for table in tables or [{}]:
        settings = {field_of(key): typed(field_of(key), value) for key, value in table.items()}
        if "student" in settings:
            bases.append(settings)
        else:
            bases += [{"student": student} | settings for student in students]
    if not bases:
        raise SettingsError("no student; name one with --student, or in a table of --config")
    axes = [[(name, value) for value in values] for name, values in parse_grid(grid).items()]
    return [base | dict(point) for base in bases for point in itertools.product(*axes)]


def parse_grid(grid: Sequence[str]) -> dict[str, list[Any]]:
    """Values by field, in the order given."""
    found: dict[str, list[Any]] = {}
    for text in grid:
        name = ""
        for part in text.split(","):
            key, equals, value = part.rpartition("=")
            if equals:
                name = field_of(key.strip())
                if name == "student":
                    raise SettingsError(f"--grid {text}: give several --student instead")
                if name in found:
                    raise SettingsError(f"--grid {text}: {key.strip()} is given twice")
                found[name] = []
            if not name or not value.strip():
                raise SettingsError(
                    f"--grid {text}: expected NAME=VALUE,VALUE, such as lr=1e-3,2e-3"
                )
            found[name].append(typed(name, value.strip()))
    return found


def field_of(option: str) -> str:
    """The field that an option's name stands for.

    Raises:
        SettingsError: it is no setting of a student.
    """
    fields = {option_name(field): field.name for field, _ in settings_of(StudentConfig)}
    name = fields.get(option.replace("_", "-"))
    if name is None:
        raise SettingsError(
            f"{option!r} is not a setting of a student; expected one of {', '.join(fields)}"
        )
    return name


def typed(name: str, value: object) -> Any:  # noqa: ANN401  # as the field has it
    """A value as its field has it; text is read as that.

    Raises:
        SettingsError: it is of another type.
    """
    hint = str(get_type_hints(StudentConfig)[name])
    try:
        if "Path" in hint and isinstance(value, str):
            return Path(value)
        if "float" in hint and isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
        if "int" in hint and (isinstance(value, str) or type(value) is int):
            return int(value)
        if "str" in hint and isinstance(value, str):
            return value
    except ValueError:
        pass
    kind = "a file" if "Path" in hint else "a number" if "float" in hint else "a whole number"
    raise SettingsError(f"{name.replace('_', ' ')} is {value!r}; expected {kind}")


def read_toml(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Options of the run by name, and the tables of its students.

    Raises:
        SettingsError: no such file, or it is not TOML.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from error
    tables = found.pop(TABLE, [])
    listed = isinstance(tables, list) and all(isinstance(table, str) for table in tables)
    if isinstance(tables, str) or listed:
        found |= {TABLE: tables} if tables else {}  # named as the option is
        tables = []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(
            f"--config {path}: {TABLE} is {tables!r}; expected [[{TABLE}]] tables, one for each"
        )
    return {key.replace("-", "_"): value for key, value in found.items()}, tables
