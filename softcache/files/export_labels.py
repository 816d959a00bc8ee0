"""Export the soft targets of a cache as a plain matrix or a Parquet table, for other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, Header
from softcache.cache.reader import open_trainable
from softcache.errors import SettingsError
from softcache.util.extras import import_extra
from softcache.util.files import replace_file
from softcache.util.progress import progress

CHUNK_VALUES = 1 << 22  # probabilities decoded at a time

Indices = npt.NDArray[np.int64]

Floats = npt.NDArray[np.float32]


def export_labels(
    path: Path,
    out: Path,
    *,
    temperature: float | None = None,
    view: int = 0,
    log_probabilities: bool = False,
) -> str:
    """Write the soft targets of one view, in the order of the data.

    An .npy file holds a float32 matrix (samples, C). A Parquet file has one row per sample: its number in
    the data set, its label (null if there is none), its key, and a list of C float32 values. Where samples
    have many rows, both have one for each token, word, frame or pixel, and the table has a column `position`.

    Args:
        path: the cache; of an unfinished one, the complete views can be exported.
        out: the file to write, FILE.npy or FILE.parquet.
        temperature: temperature of the softmax; by default the temperature of the cache.
        view: 0 to views - 1.
        log_probabilities: write log-probabilities instead of probabilities.

    Returns:
        A line that says what was written.

    Raises:
        SettingsError: `out` has another suffix, the cache does not have this view or cannot be used at this
            temperature, or the data extra is not installed.
        FormatError: the cache is unfinished or damaged.
    """
    cache = open_trainable(path)
    header = cache.header
    if out.suffix not in (".npy", ".parquet"):
        raise SettingsError(f"-o {out}: expected a name that ends in .npy or .parquet")
    if not 0 <= view < header.views:
        raise SettingsError(f"view {view} of {path}; expected 0 to {header.views - 1}")
    shape, chunk = (header.row_count, header.classes), max(1, CHUNK_VALUES // header.classes)

    def chunks() -> Iterator[tuple[Indices, Floats]]:
        with progress("export", header.row_count, "rows") as advance:
            for start in range(0, header.row_count, chunk):
                cache_rows = np.arange(start, min(start + chunk, header.row_count))
                log_probs = cache.rows(view, cache_rows, temperature)  # (B, C)
                if header.multi_label:  # log-odds: log sigmoid(z) = -log(1 + exp(-z))
                    log_probs = -np.logaddexp(np.float32(0), -log_probs)
                yield cache_rows, log_probs if log_probabilities else np.exp(log_probs)
                advance(len(cache_rows))

    def write(unfinished: Path) -> None:
        if out.suffix == ".npy":
            matrix = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            for cache_rows, values in chunks():
                matrix[cache_rows] = values
            matrix.flush()
        else:
            name = "log_probabilities" if log_probabilities else "probabilities"
            write_parquet(unfinished, cache, name, chunks())

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, write)
    kind = "log-probabilities" if log_probabilities else "probabilities"
    used_temperature = header.temperature if temperature is None else temperature
    return (
        f"{out}: {kind} of {shape[0]:,} {header.unit}s, {shape[1]:,} classes, at temperature "
        f"{used_temperature:g}; {_describe_view(header, view)}"
    )


def _describe_view(header: Header, view: int) -> str:
    """Which inputs the rows belong to."""
    if header.augment is None:
        return "the samples are not augmented"
    number = header.first_view + view
    return f"view {number} of the samples, augmented by {header.augment} with seed {header.seed}"


def write_parquet(
    path: Path,
    cache: Cache,
    name: str,
    chunks: Iterable[tuple[Indices, Floats]],
) -> None:
    """Write rows of a cache as Parquet, chunk by chunk.

    Args:
        name: name of the column of values.
        chunks: cache rows (B,), and their values (B, C).
    """
    arrow = import_extra("pyarrow", extra="data", what="Parquet")
    parquet = import_extra("pyarrow.parquet", extra="data", what="Parquet")
    header = cache.header
    schema = arrow.schema(
        [
            ("sample", arrow.int64()),
            *([("position", arrow.int64())] if cache.layout is not None else []),
            ("label", arrow.int64()),
            ("key", arrow.uint64()),
            (name, arrow.list_(arrow.float32(), header.classes)),
        ],
        metadata={"softcache_content_id": cache.content_id()} if cache.complete else None,
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for cache_rows, values in chunks:
            labels, layout = cache.labels[cache_rows].astype(np.int64), cache.layout
            samples = cache_rows if layout is None else layout.samples_of(cache_rows)
            flat_values = np.ascontiguousarray(values, np.float32).reshape(-1)
            columns = [
                arrow.array(samples + header.first_sample),
                *([arrow.array(layout.positions_of(cache_rows))] if layout is not None else []),
                arrow.array(labels, mask=labels < 0),
                arrow.array(np.array(cache.keys[samples])),
                arrow.FixedSizeListArray.from_arrays(arrow.array(flat_values), header.classes),
            ]
            writer.write_table(arrow.table(columns, schema=schema))
