"""Join a data set to a cache by sample: a soft label on the wrong sample is worse than none."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache
from softcache.data import Source
from softcache.errors import DataError
from softcache.loader import loader, sequential_batches
from softcache.progress import progress

BATCH = 1000


def join_samples(source: Source, cache: Cache, workers: int = 0) -> npt.NDArray[np.int64]:
    """The row of the cache for each sample of `source`, (N,); all samples are read once.

    In order where the order is the same, else by the hash of each sample's content.

    Raises:
        DataError: the data are not those of the cache; the first sample that differs is named.
    """
    samples = cache.header.samples
    if len(source) != samples:
        raise DataError(
            f"{source.name} has {len(source):,} samples, {cache.path} was made from "
            f"{samples:,} of {cache.header.data}; give the data the cache was made from"
        )
    keys, labels = read_keys(source, workers)
    rows = np.arange(samples)
    differs = np.flatnonzero(keys != cache.keys)
    if len(differs):
        rows = _by_key(keys, labels, cache, source)
        print(
            f"note: {source.name} is in another order than the cache (first at sample {differs[0]}); "
            "joined by content",
            file=sys.stderr,
        )
    _check_labels(labels, cache, rows, source)
    return rows


def read_keys(
    source: Source, workers: int = 0
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Keys (N,) and labels (N,) of all samples."""
    keys = np.empty(len(source), np.uint64)
    labels = np.empty(len(source), np.int64)
    batches = sequential_batches(len(source), BATCH)
    with progress("read data", len(source), "samples") as advance:
        for batch in loader(source, batches, workers=workers, keys=True):
            at = batch.indices.numpy()
            keys[at] = batch.keys.numpy().view(np.uint64)
            labels[at] = batch.labels.numpy()
            advance(len(at))
    return keys, labels


def _by_key(
    keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64], cache: Cache, source: Source
) -> npt.NDArray[np.int64]:
    """Rows by key; the same content twice goes to its rows by label, then in turn."""
    cached = np.array(cache.keys)
    order, wanted = np.lexsort((cache.labels, cached)), np.lexsort((labels, keys))
    differs = np.flatnonzero(cached[order] != keys[wanted])
    if len(differs):
        surplus = _surplus(keys, cached)
        raise DataError(
            f"sample {surplus[0]} of {source.name} is not in {cache.path}, which was made from "
            f"{cache.header.data} ({len(surplus):,} samples differ); give the data the cache was made "
            "from, or dump a cache of these"
        )
    rows = np.empty(len(keys), np.int64)
    rows[wanted] = order
    return rows


def _surplus(keys: npt.NDArray[np.uint64], cached: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Samples that have no row left: of a content that stands more often than in the cache, the last."""
    known, counts = np.unique(cached, return_counts=True)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    turn = np.arange(len(keys)) - np.searchsorted(ordered, ordered)  # how many came before it
    place = np.searchsorted(known, ordered).clip(max=len(known) - 1)
    available = np.where(known[place] == ordered, counts[place], 0)
    return np.sort(order[turn >= available])


def _check_labels(
    labels: npt.NDArray[np.int64], cache: Cache, rows: npt.NDArray[np.int64], source: Source
) -> None:
    cached = cache.labels[rows]
    differs = np.flatnonzero((labels != cached) & (labels >= 0) & (cached >= 0))
    if len(differs):
        at = int(differs[0])
        raise DataError(
            f"sample {at} of {source.name} has label {labels[at]}, and {cached[at]} in {cache.path} "
            f"({len(differs):,} labels differ); give the data the cache was made from"
        )
