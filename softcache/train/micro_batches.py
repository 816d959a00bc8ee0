"""A batch in parts that are computed one after the other, to need less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from softcache.types import LabelSets, MixedLabels, RowIndex, SparseTargets, StoredTargets


def micro_batches(samples: int, count: int) -> Iterator[slice]:
    """Rows of each of up to `count` micro-batches of two or more samples.

    Batch normalization has no variance of one sample.
    """
    count = max(1, min(count, samples // 2))
    edges = [samples * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def rows_of_samples(rows: RowIndex, samples: slice) -> slice:
    """Those of the rows of a batch, which are in the order of its samples, that belong to some of them."""
    edges = torch.tensor([samples.start, samples.stop], device=rows.samples.device)
    start, stop = torch.searchsorted(rows.samples, edges).tolist()
    return slice(start, stop)


def take_rows(values: Any, rows: slice) -> Any:  # noqa: ANN401  # labels or targets of either kind
    """The labels or targets of one micro-batch."""
    if isinstance(values, StoredTargets):
        return values.rows(rows)
    if isinstance(values, SparseTargets):
        ids, log_probs, rest = (t[rows] for t in (values.ids, values.log_probs, values.rest))
        return replace(values, ids=ids, log_probs=log_probs, rest=rest)
    if isinstance(values, MixedLabels | LabelSets):
        return type(values)(*(tensor[rows] for tensor in values))
    return values[rows]
