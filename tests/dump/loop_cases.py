"""Helpers shared by the tests of the dump loop."""

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

BATCHES = 5  # of up to 64 samples

# a teacher that environment variables make fail or pause in the middle of a dump; batches of one
# sample, with which the dump tries it, do not count
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
    """Start a dump that the teacher breaks off; returns the unfinished file."""
    stop_at(batch)
    with pytest.raises(ModelError, match="raised ValueError on samples"):
        dump(config)
    stop_at(0)
    return partial_path(config.out)


def whole(config: DumpConfig) -> DumpConfig:
    """The same dump into another file, to be run without a stop."""
    return replace(config, out=config.out.with_name("whole.h5"))


def batches_of(config: DumpConfig, folder: Path) -> int:
    """Run a dump; returns how many batches the teacher in `folder` sees."""
    before = batches_seen(folder)
    dump(config)
    return batches_seen(folder) - before


def committed(path: Path) -> int:
    """Blocks of rows that an unfinished cache holds."""
    return int((open_cache(path, unfinished=True).arrays["digests"] != 0).sum())


def data_of(config: DumpConfig, folder: Path, **arrays: npt.NDArray[Any]) -> DumpConfig:
    """The same dump of other arrays, in a file of the same name."""
    folder = folder / "changed"
    folder.mkdir()
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return replace(config, data=f"npz:{folder}/tiny.npz")
