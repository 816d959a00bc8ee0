"""The model card of a student: results, provenance, and the command that reproduces it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from softcache.models.spec import BUILT_IN, parse_model
from softcache.train.options import train_settings
from softcache.util.messages import as_markdown
from softcache.util.settings import option_name


def model_card(facts: Mapping[str, Any]) -> str:
    """The model card as Markdown.

    Args:
        facts: the contents of config.json.
    """
    settings = facts["settings"]
    teachers = facts["teachers"]
    distilled = bool(facts["alpha"] > 0 and teachers)
    title = str(settings["student"]) + (
        f", distilled from {', '.join(teacher['name'] for teacher in teachers)}"
        if distilled
        else ""
    )
    return "\n".join(
        [
            "---",
            "library_name: softcache",
            f"tags: [{'knowledge-distillation' if distilled else task(facts)}]",
            "---",
            "",
            f"# {as_markdown(title)}",
            "",
            _results_table(facts),
            "",
            "## How it was trained",
            "",
            *_provenance(facts, distilled=distilled),
            "",
            "To reproduce it, run this in a folder with the cache and the data:",
            "",
            f"    {training_command(facts)}",
            "",
            "## How to use it",
            "",
            _usage(facts),
            "",
            "`softcache export --hf` writes a folder for transformers."
            if facts.get("unit") in ("token", "word")
            else "`softcache export` writes it as ONNX or as an exported program of torch.",
            "",
        ]
    )


# the hub's tags of students of samples with many rows
TASKS = {"token": "text-generation", "word": "token-classification", "pixel": "image-segmentation"}


def task(facts: Mapping[str, Any]) -> str:
    """The hub's tag of what the student classifies, which follows from its input."""
    if facts.get("unit") in TASKS:
        return TASKS[facts["unit"]]
    if len(facts["input_shape"]) == 3:
        return "image-classification"
    # code points of texts are int64; tables are floats, and the built-in models read no texts
    is_text = len(facts["input_shape"]) == 1 and facts.get("input_dtype") == "int64"
    if is_text and parse_model(facts["settings"]["student"]).kind not in BUILT_IN:
        return "text-classification"
    return "tabular-classification"


def training_command(facts: Mapping[str, Any]) -> str:
    """The command that trains this student alone; settings at their defaults are left out."""
    settings = facts["settings"]
    words = ["softcache", "train", *settings["cache"], "--student", settings["student"]]
    for spec in () if facts["embedded"] else settings["data"]:
        words += ["--data", spec]
    for field, setting in train_settings():
        value = settings.get(field.name)
        if not setting.affects_result or field.name in ("student", "data", "baseline"):
            continue
        if value is None or value == field.default:
            continue
        option = f"--{option_name(field)}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        else:
            words += [option, str(value)]
    return shlex.join([*words, "--out", settings["out"]])


def _results_table(facts: Mapping[str, Any]) -> str:
    student_errors, evaluation = "-", facts["teacher_evaluation"]
    if "errors" in facts:
        student_errors = f"{facts['errors']:,} of {facts['samples']:,}"
    rows = [[as_markdown(facts["name"]), f"{facts['parameters']:,}", student_errors]]
    if facts["teachers"]:
        parameters = sum(teacher["parameters"] for teacher in facts["teachers"])
        teacher_errors = (
            f"{evaluation['errors']:,} of {evaluation['samples']:,}" if evaluation else "-"
        )
        rows.insert(0, ["teacher", f"{parameters:,}", teacher_errors])
    eval_data = facts["settings"]["eval_data"]
    errors = f"errors on {as_markdown(eval_data)}" if eval_data else "errors"
    return str(
        tabulate(rows, ["model", "parameters", errors], tablefmt="github", disable_numparse=True)
    )


def _provenance(facts: Mapping[str, Any], *, distilled: bool) -> list[str]:
    settings = facts["settings"]
    data = as_markdown(", ".join(settings["data"]))
    lines = [f"- data: {data}; {facts['classes']:,} classes"]
    if distilled:
        for teacher in facts["teachers"]:
            weights = (
                as_markdown(f", weights {teacher['weights']}") if teacher.get("weights") else ""
            )
            name = as_markdown(teacher["name"])
            lines.append(f"- teacher: {name}, {teacher['parameters']:,} parameters{weights}")
        for name, content_id in zip(settings["cache"], facts["content_ids"], strict=True):
            lines.append(
                f"- soft targets: {as_markdown(name)}, content id `{content_id or 'unfinished'}`"
            )
        kind = "kl of each class on its own" if facts.get("multi_label") else settings["loss"]
        lines.append(
            f"- loss: {facts['alpha']:g} of {kind} at temperature "
            f"{facts['temperature']:g}, {1 - facts['alpha']:g} of cross-entropy with the labels"
        )
    else:
        lines.append("- loss: cross-entropy with the labels")
    lines.append(
        f"- {settings['epochs']} epochs, batches of {settings['batch_size']}, "
        f"{settings['optimizer']}, seed {settings['seed']}; softcache {facts['softcache']}"
    )
    return lines


def _input_description(facts: Mapping[str, Any]) -> str:
    dtype = facts.get("input_dtype", "float32")
    return f"{dtype}, images in [0, 1]" if dtype == "float32" else f"{dtype}, as the data give them"


def _usage(facts: Mapping[str, Any]) -> str:
    shape = tuple(facts["input_shape"])
    unit = f", unit={facts['unit']!r}" if facts.get("unit") else ""
    student, classes = facts["settings"]["student"], facts["classes"]
    return f"""```python
from safetensors.torch import load_file
import softcache

model = softcache.build({student!r}, input_shape={shape}, classes={classes}{unit})
model.load_state_dict(load_file("student.safetensors"))
logits = model.eval()(inputs)  # (B, {", ".join(map(str, shape))}) {_input_description(facts)}
```"""
