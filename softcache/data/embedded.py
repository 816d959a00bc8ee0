"""Samples embedded in a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.cache.arrays import INPUT_OFFSETS, INPUTS
from softcache.cache.layout import check_tokens
from softcache.cache.reader import open_trainable
from softcache.data.class_names import all_class_names
from softcache.data.keys import sample_keys
from softcache.data.rows import WORD, TokenSource
from softcache.data.source import UNLABELLED, Source
from softcache.errors import SettingsError


def source_of_cache(cache: Cache) -> Source:
    """The samples of a cache that was dumped with --embed-inputs.

    Raises:
        SettingsError: the cache has no inputs.
        FormatError: its tokens are not those of its samples.
    """
    layout, rows = cache.layout, cache.header.rows
    if layout is None or rows is None or not cache.header.embeds_inputs:
        return CacheSource(cache)
    offsets = np.array(cache.arrays[INPUT_OFFSETS])
    check_tokens(layout, cache.arrays[INPUTS], offsets, cache.path)
    facts = {name: fact for name, fact in rows.items() if name not in ("count", "unit")}
    return EmbeddedTokens(
        cache.header.data,
        cache.arrays[INPUTS],
        offsets,
        layout,
        cache.arrays["labels"],
        facts,
        cache.header.unit,
        all_class_names(cache) if cache.header.unit == WORD else (),
        cache.path,
    )


@dataclass(frozen=True)
class EmbeddedTokens(TokenSource):
    """The documents of a cache that was dumped with --embed-inputs."""

    path: Path = Path()

    def __reduce__(self) -> tuple[Callable[[Path], Source], tuple[Path]]:
        return _reopen, (self.path,)  # a memory map would be copied, with all that it holds


class CacheSource:
    """The samples of a cache that was dumped with --embed-inputs.

    Raises:
        SettingsError: the cache has no inputs.
    """

    def __init__(self, cache: Cache) -> None:
        if not cache.header.embeds_inputs:
            raise SettingsError(
                f"{cache.path} holds only soft targets; give its samples, {cache.header.data}, with --data, "
                "or dump it again with --embed-inputs"
            )
        self.cache, self.name = cache, cache.header.data
        self.class_names = all_class_names(cache)
        self.text = _are_texts(cache)

    def __reduce__(self) -> tuple[Callable[[Path], Source], tuple[Path]]:
        return _reopen, (self.cache.path,)  # a memory map cannot be pickled for another process

    def __len__(self) -> int:
        return self.cache.header.samples

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        rows = np.asarray(indices, np.int64)
        inputs, labels = torch.from_numpy(self.cache.arrays[INPUTS][rows]), self.cache.labels[rows]
        if self.cache.header.multi_label:
            sets = self.cache.label_sets(rows).astype(np.int64)
            labels = np.where(labels[:, None] < 0, UNLABELLED, sets)
        return inputs, labels


def _are_texts(cache: Cache) -> bool:
    """Whether the samples are texts, whose keys leave out the padding, unlike those of all others."""
    first = torch.from_numpy(np.array(cache.arrays[INPUTS][:1]))
    is_text = first.ndim == 2 and not first.dtype.is_floating_point
    return is_text and bool(sample_keys(first, text=True)[0] == cache.keys[0])


def _reopen(path: Path) -> Source:
    return source_of_cache(open_trainable(path))
