"""Soft targets of a cache as a plain matrix, for tools that read nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache
from softcache.cache.reader import open_trainable
from softcache.errors import SettingsError
from softcache.util.extras import import_extra
from softcache.util.files import replace_file
from softcache.util.progress import progress

CHUNK_VALUES = 1 << 22

Indices = npt.NDArray[np.int64]


def export_labels(
    path: Path,
    out: Path,
    *,
    temperature: float | None = None,
    view: int = 0,
    log_probabilities: bool = False,
) -> str:
    """Write the rows of one view in the order of the data.

    An .npy file is a matrix (samples, C) float32. Parquet has a row for each sample: its number in the data
    set, label (null if it has none), key, and a list of C float32.

    Args:
        temperature: of the softmax; the cache's own by default.
        log_probabilities: instead of probabilities.

    Raises:
        SettingsError: the view or the temperature cannot be had, `out` is of another kind, or the extra
            softcache[data] is not there.
        FormatError: the cache is unfinished or broken.
    """
    cache = open_trainable(path)
    header = cache.header
    if out.suffix not in (".npy", ".parquet"):
        raise SettingsError(f"-o {out}: expected a name that ends in .npy or .parquet")
    if not 0 <= view < header.views:
        raise SettingsError(f"view {view} of {path}; expected 0 to {header.views - 1}")
    shape, chunk = (header.samples, header.classes), max(1, CHUNK_VALUES // header.classes)

    def parts() -> Iterator[tuple[Indices, npt.NDArray[np.float32]]]:
        with progress("export", header.samples, "rows") as advance:
            for start in range(0, header.samples, chunk):
                at = np.arange(start, min(start + chunk, header.samples))
                rows = cache.rows(view, at, temperature)
                yield at, rows if log_probabilities else np.exp(rows)
                advance(len(at))

    def write(unfinished: Path) -> None:
        if out.suffix == ".npy":
            matrix = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            for at, rows in parts():
                matrix[at] = rows
            matrix.flush()
        else:
            name = "log_probabilities" if log_probabilities else "probabilities"
            write_parquet(unfinished, cache, name, parts())

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, write)
    what = "log-probabilities" if log_probabilities else "probabilities"
    wanted = header.temperature if temperature is None else temperature
    return f"{out}: {what} of {shape[0]:,} samples, {shape[1]:,} classes, at temperature {wanted:g}"


def write_parquet(
    path: Path,
    cache: Cache,
    name: str,
    parts: Iterable[tuple[Indices, npt.NDArray[np.float32]]],
) -> None:
    """Rows (B,) of a cache and their values (B, C), part by part, as Parquet with the column `name`."""
    arrow = import_extra("pyarrow", extra="data", what="Parquet")
    parquet = import_extra("pyarrow.parquet", extra="data", what="Parquet")
    header = cache.header
    schema = arrow.schema(
        [
            ("sample", arrow.int64()),
            ("label", arrow.int64()),
            ("key", arrow.uint64()),
            (name, arrow.list_(arrow.float32(), header.classes)),
        ],
        metadata={"softcache_content_id": cache.content_id()} if cache.complete else None,
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for at, rows in parts:
            labels = np.array(cache.labels[at])
            columns = [
                arrow.array(at + header.first_sample),
                arrow.array(labels, mask=labels < 0),
                arrow.array(np.array(cache.keys[at])),
                arrow.FixedSizeListArray.from_arrays(
                    arrow.array(np.ascontiguousarray(rows, np.float32).reshape(-1)), header.classes
                ),
            ]
            writer.write_table(arrow.table(columns, schema=schema))
