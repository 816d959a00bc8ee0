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

BATCH = 1000  # samples per batch when all keys are read


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
    """Join a source to a cache, and check that the inputs are those that the teacher saw.

    Args:
        source: the data that the cache was made from, in any order.
        cache: the cache to join.
        augment: the cache's augmentation; needed only if it includes the user's own callable.
        temperatures: the temperatures to fetch soft targets at.
        device: the device of the soft targets.
        workers: the number of worker processes that read the data.
        rotate: whether each sample starts with a view of its own.

    Raises:
        DataError: the data or their augmentation are not those of the cache.
        SettingsError: the cache has no targets at a temperature, or the augmentation is not available.
    """
    header = cache.header
    targets = tempered_targets(cache, temperatures, device)
    source_indices = join_samples(source, cache, workers)
    augmentation = replayed(header, augment)
    if augmentation.mixup and len(source) < header.data_samples:
        raise SettingsError(
            f"{cache.path} holds {header.samples:,} of {header.data_samples:,} samples, each mixed with any "
            f"of them, but {source.name} has only {len(source):,}; give the whole data set"
        )
    # the whole data set of a shard is in the order of the dump; the data of a whole cache may not be
    in_order = np.arange(len(source))
    source_index_of = source_indices if header.samples == header.data_samples else in_order
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
    """The source index of each sample of the cache, (samples,); all samples are read once.

    Samples are matched in order if the order is the same, else by the hash of their content. The source may
    also be the whole data set of a shard; then it must be in the order of the dump.

    Raises:
        DataError: the data are not those of the cache; the message names the first sample that differs.
    """
    header = cache.header
    if len(source) not in (header.samples, header.data_samples):
        shard = f" (a shard of {header.data_samples:,})"
        raise DataError(
            f"{source.name} has {len(source):,} samples, but {cache.path} was made from "
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
            f"sample {source_indices[differs[0]]} of {source.name} is not the one in {cache.path}, a shard "
            f"of {header.data}; give the data the cache was made from, in the order of the dump"
        )
    if len(differs):
        source_indices = _by_key(keys, labels, cache, source)
        inform(
            f"note: {source.name} is not in the order of the cache (first difference at sample "
            f"{differs[0]}); joined by content"
        )
    _check_labels(labels, cache, source_indices, source)
    return source_indices


def read_keys(
    source: Source, workers: int = 0
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The content keys (N,) and labels (N,) of all samples."""
    keys = np.empty(len(source), np.uint64)
    labels = np.empty(len(source), np.int64)
    batches = sequential_batches(len(source), BATCH)
    with progress("read data", len(source), "samples") as advance:
        for batch in loader(source, batches, workers=workers, keys=True):
            source_indices = batch.source_indices.numpy()
            keys[source_indices] = batch.keys.numpy().view(np.uint64)
            labels[source_indices] = batch.labels.numpy()
            advance(len(source_indices))
    return keys, labels


def _by_key(
    keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64], cache: Cache, source: Source
) -> npt.NDArray[np.int64]:
    """Source indices (samples,) by key; samples with equal content are matched by label, then in order."""
    cached_keys = np.array(cache.keys)
    cache_rows = np.lexsort((cache.labels, cached_keys))
    sorted_indices = np.lexsort((labels, keys))
    if (cached_keys[cache_rows] != keys[sorted_indices]).any():
        surplus = _surplus(keys, cached_keys)
        raise DataError(
            f"sample {surplus[0]} of {source.name} is not in {cache.path}, which was made from "
            f"{cache.header.data} ({len(surplus):,} samples differ); give the data the cache was made "
            "from, or dump a cache of these"
        )
    source_indices = np.empty(len(keys), np.int64)
    source_indices[cache_rows] = sorted_indices
    return source_indices


def _surplus(
    keys: npt.NDArray[np.uint64], cached_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Source indices of the samples without a cache row; of too many equal samples, the last ones."""
    unique_keys, counts = np.unique(cached_keys, return_counts=True)
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    # how many samples of the same content come before each sample
    earlier = np.arange(len(keys)) - np.searchsorted(sorted_keys, sorted_keys)
    nearest = np.searchsorted(unique_keys, sorted_keys).clip(max=len(unique_keys) - 1)
    available = np.where(unique_keys[nearest] == sorted_keys, counts[nearest], 0)
    return np.sort(order[earlier >= available])


def _check_labels(
    labels: npt.NDArray[np.int64], cache: Cache, source_indices: Indices, source: Source
) -> None:
    joined = labels[source_indices]
    differs = np.flatnonzero((joined != cache.labels) & (joined >= 0) & (cache.labels >= 0))
    if len(differs):
        cache_row = differs[int(source_indices[differs].argmin())]
        raise DataError(
            f"sample {source_indices[cache_row]} of {source.name} has label {joined[cache_row]}, but "
            f"{cache.labels[cache_row]} in {cache.path} ({len(differs):,} labels differ); give the data "
            "the cache was made from"
        )
