"""Items of samples with many rows for training loops of your own: padded, or packed into blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from softcache.data.rows import NO_ROW, has_tokens, lengths_of
from softcache.errors import SettingsError
from softcache.join.joined_data import JoinedData, TrainingBatch

if TYPE_CHECKING:
    from softcache.api import SoftLabelDataset

Item = dict[str, Tensor]
Indices = npt.NDArray[np.int64]

NO_CACHE_ROW = -1  # in `cache_rows`, of a position without soft targets
PADDING_OF = {"input_ids": 0, "attention_mask": 0, "row_labels": NO_ROW, "cache_rows": NO_CACHE_ROW}


def row_items(
    joined: JoinedData, batch: TrainingBatch, views: Indices, sample_ids: Indices
) -> list[Item]:
    """The samples of a batch as items of a SoftLabelDataset.

    Args:
        views: (B,) the view of each sample, counted from the cache's first.
        sample_ids: (B,).
    """
    cache, layout, rows = joined.cache, joined.layout, batch.rows
    if cache is None or layout is None or rows is None or not isinstance(batch.labels, Tensor):
        raise SettingsError("the cache has one row for each sample")
    tokens = has_tokens(joined.source)
    own_samples = sample_ids - cache.header.first_sample
    cache_rows = torch.from_numpy(layout.rows_of(own_samples))
    of_views = torch.from_numpy(views)[rows.samples] * cache.header.row_count
    items = []
    for number, sample in enumerate(batch.inputs):
        inputs = sample[sample >= 0] if tokens else sample
        positions = inputs.shape[0] if tokens else int(rows.positions.max()) + 1
        own = rows.samples == number
        places = rows.positions[own]
        labels = torch.full((positions,), NO_ROW, dtype=torch.int64)
        numbers = torch.full((positions,), NO_CACHE_ROW, dtype=torch.int64)
        labels[places] = batch.labels[own]
        numbers[places] = (cache_rows + of_views)[own]
        item = {"row_labels": labels, "cache_rows": numbers}
        name = "input_ids" if tokens else "inputs"
        items.append({name: inputs, **item})
    return items


def collate_tokens(items: Sequence[Mapping[str, Tensor]]) -> Item:
    """Items of tokens as one batch, each padded on the right to the longest.

    Returns:
        input_ids, attention_mask (1 for a token), row_labels and cache_rows, (B, L) int64 each. Give the
        first two to the model; the others are for distillation_loss().
    """
    longest = max(len(item["input_ids"]) for item in items)
    batch = {}
    for name in ("input_ids", "row_labels", "cache_rows"):
        padded = [
            pad(item[name], (0, longest - len(item[name])), value=PADDING_OF[name])
            for item in items
        ]
        batch[name] = torch.stack(padded)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


class PackedTokens(Dataset[Item]):
    """Documents of a SoftLabelDataset packed into blocks of a fixed length.

    A document keeps its soft targets in any packing, since the teacher saw it alone. So that a student does
    too, an item has `position_ids`, which begin anew in each document, and `attention_mask` (1, L, L), which
    is true where a token may see another. A document that does not fit into the rest of a block begins a new
    one; of one that is longer than a block, each part stands alone.
    """

    def __init__(self, dataset: SoftLabelDataset, length: int) -> None:
        """Plan the blocks.

        Args:
            dataset: documents with soft targets.
            length: tokens of a block.

        Raises:
            SettingsError: the samples are no documents, or the length is not positive.
        """
        lengths = dataset.token_lengths()
        if length < 2:
            raise SettingsError(f"blocks of {length} tokens; expected 2 or more")
        self.dataset, self.length = dataset, length
        self.blocks: list[
            list[tuple[int, int, int]]
        ] = []  # of each part: item, first and last token
        room = 0
        for item, size in enumerate(lengths.tolist()):
            for start in range(0, size, length):
                stop = min(size, start + length)
                if stop - start > room:
                    self.blocks.append([])
                    room = length
                self.blocks[-1].append((item, start, stop))
                room -= stop - start

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Item:
        parts = self.blocks[index]
        items = self.dataset.items([item for item, _, _ in parts])
        block: Item = {}
        for name in ("input_ids", "row_labels", "cache_rows"):
            values = torch.cat(
                [
                    item[name][start:stop]
                    for item, (_, start, stop) in zip(items, parts, strict=True)
                ]
            )
            block[name] = pad(values, (0, self.length - len(values)), value=PADDING_OF[name])
        sizes = torch.tensor([stop - start for _, start, stop in parts])
        document = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        block["position_ids"] = pad(
            torch.cat([torch.arange(int(size)) for size in sizes]), (0, self.length - len(document))
        )
        # each padding token is a document of its own, which sees itself, so that no softmax is over nothing
        padding = len(sizes) + torch.arange(self.length - len(document))
        document = torch.cat([document, padding])
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        block["attention_mask"] = (causal & (document[:, None] == document))[None]
        return block


def token_lengths(joined: JoinedData, order: Indices) -> Indices:
    """The number of tokens of each item.

    Raises:
        SettingsError: the samples are no documents.
    """
    if not has_tokens(joined.source):
        raise SettingsError(
            f"the samples of {joined.source.name} are no tokens, which packing needs"
        )
    lengths: Any = lengths_of(joined.source)[joined.source_indices[order]]
    return np.asarray(lengths, np.int64)
