"""What the tests of loop share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from softcache.train.config import TrainConfig
from tests.configs import replace

NOTHING = 1e-4  # KL in nats: float16 targets leave less, one wrong sample much more


def as_teacher(config: TrainConfig, teacher_file: Path) -> TrainConfig:
    """A run whose student is the teacher, and does not move.

    Its KL from the teacher is 0 in every epoch if the targets are those of the pixels that it sees,
    at the temperature of the loss.
    """
    return replace(config, student=f"{teacher_file}:teacher", learning_rate=1e-12)


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def soft(folder: Path) -> list[float]:
    """Mean KL from the teacher in each epoch."""
    return [line["soft"] for line in metrics(folder)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save_data(folder: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> str:
    """The specification of other data under the name of the tiny ones."""
    folder = folder / "changed"
    folder.mkdir(exist_ok=True)
    arrays = {"x_train": images} | ({} if labels is None else {"y_train": labels})
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{folder}/tiny.npz"
