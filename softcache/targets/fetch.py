"""Read rows of a cache from the memory-mapped file, as soft targets."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Sampled, TopK
from softcache.cache.draws import check_sampled
from softcache.cache.reader import change_check
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import Indices
from softcache.types import SparseTargets, StoredTargets, Targets, Views

# reading is slow if a row takes longer than SLOW_ROW seconds plus its bytes at SLOW_BYTES per second
SLOW_ROW, SLOW_BYTES = 20e-6, 5e8
SLOW_BATCHES = 100  # how many batches are prefetched after a slow one


def soft_targets(
    cache: Cache, temperature: float, device: torch.device
) -> Callable[[Views, Indices], Targets]:
    """Make the function that fetches targets at `temperature` to `device`.

    Returns:
        (views, cache rows (B,)) -> targets, dense or sparse. A view is counted from the cache's
        first. The function raises FormatError if a stored class id is out of range, or if the file was
        written to since.

    Raises:
        SettingsError: the encoding cannot be re-tempered to `temperature`.
    """
    fetch = tempered_targets(cache, [temperature], device)
    return lambda views, cache_rows: fetch(views, cache_rows)[temperature]


def stored_targets(
    cache: Cache, temperatures: Sequence[float], device: torch.device
) -> Callable[[Views, Indices], dict[float, StoredTargets]]:
    """Like tempered_targets(), but the rows stay as they are stored until they are needed.

    The log-probabilities of all tokens of a batch would not fit into memory.

    Returns:
        (views, cache rows (B,)) -> stored targets by temperature.

    Raises:
        SettingsError: the encoding cannot be re-tempered to a temperature.
    """
    header = cache.header
    if isinstance(header.encoding, Sampled):
        for temperature in temperatures:
            check_sampled(header.temperature, temperature)
    gather, check_unchanged = make_gather(cache), change_check(cache)
    shared = {name: tensor.to(device) for name, tensor in shared_tensors(cache).items()}

    def decoder(wanted: float) -> Callable[[Mapping[str, Tensor]], Targets]:
        def decoded(stored: Mapping[str, Tensor]) -> Targets:
            targets = decode(
                header.encoding,
                shared | dict(stored),
                temperature=header.temperature,
                wanted=wanted,
                classes=header.classes,
            )
            if header.rows is None or not isinstance(header.encoding, TopK):
                return targets
            # of a large vocabulary, the mass of the tail is known, and not how it is shared out
            return replace(targets, bucket=True) if isinstance(targets, SparseTargets) else targets

        return decoded

    decoders = {temperature: decoder(temperature) for temperature in temperatures}

    def fetch(views: Views, rows: Indices) -> dict[float, StoredTargets]:
        stored = gather(views * header.row_count + rows)
        check_unchanged()
        if "ids" in stored:
            stored["ids"] = class_ids(stored["ids"], header.classes)
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in stored.items()}
        return {
            temperature: StoredTargets(on_device, decoder, len(rows), header.classes)
            for temperature, decoder in decoders.items()
        }

    return fetch


def tempered_targets(
    cache: Cache, temperatures: Sequence[float], device: torch.device
) -> Callable[[Views, Indices], dict[float, Targets]]:
    """Like soft_targets(), but at several temperatures, reading the rows only once.

    Returns:
        (views, cache rows (B,)) -> targets by temperature.
    """
    fetch = stored_targets(cache, temperatures, device)
    return lambda views, cache_rows: {
        temperature: stored.decoded() for temperature, stored in fetch(views, cache_rows).items()
    }


def make_gather(cache: Cache) -> Callable[[Indices], dict[str, Tensor]]:
    """Make the function that gathers rows from all per-row arrays.

    In a file larger than memory, every row would wait for the disk in turn. Once gathering becomes
    slow, the operating system is asked for all rows of a batch at once, to read them in parallel.

    Returns:
        (rows (B,)) -> tensors (B, ...) by array name; rows are numbered view · samples + cache row.
    """
    tensors = {
        array: as_tensor(cache.arrays[array.name]).flatten(0, 1)  # (views · samples, ...)
        for array in cache.header.arrays
        if array.axis == "rows"
    }
    row_seconds = SLOW_ROW + cache.header.bytes_per_row / SLOW_BYTES
    batches_to_prefetch = 0

    def gather(rows: Indices) -> dict[str, Tensor]:
        nonlocal batches_to_prefetch
        if batches_to_prefetch:
            batches_to_prefetch -= 1
            for array in tensors:
                cache.prefetch_rows(array, rows)
        start, index = time.perf_counter(), torch.from_numpy(rows)
        gathered = {
            array.name: torch.index_select(tensor, 0, index) for array, tensor in tensors.items()
        }
        if time.perf_counter() - start > row_seconds * len(rows):
            batches_to_prefetch = SLOW_BATCHES
        return gathered

    return gather


def shared_tensors(cache: Cache) -> dict[str, Tensor]:
    """The arrays that all rows of the encoding share, by name, as float32."""
    return {
        array.name: torch.from_numpy(cache.arrays[array.name].astype(np.float32))
        for array in cache.header.encoding.arrays(cache.header.classes)
        if array.axis == "shared"
    }


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor over the memory of `array`, which may be a read-only map: do not write to it.

    Unsigned integers of more than 8 bits become signed ones of the same width, since torch supports
    few operations on them.
    """
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.view(f"<i{array.dtype.itemsize}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
