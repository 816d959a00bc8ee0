"""Fixtures shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache
from softcache.train.config import TrainConfig
from softcache.train.options import make_train_config


@pytest.fixture
def config(cache: Cache, data_file: Path, tmp_path: Path) -> TrainConfig:
    """A short run from the tiny cache to tmp_path / run: 2 epochs of 5 steps."""
    return make_train_config(
        student="mlp:16",
        data=f"npz:{data_file}",
        out=tmp_path / "run",
        cache=cache.path,
        epochs=2,
        batch_size=64,
        device="cpu",
    )
