"""A model card: what a student is, whom it learned from, and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from softcache.train.config import train_settings
from softcache.util.settings import option_name


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown, from what config.json says."""
    settings = facts["settings"]
    teachers = facts["teachers"]
    taught = facts["alpha"] > 0 and teachers
    title = f"{settings['student']}" + (
        f", distilled from {', '.join(teacher['name'] for teacher in teachers)}" if taught else ""
    )
    return "\n".join(
        [
            "---",
            "library_name: softcache",
            "tags: [knowledge-distillation]" if taught else "tags: [image-classification]",
            "---",
            "",
            f"# {title}",
            "",
            _figures(facts),
            "",
            "## How it was trained",
            "",
            *_provenance(facts, bool(taught)),
            "",
            "The same again, in a folder with the cache and the data:",
            "",
            f"    {again(facts)}",
            "",
            "## How to use it",
            "",
            _usage(facts),
            "",
            "`softcache export` writes it as ONNX or as an exported program of torch.",
            "",
        ]
    )


def again(facts: Mapping[str, Any]) -> str:
    """The command that trains this student, alone, with settings that are not the defaults."""
    settings = facts["settings"]
    words = ["softcache", "train", *settings["cache"], "--student", settings["student"]]
    for data in () if facts["embedded"] else settings["data"]:
        words += ["--data", data]
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


def _figures(facts: Mapping[str, Any]) -> str:
    teacher, own = facts["teacher_evaluation"], None
    if "errors" in facts:
        own = f"{facts['errors']:,} of {facts['samples']:,}"
    rows = [[facts["name"], f"{facts['parameters']:,}", own or "-"]]
    if facts["teachers"]:
        size = sum(teacher["parameters"] for teacher in facts["teachers"])
        known = f"{teacher['errors']:,} of {teacher['samples']:,}" if teacher else "-"
        rows.insert(0, ["teacher", f"{size:,}", known])
    data = facts["settings"]["eval_data"]
    errors = f"errors on {data}" if data else "errors"
    return str(
        tabulate(rows, ["model", "parameters", errors], tablefmt="github", disable_numparse=True)
    )


def _provenance(facts: Mapping[str, Any], taught: bool) -> list[str]:
    settings = facts["settings"]
    lines = [f"- data: {', '.join(settings['data'])}; {facts['classes']:,} classes"]
    if taught:
        for teacher in facts["teachers"]:
            weights = f", weights {teacher['weights']}" if teacher.get("weights") else ""
            lines.append(
                f"- teacher: {teacher['name']}, {teacher['parameters']:,} parameters{weights}"
            )
        for name, content_id in zip(settings["cache"], facts["content_ids"], strict=True):
            lines.append(f"- soft targets: {name}, content id `{content_id or 'unfinished'}`")
        lines.append(
            f"- loss: {facts['alpha']:g} of {settings['loss']} at temperature "
            f"{facts['temperature']:g}, {1 - facts['alpha']:g} of cross-entropy with the labels"
        )
    else:
        lines.append("- loss: cross-entropy with the labels")
    lines.append(
        f"- {settings['epochs']} epochs, batches of {settings['batch_size']}, "
        f"{settings['optimizer']}, seed {settings['seed']}; softcache {facts['softcache']}"
    )
    return lines


def _input_kind(facts: Mapping[str, Any]) -> str:
    dtype = facts.get("input_dtype", "float32")
    return f"{dtype}, images in [0, 1]" if dtype == "float32" else f"{dtype}, as the data give them"


def _usage(facts: Mapping[str, Any]) -> str:
    shape = tuple(facts["input_shape"])
    return f"""```python
from safetensors.torch import load_file
import softcache

model = softcache.build({facts["settings"]["student"]!r}, input_shape={shape}, classes={facts["classes"]})
model.load_state_dict(load_file("student.safetensors"))
logits = model.eval()(inputs)  # (B, {", ".join(map(str, shape))}) {_input_kind(facts)}
```"""
