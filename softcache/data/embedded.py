"""The samples that a cache itself holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.cache.header import INPUTS
from softcache.cache.reader import open_trainable
from softcache.errors import SettingsError


class CacheSource:
    """The samples that a cache was made with --embed-inputs holds itself."""

    def __init__(self, cache: Cache) -> None:
        if not cache.header.embeds_inputs:
            raise SettingsError(
                f"{cache.path} holds soft targets alone; name its samples, {cache.header.data}, with --data, "
                "or dump it with --embed-inputs"
            )
        self.cache, self.name = cache, cache.header.data
        self.class_names = tuple(cache.class_names)

    def __reduce__(self) -> tuple[Callable[[Path], CacheSource], tuple[Path]]:
        return _reopen, (self.cache.path,)  # a map of a file has no copy in another process

    def __len__(self) -> int:
        return self.cache.header.samples

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        at = np.asarray(indices, np.int64)
        return torch.from_numpy(self.cache.arrays[INPUTS][at]), self.cache.labels[at]


def _reopen(path: Path) -> CacheSource:
    return CacheSource(open_trainable(path))
