"""Items of samples with many rows for training loops of your own: padded, or packed into blocks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from softcache.data.rows import NO_ROW, TOKEN, has_tokens, lengths_of
from softcache.errors import SettingsError
from softcache.join.joined_data import JoinedData, TrainingBatch

if TYPE_CHECKING:
    from softcache.api import SoftLabelDataset

Item = dict[str, Tensor]
Indices = npt.NDArray[np.int64]

NO_CACHE_ROW = -1  # in `cache_rows`, of a position without soft targets
PADDING_OF = {"input_ids": 0, "row_labels": NO_ROW, "cache_rows": NO_CACHE_ROW}


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
    samples = sample_ids - cache.header.first_sample
    counts = layout.counts(samples)
    cache_rows = layout.rows_of(samples) + np.repeat(views, counts) * cache.header.row_count
    parts = (rows.positions, batch.labels, torch.from_numpy(cache_rows))
    split = zip(*(torch.split(part, counts.tolist()) for part in parts), strict=True)
    items = []
    for sample, (places, own_labels, own_rows) in zip(batch.inputs, split, strict=True):
        inputs = sample[sample >= 0] if tokens else sample
        positions = len(inputs) if tokens else int(places[-1]) + 1
        labels = torch.full((positions,), NO_ROW, dtype=torch.int64)
        numbers = torch.full((positions,), NO_CACHE_ROW, dtype=torch.int64)
        labels[places] = own_labels.where(own_labels >= 0, NO_ROW)
        numbers[places] = own_rows
        name = "input_ids" if tokens else "inputs"
        items.append({name: inputs, "row_labels": labels, "cache_rows": numbers})
    return items


def collate_tokens(items: Sequence[Mapping[str, Tensor]]) -> Item:
    """Items of documents as one batch, each padded on the right to the longest.

    Those of PackedTokens, which have the same length, are stacked as they are.

    Returns:
        input_ids, attention_mask (1 for a token, 0 for padding), row_labels and cache_rows, (B, L) int64
        each. Give the first two to the model; the others are for distillation_loss().

    Raises:
        SettingsError: the items are no documents.
    """
    first = items[0]
    if not isinstance(first, Mapping) or not set(PADDING_OF) <= set(first):
        found = ", ".join(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
        raise SettingsError(
            f"an item has {found}; expected one of a SoftLabelDataset of documents, with "
            f"{', '.join(PADDING_OF)}; TrainingArguments need remove_unused_columns=False"
        )
    if "position_ids" in first:
        return {name: torch.stack([item[name] for item in items]) for name in first}
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    longest = int(lengths.max())
    batch = {
        name: torch.stack([_padded(item[name], longest, value) for item in items])
        for name, value in PADDING_OF.items()
    }
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def _padded(values: Tensor, length: int, value: int) -> Tensor:
    return pad(values, (0, length - len(values)), value=value)


class PackedTokens(Dataset[Item]):
    """Documents of a SoftLabelDataset packed into blocks of a fixed length.

    A document keeps its soft targets in any packing, since the teacher saw it alone. So that the student sees
    it alone too, an item has, besides `input_ids`, `row_labels` and `cache_rows` (L,):

    - `position_ids` (L,), which begin anew in each document;
    - `attention_mask` (1, L, L), to be added to the attention's scores: 0 where a token may see another, and
      the lowest number where it may not. In a batch it is (B, 1, L, L), as models of transformers take it.

    Give both to the model, with `input_ids`. Flash attention takes no such mask: give it `position_ids`
    alone, with `use_cache=False`.

    Every document is in one block, and the blocks are filled as well as they can be. Only a document that is
    longer than a block is cut, and each of its parts stands alone.
    """

    def __init__(
        self, dataset: SoftLabelDataset, length: int, *, mask_dtype: torch.dtype = torch.float32
    ) -> None:
        """Plan the blocks.

        Args:
            dataset: documents with soft targets.
            length: L, tokens of a block.
            mask_dtype: dtype of the attention mask: that of the model's weights. torch.bool, true where a
                token may see another, takes less memory, but attn_implementation="eager" would add it to the
                scores as a number, and hide nothing.

        Raises:
            SettingsError: the samples are no documents, or the length is below 2.
        """
        lengths = dataset.token_lengths()
        if length < 2:
            raise SettingsError(f"blocks of {length} tokens; expected 2 or more")
        self.dataset, self.length, self.mask_dtype = dataset, length, mask_dtype
        self.blocks = _packed(lengths, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Item:
        parts = self.blocks[index].tolist()
        items = self.dataset.__getitems__([item for item, _, _ in parts])
        block: Item = {}
        for name, value in PADDING_OF.items():
            values = [item[name][a:b] for item, (_, a, b) in zip(items, parts, strict=True)]
            block[name] = _padded(torch.cat(values), self.length, value)
        sizes = torch.tensor([stop - start for _, start, stop in parts])
        positions = torch.cat([torch.arange(size) for size in sizes.tolist()])
        block["position_ids"] = _padded(positions, self.length, 0)
        # each padding token is a document of its own, which sees itself, so that no softmax is over nothing
        padding = len(sizes) + torch.arange(self.length - len(positions))
        document = torch.cat([torch.repeat_interleave(torch.arange(len(sizes)), sizes), padding])
        sees = document[:, None] == document
        if self.dataset.unit == TOKEN:
            sees = sees.tril()  # a token classifier looks ahead too
        block["attention_mask"] = _mask(sees, self.mask_dtype)[None]
        return block


def _mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of attention (L, L) from which token sees which."""
    if dtype == torch.bool:
        return sees
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def _packed(lengths: Indices, length: int) -> list[Indices]:
    """Which documents are in which block: the longest first, each where the least room is left.

    Returns:
        For each block, (parts, 3): the document, and its first token and the end of its tokens.
    """
    parts = [
        (min(size, start + length) - start, item, start)
        for item, size in enumerate(lengths.tolist())
        for start in range(0, size, length)
    ]
    parts.sort(key=lambda part: (-part[0], part[1:]))
    blocks: list[list[tuple[int, int, int]]] = []
    blocks_with: dict[int, list[int]] = {}  # by the room that is left in them
    rooms: list[int] = []  # the keys of blocks_with, ascending
    for size, item, start in parts:
        at = bisect_left(rooms, size)
        if at == len(rooms):
            number, left = len(blocks), length - size
            blocks.append([])
        else:
            room = rooms[at]
            number, left = blocks_with[room].pop(), room - size
            if not blocks_with[room]:
                del blocks_with[room], rooms[at]
        blocks[number].append((item, start, start + size))
        if left:
            if left not in blocks_with:
                insort(rooms, left)
            blocks_with.setdefault(left, []).append(number)
    return [np.array(block, np.int64) for block in blocks]


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
