"""Checkpoints: the full state of a run in one safetensors file, so that a stopped run can resume.

Tensors are named `{student}.{part}.{name}`; everything else is JSON in the file's metadata. Reading a
checkpoint executes no code. On a CPU, a resumed run ends with the same weights, bit for bit, as a run
that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softcache.errors import SettingsError
from softcache.models.evaluate import Evaluation
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.student import Student
from softcache.util.files import replace_file
from softcache.util.settings import settings_of

NAME = "checkpoint.safetensors"
STATE = "softcache"  # the only key in the file's metadata


@dataclass(frozen=True)
class Position:
    """How far a run has come: the current epoch, counted from 0, and the batches done in it."""

    epoch: int = 0
    batch: int = 0


@dataclass
class Checkpoint:
    """The checkpoint file of a run.

    Attributes:
        settings: what must be the same for a run to resume, as JSON.
        minutes: time between two checkpoints within an epoch.
        written: when the file was last written, in seconds of time.monotonic().
    """

    path: Path
    settings: Mapping[str, Any]
    minutes: float
    written: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time for a checkpoint within an epoch."""
        return time.monotonic() - self.written >= 60 * self.minutes

    def save(self, students: Sequence[Student], position: Position) -> None:
        """Write the state of all students; the previous file stays until the new one is complete."""
        tensors: dict[str, Tensor] = {}
        facts = []
        for number, student in enumerate(students):
            student_tensors, student_facts = _state(student)
            facts.append(student_facts)
            tensors |= _prefixed(str(number), student_tensors)
        scaler = getattr(students[0].accelerator, "scaler", None)
        state = {
            "settings": self.settings,
            "epoch": position.epoch,
            "batch": position.batch,
            "students": facts,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        data = save(tensors, metadata={STATE: json.dumps(state)})
        replace_file(self.path, lambda path: path.write_bytes(data))
        self.written = time.monotonic()

    def load(self, students: Sequence[Student]) -> Position:
        """Restore the students from the file, and return how far the run had come."""
        with open_checkpoint(self.path) as file:
            state = json.loads(file.metadata()[STATE])
            names = list(file.keys())
            for number, (student, facts) in enumerate(
                zip(students, state["students"], strict=True)
            ):
                prefix = f"{number}."
                tensors = {
                    name.removeprefix(prefix): file.get_tensor(name)
                    for name in names
                    if name.startswith(prefix)
                }
                _restore(student, tensors, facts)
            scaler = getattr(students[0].accelerator, "scaler", None)
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        return Position(state["epoch"], state["batch"])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def check_checkpoint(path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether there is a checkpoint that this run can resume from.

    Raises:
        SettingsError: the checkpoint is damaged or of a run with other settings, and `overwrite` is not set.
    """
    if not path.exists():
        return False
    advice = "give another --out, or --overwrite to start from scratch"
    try:
        with open_checkpoint(path) as file:
            stored = _with_defaults(json.loads(file.metadata()[STATE])["settings"])
    except (SettingsError, ValueError, KeyError, TypeError) as error:
        if overwrite:
            return False
        raise SettingsError(f"{path} cannot be read ({error}); {advice}") from error
    for name, value in json.loads(json.dumps(settings)).items():
        if stored.get(name) != value:
            if overwrite:
                return False
            raise SettingsError(
                f"{path.parent} was started with {name} {_shortened(stored.get(name))}, now it is "
                f"{_shortened(value)}; use the same settings, {advice}"
            )
    return True


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, with the defaults of those that its version did not have yet."""
    run, student = (
        {field.name: field.default for field, _ in settings_of(kind)}
        for kind in (TrainConfig, StudentConfig)
    )
    students = [{**student, **stored} for stored in settings["students"]]
    return {**run, **settings, "students": students}


def open_checkpoint(path: Path) -> Any:  # noqa: ANN401  # safetensors has no type for it
    """Open a checkpoint for reading.

    Raises:
        SettingsError: the file is not a safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path} is not a checkpoint: {error}") from error


def _state(student: Student) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next steps and the metrics of a student depend on, as tensors and JSON."""
    tensors = _prefixed("model", student.accelerator.unwrap_model(student.model).state_dict())
    if student.average is not None:
        tensors |= _prefixed("average", student.average.state_dict())
    if student.best is not None:
        tensors |= _prefixed("best", student.best)
    for number, values in student.optimizer.state_dict()["state"].items():
        buffers = {name: value for name, value in values.items() if value is not None}
        tensors |= _prefixed(f"optimizer.{number}", buffers)
    tensors |= {f"random.{i}": state for i, state in enumerate(student.random)}
    if student.losses:
        tensors["losses"] = torch.stack(student.losses)
    evaluation = student.evaluation
    facts = {
        "schedule": {
            name: value
            for name, value in student.schedule.state_dict().items()
            if name != "lr_lambdas"
        },
        "rates": [group["lr"] for group in student.optimizer.param_groups],
        "steps": student.steps,
        "history": student.history,
        "evaluation": evaluation and [evaluation.errors, evaluation.samples],
        "stopped": student.stopped,
        "failed": student.failed,
    }
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return copies, facts


def _restore(student: Student, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Restore what _state() returned."""
    student.accelerator.unwrap_model(student.model).load_state_dict(_under("model", tensors))
    if student.average is not None:
        student.average.load_state_dict(_under("average", tensors))
    student.best = _under("best", tensors) or None
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer", tensors).items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    groups = student.optimizer.state_dict()["param_groups"]
    student.optimizer.load_state_dict({"state": state, "param_groups": groups})
    student.schedule.load_state_dict(dict(facts["schedule"]) | {"lr_lambdas": [None] * len(groups)})
    for group, rate in zip(student.optimizer.param_groups, facts["rates"], strict=True):
        group["lr"] = rate
    student.random = [tensors[f"random.{i}"] for i in range(len(student.random))]
    device = student.accelerator.device
    student.losses = list(tensors["losses"].to(device)) if "losses" in tensors else []
    student.steps, student.history = facts["steps"], list(facts["history"])
    student.evaluation = Evaluation(*facts["evaluation"]) if facts["evaluation"] else None
    student.stopped, student.failed = facts["stopped"], facts["failed"]


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}…"
