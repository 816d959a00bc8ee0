"""A part of a data source, or another order of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from softcache.cache.layout import RowLayout
from softcache.data.rows import TokenSource
from softcache.data.source import ArraySource, Source, WrappedSource
from softcache.errors import DataError, SettingsError


@dataclass(frozen=True)
class SubsetSource(WrappedSource):
    """The samples at `indices` of another source, in this order."""

    indices: npt.NDArray[np.int64] = field(repr=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the source, also of those without a sample in the subset."""
        return self.source.class_names

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """(N,) all labels, if the source knows them without being read."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else labels[self.indices]

    @property
    def layout(self) -> RowLayout | None:
        """Which rows belong to which sample; None if each has one."""
        layout = super().layout
        return None if layout is None else layout.take(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        return self.source.fetch(self.indices[np.asarray(indices, np.int64)].tolist())


def parse_subset(options: Mapping[str, str], spec: str) -> tuple[int | None, int | None]:
    """The seed of `shuffle=SEED` and the number of `samples=N`; None for an option that is not given.

    Raises:
        SettingsError: an option is not a whole number in its range.
    """
    shuffle, samples = options.get("shuffle"), options.get("samples")
    if shuffle is not None and not re.fullmatch(r"\d{1,18}", shuffle, re.ASCII):
        raise SettingsError(
            f"{spec!r}: shuffle {shuffle!r}; expected a seed, a whole number from 0"
        )
    if samples is not None and not re.fullmatch(r"[1-9]\d{0,17}", samples, re.ASCII):
        raise SettingsError(f"{spec!r}: samples {samples!r}; expected a whole number from 1")
    return (None if shuffle is None else int(shuffle), None if samples is None else int(samples))


def subset(source: Source, shuffle: int | None, samples: int | None) -> Source:
    """A part of a source.

    A source of arrays stays one of its type, so that a table keeps its columns; its samples are copied.

    Args:
        source: the whole data.
        shuffle: the seed of a random order; None for the order of the source.
        samples: the number of samples to take from the start of that order; None for all.

    Raises:
        DataError: the source has fewer samples.
    """
    if shuffle is None and samples is None:
        return source
    if samples is not None and samples > len(source):
        raise DataError(
            f"{source.name}: samples={samples}, and the data holds {len(source)}; expected at most as many"
        )
    order = np.arange(len(source))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(source))
    indices = order[:samples].astype(np.int64)
    if isinstance(source, ArraySource | TokenSource):
        return source.take(indices)
    return SubsetSource(source, indices)
