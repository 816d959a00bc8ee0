"""Find the batch size at which a teacher is fastest and still fits into memory."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from softcache.errors import ModelError
from softcache.teachers.matrix import MissingRowError
from softcache.util.device import is_out_of_memory

LARGEST_BATCH = 4096  # the largest one tried
GAIN = 1.05  # the smallest speedup in rows/s for which doubling the batch is worth its memory


def fastest_batch(
    teacher: Callable[[Tensor], Tensor], sample: Tensor, largest: int = LARGEST_BATCH
) -> int:
    """Double the batch size from 32 until rows/s stop growing or memory runs out; return the best.

    A matrix of outputs is tried with at most as many samples as it has rows.

    Args:
        teacher: the function to time, from inputs (B, *shape) to a tensor.
        sample: (1, *shape), repeated to fill each batch.
        largest: the largest batch to try; more samples than the data has are of no use.

    Returns:
        The batch size in samples; 1 if even 32 do not fit.

    Raises:
        ModelError: the teacher fails for a reason other than memory.
    """
    best, best_rate, size = 1, 0.0, 32
    while size <= min(largest, LARGEST_BATCH):
        try:
            rate = _rows_per_second(teacher, sample.expand(size, *sample.shape[1:]).contiguous())
        except (ModelError, MemoryError, RuntimeError) as error:
            cause = error.__cause__ or error
            if not (is_out_of_memory(cause) or isinstance(cause, MissingRowError)):
                raise
            break
        if rate < best_rate * GAIN:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def _rows_per_second(teacher: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    teacher(inputs).cpu()  # warm up; copying to the CPU waits for the GPU
    start = time.perf_counter()
    teacher(inputs).cpu()
    return len(inputs) / (time.perf_counter() - start)
