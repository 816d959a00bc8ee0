"""What runs on a GPU, on a GPU; without one, the same code on the CPU.

`pytest -m gpu` runs these alone. Where a check needs a GPU, the test says so and is skipped without one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softcache.cache import Cache, Encoding, Sampled, open_cache, parse_encoding
from softcache.cache.reader import partial_path
from softcache.dump.config import AUTO, DumpConfig
from softcache.dump.fit_basis import principal_directions, shared_arrays, splits
from softcache.dump.loop import dump
from softcache.errors import Interrupted, SettingsError
from softcache.files.recheck import recheck_rows
from softcache.targets.encode import HostCopy, as_arrays, make_encoder
from softcache.targets.fetch import soft_targets
from softcache.train import student as student_module
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from tests.configs import replace

pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")

CLASSES, ROWS = 300, 256
# most that a precision may cost in KL against float32, on a teacher of one layer
PRECISION_COST = {"bf16": 1e-2, "fp16": 1e-3, "tf32": 1e-3}

TEACHERS = '''
import torch
from torch import nn

class Linear(nn.Module):
    """Always the same; a batch of more than `limit` needs more memory than any machine has."""

    def __init__(self, limit=1 << 30):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.limit, self.linear = limit, nn.Linear(64, 5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        if len(x) > self.limit:
            torch.empty(1 << 46, dtype=torch.uint8, device=x.device)
        return self.linear(x.flatten(1))

def teacher():
    return Linear()

def hungry():
    return Linear(limit=48)

def dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 5))
'''


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "gpu_models.py"
    path.write_text(TEACHERS)
    return path


@pytest.fixture
def config(dump_config: DumpConfig, models: Path) -> DumpConfig:
    """A dump of 300 samples on the device."""
    return changed(dump_config, teacher=f"{models}:teacher", device=str(DEVICE))


@pytest.fixture
def training(config: DumpConfig, models: Path, tmp_path: Path) -> TrainConfig:
    """A short training of a student with dropout, from a finished cache, on the device."""
    return make_train_config(
        student=f"{models}:dropout", data=config.data, cache=dump(config).path, out=tmp_path / "run",
        epochs=2, batch_size=64, checkpoint_minutes=0.0, device=DEVICE.type,
    )  # fmt: skip


def rows() -> Tensor:
    """Log-probabilities (ROWS, CLASSES) on the CPU, of a teacher of few dimensions."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 24, generator=generator)
    return torch.log_softmax(hidden @ torch.randn(24, CLASSES, generator=generator), dim=-1)


def encodings() -> list[tuple[Encoding, dict[str, Tensor]]]:
    """Each encoding with what its rows share."""
    simple = [parse_encoding(spec, 1.0) for spec in ("dense", "quantized", "topk:16", "sampled:20")]
    fitted = principal_directions(rows(), max_directions=32)
    basis = next(iter(splits(16, 4, len(fitted.directions))))
    return [*((encoding, {}) for encoding in simple), (basis, shared_arrays(basis, fitted))]


# encode


@pytest.mark.parametrize("number", range(5))
def test_an_encoding_comes_out_on_the_device_as_on_the_cpu(number: int) -> None:
    encoding, shared = encodings()[number]

    def encoded(device: torch.device) -> dict[str, np.ndarray]:
        encode = make_encoder(encoding, shared, temperature=1.0, seed=3, device=device)
        stored = encode(rows().to(device), 0, np.arange(ROWS))
        return as_arrays(HostCopy.of(stored).wait())

    on_device, on_cpu = encoded(DEVICE), encoded(torch.device("cpu"))
    assert set(on_device) == set(on_cpu)
    for name, expected in on_cpu.items():
        values = on_device[name]
        assert values.dtype == expected.dtype
        if not CUDA:
            assert np.array_equal(values, expected)
        elif isinstance(encoding, Sampled) or name == "ids":
            # sums in another order move a draw, or two classes that are nearly equal
            assert (values != expected).mean() < 0.01, name
        elif expected.dtype.kind == "f":
            assert np.allclose(values, expected, rtol=2e-3, atol=2e-3), name
        else:
            # a code of 8 bits may round the other way
            off = np.abs(values.astype(np.int64) - expected.astype(np.int64))
            assert (off > 1).mean() < 0.01, name


def test_copies_to_the_host_arrive() -> None:
    tensors = {"a": torch.arange(1 << 20, device=DEVICE), "b": torch.ones(3, device=DEVICE)}
    copy = HostCopy.of(tensors)
    arrived = copy.wait()
    assert torch.equal(arrived["a"], torch.arange(1 << 20))
    assert all(tensor.device.type == "cpu" for tensor in arrived.values())
    assert not CUDA or all(tensor.is_pinned() for tensor in arrived.values())


# dump


def test_a_dump_on_the_device_holds_what_one_on_the_cpu_does(config: DumpConfig) -> None:
    on_device = dump(config)
    on_cpu = dump(changed(config, device="cpu", out=config.out.with_name("cpu.h5")))
    difference = np.abs(on_device.rows(0, np.arange(300)) - on_cpu.rows(0, np.arange(300)))
    assert difference.max() < 5e-3
    assert np.array_equal(on_device.keys, on_cpu.keys)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_cuda), "tf32"])
def test_what_a_precision_costs_is_measured(precision: str, config: DumpConfig) -> None:
    low = changed(config, precision=precision)
    if precision == "tf32" and not CUDA:
        with pytest.raises(SettingsError, match="precision tf32 needs a CUDA GPU"):
            dump(low)
        return
    summary = dump(low).header.summary
    assert summary is not None
    assert 0 <= abs(summary["fidelity"]["precision"]) < PRECISION_COST[precision]


@needs_cuda
def test_a_compiled_teacher_says_the_same(config: DumpConfig) -> None:
    compiled = dump(changed(config, compile=True))
    plain = dump(changed(config, out=config.out.with_name("plain.h5")))
    assert compiled.header.precision == "fp32, compiled"
    difference = np.abs(compiled.rows(0, np.arange(300)) - plain.rows(0, np.arange(300)))
    assert difference.max() < 5e-3


def test_a_batch_that_does_not_fit_goes_in_halves(config: DumpConfig, models: Path) -> None:
    hungry = changed(config, teacher=f"{models}:hungry", out=config.out.with_name("hungry.h5"))
    halved = dump(changed(hungry, batch_size=150)).rows(0, np.arange(300))
    whole = dump(config).rows(0, np.arange(300))
    assert np.abs(halved - whole).max() < 5e-3


def test_batch_size_auto_ends_where_memory_does(
    config: DumpConfig, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(changed(config, teacher=f"{models}:hungry", batch_size=AUTO))
    line = next(text for text in capsys.readouterr().out.splitlines() if "batch size" in text)
    assert int(line.rpartition(" ")[2]) >= 32


def test_a_killed_dump_continues_to_the_same_bytes(config: DumpConfig, tmp_path: Path) -> None:
    whole = dump(changed(config, out=tmp_path / "whole.h5", batch_size=4)).path.read_bytes()
    command = [
        sys.executable, "-m", "softcache", "dump", "--teacher", str(config.teacher), "--data",
        config.data, "--eval-data", str(config.eval_data), "--out", str(config.out), "--device",
        config.device, "--batch-size", "4",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not partial_path(config.out).exists():
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    dump(changed(config, batch_size=4))
    assert config.out.read_bytes() == whole


def test_the_rows_are_recomputed_from_the_teacher(config: DumpConfig) -> None:
    cache: Cache = dump(config)
    line = recheck_rows(
        cache.path, teacher=[str(config.teacher)], weights=[], data=config.data, rows=64,
        device=config.device,
    )  # fmt: skip
    assert line.startswith("fidelity: KL")


# train


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=needs_cuda)])
def test_mixed_precision_trains(precision: str, training: TrainConfig) -> None:
    (student,) = train(replace(training, precision=precision, epochs=3))
    losses = [line["total"] for line in student.history]
    assert losses[-1] < losses[0]
    assert all(tensor.isfinite().all() for tensor in weights(training.out).values())


@pytest.mark.parametrize("forget_random_state", [False, True])
def test_a_stopped_training_continues_as_if_it_had_not_stopped(
    forget_random_state: bool, training: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(training)
    again = replace(training, out=training.out.with_name("again"))
    step, taken = Student.step, 0

    def stopping(student: Student, *arguments: object) -> None:
        nonlocal taken
        taken += 1
        if taken == 8:
            raise KeyboardInterrupt
        step(student, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Student, "step", stopping)
        with pytest.raises(Interrupted, match="the same command continues"):
            train(again)
    if forget_random_state:  # so the check would notice
        monkeypatch.setattr(student_module, "set_random_state", lambda device, states: None)
    torch.manual_seed(99)
    train(again)
    same = [
        torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(
            weights(training.out).values(), weights(again.out).values(), strict=True
        )
    ]
    assert all(same) != forget_random_state


def test_rows_reach_the_device(training: TrainConfig) -> None:
    cache = open_cache(training.caches[0])
    targets = soft_targets(cache, 2.0, DEVICE)(np.zeros(5, np.int64), np.arange(5))
    assert isinstance(targets, Tensor)
    assert targets.device.type == DEVICE.type
    assert torch.allclose(targets.exp().sum(-1).cpu(), torch.ones(5), atol=1e-4)
