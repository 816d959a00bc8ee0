"""The encodings in torch: encode on the teacher's device, decode on the student's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Encoding
from softcache.cache.encodings import FLOAT16_LOWEST


def soften(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) in float32, (B, C); Hinton et al. 2015 (arXiv 1503.02531), equation 1."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def encode(encoding: Encoding, log_probs: Tensor) -> dict[str, npt.NDArray[Any]]:
    """What the file stores of log-probabilities (B, C) float32; only that leaves the device.

    The lowest float16 stands for anything below it: exp of both is 0, and the loss has no inf - inf.
    """
    half = log_probs.clamp(min=FLOAT16_LOWEST).half()
    return {"log_probs": half.cpu().numpy()}


def decode(encoding: Encoding, stored: Mapping[str, Tensor], ratio: float) -> Tensor:
    """Log-probabilities (B, C) float32 at T' from rows stored at T; `ratio` is T / T'."""
    return torch.log_softmax(stored["log_probs"].float() * ratio, dim=-1)


def soft_targets(
    cache: Cache, rows: npt.NDArray[np.int64], temperature: float, device: torch.device
) -> Callable[[int, npt.NDArray[np.int64]], Tensor]:
    """A function (view, indices (B,)) -> log-probabilities (B, C) at `temperature` on `device`.

    Args:
        rows: (N,) the row of the cache for each sample of the data, as join_samples() gives it.
    """
    header = cache.header
    joined = torch.from_numpy(rows)
    arrays = {a.name: as_tensor(cache.arrays[a.name]) for a in header.arrays if a.axis == "rows"}
    shared = {
        a.name: as_tensor(cache.arrays[a.name]).to(device)
        for a in header.arrays
        if a.axis == "shared" and not a.dtype.startswith("|S")
    }
    ratio = header.temperature / temperature

    def fetch(view: int, indices: npt.NDArray[np.int64]) -> Tensor:
        at = joined[torch.from_numpy(indices)]
        picked = {name: torch.index_select(array[view], 0, at) for name, array in arrays.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in picked.items()}
        return decode(header.encoding, shared | moved, ratio)

    return fetch


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor over the same memory; the map is read-only, and nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
