"""Soft targets of a cache as a plain matrix, for tools that read nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softcache.cache.reader import open_trainable
from softcache.errors import SettingsError
from softcache.learner import replace_file
from softcache.progress import progress

CHUNK_VALUES = 1 << 22


def export_labels(
    path: Path,
    out: Path,
    *,
    temperature: float | None = None,
    view: int = 0,
    log_probabilities: bool = False,
) -> str:
    """Write the rows of one view as an .npy matrix (samples, C) float32, in the order of the data.

    Args:
        temperature: of the softmax; the cache's own by default.
        log_probabilities: instead of probabilities.

    Raises:
        SettingsError: the view or the temperature cannot be had, or `out` is no .npy file.
        FormatError: the cache is unfinished or broken.
    """
    cache = open_trainable(path)
    header = cache.header
    if out.suffix != ".npy":
        raise SettingsError(f"-o {out}: expected a name that ends in .npy")
    if not 0 <= view < header.views:
        raise SettingsError(f"view {view} of {path}; expected 0 to {header.views - 1}")
    shape, chunk = (header.samples, header.classes), max(1, CHUNK_VALUES // header.classes)

    def write(unfinished: Path) -> None:
        matrix = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
        with progress("export", header.samples, "rows") as advance:
            for start in range(0, header.samples, chunk):
                at = np.arange(start, min(start + chunk, header.samples))
                rows = cache.rows(view, at, temperature)
                matrix[at] = rows if log_probabilities else np.exp(rows)
                advance(len(at))
        matrix.flush()

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, write)
    what = "log-probabilities" if log_probabilities else "probabilities"
    wanted = header.temperature if temperature is None else temperature
    return f"{out}: {what} of {shape[0]:,} samples, {shape[1]:,} classes, at temperature {wanted:g}"
