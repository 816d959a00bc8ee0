"""Several processes, started by torchrun, that fill one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump.processes import ProcessGroup, join_processes
from softcache.errors import SoftcacheError
from tests.commands import softcache

SAMPLES = 4096

MODELS = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, 5, generator=generator))
        self.seconds = seconds

    def forward(self, inputs):
        time.sleep(self.seconds)
        return inputs.flatten(1) @ self.weight

def teacher():
    name = "SECONDS_A_BATCH" + "_IN_THE_FIRST" * (os.environ.get("RANK") == "0")
    return Slow(float(os.environ.get(name, "0")))

def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 5))

class Fails(nn.Sequential):
    steps = 0

    def forward(self, inputs):
        self.steps += 1
        if self.steps > 5 and os.environ.get("RANK") == "1":
            raise ValueError("in the second process alone")
        return super().forward(inputs)

def fails():
    return Fails(nn.Flatten(), nn.Linear(64, 5))
"""


def write_inputs(folder: Path) -> Path:
    """Write the data and the models that the commands below name."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (SAMPLES, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", x=images, y=random.integers(0, 5, SAMPLES))
    (folder / "models.py").write_text(MODELS)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data and models, in which commands run."""
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that a single process writes."""
    folder = write_inputs(tmp_path_factory.mktemp("reference"))
    result = softcache(dump_arguments("one.h5"), folder, threads=1)
    assert result.returncode == 0, result.stderr
    return (folder / "one.h5").read_bytes()


def dump_arguments(out: str) -> list[str]:
    options = "--teacher models.py:teacher --data npz:data.npz --batch-size 96 --views 2"
    return ["dump", *options.split(), "--augment", "shift:1", "--out", out]


def torchrun(*arguments: str) -> list[str]:
    """A command in two processes."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return [sys.executable, *start, "-m", "softcache", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def test_several_processes_write_the_file_that_one_writes(
    folder: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_A_BATCH_IN_THE_FIRST", "0.1")  # which the others do not wait for
    result = softcache(dump_arguments("many.h5"), folder, processes=3, threads=1)
    assert result.returncode == 0, result.stderr
    assert (folder / "many.h5").read_bytes() == reference
    assert result.stdout.count("content id") == 1  # only one process prints


def test_a_killed_process_fails_the_job_and_another_number_of_them_goes_on(
    folder: Path, reference: bytes
) -> None:
    seconds = {"SECONDS_A_BATCH": "0.1", "SECONDS_A_BATCH_IN_THE_FIRST": "0.1"}
    job = subprocess.Popen(
        torchrun(*dump_arguments("many.h5")),
        cwd=folder,
        env=environment(**seconds),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = partial_path(folder / "many.h5")
    deadline = time.monotonic() + 60
    while committed(partial) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = committed(partial)
    assert kept >= 2
    victim = next(child for child in children(job.pid) if "softcache" in command_line(child))
    os.kill(victim, signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0
    assert not (folder / "many.h5").exists()
    assert committed(partial) >= kept
    result = softcache(dump_arguments("many.h5"), folder, processes=3, threads=1)
    assert result.returncode == 0, result.stderr
    assert (folder / "many.h5").read_bytes() == reference


def committed(partial: Path) -> int:
    if not partial.exists():
        return 0
    return int((open_cache(partial, unfinished=True).arrays["digests"] != 0).sum())


def children(parent: int) -> list[int]:
    listing = Path(f"/proc/{parent}/task/{parent}/children")
    if not listing.exists():
        pytest.skip("this system does not list the children of a process")
    return [int(child) for child in listing.read_text().split()]


def command_line(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


def test_an_error_in_the_first_process_ends_the_others(folder: Path) -> None:
    arguments = [*dump_arguments("many.h5"), "--temperature", "4", "--eval-data", "npz:none.npz"]
    result = softcache(arguments, folder, processes=2)
    assert result.returncode != 0
    assert "npz:none.npz: no such file" in result.stderr
    assert not (folder / "many.h5").exists()


def test_several_processes_train_as_one_does(folder: Path, reference: bytes) -> None:
    (folder / "one.h5").write_bytes(reference)
    losses = []
    for processes in (1, 2):
        # a checkpoint at every step, and early stopping, which all must decide alike
        options = (
            f"--student models.py:student --data npz:data.npz --epochs 2 --out run{processes} "
        )
        options += "--checkpoint-minutes 0 --patience 5 --eval-data npz:data.npz"
        arguments = ["train", "one.h5", *options.split()]
        result = softcache(arguments, folder, processes=processes, threads=1)
        assert result.returncode == 0, result.stderr
        lines = (folder / f"run{processes}" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2
        losses.append([float(line.split('"total": ')[1].split(",")[0]) for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_student_that_fails_in_one_process_leaves_the_others_as_they_are(
    folder: Path, reference: bytes
) -> None:
    (folder / "one.h5").write_bytes(reference)
    (folder / "grid.toml").write_text(
        "".join(
            f'[[student]]\nstudent = "models.py:{name}"\n' for name in ("student", "fails", "other")
        )
    )
    options = "one.h5 --data npz:data.npz --epochs 2 --batch-size 256 --checkpoint-minutes 0"
    train = ["train", *options.split()]
    together = [*train, "--config", "grid.toml", "--out", "all"]
    result = softcache(together, folder, processes=2, threads=1)
    assert result.returncode == 1
    assert "1 of 3 students failed: " in result.stderr
    assert "Traceback" not in result.stderr
    for name in ("other",):  # its dropout must draw the same masks
        single = f"--student models.py:{name} --out alone-{name}"
        alone = softcache([*train, *single.split()], folder, processes=2, threads=1)
        assert alone.returncode == 0, alone.stderr
        (run_folder,) = [path for path in (folder / "all").iterdir() if path.name.endswith(name)]
        weights = [path / "student.safetensors" for path in (run_folder, folder / f"alone-{name}")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list((folder / "all").glob("*fails/student.safetensors"))


def test_one_process_alone_is_a_group() -> None:
    group = ProcessGroup()
    assert group.first
    assert [group.add("runs", 1) for _ in range(3)] == [1, 2, 3]
    assert [group.add_rows(amount) for amount in (5, 7)] == [5, 7]
    assert group.broadcast("batch size", 32) == 32
    group.barrier()
    group.fail()


def test_processes_on_several_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(
        SoftcacheError,
        match=r"8 processes, but only 4 on this host; expected one host.*--shard I/N",
    ):
        join_processes()


def test_a_process_that_waits_hears_that_another_has_failed() -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()
    waiting, failing = ProcessGroup(0, 2, store), ProcessGroup(1, 2, store)
    failing.fail()
    with pytest.raises(SoftcacheError, match="another process of this job has failed"):
        waiting.barrier()
