"""Choice of the torch device, and the state of its random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.util.distributed import local_rank


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one, and each local process gets its own.

    Raises:
        SettingsError: torch cannot use the device on this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {name}: torch cannot use it here ({' '.join(str(error).split())[:200]}); "
            "use --device auto or cpu"
        ) from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host ran out of memory; for the host, only torch's message tells."""
    has_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return has_type or "can't allocate memory" in str(error)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's CPU generator, and of the GPU's if `device` is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Restore what random_state() returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
