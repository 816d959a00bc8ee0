"""Helpers shared by the tests of the training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softcache.train.config import TrainConfig
from softcache.train.student import Student
from tests.configs import replace

NOTHING = 1e-4  # KL in nats: float16 targets stay below it, one wrong sample is far above


def as_teacher(config: TrainConfig, teacher_file: Path) -> TrainConfig:
    """A run in which the teacher itself is the student, with too small a learning rate to change it.

    Its KL divergence from the soft targets is 0 in every epoch if the targets belong to the pixels that
    it sees, at the temperature of the loss.
    """
    return replace(config, student=f"{teacher_file}:teacher", learning_rate=1e-12)


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics, one for each epoch."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def soft(folder: Path) -> list[float]:
    """The mean KL divergence from the teacher in each epoch."""
    return [line["soft"] for line in metrics(folder)]


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's student."""
    return load_file(folder / "student.safetensors")


def same_weights(folder: Path, other: Path) -> bool:
    """Whether the students of two runs are equal bit for bit."""
    a, b = weights(folder), weights(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save_data(folder: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> str:
    """Save other arrays under the file name of the tiny data, and return their specification."""
    folder = folder / "changed"
    folder.mkdir(exist_ok=True)
    arrays = {"x_train": images} | ({} if labels is None else {"y_train": labels})
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{folder}/tiny.npz"


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C at the start of a student's n-th step, after the checkpoint before it."""
    original, steps = Student.step, iter(range(1, 10**6))

    def stopping(self: Student, *arguments: Any) -> None:
        if next(steps) == step:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Student, "step", stopping)
