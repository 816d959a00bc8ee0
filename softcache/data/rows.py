"""Samples with many rows: tokens of a document, words, frames of a recording, pixels of an image.

A source of such samples says which rows each of them has, and returns the labels of a batch as one flat
array: those of the first sample's rows, then of the second's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache.layout import RowLayout, even_layout
from softcache.data.source import UNLABELLED, Source, WrappedSource
from softcache.errors import DataError

TOKEN, WORD, FRAME, PIXEL = "token", "word", "frame", "pixel"  # what a row is
NO_ROW = -100  # the label of a position without a row, as in transformers
IGNORED = 255  # the label of a pixel without a class, as in Pascal VOC and Cityscapes
PADDING = -1  # behind the last token of a sample that is shorter than others in its batch

Indices = npt.NDArray[np.int64]


def layout_of_source(source: Source) -> RowLayout | None:
    """Which rows belong to which sample of a source; None if each sample has one."""
    layout: RowLayout | None = getattr(source, "layout", None)
    return layout


def unit_of(source: Source) -> str | None:
    """What a row of a source is; None if each sample has one row."""
    return None if layout_of_source(source) is None else str(getattr(source, "unit", TOKEN))


def has_masks(source: Source) -> bool:
    """Whether the labels of a source are those of pixels, and move with them."""
    inner = source
    while not isinstance(inner, EvenRowsSource) and isinstance(inner, WrappedSource):
        inner = inner.source
    return unit_of(source) == PIXEL and not isinstance(inner, EvenRowsSource)


def row_facts(source: Source) -> dict[str, Any]:
    """What a header says of the rows of a source, besides their number."""
    return {"unit": unit_of(source), **getattr(source, "facts", {})}


def vocabulary_of(source: Source) -> int | None:
    """The number of tokens that the rows of a language model are about; None if it is not known."""
    if unit_of(source) != TOKEN:
        return None
    vocabulary: int | None = getattr(source, "facts", {}).get("vocabulary")
    return vocabulary


def lengths_of(source: Source) -> Indices:
    """The number of tokens of each sample, (samples,).

    Raises:
        DataError: the source does not know it.
    """
    tokens = tokens_of(source)
    if tokens is None:
        raise DataError(f"{source.name} does not know how long its samples are")
    return tokens.lengths


def tokens_of(source: Source) -> TokenSource | None:
    """The documents within a source that only changes their labels; None for other sources."""
    inner = source
    while isinstance(inner, WrappedSource):
        inner = inner.source
    return inner if isinstance(inner, TokenSource) else None


def longest_sample(source: Source) -> int:
    """The most positions of a sample, at least 1: tokens, frames or pixels."""
    tokens = tokens_of(source)
    if tokens is not None:
        return int(tokens.lengths.max(initial=1))
    layout = layout_of_source(source)
    counts = layout.counts(np.arange(layout.samples)) if layout else np.ones(1, np.int64)
    return int(counts.max(initial=1))


def has_tokens(source: Source) -> bool:
    """Whether the samples are token ids, padded with PADDING."""
    return unit_of(source) in (TOKEN, WORD)


@dataclass(frozen=True)
class TokenSource:
    """Documents as token ids, each with a row for every prediction that counts.

    The row at position i of a language model predicts token i + 1; that of a token classifier is about token
    i itself.

    Attributes:
        ids: (tokens,) the tokens of all documents.
        offsets: (samples + 1,) the first token of each document.
        layout: which positions of the documents have rows.
        row_labels: (rows,) the label of each row: the next token, or the class of a word.
        unit: what a row is, TOKEN or WORD.
        facts: what a header says of the tokens: tokenizer, template, vocabulary, tokens, bytes, loss_on.
    """

    name: str
    ids: npt.NDArray[np.int32]
    offsets: Indices
    layout: RowLayout
    row_labels: npt.NDArray[np.int32]
    facts: dict[str, Any]
    unit: str = TOKEN
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Indices:
        """The number of tokens of each document, (samples,)."""
        return np.diff(self.offsets)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Indices]:
        samples = np.asarray(indices, np.int64)
        lengths = self.lengths[samples]
        inputs = np.full((len(samples), int(lengths.max(initial=0))), PADDING, np.int64)
        for row, sample, length in zip(inputs, samples, lengths, strict=True):
            row[:length] = self.ids[self.offsets[sample] : self.offsets[sample] + length]
        labels = self.row_labels[self.layout.rows_of(samples)].astype(np.int64)
        return torch.from_numpy(inputs), labels

    def take(self, samples: Indices) -> TokenSource:
        """The documents at `samples`, copied."""
        whole = RowLayout(self.offsets, self.offsets[:-1], np.zeros(len(self), np.int64))
        layout = self.layout.take(samples)
        lengths = self.lengths[samples]
        facts = {name: fact for name, fact in self.facts.items() if name != "bytes"}
        if "tokens" in facts:
            facts["tokens"] = int(lengths.sum())
        return TokenSource(
            self.name,
            self.ids[whole.rows_of(samples)],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            layout,
            self.row_labels[self.layout.rows_of(samples)],
            facts,
            self.unit,
            self.class_names,
        )


@dataclass(frozen=True)
class MaskSource:
    """Images with a label for each pixel.

    Attributes:
        inputs: (N, C, H, W).
        masks: (N, H, W) int64, UNLABELLED where a pixel has no label.
    """

    name: str
    inputs: npt.NDArray[Any]
    masks: Indices
    class_names: tuple[str, ...] = ()
    unit: str = PIXEL

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def layout(self) -> RowLayout:
        """A row for each pixel, in reading order."""
        return even_layout(len(self), self.masks[0].size)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Indices]:
        rows = np.asarray(indices, np.int64)
        inputs = torch.from_numpy(np.ascontiguousarray(self.inputs[rows]))
        return inputs, self.masks[rows].reshape(-1)


def without_ignored(masks: npt.NDArray[Any]) -> Indices:
    """Masks as int64, with UNLABELLED for 255 and NO_ROW, which stand for pixels without a label."""
    values = masks.astype(np.int64)
    return np.where((values == IGNORED) | (values == NO_ROW), UNLABELLED, values)


@dataclass(frozen=True)
class EvenRowsSource(WrappedSource):
    """Samples that each have a row at the same positions, without labels, as the frames of a recording."""

    positions: int
    row_unit: str

    @property
    def unit(self) -> str:
        """What a row is."""
        return self.row_unit

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: the labels of the samples are not those of the rows."""
        return ()

    @property
    def layout(self) -> RowLayout:
        """A row at each position of each sample."""
        return even_layout(len(self.source), self.positions)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Indices]:
        inputs = self.source.fetch(indices)[0]
        return inputs, np.full(len(indices) * self.positions, UNLABELLED, np.int64)
