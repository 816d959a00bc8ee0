"""Join a data set to a cache by sample: a soft label on the wrong sample is worse than none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from softcache.cache import Cache
from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source, check_labels
from softcache.errors import DataError, SettingsError
from softcache.join.fingerprints import check_replay, replayed
from softcache.join.joined_data import Indices, JoinedData
from softcache.targets.fetch import tempered_targets
from softcache.util.log import inform
from softcache.util.progress import progress

BATCH = 1000


def join(
    source: Source,
    cache: Cache,
    *,
    augment: str | None,
    temperatures: Sequence[float],
    device: torch.device,
    workers: int = 0,
    rotate: bool = True,
) -> JoinedData:
    """Join a source to a cache, and be sure that the inputs are those that the teacher saw.

    Args:
        augment: the file of the cache's own callable, if it has one.
        temperatures: of the soft targets that are wanted.
        rotate: whether each sample begins with another view.

    Raises:
        DataError: the data are not those of the cache, or are augmented otherwise.
        SettingsError: the temperature or the augmentation cannot be had.
    """
    header = cache.header
    targets = tempered_targets(cache, temperatures, device)
    source_indices = join_samples(source, cache, workers)
    augmentation = replayed(header, augment)
    if augmentation.mixup and len(source) < header.data_samples:
        raise SettingsError(
            f"{cache.path} holds {header.samples:,} of {header.data_samples:,} samples, mixed with any of "
            f"them; {source.name} has {len(source):,}: give the whole data set"
        )
    whole = np.arange(len(source))  # a shard's data set has its order; a whole cache's may not
    source_index_of = source_indices if header.samples == header.data_samples else whole
    check_replay(cache, source, augmentation, source_indices, source_index_of)
    sample_ids = np.array(header.sample_range)
    return JoinedData(
        source,
        source_indices,
        sample_ids,
        source_index_of,
        augmentation,
        header.classes,
        cache,
        targets,
        rotate,
    )


def join_samples(source: Source, cache: Cache, workers: int = 0) -> Indices:
    """The place in `source` of each sample of the cache, (samples,); all samples are read once.

    In order where the order is the same, else by the hash of each sample's content. The source may
    be the whole data set of which the cache holds a shard; then its order must be the dump's.

    Raises:
        DataError: the data are not those of the cache; the first sample that differs is named.
    """
    header = cache.header
    if len(source) not in (header.samples, header.data_samples):
        shard = f" (a shard of {header.data_samples:,})"
        raise DataError(
            f"{source.name} has {len(source):,} samples, {cache.path} was made from "
            f"{header.samples:,}{shard if header.samples < header.data_samples else ''} of {header.data}; "
            "give the data the cache was made from"
        )
    keys, labels = read_keys(source, workers)
    check_labels(labels, np.arange(len(source)), header.classes, source)
    first = header.first_sample if len(source) == header.data_samples else 0
    source_indices = np.arange(first, first + header.samples)
    differs = np.flatnonzero(keys[source_indices] != cache.keys)
    if len(differs) and len(source) > header.samples:
        raise DataError(
            f"sample {source_indices[differs[0]]} of {source.name} is not the one of {cache.path}, a shard "
            f"of {header.data} in the dump's order; give the data the cache was made from"
        )
    if len(differs):
        source_indices = _by_key(keys, labels, cache, source)
        inform(
            f"note: {source.name} is in another order than the cache (first at sample {differs[0]}); "
            "joined by content"
        )
    _check_labels(labels, cache, source_indices, source)
    return source_indices


def read_keys(
    source: Source, workers: int = 0
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Keys (N,) and labels (N,) of all samples."""
    keys = np.empty(len(source), np.uint64)
    labels = np.empty(len(source), np.int64)
    batches = sequential_batches(len(source), BATCH)
    with progress("read data", len(source), "samples") as advance:
        for batch in loader(source, batches, workers=workers, keys=True):
            at = batch.source_indices.numpy()
            keys[at] = batch.keys.numpy().view(np.uint64)
            labels[at] = batch.labels.numpy()
            advance(len(at))
    return keys, labels


def _by_key(
    keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64], cache: Cache, source: Source
) -> npt.NDArray[np.int64]:
    """Places by key; the same content twice goes to its source_indices by label, then in turn."""
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
    source_indices = np.empty(len(keys), np.int64)
    source_indices[order] = wanted
    return source_indices


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
    labels: npt.NDArray[np.int64], cache: Cache, source_indices: Indices, source: Source
) -> None:
    given = labels[source_indices]
    differs = np.flatnonzero((given != cache.labels) & (given >= 0) & (cache.labels >= 0))
    if len(differs):
        row = differs[int(source_indices[differs].argmin())]
        raise DataError(
            f"sample {source_indices[row]} of {source.name} has label {given[row]}, and "
            f"{cache.labels[row]} in {cache.path} ({len(differs):,} labels differ); give the data "
            "the cache was made from"
        )
