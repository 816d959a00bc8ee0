"""The tags of a student's model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.train.card import task
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace


@pytest.mark.parametrize(
    ("shape", "dtype", "student", "tag"),
    [
        ([3, 32, 32], "float32", "cnn:8", "image-classification"),
        ([1, 28, 28], "float32", "models.py:student", "image-classification"),
        ([12], "float32", "mlp:8", "tabular-classification"),
        ([12], "float32", "models.py:student", "tabular-classification"),
        ([12], "int64", "mlp:8", "tabular-classification"),
        ([4, 12], "float32", "mlp:8", "tabular-classification"),
        ([128], "int64", "hf:bert", "text-classification"),
        ([128], "int64", "models.py:student", "text-classification"),
    ],
)
def test_the_task_follows_from_the_input(
    shape: list[int], dtype: str, student: str, tag: str
) -> None:
    facts = {"input_shape": shape, "input_dtype": dtype, "settings": {"student": student}}
    assert task(facts) == tag


def tags(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()[2]


def test_cards_of_tables_and_of_images(
    config: TrainConfig, data_file: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "table.npz", x=np.eye(20, 4, dtype=np.float32), y=np.arange(20) % 3)
    options: dict[str, Any] = {"student": "mlp:4", "epochs": 1, "device": "cpu"}
    train(make_train_config(data=f"npz:{tmp_path}/table.npz", out=tmp_path / "table", **options))
    assert tags(tmp_path / "table") == "tags: [tabular-classification]"
    train(make_train_config(data=f"npz:{data_file}", out=tmp_path / "images", **options))
    assert tags(tmp_path / "images") == "tags: [image-classification]"
    train(replace(config, epochs=1))
    assert tags(config.out) == "tags: [knowledge-distillation]"
