"""What config.json and metrics.jsonl of a run folder may hold: they are shared, so they are not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softcache.cache import provenance
from softcache.cache.fields import JSON, MAX_COUNT, integer, is_text, load_json, shown
from softcache.errors import FormatError
from softcache.util.files import read_regular_file

CONFIG_BYTES = 64 << 20  # of config.json, at most: it names every class
METRICS_BYTES = 256 << 20  # of metrics.jsonl, at most
MAX_CLASSES = 1 << 24
MAX_AXES = 8
MAX_INPUT = 1 << 31  # numbers in one input
DTYPES = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
)
LONGEST = 4096  # characters of a text
LARGEST = 1e30  # of the numbers in a line of metrics
MAX_EPOCHS = 10**9
DEPTH = 6  # of nested values
NUMBERS = (
    "total",
    "soft",
    "hard",
    "lr",
    "balanced_accuracy",
    *provenance.SCORES,
    *provenance.ROW_SCORES,
)  # in a line of metrics


def read_facts(path: Path) -> JSON:
    """Read and check a config.json.

    Raises:
        FormatError: it cannot be read, or a value is not what softcache writes there.
    """
    facts = load_json(read_regular_file(path, CONFIG_BYTES), path.name)
    try:
        _check_facts(facts)
    except KeyError as error:
        raise FormatError(f"{path.name} lacks {shown(error.args[0])}") from None
    return facts


def read_metrics(path: Path) -> list[JSON]:
    """Read and check a metrics.jsonl.

    Raises:
        FormatError: it cannot be read, or a line is not what softcache writes there.
    """
    lines = read_regular_file(path, METRICS_BYTES).splitlines()
    metrics = [load_json(line, f"{path.name}, line {n}") for n, line in enumerate(lines, 1)]
    for number, line in enumerate(metrics, 1):
        try:
            check_line(line)
        except (FormatError, KeyError) as error:
            raise FormatError(f"{path.name}, line {number}: {_reason(error)}") from None
    return metrics


def check_line(line: Mapping[str, Any]) -> None:
    """Raise FormatError or KeyError unless a line of metrics, of one epoch, is as softcache writes it."""
    fields = dict(line)
    integer(fields, "epoch", 1, MAX_EPOCHS)
    if "step" in fields:
        integer(fields, "step", 0, MAX_COUNT)
    for name in NUMBERS:
        value = fields.get(name, 0.0)
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise FormatError(f"{name} is {shown(value)}; expected a number of at most {LARGEST:g}")
    if "errors" in fields:
        integer(fields, "errors", 0, integer(fields, "samples", 1, MAX_COUNT))
    by_class = fields.get("class_errors", [])
    if not isinstance(by_class, list) or not all(
        type(errors) is int and 0 <= errors <= MAX_COUNT for errors in by_class
    ):
        raise FormatError(f"class_errors is {shown(by_class)}; expected whole numbers")


def _check_facts(facts: JSON) -> None:
    """Raise FormatError or KeyError for the first value that is not as softcache writes it."""
    settings = facts["settings"]
    if not isinstance(settings, dict):
        raise FormatError(f"settings is {shown(settings)}; expected an object")
    for name in ("student", "loss", "optimizer"):
        if not _is_name(settings[name]):
            raise FormatError(f"{name} is {shown(settings[name])}; expected a text")
    integer(settings, "seed", 0, MAX_COUNT << 15)
    for name in ("data", "cache"):
        if not isinstance(settings[name], list) or not all(map(_is_name, settings[name])):
            raise FormatError(
                f"settings has {name} {shown(settings[name])}; expected a list of texts"
            )
    _check_values({name: value for name, value in facts.items() if name != "class_names"})
    shape = facts["input_shape"]
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= MAX_AXES
        or not all(type(size) is int and 1 <= size <= MAX_INPUT for size in shape)
        or math.prod(shape) > MAX_INPUT
    ):
        raise FormatError(f"input_shape is {shown(shape)}; expected the shape of one input")
    if facts.get("input_dtype", "float32") not in DTYPES:
        raise FormatError(
            f"input_dtype is {shown(facts['input_dtype'])}; expected one of {', '.join(DTYPES)}"
        )
    integer(facts, "classes", 2, MAX_CLASSES)
    names = facts.setdefault("class_names", [])
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise FormatError(f"class_names is {shown(names)}; expected a list of texts")
    columns = facts.get("columns", [])
    if not isinstance(columns, list) or not (
        all(map(provenance.is_column, columns)) or all(map(is_text, columns))
    ):
        raise FormatError(
            f"columns is {shown(columns)}; expected objects with name, and words or mean"
        )
    words = facts.get("categories") or {}  # of versions before 0.2
    if not isinstance(words, dict) or not all(
        isinstance(one, list) and all(map(_is_name, one)) for one in words.values()
    ):
        raise FormatError(f"categories is {shown(words)}; expected lists of texts by column")
    contents = facts.get("content_ids", [])
    if not isinstance(contents, list) or not all(one is None or is_text(one) for one in contents):
        raise FormatError(f"content_ids is {shown(contents)}; expected a list of texts")
    if facts.get("unit") not in (None, *provenance.UNITS):
        raise FormatError(
            f"unit is {shown(facts['unit'])}; expected one of {', '.join(provenance.UNITS)}"
        )
    provenance.teachers(facts.get("teachers", []))
    provenance.evaluation(facts.get("teacher_evaluation"))
    for name in ("alpha", "temperature"):
        if type(facts[name]) not in (int, float) or not 0 <= facts[name] <= 1e6:
            raise FormatError(f"{name} is {shown(facts[name])}; expected a number from 0 to 1e6")
    if "errors" in facts:
        integer(facts, "errors", 0, integer(facts, "samples", 1, MAX_COUNT))
    for name in ("softcache", "name"):
        if name in facts and not _is_name(facts[name]):
            raise FormatError(f"{name} is {shown(facts[name])}; expected a text")
    if "parameters" in facts:
        integer(facts, "parameters", 0, MAX_COUNT)


def _check_values(value: object, depth: int = 0) -> None:
    """Raise FormatError for a text that is very long, or for values that are nested too deeply."""
    if isinstance(value, str) and not _is_name(value):
        raise FormatError(f"a text is {shown(value)}; expected at most {LONGEST:,} characters")
    if isinstance(value, dict | list):
        if depth == DEPTH:
            raise FormatError(f"values are nested in more than {DEPTH} levels")
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(inner, depth + 1)


def _is_name(value: object) -> bool:
    """Whether a value is a text of a usual length; names of files and classes may hold any characters."""
    return isinstance(value, str) and len(value) <= LONGEST


def _reason(error: Exception) -> str:
    return f"it lacks {shown(error.args[0])}" if isinstance(error, KeyError) else str(error)
