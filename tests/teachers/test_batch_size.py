"""Batches that do not fit into memory, the fastest batch size, and the cost of a precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError, SettingsError
from softcache.teachers.batch_size import fastest_batch
from softcache.teachers.teacher import Teacher
from softcache.util.device import is_out_of_memory
from tests.conftest import Run


class Small(nn.Module):
    """A model with memory for only `capacity` samples at a time."""

    def __init__(self, capacity: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.capacity, self.error = capacity, error
        self.batch_sizes = list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.capacity:
            raise self.error()
        self.batch_sizes.append(len(inputs))
        return 9 * inputs.flatten(1)[:, :5]


def gpu_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def host_error() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    )


def teacher(model: nn.Module) -> Teacher:
    return Teacher("small", model, 5, torch.device("cpu"), "fp32", {})


@pytest.mark.parametrize("error", [gpu_error, host_error, MemoryError])
def test_a_batch_that_does_not_fit_goes_in_halves(error: Callable[[], Exception]) -> None:
    inputs = torch.rand(13, 1, 8, 8)
    model = Small(4, error)
    torch.testing.assert_close(teacher(model).logits(inputs), 9 * inputs.flatten(1)[:, :5])
    assert sum(model.batch_sizes) == 13
    assert max(model.batch_sizes) <= 4


def test_a_sample_that_does_not_fit_is_told() -> None:
    with pytest.raises(
        ModelError, match=r"raised OutOfMemoryError on samples 0 to 2, .*CUDA out of"
    ):
        teacher(Small(0, gpu_error)).logits(torch.rand(3, 1, 8, 8))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    model = Small(4, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ModelError, match="mat1 and mat2 shapes cannot be multiplied"):
        teacher(model).logits(torch.rand(13, 1, 8, 8))
    assert model.batch_sizes == []
    assert not is_out_of_memory(RuntimeError("mat1 and mat2"))


def test_the_batch_that_is_picked_fits() -> None:
    def costly_start(inputs: Tensor) -> Tensor:
        if len(inputs) > 200:
            raise MemoryError
        (torch.rand(400, 400) @ torch.rand(400, 400)).sum()  # takes the same time for any batch
        return inputs

    assert fastest_batch(costly_start, torch.rand(1, 1, 8, 8)) in (32, 64, 128)


def test_tf32_needs_a_gpu(dump_config: DumpConfig) -> None:
    with pytest.raises(
        SettingsError, match="precision tf32 needs a CUDA GPU, but the device is cpu; use fp32 or"
    ):
        dump(replace(dump_config, precision="tf32", device="cpu"))


def test_what_a_precision_cost_is_recorded(
    dump_config: DumpConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = dump(replace(dump_config, out=dump_config.out.with_name("exact.h5")))
    rough = dump(replace(dump_config, precision="bf16"))
    assert "precision" not in (exact.header.summary or {})["fidelity"]
    cost = (rough.header.summary or {})["fidelity"]["precision"]
    assert 1e-9 < cost < 1e-2
    assert f"the precision costs KL(float32 ‖ teacher) {cost:.1e}" in capsys.readouterr().out


def test_the_batch_size_may_be_left_to_the_dump(dump_config: DumpConfig, run: Run) -> None:
    options = ["--teacher", dump_config.teacher, "--data", dump_config.data, "--out", "auto.h5"]
    result = run("dump", *map(str, options), "--batch-size", "auto", check=True)
    assert "batch size: " in result.stdout
    assert "time: " in result.stdout
    assert run("dump", *map(str, options), "--batch-size", "some").returncode == 2
