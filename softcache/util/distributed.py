"""Rank, world size and device, read in one place."""

from __future__ import annotations

import os

import torch

from softcache.errors import SettingsError


def pick_device(name: str) -> torch.device:
    """The device asked for; `auto` takes a GPU if there is one, of several processes each its own.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {name}: torch cannot use it here ({' '.join(str(error).split())[:200]}); "
            "use --device auto or cpu"
        ) from error
    return device
