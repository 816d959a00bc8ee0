"""Settings as dataclass fields: default, range, help and option are declared in one place.

A new option is one field with `setting(...)`; the command line, the range checks, the run records and
the model cards follow from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from softcache.errors import SettingsError

LARGEST = (1 << 63) - 1  # of whole numbers, which torch and numpy keep in 64 bits
KEY = "setting"  # in the metadata of a dataclass field


@dataclass(frozen=True)
class Setting:
    """How a setting is shown on the command line, and which values it accepts.

    Attributes:
        help: a phrase that stands alone.
        group: the heading that `--help` lists the option under.
        option: the name of the option, without dashes; by default the name of the field.
        metavar: how `--help` shows the value.
        default_text: how `--help` shows a default that depends on something else.
        choices: the values that are accepted; empty if any value is.
        at_least: the lower bound, inclusive.
        above: the lower bound, exclusive.
        at_most: the upper bound, inclusive.
        below: the upper bound, exclusive.
        flag_value: the value of the option if it is given without one; None if it needs a value.
        affects_result: whether another value can change the result; a stopped run continues only with the
            same values of these settings.
    """

    help: str
    group: str
    option: str = ""
    metavar: str | None = None
    default_text: str | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    flag_value: int | None = None
    affects_result: bool = True

    def problem(self, value: object) -> str | None:
        """What is expected instead, if `value` is not accepted; else None."""
        if self.choices and value not in self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            return f"a number of at most {LARGEST:,}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._range():
            return None
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if inside and math.isfinite(value) else self._range()

    def _range(self) -> str:
        """The accepted numbers in words; empty if any number is accepted."""
        high = f" to {_shown(self.at_most)}" if self.at_most is not None else ""
        high = f" to below {_shown(self.below)}" if self.below is not None else high
        if self.above is not None:
            return f"a number above {_shown(self.above)}{high.replace(' to ', ', up to ')}"
        if self.at_least is not None:
            low = _shown(self.at_least)
            return f"a number from {low}{high}" if high else f"{low} or more"
        return f"a number{high}" if high else ""


def _shown(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


def setting(default: Any = MISSING, **facts: Any) -> Any:  # noqa: ANN401  # a field of any type
    """A dataclass field with a Setting in its metadata; `facts` are the attributes of the Setting."""
    return dataclasses.field(default=default, metadata={KEY: Setting(**facts)})


def settings_of(config: type | object) -> Iterator[tuple[dataclasses.Field[Any], Setting]]:
    """The settings among the fields of a dataclass, or of an instance of one."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass
        if KEY in field.metadata:
            yield field, field.metadata[KEY]


def option_name(field: dataclasses.Field[Any]) -> str:
    """The name of a setting's option without the leading dashes, such as `learning-rate`."""
    facts: Setting = field.metadata[KEY]
    return facts.option or field.name.replace("_", "-")


def check_range(config: object) -> None:
    """Raise SettingsError for the first setting that is out of range; None is never checked."""
    for field, facts in settings_of(config):
        value = getattr(config, field.name)
        problem = None if value is None else facts.problem(value)
        if problem:
            raise SettingsError(f"--{option_name(field)} is {value}; expected {problem}")
