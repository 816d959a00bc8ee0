"""What a dump does where samples have many rows: their layout, batches by length, encoding in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from softcache.cache.arrays import INPUT_OFFSETS, INPUTS
from softcache.cache.layout import RowLayout
from softcache.data.documents import is_text
from softcache.data.loader import Batch, loader, sequential_batches
from softcache.data.rows import (
    FRAME,
    PIXEL,
    EvenRowsSource,
    has_tokens,
    layout_of_source,
    lengths_of,
    row_facts,
    tokens_of,
)
from softcache.data.source import Source
from softcache.data.spec import parse_data
from softcache.data.tokens import DEFAULT_LENGTH
from softcache.errors import SettingsError
from softcache.models.hf import context_length
from softcache.targets.encode import Encoder, Stored
from softcache.teachers.ensemble import Ensemble
from softcache.teachers.spec import parse_teacher
from softcache.types import RowIndex
from softcache.util.log import inform
from softcache.util.progress import progress

Indices = npt.NDArray[np.int64]

KEY_BATCH = 256  # samples read at a time for their keys
WINDOW = 8  # batches, among which samples are sorted by length: the most work that a kill can cost


def text_defaults(teachers: list[str], data: str | None, loss_on: str | None) -> dict[str, str]:
    """Options of texts that follow from the teacher: its tokenizer, and as many tokens as it takes.

    Args:
        teachers: their specifications.
        data: that of the data; nothing follows for data that are no texts.
        loss_on: which tokens of chats are to be predicted, if that is given.
    """
    if data is None or not is_text(parse_data(data)):
        return {}
    defaults = {"loss_on": loss_on} if loss_on else {}
    spec = parse_teacher(teachers[0])
    if spec.kind != "hf":
        return defaults
    place = str(spec.path.expanduser())
    defaults["tokenizer"] = spec.options.get("tokenizer", place)
    length = context_length(place)
    if length is not None and length < DEFAULT_LENGTH:
        defaults["length"] = str(length)
    return defaults


def with_rows(source: Source, teacher: Ensemble) -> Source:
    """The source with a row for each position of the teacher's output, if it does not say itself what its
    rows are, and the teacher has many for a sample."""
    positions = teacher.teachers[0].positions
    if positions is None or layout_of_source(source) is not None:
        return source
    shape = source.fetch([0])[0].shape
    unit = PIXEL if len(shape) == 4 and positions == shape[-1] * shape[-2] else FRAME
    labels = source.fetch([0])[1]
    inform(
        f"the teacher returns {positions:,} {unit}s for each sample; a row is dumped for each of them"
        + (
            f", without the labels of {source.name}, which are those of samples"
            * bool(labels[0].max() >= 0)
        )
    )
    return EvenRowsSource(source, positions, unit)


def rows_field(source: Source, samples: range) -> dict[str, Any] | None:
    """The field `rows` of the header of a dump of some samples; None if each has one row."""
    layout = layout_of_source(source)
    if layout is None:
        return None
    facts = row_facts(source)
    if len(samples) < len(source):
        facts.pop("bytes", None)  # it is known of the whole data alone
        if "tokens" in facts:
            facts["tokens"] = int(lengths_of(source)[samples.start : samples.stop].sum())
    count = int(layout.offsets[samples.stop] - layout.offsets[samples.start])
    if not count:
        raise SettingsError(
            f"samples {samples.start} to {samples.stop - 1} of {source.name} have no {facts['unit']}s; use "
            "fewer shards"
        )
    return {"count": count, **facts}


def sample_arrays(source: Source, samples: range, *, embed: bool) -> dict[str, npt.NDArray[Any]]:
    """The shared arrays of a cache that describe samples with many rows: keys, layout, embedded tokens.

    Raises:
        SettingsError: samples are to be embedded that are no tokens.
    """
    layout = layout_of_source(source)
    if layout is None:
        return {}
    indices = np.arange(samples.start, samples.stop)
    arrays: dict[str, npt.NDArray[Any]] = {**layout.take(indices).arrays()}
    arrays["keys"] = read_keys(source, indices)
    if embed:
        documents = tokens_of(source)
        tokens = documents.take(indices) if documents is not None else None
        if tokens is None:
            raise SettingsError(
                f"--embed-inputs: {source.name} has a row for each {row_facts(source)['unit']}, and only "
                "tokens can be stored with the cache; leave it out"
            )
        arrays[INPUTS], arrays[INPUT_OFFSETS] = tokens.ids, tokens.offsets
    return arrays


def read_keys(source: Source, indices: Indices) -> npt.NDArray[np.uint64]:
    """The content keys of some samples, (samples,)."""
    keys = np.empty(len(indices), np.uint64)
    batches = sequential_batches(len(indices), KEY_BATCH)
    requests = [indices[batch.start : batch.stop].tolist() for batch in batches]
    with progress("read data", len(indices), "samples") as advance:
        for rows, batch in zip(batches, loader(source, requests, keys=True), strict=True):
            keys[rows.start : rows.stop] = batch.keys.numpy().view(np.uint64)
            advance(len(rows))
    return keys


def row_index(batch: Batch) -> RowIndex:
    """The rows of a batch."""
    return RowIndex(batch.row_samples, batch.row_positions)


def encode_rows(
    encode: Encoder,
    teacher: Ensemble,
    inputs: torch.Tensor,
    rows: RowIndex,
    temperature: float,
    view: int,
    sample_ids: Indices,
) -> Stored:
    """Run the teacher and encode its rows, a few at a time, so that not all logits are in memory at once.

    Args:
        rows: the rows of the batch.
        sample_ids: (B,) the samples of the batch.
    """
    ids, positions = sample_ids[rows.samples.numpy()], rows.positions.numpy()
    parts: list[Stored] = []
    start = 0
    for log_probs in teacher.row_log_probs(inputs, rows, temperature, sample_ids):
        stop = start + len(log_probs)
        parts.append(encode(log_probs, view, ids[start:stop], positions[start:stop]))
        start = stop
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sample_batches(
    source: Source,
    samples: range,
    batch_size: int,
    batch_tokens: int | None,
    *,
    in_order: bool = False,
) -> list[list[Indices]]:
    """The samples in windows of batches; the division depends on the data and these numbers alone.

    Within a window, samples are batched with others of about their length, so that little is padded.

    Args:
        samples: the part of the source that is dumped.
        batch_size: samples of a batch, where these are not tokens.
        batch_tokens: the most tokens of a batch, with its padding.
        in_order: leave samples in their order, for a server, which needs no padding. What was done before a
            failure is then complete blocks of the file, which are kept.

    Returns:
        For each window its batches, of sample ids (B,).
    """
    indices = np.arange(samples.start, samples.stop)
    if not has_tokens(source) or batch_tokens is None:
        return [[indices[s : s + batch_size]] for s in range(0, len(indices), batch_size)]
    lengths = np.asarray(lengths_of(source)[indices], np.int64)
    if in_order:
        number = np.cumsum(lengths) // batch_tokens
        edges = np.flatnonzero(np.diff(number)) + 1
        return [[batch] for batch in np.split(indices, edges)]
    windows, start, total = [], 0, 0
    for stop, length in enumerate(lengths.tolist(), 1):
        total += length
        if total >= WINDOW * batch_tokens or stop == len(indices):
            windows.append(_by_length(indices[start:stop], lengths[start:stop], batch_tokens))
            start, total = stop, 0
    return windows


def _by_length(samples: Indices, lengths: Indices, batch_tokens: int) -> list[Indices]:
    """Batches of samples in order of their length, of at most so many tokens with padding."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(samples[order[start : start + count]])
        start += count
    return batches


def segments(layout: RowLayout, samples: Indices, limits: range) -> Iterator[tuple[int, slice]]:
    """Where the rows of some samples go: (first row of the cache, which of the batch's rows follow there).

    Args:
        samples: (B,) samples of the cache.
        limits: the rows that are to be written.
    """
    place = 0
    for sample in samples.tolist():
        first, stop = int(layout.offsets[sample]), int(layout.offsets[sample + 1])
        low, high = max(first, limits.start), min(stop, limits.stop)
        if low < high:
            yield low, slice(place + low - first, place + high - first)
        place += stop - first


class RowBatches:
    """Which batches have rows in a part of a cache of samples with many rows."""

    def __init__(self, layout: RowLayout, windows: list[list[Indices]], first_sample: int) -> None:
        """Prepare the batches.

        Args:
            layout: of the cache.
            windows: for each window its batches, of sample ids; the samples of a window are adjacent.
            first_sample: the sample id of the cache's first sample.
        """
        self.layout = layout
        self.windows = [[batch - first_sample for batch in window] for window in windows]
        ends = np.cumsum([sum(map(len, window)) for window in windows])
        self.ends = layout.offsets[ends]  # (windows,) the row after the last of each window

    def with_rows_in(self, rows: range) -> Iterator[Indices]:
        """The batches, of samples of the cache (B,), that have some of these rows."""
        first = int(np.searchsorted(self.ends, rows.start, "right"))
        for number in range(first, len(self.windows)):
            if number and self.ends[number - 1] >= rows.stop:
                return
            for samples in self.windows[number]:
                starts, stops = self.layout.offsets[samples], self.layout.offsets[samples + 1]
                if ((starts < rows.stop) & (stops > rows.start) & (starts < stops)).any():
                    yield samples

    def missing(self, missing: npt.NDArray[np.bool_], samples: Indices, start: int) -> int:
        """How many rows of these samples are missing, of those that `missing` (n,) covers from `start` on."""
        rows = self.layout.rows_of(samples) - start
        return int(missing[rows[(rows >= 0) & (rows < len(missing))]].sum())
