"""Small but real files shared by the tests: data, a teacher, a cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import Cache
from softcache.cli.commands import show_log
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from tests.commands import softcache

SAMPLES, CLASSES, SIDE = 300, 5, 8

TEACHER = '''
import torch
from torch import nn

def teacher():
    """Untrained but deterministic: its logits depend on every pixel."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model
'''

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def make_arrays(samples: int = SAMPLES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8) uint8, in which a bright row marks the class, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    images = rng.integers(0, 120, (samples, 1, SIDE, SIDE), dtype=np.uint8)
    images[np.arange(samples), 0, labels] += 120
    return images, labels


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hide a module as if it were not installed, even if other tests have imported it."""

    def hide(module: str) -> None:
        for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """With two threads, steps as small as these are ten times slower on busy cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_on_the_terminal() -> Iterator[None]:
    """Print the library's log, as the command line does, so that capsys captures it."""
    with show_log(verdicts_last=False):
        yield


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz file with a train and a test split."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    x, y = make_arrays()
    x_test, y_test = make_arrays(100, seed=1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file that defines teacher()."""
    path = tmp_path_factory.mktemp("teacher") / "models.py"
    path.write_text(TEACHER)
    return path


@pytest.fixture
def dump_config(data_file: Path, teacher_file: Path, tmp_path: Path) -> DumpConfig:
    """Settings that dump the tiny cache to tmp_path / tiny.h5."""
    return DumpConfig(
        teacher=f"{teacher_file}:teacher",
        data=f"npz:{data_file}",
        eval_data=f"npz:{data_file}@test",
        temperature=4.0,
        out=tmp_path / "tiny.h5",
        batch_size=64,
    )


@pytest.fixture
def cache(dump_config: DumpConfig) -> Cache:
    """A complete dense cache of 300 samples, 5 classes, one view."""
    return dump(dump_config)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `softcache ARGUMENTS` as a separate process in tmp_path."""

    def run(*arguments: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]:
        result = softcache(arguments, tmp_path)
        if check:
            result.check_returncode()
        return result

    return run
