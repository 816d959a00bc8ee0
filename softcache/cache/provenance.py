"""What a header tells people of teachers, choices and results; checked, for it is printed."""

from __future__ import annotations

from softcache.cache.fields import JSON, MAX_COUNT, integer, is_text, shown, text_of
from softcache.errors import FormatError


def is_teacher(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(is_text(text) for text in value.values() if isinstance(text, str))
        and isinstance(value.get("name"), str)
        and type(value.get("parameters")) is int
        and 0 <= value["parameters"] <= MAX_COUNT
        and type(value.get("weight")) in (int, float)
        and 0 < value["weight"] <= 1
    )


def evaluation(value: object) -> JSON | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"data", "digest", "errors", "samples"}:
        raise FormatError(
            f"evaluation is {shown(value)}; expected data, digest, errors and samples"
        )
    text_of(value, "data"), text_of(value, "digest")
    integer(value, "errors", 0, integer(value, "samples", 1, MAX_COUNT))
    return value


def choice(value: object) -> JSON | None:
    if value is not None and (not isinstance(value, dict) or "asked" not in value):
        raise FormatError(f"choice is {shown(value)}; expected what was asked and the candidates")
    return value


SUMMARY = ("entropy", "agreement", "rows")


def summary(value: object) -> JSON | None:
    """entropy in nats; agreement in [0, 1] or None without labels; rows it was measured on;
    fidelity: what the dump measured of KL(teacher ‖ stored)."""
    if value is None:
        return None
    if not isinstance(value, dict) or not set(SUMMARY) <= set(value):
        raise FormatError(f"summary is {shown(value)}; expected {', '.join(SUMMARY)}")
    agreement = value["agreement"]
    if not isinstance(value["entropy"], float) or not value["entropy"] >= 0:
        raise FormatError(f"summary has entropy {shown(value['entropy'])}; expected 0 or more")
    if agreement is not None and (not isinstance(agreement, float) or not 0 <= agreement <= 1):
        raise FormatError(f"summary has agreement {shown(agreement)}; expected 0 to 1, or null")
    integer(value, "rows", 1, MAX_COUNT)
    fidelity = value.get("fidelity", {})
    numbers = (
        [v for k, v in fidelity.items() if k != "at"] if isinstance(fidelity, dict) else [None]
    )
    if any(type(number) not in (int, float) for number in numbers):
        raise FormatError(f"summary has fidelity {shown(fidelity)}; expected numbers by name")
    return value
