"""The Accelerator of Hugging Face accelerate, on which a run trains."""

from __future__ import annotations

import atexit

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from softcache.errors import SettingsError
from softcache.util.device import pick_device
from softcache.util.distributed import world_size


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An Accelerator of Hugging Face accelerate for this process.

    Args:
        device: auto, cpu, cuda, cuda:1, mps.
        precision: fp32, bf16 or fp16.

    Raises:
        SettingsError: the device is not available, or accelerate does not see all processes.
    """
    torch_device, processes = pick_device(device), world_size()
    if torch_device.type == "cuda" and torch_device.index is not None:
        torch.cuda.set_device(torch_device)
    mixed_precision = "no" if precision == "fp32" else precision
    if processes == 1:
        # accelerate keeps one state per process, and refuses another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        atexit.register(leave_processes)
    # without a GPU, accelerate looks for other processes only with cpu=True
    accelerator = Accelerator(cpu=torch_device.type == "cpu", mixed_precision=mixed_precision)
    if accelerator.num_processes != processes:
        raise SettingsError(
            f"{processes} processes were started, but accelerate sees {accelerator.num_processes}; start "
            "them with torchrun or accelerate launch"
        )
    return accelerator


def leave_processes() -> None:
    """Leave the group of processes: a thread of it that outlives Python would abort this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
