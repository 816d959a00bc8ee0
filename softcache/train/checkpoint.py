"""Checkpoints: the full state of a run in one safetensors file, so that a stopped run can resume.

Tensors are named `{student}.{part}.{name}`; everything else is JSON in the file's metadata, with a digest of
both. Reading a checkpoint executes no code. On a CPU, a resumed run ends with the same weights, bit for bit,
as a run that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softcache.cache.fields import MAX_COUNT, integer, load_json
from softcache.errors import FormatError, SettingsError
from softcache.losses import Loss
from softcache.models.evaluate import Evaluation
from softcache.models.scores import scores_from
from softcache.train.config import MAX_LEARNING_RATE, StudentConfig, TrainConfig
from softcache.train.run_facts import check_line
from softcache.train.student import Student
from softcache.util.files import replace_file
from softcache.util.settings import settings_of

NAME = "checkpoint.safetensors"
STATE, DIGEST = "softcache", "digest"  # the keys in the file's metadata
ADVICE = "give another --out, or --overwrite to start from scratch"


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
            "tensors": sorted(tensors),
        }
        text = json.dumps(state)
        data = save(tensors, metadata={STATE: text, DIGEST: digest_of(text, tensors)})
        replace_file(self.path, lambda path: path.write_bytes(data))
        self.written = time.monotonic()

    def load(self, students: Sequence[Student]) -> Position:
        """Restore the students from the file, and return how far the run had come.

        Raises:
            SettingsError: the file does not hold the state of these students.
        """
        state, tensors = read_checkpoint(self.path)
        try:
            for number, (student, facts) in enumerate(
                zip(students, state["students"], strict=True)
            ):
                _restore(student, _under(str(number), tensors), facts)
            scaler = getattr(students[0].accelerator, "scaler", None)
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            fields = {name: state[name] for name in ("epoch", "batch")}
            return Position(
                integer(fields, "epoch", 0, MAX_COUNT), integer(fields, "batch", 0, MAX_COUNT)
            )
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # the digest is right, so this is no damage: somebody has made the file
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise SettingsError(
                f"{self.path} does not hold the state of these students ({reason}); {ADVICE}"
            ) from error

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
    try:
        stored = _with_defaults(read_checkpoint(path)[0]["settings"])
    except SettingsError:
        if overwrite:
            return False
        raise
    except (ValueError, LookupError, TypeError) as error:
        if overwrite:
            return False
        raise SettingsError(
            f"{path} has other settings than softcache writes ({type(error).__name__}: {error}); {ADVICE}"
        ) from error
    for name, value in json.loads(json.dumps(settings)).items():
        if stored.get(name) != value:
            if overwrite:
                return False
            raise SettingsError(
                f"{path.parent} was started with {name} {_shortened(stored.get(name))}, now it is "
                f"{_shortened(value)}; use the same settings, {ADVICE}"
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


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the state and the tensors of a checkpoint.

    Raises:
        SettingsError: the file is not a checkpoint, is damaged, or is of a version before 0.2.
    """
    problem = f"{path} cannot be read as a checkpoint"
    if not path.is_file():
        raise SettingsError(f"{problem}: it is not a regular file; {ADVICE}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata[STATE]
        if DIGEST not in metadata:
            raise SettingsError(f"{problem}: it has no digest, as before version 0.2; {ADVICE}")
        if digest_of(text, tensors) != metadata[DIGEST]:
            raise SettingsError(f"{problem}: it does not match its digest; {ADVICE}")
        state = load_json(text.encode(), "its state")
        if state["tensors"] != sorted(tensors):
            raise SettingsError(f"{problem}: tensors are missing or unknown; {ADVICE}")
    except (SafetensorError, OSError, LookupError, FormatError) as error:
        raise SettingsError(f"{problem} ({type(error).__name__}: {error}); {ADVICE}") from error
    return state, tensors


def digest_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """xxh3 (128 bits) of the state and of the names, dtypes, shapes and bytes of all tensors, in hex."""
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    model, weights = student.accelerator.unwrap_model(student.model), _under("model", tensors)
    _check_tensors(weights, model.state_dict())
    model.load_state_dict(weights)
    if student.average is not None:
        student.average.load_state_dict(_under("average", tensors))
    student.best = _under("best", tensors) or None
    if student.best is not None:
        _check_tensors(student.best, student.final_model.state_dict())
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer", tensors).items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    groups = student.optimizer.state_dict()["param_groups"]
    parameters = [p for group in student.optimizer.param_groups for p in group["params"]]
    for index, buffers in state.items():
        shape = parameters[index].shape
        if not all(
            buffer.shape == shape or (name == "step" and buffer.numel() == 1)
            for name, buffer in buffers.items()
        ):
            raise ValueError(f"the optimizer's state of parameter {index} has another shape")
        if buffers.keys() != state_names(student.optimizer):
            raise ValueError(f"the optimizer's state of parameter {index} is {', '.join(buffers)}")
        for name, buffer in buffers.items():
            never_negative = name in ("step", "exp_avg_sq")
            if not bool(buffer.isfinite().all()) or (never_negative and bool((buffer < 0).any())):
                raise ValueError(f"{name} of parameter {index} is not finite, or negative")
            if name == "step" and float(buffer) > MAX_COUNT:
                raise ValueError(f"step of parameter {index} is {float(buffer):g}")
    student.optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule = dict(facts["schedule"]) | {"lr_lambdas": [None] * len(groups)}
    for name, own in student.schedule.state_dict().items():
        if _form(schedule[name]) != _form(own) or not _is_moderate(schedule[name]):
            raise ValueError(f"{name} of the schedule is {schedule[name]}")
    student.schedule.load_state_dict(schedule)
    for group, rate in zip(student.optimizer.param_groups, facts["rates"], strict=True):
        if type(rate) not in (int, float) or not 0 <= rate <= MAX_LEARNING_RATE:
            raise ValueError(f"a learning rate is {rate!r}")
        group["lr"] = rate
    states = [tensors[f"random.{i}"] for i in range(len(student.random))]
    for own, stored in zip(student.random, states, strict=True):
        if (own.shape, own.dtype) != (stored.shape, stored.dtype):
            raise ValueError(f"a random state is {stored.dtype} {tuple(stored.shape)}")
    torch.Generator().set_state(states[0])  # raises unless it is one
    student.random = states
    device = student.accelerator.device
    losses = tensors.get("losses", torch.empty(0, len(Loss._fields)))
    if losses.ndim != 2 or losses.shape[1] != len(Loss._fields) or losses.dtype != torch.float32:
        raise ValueError(f"the losses are {losses.dtype} {tuple(losses.shape)}")
    student.losses = list(losses.to(device))
    for line in facts["history"]:
        check_line(line)
    student.steps = integer(dict(facts), "steps", 0, MAX_COUNT)
    student.history = list(facts["history"])
    counts = facts["evaluation"]
    student.evaluation = None
    if counts and not all("errors" in line for line in student.history):
        raise ValueError("a line of the metrics has no errors")
    if counts:
        samples = integer({"samples": counts[1]}, "samples", 1, MAX_COUNT)
        errors = integer({"errors": counts[0]}, "errors", 0, samples)
        scores = scores_from(student.history[-1]) if student.history else None
        student.evaluation = Evaluation(errors, samples, scores=scores)
    if not isinstance(facts["stopped"], str | None) or type(facts["failed"]) is not bool:
        raise ValueError(f"stopped is {facts['stopped']!r} and failed is {facts['failed']!r}")
    student.stopped, student.failed = facts["stopped"], facts["failed"]


def _check_tensors(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless weights have the names, shapes and dtypes of a model, and are finite."""
    if stored.keys() != own.keys():
        raise ValueError(f"the weights are {', '.join(stored)}")
    for name, tensor in stored.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")


def state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimizer keeps for each parameter, found with a step on a parameter of one number."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    make: Any = type(inner)
    other = make([{**inner.param_groups[0], "params": [parameter]}])
    other.step()
    return {name for name, value in other.state[parameter].items() if value is not None}


def _form(value: object) -> object:
    """The types of a value of a schedule: a number, or a list of them of some length."""
    if isinstance(value, list | tuple):
        return [_form(item) for item in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if number else type(value).__name__


def _is_moderate(value: object) -> bool:
    """Whether the numbers in a value of a schedule are of a size that steps and learning rates can have."""
    if isinstance(value, list | tuple):
        return all(map(_is_moderate, value))
    return not isinstance(value, int | float) or abs(value) <= MAX_COUNT


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
    text = json.dumps(value, default=str)
    return text if len(text) <= 160 else f"{text[:160]}…"
