"""The batch size that is fastest and fits into memory."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from softcache.errors import ModelError
from softcache.teachers.teacher import is_out_of_memory

LARGEST_BATCH = 4096  # that is tried

GAIN = 1.05  # in rows/s, for which a batch of double the size is worth its memory


def fastest_batch(teacher: Callable[[Tensor], Tensor], sample: Tensor) -> int:
    """The batch size, doubled from 32 on, beyond which rows/s no longer grow or memory ends.

    Args:
        sample: (1, *shape).
    """
    best, best_rate, size = 1, 0.0, 32
    while size <= LARGEST_BATCH:
        try:
            rate = _rows_per_second(teacher, sample.expand(size, *sample.shape[1:]).contiguous())
        except (ModelError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error.__cause__ or error):
                raise
            break
        if rate < best_rate * GAIN:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def _rows_per_second(teacher: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    teacher(inputs).cpu()  # warms up, and waits
    start = time.perf_counter()
    teacher(inputs).cpu()
    return len(inputs) / (time.perf_counter() - start)
