"""A cache with its samples, and runs of two students with three seeds each, shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.train.loop import train
from softcache.train.options import make_train_config


@pytest.fixture(scope="session")
def embedded(
    data_file: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """The tiny cache with its samples: 300 of 5 classes, one view."""
    config = DumpConfig(
        teacher=f"{teacher_file}:teacher",
        data=f"npz:{data_file}",
        eval_data=f"npz:{data_file}@test",
        temperature=4.0,
        out=tmp_path_factory.mktemp("embedded") / "tiny.h5",
        batch_size=64,
        embed_inputs=True,
    )
    return dump(config)


@pytest.fixture(scope="session")
def grid(embedded: Cache, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of mlp:8 and mlp:16 with seeds 0, 1, 2, each with its baseline. Do not write to it."""
    config = make_train_config(
        cache=embedded.path, data=(), out=tmp_path_factory.mktemp("grid") / "runs", epochs=2,
        students=[{"student": spec, "seed": seed} for spec in ("mlp:8", "mlp:16") for seed in range(3)],
        eval_data=f"npz:{data_file}@test", baseline=True, device="cpu",
    )  # fmt: skip
    train(config)
    return config.out
