"""Export the soft targets of tokens as the sparse columns that other trainers train from, a document each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, TopK
from softcache.cache.layout import RowLayout
from softcache.cache.reader import open_trainable
from softcache.data.rows import NO_ROW, TOKEN, TokenSource
from softcache.errors import SettingsError
from softcache.join.match import join_samples
from softcache.join.samples import open_samples
from softcache.util.extras import import_extra
from softcache.util.files import replace_file
from softcache.util.progress import progress

CHUNK_VALUES = 1 << 22  # log-probabilities decoded at a time
DEFAULT_TOP = 64
BATCH = 64  # documents written to Parquet at a time
LOWEST = -1e4  # a log-probability below it is that of an entry that is not there
NO_ENTRY = -1e9  # what axolotl writes for such an entry, with a mask of 0
DIGITS = 5  # of log-probabilities in JSON, more than float16 has
FORMATS = ("axolotl", "distillkit")

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Document = dict[str, npt.NDArray[Any]]
Layout = Callable[[npt.NDArray[np.int32], Indices, Indices, Floats, str], Document]


def export_columns(
    path: Path,
    out: Path,
    *,
    columns: str,
    top: int | None = None,
    data: str | None = None,
    temperature: float | None = None,
    view: int = 0,
) -> str:
    """Write the largest log-probabilities of each token, one row or object a document, in the cache's order.

    Args:
        path: the cache.
        out: the file to write, FILE.jsonl or FILE.parquet.
        columns: whose columns, one of FORMATS: those of axolotl (input_ids, attention_mask, labels,
            target_token_ids, target_logprobs, target_mask), with a list for each token, or of DistillKit
            (input_ids, token_ids, top_values), with one for each but the last. In both the list at position i
            is about token i + 1.
        top: entries of each list; by default those of a topk cache, else DEFAULT_TOP.
        data: the documents; None for those that the cache stores.
        temperature: of the softmax; by default that of the cache.
        view: 0 to views - 1.

    Returns:
        A line that says what was written.

    Raises:
        SettingsError: the cache has no rows of tokens, an option is invalid, or the layout has no room for
            tokens without a row.
        DataError: the data are not those of the cache.
        FormatError: the cache is unfinished or damaged.
    """
    cache = open_trainable(path)
    header, layout = cache.header, cache.layout
    if layout is None or header.unit != TOKEN:
        raise SettingsError(
            f"--columns {columns}: {path} has rows of {header.unit}s, and only those of tokens of a language "
            "model are columns of a trainer; leave it out"
        )
    if columns not in FORMATS:
        raise SettingsError(f"--columns {columns}; expected {' or '.join(FORMATS)}")
    if out.suffix not in (".jsonl", ".parquet"):
        raise SettingsError(f"-o {out}: expected a name that ends in .jsonl or .parquet")
    if not 0 <= view < header.views:
        raise SettingsError(f"view {view} of {path}; expected 0 to {header.views - 1}")
    if top is not None and not 1 <= top <= header.classes:
        raise SettingsError(f"--top {top}; expected 1 to {header.classes}, the vocabulary")
    own = header.encoding.k if isinstance(header.encoding, TopK) else DEFAULT_TOP
    k = min(top or own, header.classes)
    source = open_samples(cache, data)
    if not isinstance(source, TokenSource):
        raise SettingsError(
            f"--data {source.name} has no documents of tokens; give those of {path}"
        )
    samples = np.arange(header.samples) if data is None else join_samples(source, cache)
    build = {"axolotl": axolotl, "distillkit": distillkit}[columns]

    def documents() -> Iterator[Document]:
        with progress("export", header.row_count, "rows") as advance:
            for number, sample in enumerate(samples.tolist()):
                rows = np.arange(layout.offsets[number], layout.offsets[number + 1])
                ids, log_probs = largest(cache, view, rows, temperature, k)
                tokens = source.ids[source.offsets[sample] : source.offsets[sample + 1]]
                where = f"document {number} of {path}"
                yield build(tokens, positions_of(layout, rows), ids, log_probs, where)
                advance(len(rows))

    def write(unfinished: Path) -> None:
        (write_json if out.suffix == ".jsonl" else write_parquet)(unfinished, documents())

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, write)
    used = header.temperature if temperature is None else temperature
    return (
        f"{out}: {k} log-probabilities of {header.row_count:,} tokens in {header.samples:,} documents, as "
        f"{columns} reads them, at temperature {used:g}"
    )


def positions_of(layout: RowLayout, rows: Indices) -> Indices:
    """The positions of rows (R,), which may be none."""
    return layout.positions_of(rows) if len(rows) else rows


def largest(
    cache: Cache, view: int, rows: Indices, temperature: float | None, k: int
) -> tuple[Indices, Floats]:
    """The ids and log-probabilities (R, k) of the largest entries of rows (R,), largest first."""
    ids, values = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
    size = max(1, CHUNK_VALUES // cache.header.classes)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        log_probs = cache.rows(view, rows[part], temperature)  # (n, C)
        head = np.argpartition(-log_probs, k - 1, -1)[:, :k]
        found = np.take_along_axis(log_probs, head, -1)
        order = np.argsort(-found, -1, kind="stable")
        ids[part] = np.take_along_axis(head, order, -1)
        values[part] = np.take_along_axis(found, order, -1)
    return ids, values


def axolotl(
    tokens: npt.NDArray[np.int32], positions: Indices, ids: Indices, log_probs: Floats, where: str
) -> Document:
    """A document as axolotl trains from: a list for each token, with a mask.

    The list at position i is about token i + 1, and so is the mask; where none counts, the mask is 0.

    Args:
        tokens: (tokens,).
        positions: (R,) of the rows.
        ids: (R, k).
        log_probs: (R, k).
        where: the document in words, for messages.
    """
    length, k = len(tokens), ids.shape[1]
    labels = np.full(length, NO_ROW, np.int32)
    labels[positions + 1] = tokens[positions + 1]
    target_ids = np.tile(np.arange(k, dtype=np.int32), (length, 1))
    target_log_probs = np.full((length, k), NO_ENTRY, np.float32)
    mask = np.zeros((length, k), np.int32)
    target_ids[positions] = ids
    known = log_probs > LOWEST
    target_log_probs[positions] = np.where(known, log_probs, NO_ENTRY)
    mask[positions] = known
    return {
        "input_ids": tokens,
        "attention_mask": np.ones(length, np.int32),
        "labels": labels,
        "target_token_ids": target_ids,
        "target_logprobs": target_log_probs,
        "target_mask": mask,
    }


def distillkit(
    tokens: npt.NDArray[np.int32], positions: Indices, ids: Indices, log_probs: Floats, where: str
) -> Document:
    """A document as DistillKit takes it: a list for each token but the last, without a mask.

    Its packing leaves the last token out, which no list is about.

    Args:
        tokens: (tokens,).
        positions: (R,) of the rows.
        ids: (R, k).
        log_probs: (R, k).
        where: the document in words, for messages.

    Raises:
        SettingsError: a token has no row.
    """
    expected = np.arange(max(0, len(tokens) - 1))
    if not np.array_equal(positions, expected):
        raise SettingsError(
            f"--columns distillkit: {where} has soft targets for {len(positions):,} of {len(expected):,} "
            "tokens, and DistillKit has no mask for the others; use --columns axolotl"
        )
    if not (log_probs > LOWEST).all():
        raise SettingsError(
            f"--columns distillkit: {where} has fewer than {ids.shape[1]} entries for a token, and "
            "DistillKit has no mask; give a smaller --top"
        )
    return {"input_ids": tokens, "token_ids": ids.astype(np.int32), "top_values": log_probs}


def write_json(path: Path, documents: Iterator[Document]) -> None:
    """Write documents as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            values = {
                name: _rounded(array) if array.dtype.kind == "f" else array.tolist()
                for name, array in document.items()
            }
            file.write(json.dumps(values) + "\n")


def _rounded(values: npt.NDArray[Any]) -> Any:  # noqa: ANN401  # nested lists
    return np.minimum(values.astype(np.float64).round(DIGITS), 0).tolist()


def write_parquet(path: Path, documents: Iterator[Document]) -> None:
    """Write documents as Parquet, some at a time."""
    arrow = import_extra("pyarrow", extra="data", what="Parquet")
    parquet = import_extra("pyarrow.parquet", extra="data", what="Parquet")
    writer, batch = None, []
    try:
        for document in documents:
            batch.append(document)
            if len(batch) == BATCH:
                writer = _write_batch(arrow, parquet, path, writer, batch)
                batch = []
        if batch or writer is None:
            writer = _write_batch(arrow, parquet, path, writer, batch)
    finally:
        if writer is not None:
            writer.close()


def _write_batch(arrow: Any, parquet: Any, path: Path, writer: Any, batch: list[Document]) -> Any:  # noqa: ANN401
    """Write some documents, and return the writer, which the first of them open."""
    columns = {name: _arrow_lists(arrow, [d[name] for d in batch]) for name in batch[0]}
    table = arrow.table(columns)
    if writer is None:
        writer = parquet.ParquetWriter(path, table.schema)
    writer.write_table(table)
    return writer


def _arrow_lists(arrow: Any, arrays: list[npt.NDArray[Any]]) -> Any:  # noqa: ANN401  # of pyarrow
    """Arrays (n,) or (n, k) as an Arrow column of lists, or of lists of lists."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays)
    inner = arrow.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        firsts = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        inner = arrow.ListArray.from_arrays(firsts, inner)
    return arrow.ListArray.from_arrays(offsets, inner)
