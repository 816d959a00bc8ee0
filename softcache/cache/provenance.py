"""Parts of a header that are only shown to people; checked, because they are printed."""

from __future__ import annotations

from softcache.cache.fields import JSON, MAX_COUNT, integer, is_text, shown, text_of
from softcache.errors import FormatError

SUMMARY = ("entropy", "agreement", "rows")

# of an evaluation where samples have any number of labels
SCORES = ("mean_average_precision", "micro_f1", "macro_f1")
# of an evaluation where samples have many rows
ROW_SCORES = (
    "ece", "perplexity", "nats_per_byte", "mean_iou", "teacher_kl", "teacher_agreement", "acceptance",
)  # fmt: skip


def teachers(value: object) -> tuple[JSON, ...]:
    """What the teachers were: of each at least its name, parameters and weight."""
    if not isinstance(value, list) or not all(map(_is_teacher, value)):
        raise FormatError(
            f"teachers is {shown(value)}; expected objects with name, parameters and weight, "
            "in printable text of at most 4096 characters"
        )
    return tuple(value)


def _is_teacher(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(is_text(text) for text in value.values() if isinstance(text, str))
        and isinstance(value.get("name"), str)
        and type(value.get("parameters")) is int
        and 0 <= value["parameters"] <= MAX_COUNT
        and type(value.get("weight")) in (int, float)
        and 0 < value["weight"] <= 1
        and _is_selection(value.get("selected"))
    )


def _is_selection(value: object) -> bool:
    """Whether a value says how many classes of how many were kept; None for all."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        type(value.get(name)) is int and 0 <= value[name] <= MAX_COUNT for name in ("classes", "of")
    )


def software(value: object) -> dict[str, str]:
    """Versions of the software that made the cache, by name."""
    if not isinstance(value, dict) or not all(map(is_text, [*value, *value.values()])):
        raise FormatError(
            f"software is {shown(value)}; expected versions by name, in printable text of at most "
            "4096 characters"
        )
    return value


def evaluation(value: object) -> JSON | None:
    """The teacher's errors on evaluation data; None if it was not evaluated."""
    if value is None:
        return None
    expected = {"data", "digest", "errors", "samples"}
    if not isinstance(value, dict) or set(value) - {*SCORES, *ROW_SCORES} != expected:
        raise FormatError(
            f"evaluation is {shown(value)}; expected data, digest, errors and samples"
        )
    text_of(value, "data"), text_of(value, "digest")
    integer(value, "errors", 0, integer(value, "samples", 1, MAX_COUNT))
    for name in set(value) & set(SCORES):
        if type(value[name]) not in (int, float) or not 0 <= value[name] <= 1:
            raise FormatError(f"{name} is {shown(value[name])}; expected a number from 0 to 1")
    for name in set(value) & set(ROW_SCORES):
        if not _is_number(value[name]) or value[name] < 0:
            raise FormatError(f"{name} is {shown(value[name])}; expected a number from 0")
    return value


UNITS = ("token", "word", "frame", "pixel")  # what a row of a sample with many rows is
ROW_TEXTS = ("tokenizer", "template", "loss_on")
ROW_COUNTS = ("tokens", "vocabulary", "bytes", "length", "stride")


def rows(value: object) -> JSON:
    """What the rows of samples with many rows are: their count and unit, and how texts became tokens."""
    expected = {"count", "unit", *ROW_TEXTS, *ROW_COUNTS}
    if not isinstance(value, dict) or not {"count", "unit"} <= set(value) <= expected:
        raise FormatError(f"rows is {shown(value)}; expected count and unit")
    integer(value, "count", 1, MAX_COUNT)
    if value["unit"] not in UNITS:
        raise FormatError(f"rows has unit {shown(value['unit'])}; expected {', '.join(UNITS)}")
    for name in set(value) & set(ROW_TEXTS):
        text_of(value, name)
    for name in set(value) & set(ROW_COUNTS):
        integer(value, name, 0, MAX_COUNT)
    return value


def choice(value: object) -> JSON | None:
    """How the encoding was chosen; None if that is not recorded."""
    if value is not None and (not isinstance(value, dict) or "asked" not in value):
        raise FormatError(
            f"choice is {shown(value)}; expected an object with asked, and the candidates"
        )
    return value


def summary(value: object) -> JSON | None:
    """What the finished cache was measured to be; None while it is unfinished.

    `entropy` in nats; `agreement` with the labels in [0, 1], or None without labels; the number of
    `rows` that they were measured on; and optionally `fidelity`, statistics of KL(teacher ‖ stored),
    `perplexity` of the next tokens, `confidence`, the teacher's mean top-1 probability at temperature 1,
    `columns` of a table, and `warnings`, what cannot be right about it.
    """
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
    if (
        not isinstance(fidelity, dict)
        or not isinstance(fidelity.get("at", {}), dict)
        or not all(map(_is_number, fidelity.get("at", {}).values()))
        or not all(_is_number(number) for name, number in fidelity.items() if name != "at")
    ):
        raise FormatError(f"summary has fidelity {shown(fidelity)}; expected numbers by name")
    confidence = value.get("confidence", 0.0)
    if not isinstance(confidence, float) or not 0 <= confidence <= 1:
        raise FormatError(f"summary has confidence {shown(confidence)}; expected 0 to 1")
    perplexity = value.get("perplexity", 1.0)
    if not _is_number(perplexity) or perplexity <= 0:
        raise FormatError(f"summary has perplexity {shown(perplexity)}; expected a number above 0")
    columns = value.get("columns", [])
    if not isinstance(columns, list) or not all(map(is_column, columns)):
        raise FormatError(
            f"summary has columns {shown(columns)}; expected objects with name, and words or mean"
        )
    warnings = value.get("warnings", [])
    if not isinstance(warnings, list) or len(warnings) > 8 or not all(map(is_text, warnings)):
        raise FormatError(
            f"summary has warnings {shown(warnings)}; expected at most 8 printable texts"
        )
    return value


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def is_column(value: object) -> bool:
    """Whether a column of a table is described: its name, the words of its numbers, its mean."""
    return (
        isinstance(value, dict)
        and set(value) <= {"name", "words", "mean"}
        and is_text(value.get("name"))
        and isinstance(value.get("words", []), list)
        and all(map(is_text, value.get("words", [])))
        and type(value.get("mean", 0.0)) in (int, float)
    )
