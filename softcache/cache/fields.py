"""Fields of JSON from a stranger: strict types, bounds, and messages that are safe to print."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from softcache.errors import FormatError

JSON = dict[str, Any]
MAX_COUNT = 1 << 48  # of anything: samples, rows of all views together, parameters


def integer(fields: JSON, name: str, low: int, high: int) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{name} is {shown(value)}; expected a whole number, {low} to {high}")
    return value


def integers(fields: JSON, name: str, low: int, high: int) -> tuple[int, ...]:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > 8:
        raise FormatError(f"{name} is {shown(value)}; expected a list of at most 8 whole numbers")
    return tuple(integer({name: part}, name, low, high) for part in value)


def is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def text_of(fields: JSON, name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not is_text(value):
        raise FormatError(f"{name} is {shown(value)}; expected printable text")
    return value


def shown(value: object) -> str:
    """A value from the file for a message: short, in one line, no control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def load_json(text: bytes) -> JSON:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> JSON:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise FormatError("the header's JSON has a key twice")
        return found

    def no_constant(name: str) -> Literal[0]:
        raise FormatError(f"the header's JSON holds {name}; expected finite numbers")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FormatError(f"the header's JSON holds {shown(digits)}; expected finite numbers")
        return value

    def bounded(digits: str) -> int:
        if len(digits.lstrip("-")) > 308:  # beyond a double
            raise FormatError(f"the header's JSON holds {shown(digits)}; expected smaller numbers")
        return int(digits)

    try:
        fields = json.loads(
            text.decode("ascii"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=finite,
            parse_int=bounded,
        )
    except RecursionError:
        raise FormatError("the header's JSON is nested too deep") from None
    except FormatError:  # which is a ValueError too
        raise
    except ValueError as error:  # not ASCII, not JSON, or an integer of thousands of digits
        raise FormatError(f"the header is not JSON: {shown(str(error))}") from error
    if not isinstance(fields, dict):
        raise FormatError("the header's JSON is no object")
    return fields
