"""Join a data set to a cache by sample: a soft label on the wrong sample is worse than none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.cache.layout import RowLayout
from softcache.data.label_sets import batch_sets, set_codes
from softcache.data.loader import loader, sequential_batches
from softcache.data.masks import check_masks_follow
from softcache.data.rows import FRAME, PIXEL, EvenRowsSource, layout_of_source, row_facts, unit_of
from softcache.data.source import (
    UNLABELLED,
    Source,
    WrappedSource,
    check_kind_of_labels,
    check_labels,
)
from softcache.errors import DataError, SettingsError
from softcache.join.fingerprints import check_replay, replayed
from softcache.join.joined_data import Indices, JoinedData
from softcache.targets.fetch import stored_targets, tempered_targets
from softcache.util.log import inform
from softcache.util.progress import progress

BATCH = 1000  # samples per batch when all keys are read
ROW_BATCH = 64  # the same where samples have many rows


@dataclass(frozen=True)
class Match:
    """Which samples of a source are which rows of a cache: one entry for each that both have.

    Attributes:
        source_indices: (N,).
        cache_rows: (N,), ascending.
        labels: (all samples of the source,) as the source gives them.
    """

    source_indices: Indices
    cache_rows: Indices
    labels: Indices

    def by_cache_row(self, samples: int) -> Indices:
        """(samples,) the source index of each row of the cache, -1 where the source lacks it."""
        source_indices = np.full(samples, -1, np.int64)
        source_indices[self.cache_rows] = self.source_indices
        return source_indices


@dataclass(frozen=True)
class RelabelledSource(WrappedSource):
    """A source with other labels."""

    labels: Indices  # (N,)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.source.class_names

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Indices]:
        """Raw inputs (B, *shape) and labels (B,) of the samples at `indices`."""
        return self.source.fetch(indices)[0], self.labels[np.asarray(indices, np.int64)]


def join(
    source: Source,
    cache: Cache,
    *,
    augment: str | None,
    temperatures: Sequence[float],
    device: torch.device,
    workers: int = 0,
    rotate: bool = True,
    known_only: bool = False,
    labels: str | None = None,
) -> JoinedData:
    """Join a source to a cache, and check that the inputs are those that the teacher saw.

    Args:
        source: samples that the cache knows, all or some of them, in any order.
        cache: the cache to join.
        augment: the cache's augmentation; needed only if it includes the user's own callable.
        temperatures: the temperatures to fetch soft targets at.
        device: the device of the soft targets.
        workers: the number of worker processes that read the data.
        rotate: whether each sample starts with a view of its own.
        known_only: leave out samples that the cache does not know.
        labels: whose labels count where they differ, `data` or `cache`; None refuses them.

    Raises:
        DataError: the data or their augmentation are not those of the cache.
        SettingsError: the cache has no targets at a temperature, or the augmentation is not available.
    """
    header = cache.header
    fetch = tempered_targets if header.rows is None else stored_targets
    targets = fetch(cache, temperatures, device)
    if header.rows is not None and layout_of_source(source) is None:
        source = with_rows_of_cache(source, cache)
    match = match_samples(source, cache, workers, known_only=known_only, labels=labels)
    if labels is not None and header.multi_label:
        raise SettingsError(
            f"--labels {labels}: {cache.path} has any number of labels per sample, of which only equal ones "
            "can be joined; leave it out and correct the labels of the data"
        )
    if labels == "cache" and header.rows is not None:
        raise SettingsError(
            f"--labels cache: the labels of {header.unit}s are those of the data; use --labels data"
        )
    if labels == "cache":
        relabelled = match.labels.copy()
        relabelled[match.source_indices] = cache.labels[match.cache_rows]
        source = RelabelledSource(source, relabelled)
    augmentation = replayed(header, augment)
    check_masks_follow(source, augmentation)
    whole = len(match.cache_rows) == header.data_samples
    if augmentation.mixup and not whole and len(source) != header.data_samples:
        raise SettingsError(
            f"{cache.path} holds {header.samples:,} of {header.data_samples:,} samples, each mixed with any "
            f"of them, but {source.name} has only {len(source):,}; give the whole data set"
        )
    # the whole data set of a shard is in the order of the dump; the data of a whole cache may not be
    source_index_of = match.source_indices if whole else np.arange(len(source))
    by_cache_row = match.by_cache_row(header.samples)
    check_replay(cache, source, augmentation, by_cache_row, source_index_of)
    return JoinedData(
        source,
        match.source_indices,
        header.first_sample + match.cache_rows,
        source_index_of,
        augmentation,
        header.classes,
        cache,
        targets,
        rotate,
        header.multi_label,
        cache.layout,
    )


def with_rows_of_cache(source: Source, cache: Cache) -> Source:
    """A source that does not say which rows its samples have, with those of a cache of frames or pixels.

    Raises:
        DataError: its rows are others.
    """
    layout = cache.layout
    counts = np.unique(layout.counts(np.arange(layout.samples))) if layout else np.zeros(0)
    if cache.header.unit not in (FRAME, PIXEL) or len(counts) != 1:
        raise DataError(
            f"{source.name} has one row for each sample, and {cache.path} has {cache.header.unit}s; give the "
            "data that the cache was made from"
        )
    return EvenRowsSource(source, int(counts[0]), cache.header.unit)


def join_samples(source: Source, cache: Cache, workers: int = 0) -> Indices:
    """The source index of each row of the cache, (samples,); the source must have them all.

    Raises:
        DataError: the data are not those of the cache; the message names the first sample that differs.
    """
    match = match_samples(source, cache, workers)
    if len(match.cache_rows) < cache.header.samples:
        raise DataError(
            f"{source.name} has {len(match.cache_rows):,} of the {cache.header.samples:,} samples of "
            f"{cache.path}; all are needed here"
        )
    return match.source_indices


def match_samples(
    source: Source,
    cache: Cache,
    workers: int = 0,
    *,
    known_only: bool = False,
    labels: str | None = None,
) -> Match:
    """Match the samples of a source to the rows of a cache; all samples are read once.

    In order where the order is the same, else by the hash of each sample's content. The source may have
    any of the samples, in any order, or be the whole data set of a shard in the order of the dump.

    Args:
        known_only: leave out samples that the cache does not know, instead of refusing them.
        labels: whose labels count where they differ, `data` or `cache`; None refuses them.

    Raises:
        DataError: the cache does not know a sample, or knows it by another label; the first is named.
    """
    header = cache.header
    if header.rows is not None:
        return match_rows(source, cache, workers, known_only=known_only, labels=labels)
    if layout_of_source(source) is not None:
        raise DataError(
            f"{source.name} has a row for each {unit_of(source)}, and {cache.path} one for each sample; give "
            "the data that the cache was made from"
        )
    stored = np.array(cache.labels)
    if header.multi_label:
        sets = cache.label_sets(np.arange(header.samples))
        stored = np.where(stored < 0, UNLABELLED, set_codes(sets))
    keys, given = read_keys(source, workers, header.classes if header.multi_label else None)
    if not header.multi_label:
        check_labels(given, np.arange(len(source)), header.classes, source)
    match = _match(source, cache, keys, given, stored, known_only=known_only)
    if labels is None:
        _check_labels(cache, match, source, stored)
    return match


def _match(
    source: Source,
    cache: Cache,
    keys: npt.NDArray[np.uint64],
    given: Indices,
    stored: Indices,
    *,
    known_only: bool,
) -> Match:
    """The match in order where that is the same, else by content; what is not in order is said.

    Raises:
        DataError: the cache does not know a sample.
    """
    header = cache.header
    match = _in_order(keys, given, cache)
    if match is None:
        match = _by_key(keys, given, cache, stored)
        unknown = np.setdiff1d(np.arange(len(source)), match.source_indices)
        if len(unknown) and (not known_only or len(unknown) == len(source)):
            raise DataError(_unknown_samples(source, cache, unknown))
        if len(unknown):
            inform(
                f"note: {len(unknown):,} of the {len(source):,} samples of {source.name} are not in "
                f"{cache.path} and are left out (the first is sample {unknown[0]})"
            )
        known = len(match.cache_rows)
        if known < header.samples:
            how = f"has {known:,} of the {header.samples:,} samples of the cache"
        else:
            differs = match.source_indices != np.arange(known)
            first = f" (first difference at sample {differs.argmax()})" if differs.any() else ""
            how = f"is not in the order of the cache{first}"
        inform(f"note: {source.name} {how}; joined by content")
    return match


def match_rows(
    source: Source,
    cache: Cache,
    workers: int = 0,
    *,
    known_only: bool = False,
    labels: str | None = None,
) -> Match:
    """match_samples() where samples have many rows: by content, and then the rows of each have to agree.

    Raises:
        DataError: the cache does not know a sample, or knows other rows of it, or other labels of these.
    """
    own, stored, header = layout_of_source(source), cache.layout, cache.header
    if own is None or stored is None or unit_of(source) != header.unit:
        raise DataError(
            f"{source.name} has a row for each {unit_of(source) or 'sample'}, and {cache.path} has "
            f"{header.unit}s; give the data that the cache was made from"
        )
    check_same_tokens(source, cache)
    keys, labels_of_rows = np.empty(len(source), np.uint64), np.empty(own.rows, np.int32)
    batches = sequential_batches(len(source), ROW_BATCH)
    with progress("read data", len(source), "samples") as advance:
        for part, batch in zip(
            batches, loader(source, batches, workers=workers, keys=True), strict=True
        ):
            keys[part.start : part.stop] = batch.keys.numpy().view(np.uint64)
            labels_of_rows[own.offsets[part.start] : own.offsets[part.stop]] = batch.labels.numpy()
            advance(len(part))
    same = np.zeros(len(source), np.int64)
    match = _match(
        source, cache, keys, same, np.zeros(header.samples, np.int64), known_only=known_only
    )
    given, known = own.take(match.source_indices), stored.take(match.cache_rows)
    for name, values in given.arrays().items():
        other = known.arrays()[name]
        if len(values) != len(other) or (values != other).any():
            raise DataError(_other_rows(source, cache, given, known, match))
    if labels is None:
        own_rows, cache_rows = own.rows_of(match.source_indices), stored.rows_of(match.cache_rows)
        ours, theirs = labels_of_rows[own_rows], cache.labels[cache_rows]
        differs = np.flatnonzero((ours != theirs) & (ours >= 0) & (theirs >= 0))
        if len(differs):
            row = own_rows[differs[:1]]
            raise DataError(
                f"sample {own.samples_of(row)[0]} of {source.name} has label {ours[differs[0]]} at "
                f"{header.unit} {own.positions_of(row)[0]}, but {theirs[differs[0]]} in {cache.path} "
                f"({len(differs):,} labels differ); give the data the cache was made from"
            )
    return match


def check_same_tokens(source: Source, cache: Cache) -> None:
    """Raise DataError if texts became tokens in another way than those of the cache."""
    own, stored = row_facts(source), cache.header.rows or {}
    for name, what in (("tokenizer", "tokenizer"), ("template", "chat template")):
        if own.get(name) and stored.get(name) and own[name] != stored[name]:
            raise DataError(
                f"{source.name} was made into tokens by another {what} ({own[name]}) than the data of "
                f"{cache.path} ({stored[name]}); name the teacher's with ?tokenizer=ID_OR_FOLDER"
            )


def _other_rows(
    source: Source, cache: Cache, given: RowLayout, known: RowLayout, match: Match
) -> str:
    every = np.arange(given.samples)
    differs = np.flatnonzero(given.counts(every) != known.counts(every))
    first = int(differs[0]) if len(differs) else 0
    counts = given.counts(every[first : first + 1])[0], known.counts(every[first : first + 1])[0]
    return (
        f"sample {match.source_indices[first]} of {source.name} has {counts[0]:,} {cache.header.unit}s that "
        f"count, and {counts[1]:,} in {cache.path}, or others of them; use the same ?length=, ?stride= and "
        "?loss_on= as the dump"
    )


def read_keys(
    source: Source, workers: int = 0, multi_label_classes: int | None = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The content keys (N,) and labels (N,) of all samples.

    Args:
        multi_label_classes: the number of classes, if the labels are to be codes of sets of classes.

    Raises:
        DataError: samples have any number of labels, and one is expected.
    """
    if multi_label_classes is None:
        check_kind_of_labels(source, multi_label=False)
    keys = np.empty(len(source), np.uint64)
    labels = np.empty(len(source), np.int64)
    batches = sequential_batches(len(source), BATCH)
    with progress("read data", len(source), "samples") as advance:
        for batch in loader(source, batches, workers=workers, keys=True):
            source_indices = batch.source_indices.numpy()
            keys[source_indices] = batch.keys.numpy().view(np.uint64)
            labels[source_indices] = batch.labels.numpy()
            if multi_label_classes is not None:
                sets = batch_sets(batch, multi_label_classes)
                codes = np.where(batch.labels.numpy() < 0, UNLABELLED, set_codes(sets))
                labels[source_indices] = codes
            advance(len(source_indices))
    return keys, labels


def _in_order(keys: npt.NDArray[np.uint64], labels: Indices, cache: Cache) -> Match | None:
    """The match of data in the order of the dump, whole or the cache's own part; None if they are not."""
    header = cache.header
    if len(keys) not in (header.samples, header.data_samples):
        return None
    first = header.first_sample if len(keys) == header.data_samples else 0
    source_indices = np.arange(first, first + header.samples)
    if (keys[source_indices] != cache.keys).any():
        return None
    return Match(source_indices, np.arange(header.samples), labels)


def _by_key(keys: npt.NDArray[np.uint64], labels: Indices, cache: Cache, stored: Indices) -> Match:
    """The match by content; samples of equal content are matched by label first, then in order."""
    cached_keys, cached_labels = np.array(cache.keys), stored
    source_indices, cache_rows = _pairs(
        np.stack([keys.view(np.int64), labels], -1),
        np.stack([cached_keys.view(np.int64), cached_labels], -1),
    )
    left = np.setdiff1d(np.arange(len(keys)), source_indices)
    free = np.setdiff1d(np.arange(len(cached_keys)), cache_rows)
    more_indices, more_rows = _pairs(
        keys[left, None].view(np.int64), cached_keys[free, None].view(np.int64)
    )
    source_indices = np.concatenate([source_indices, left[more_indices]])
    cache_rows = np.concatenate([cache_rows, free[more_rows]])
    order = np.argsort(cache_rows)
    return Match(source_indices[order], cache_rows[order], labels)


def _pairs(left: Indices, right: Indices) -> tuple[Indices, Indices]:
    """Equal rows of two arrays (n, k), (m, k), each taken once: the first with the first, and so on."""
    rows, codes = np.unique(np.concatenate([left, right]), axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    ranked = [_ranks(side) * len(rows) + side for side in (codes[: len(left)], codes[len(left) :])]
    _, at_left, at_right = np.intersect1d(
        ranked[0], ranked[1], assume_unique=True, return_indices=True
    )
    return at_left, at_right


def _ranks(codes: Indices) -> Indices:
    """How many equal entries come before each entry, (n,)."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    ranks = np.empty(len(codes), np.int64)
    ranks[order] = np.arange(len(codes)) - np.searchsorted(ordered, ordered)
    return ranks


def _unknown_samples(source: Source, cache: Cache, unknown: Indices) -> str:
    header = cache.header
    if len(source) == header.data_samples > header.samples:
        return (
            f"sample {unknown[0]} of {source.name} is not in {cache.path}, a shard of {header.data} "
            f"({len(unknown):,} of {len(source):,} are unknown); give the data of the cache, in the order "
            "of the dump, or the samples of the shard alone (--known-only leaves the others out)"
        )
    choices = ["give the data the cache was made from", "dump a cache of these"]
    if len(unknown) < len(source):
        choices.append("add --known-only to train on the others")
    return (
        f"sample {unknown[0]} of {source.name} is not in {cache.path}, which was made from {header.data} "
        f"({len(unknown):,} of {len(source):,} are unknown); {', '.join(choices[:-1])}, or {choices[-1]}"
    )


def _check_labels(cache: Cache, match: Match, source: Source, stored: Indices) -> None:
    given, stored = match.labels[match.source_indices], stored[match.cache_rows]
    differs = np.flatnonzero((given != stored) & (given >= 0) & (stored >= 0))
    if len(differs):
        first = differs[int(match.source_indices[differs].argmin())]
        if cache.header.multi_label:
            raise DataError(
                f"sample {match.source_indices[first]} of {source.name} has other labels than in "
                f"{cache.path} ({len(differs):,} samples differ); give the data the cache was made from"
            )
        raise DataError(
            f"sample {match.source_indices[first]} of {source.name} has label {given[first]}, but "
            f"{stored[first]} in {cache.path} ({len(differs):,} labels differ); give the data the cache was "
            "made from, or say whose labels count with --labels data or --labels cache"
        )
