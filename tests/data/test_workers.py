"""Worker processes: without fork, told to stop, or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import numpy as np, torch
from torch import nn
from torch.utils.data import Dataset

class Own(Dataset):
    def __init__(self):
        random = np.random.default_rng(0)
        self.images = random.integers(0, 256, (256, 1, 6, 6), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]), int(self.images[index].sum() % 3)

def data():
    return Own()

class Unsendable(Own):
    def __init__(self):
        super().__init__()
        self.function = lambda: 0

def unsendable():
    return Unsendable()

def noise(sample):
    return sample + torch.randint(0, 9, sample.shape).to(sample.dtype)

def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = teacher()

    def forward(self, x):
        import time
        time.sleep(0.1)
        return self.inner(x)

def slow():
    return Slow()
"""
# a start method can only be set where the main module guards what it runs
RUN = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    from softcache.cli.app import main
    main(sys.argv[2:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path


def start(folder: Path, method: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "run.py", method, *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(folder: Path, method: str, *arguments: str) -> tuple[int, str]:
    process = start(folder, method, *arguments)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def dump_arguments(out: str, *options: str, data: str = "data") -> list[str]:
    return [
        "dump", "--teacher", "mine.py:teacher", "--data", f"mine.py:{data}", "--augment",
        "mine.py:noise,flip", "--views", "2", "--batch-size", "64", "-o", out, *options,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["spawn"])  # forkserver sends the same things
def test_a_users_file_works_in_workers_that_are_not_forked(folder: Path, method: str) -> None:
    for out, options in (("one.h5", []), ("two.h5", ["--workers", "1"])):
        code, errors = run(folder, method, *dump_arguments(out, "--embed-inputs", *options))
        assert code == 0, errors
    assert (folder / "one.h5").read_bytes() == (folder / "two.h5").read_bytes()
    # the samples and the transform of a cache are sent too
    train = (
        "train one.h5 --student mlp:8 --epochs 1 --augment mine.py:noise,flip -o run --workers 1"
    )
    code, errors = run(folder, method, *train.split())
    assert code == 0, errors


def test_data_that_cannot_be_sent_are_told_in_one_line(folder: Path) -> None:
    code, errors = run(
        folder, "spawn", *dump_arguments("c.h5", "--workers", "1", data="unsendable")
    )
    assert code == 1
    assert "Traceback" not in errors
    assert "the data cannot be sent to worker processes" in errors
    assert "or use --workers 0" in errors


def workers_of(process: int) -> list[int]:
    listing = Path(f"/proc/{process}/task")
    if not listing.exists():
        pytest.skip("this system does not list the children of a process")
    return [
        int(pid) for task in listing.iterdir() for pid in (task / "children").read_text().split()
    ]


def slow_dump(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A dump with two workers that runs, and takes long."""
    process = start(
        folder, "fork", "dump", "--teacher", "mine.py:slow", "--data", "mine.py:data",
        "--batch-size", "2", "--workers", "2", "-o", "c.h5",
    )  # fmt: skip
    partial = folder / "c.h5.partial"
    for _ in range(600):
        if partial.exists() and len(workers := workers_of(process.pid)) == 2:
            time.sleep(0.5)  # the workers may not have set up their signals yet
            return process, workers
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the dump did not begin: {process.communicate()}")


def test_a_worker_that_is_killed_is_told_in_one_line(folder: Path) -> None:
    process, workers = slow_dump(folder)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if not line.startswith("dump")]
    assert line.startswith("Error: a process that loads data was stopped from outside")
    assert "use fewer --workers, then run the same command again, which continues" in line
    assert (folder / "c.h5.partial").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_stops_in_one_line(
    folder: Path, number: signal.Signals, code: int
) -> None:
    process, workers = slow_dump(folder)
    for pid in (*workers, process.pid):  # as a terminal and SLURM send it
        os.kill(pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    lines = [line for line in errors.splitlines() if not line.startswith("dump")]
    assert lines == [
        "Error: stopped; the finished rows are kept in c.h5.partial: run the same command again to continue"
    ]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
