"""What the tests of loop share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError

StopAt = Callable[..., None]


BATCHES = 5  # of 64 samples and less


# a teacher that is told by the environment what to do in the middle of its work; a batch of one
# sample, on which the dump tries it, does not count
TEACHER = """
import builtins, os, time
from pathlib import Path

import torch
from torch import nn

CALLS = Path(__file__).with_name("calls")

class Teacher(nn.Module):
    def __init__(self, classes):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, classes, generator=generator))

    def forward(self, x):
        if len(x) > 1:
            with CALLS.open("a") as file:
                file.write("x")
            if CALLS.stat().st_size == int(os.environ.get("TEACHER_AT", 0)):
                if "TEACHER_RAISES" in os.environ:
                    raise getattr(builtins, os.environ["TEACHER_RAISES"])("no more")
                time.sleep(60)
            time.sleep(float(os.environ.get("TEACHER_PAUSE", 0)))
        return x.flatten(1) @ self.weight

def teacher():
    return Teacher(5)

def wide():
    return Teacher(2048)
"""


def batches_seen(folder: Path) -> int:
    """How many batches the teacher in `folder` has seen."""
    path = folder / "calls"
    return path.stat().st_size if path.exists() else 0


def begin(config: DumpConfig, stop_at: StopAt, batch: int = 3) -> Path:
    """A dump that the teacher broke off; the unfinished file."""
    stop_at(batch)
    with pytest.raises(ModelError, match="raised ValueError on samples"):
        dump(config)
    stop_at(0)
    return partial_path(config.out)


def whole(config: DumpConfig) -> DumpConfig:
    """The same dump into another file, which nothing stops."""
    return replace(config, out=config.out.with_name("whole.h5"))


def batches_of(config: DumpConfig, folder: Path) -> int:
    """How many batches the teacher in `folder` sees in a dump."""
    before = batches_seen(folder)
    dump(config)
    return batches_seen(folder) - before


def committed(path: Path) -> int:
    """Blocks of rows that an unfinished cache holds."""
    return int((open_cache(path, unfinished=True).arrays["digests"] != 0).sum())


def data_of(config: DumpConfig, folder: Path, **arrays: npt.NDArray[Any]) -> DumpConfig:
    """Other arrays in a file of the same name."""
    folder = folder / "changed"
    folder.mkdir()
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return replace(config, data=f"npz:{folder}/tiny.npz")
