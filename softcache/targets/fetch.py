"""Rows of a cache as targets, read from the memory-mapped file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Sampled
from softcache.cache.encodings import check_sampled
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import Indices
from softcache.types import Targets, Views

# picking a row is slow, seconds, if it takes so long and its bytes come at less than so many a second
SLOW_ROW, SLOW_BYTES = 20e-6, 5e8

SLOW_BATCHES = 100  # after a slow one


def soft_targets(
    cache: Cache, temperature: float, device: torch.device
) -> Callable[[Views, Indices], Targets]:
    """A function (views, rows of the cache (B,)) -> targets at `temperature` on `device`.

    Raises:
        SettingsError: the encoding cannot be re-tempered so.
        FormatError: (the function) a stored class id is out of range.
    """
    fetch = tempered_targets(cache, [temperature], device)
    return lambda views, rows: fetch(views, rows)[temperature]


def tempered_targets(
    cache: Cache, temperatures: Sequence[float], device: torch.device
) -> Callable[[Views, Indices], dict[float, Targets]]:
    """The same at several temperatures; the rows are read once."""
    header = cache.header
    if isinstance(header.encoding, Sampled):
        for temperature in temperatures:
            check_sampled(header.temperature, temperature)
    gather = make_gather(cache)
    shared = {name: tensor.to(device) for name, tensor in shared_tensors(cache).items()}

    def fetch(views: Views, rows: Indices) -> dict[float, Targets]:
        picked = gather(views * header.samples + rows)
        if "ids" in picked:
            picked["ids"] = class_ids(picked["ids"], header.classes)
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in picked.items()}
        return {
            wanted: decode(
                header.encoding,
                shared | moved,
                temperature=header.temperature,
                wanted=wanted,
                classes=header.classes,
            )
            for wanted in temperatures
        }

    return fetch


def make_gather(cache: Cache) -> Callable[[Indices], dict[str, Tensor]]:
    """A function that picks rows (B,), counted through all views, of all arrays that have rows.

    Of a file larger than memory each row would wait for the disk on its own. Where picking has become
    slow, the system is asked for all rows of a batch at once, so that they come side by side.
    """
    arrays = {
        a: as_tensor(cache.arrays[a.name]).flatten(0, 1)  # (views · samples, ...)
        for a in cache.header.arrays
        if a.axis == "rows"
    }
    row_seconds = SLOW_ROW + cache.header.bytes_per_row / SLOW_BYTES
    slow_batches = 0  # for which rows are still to be asked for

    def gather(at: Indices) -> dict[str, Tensor]:
        nonlocal slow_batches
        if slow_batches:
            slow_batches -= 1
            for array in arrays:
                cache.prefetch_rows(array, at)
        start, rows = time.perf_counter(), torch.from_numpy(at)
        picked = {a.name: torch.index_select(array, 0, rows) for a, array in arrays.items()}
        if time.perf_counter() - start > row_seconds * len(at):
            slow_batches = SLOW_BATCHES
        return picked

    return gather


def shared_tensors(cache: Cache) -> dict[str, Tensor]:
    """What the rows of an encoding share, as float32."""
    return {
        array.name: torch.from_numpy(cache.arrays[array.name].astype(np.float32))
        for array in cache.header.arrays
        if array.axis == "shared" and not array.dtype.startswith("|S")
    }


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor over the same memory; the map is read-only, and nothing here writes to it.

    Unsigned numbers of 16 and 32 bits, of which torch can do little, come as signed ones.
    """
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.view(f"<i{array.dtype.itemsize}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
