"""Fields of untrusted JSON: strict types, bounds, and messages that are safe to print."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from softcache.errors import FormatError

JSON = dict[str, Any]
MAX_COUNT = 1 << 48  # of anything: samples, rows in all views, parameters


def integer(fields: JSON, name: str, low: int, high: int) -> int:
    """The field `name`, an integer from `low` to `high`; raises FormatError for anything else."""
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{name} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def integers(fields: JSON, name: str, low: int, high: int) -> tuple[int, ...]:
    """The field `name`, a list of at most 8 integers from `low` to `high`."""
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > 8:
        raise FormatError(f"{name} is {shown(value)}; expected a list of at most 8 whole numbers")
    return tuple(integer({name: item}, name, low, high) for item in value)


def is_text(value: object) -> bool:
    """Whether `value` is printable text of at most 4096 characters."""
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def text_of(fields: JSON, name: str) -> str:
    """The field `name`, printable text."""
    value = fields[name]
    if not isinstance(value, str) or not is_text(value):
        raise FormatError(f"{name} is {shown(value)}; expected printable text")
    return value


def shown(value: object) -> str:
    """A value of the file as a message can show it: short, on one line, without control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def load_json(text: bytes, what: str = "the header") -> JSON:
    """Parse a JSON object strictly: ASCII, without duplicate keys, every number within a double.

    Args:
        what: whose text this is, for messages.

    Raises:
        FormatError: `text` is anything else.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> JSON:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise FormatError(f"{what}'s JSON has a duplicate key")
        return fields

    def reject_constant(name: str) -> Literal[0]:
        raise FormatError(f"{what}'s JSON has {name}; expected finite numbers")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FormatError(f"{what}'s JSON has {shown(digits)}; expected finite numbers")
        return value

    def bounded(digits: str) -> int:
        if len(digits.lstrip("-")) > 308:  # larger than any double
            raise FormatError(f"{what}'s JSON has {shown(digits)}; expected smaller numbers")
        return int(digits)

    try:
        fields = json.loads(
            text.decode("ascii"),
            object_pairs_hook=without_duplicates,
            parse_constant=reject_constant,
            parse_float=finite,
            parse_int=bounded,
        )
    except RecursionError:
        raise FormatError(f"{what}'s JSON is nested too deeply") from None
    except FormatError:  # a ValueError too
        raise
    except ValueError as error:  # not ASCII, not JSON, or an integer of thousands of digits
        raise FormatError(f"{what} is not JSON: {shown(str(error))}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{what}'s JSON is not an object")
    return fields
