"""Several students from one command: by specification, by a grid of settings, by tables in TOML."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from softcache.errors import SettingsError
from softcache.train.config import StudentConfig
from softcache.util.files import refuse_special_file
from softcache.util.messages import first_line
from softcache.util.settings import option_name, settings_of

TABLE = "student"  # name of a student's table in a TOML file
Variant = dict[str, Any]  # settings of one student, by field


def make_variants(
    students: Sequence[str], grid: Sequence[str], tables: Sequence[Mapping[str, Any]]
) -> list[Variant]:
    """The settings of each student.

    Args:
        students: specifications; each is combined with every point of the grid.
        grid: values of settings, such as `lr=1e-3,2e-3` or `lr=1e-3,2e-3,alpha=0.5,1`.
        tables: settings by option name, one table for each student; a table without a specification
            applies to each of `students`.

    Raises:
        SettingsError: there is no student, a name is not a setting of a student, or a value has the wrong
            type.
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
    """The values of each field, in the order given, of texts such as `lr=1e-3,2e-3`.

    Raises:
        SettingsError: a text has another form, or names a field twice or one that does not exist.
    """
    axes: dict[str, list[Any]] = {}
    for text in grid:
        name = ""
        for part in text.split(","):
            key, equals, value = part.rpartition("=")
            if equals:
                name = field_of(key.strip())
                if name == "student":
                    raise SettingsError(f"--grid {text}: repeat --student instead")
                if name in axes:
                    raise SettingsError(f"--grid {text}: {key.strip()} is given twice")
                axes[name] = []
            if not name or not value.strip():
                raise SettingsError(
                    f"--grid {text}: expected NAME=VALUE,VALUE, such as lr=1e-3,2e-3"
                )
            axes[name].append(typed(name, value.strip()))
    return axes


def field_of(option: str) -> str:
    """The name of the StudentConfig field that an option sets.

    Raises:
        SettingsError: the option is not a setting of a student.
    """
    fields = {option_name(field): field.name for field, _ in settings_of(StudentConfig)}
    name = fields.get(option.replace("_", "-"))
    if name is None:
        raise SettingsError(
            f"{option!r} is not a setting of a student; expected one of {', '.join(fields)}"
        )
    return name


def typed(name: str, value: object) -> Any:  # noqa: ANN401  # the field's type
    """A value converted to the type of its StudentConfig field.

    Raises:
        SettingsError: the value cannot be converted.
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
    """The options of a run by name, and the tables of its students.

    Raises:
        SettingsError: the file cannot be read, or is not TOML.
    """
    refuse_special_file(path, SettingsError)
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # tomllib's own are ValueErrors
        raise SettingsError(f"--config {path} cannot be read: {first_line(error)[:300]}") from error
    tables = options.pop(TABLE, [])
    is_list = isinstance(tables, list) and all(isinstance(table, str) for table in tables)
    if isinstance(tables, str) or is_list:
        # specifications, under the same name as --student
        options |= {TABLE: tables} if tables else {}
        tables = []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(
            f"--config {path}: {TABLE} is {tables!r}; expected [[{TABLE}]] tables, one for each student"
        )
    return {key.replace("-", "_"): value for key, value in options.items()}, tables
