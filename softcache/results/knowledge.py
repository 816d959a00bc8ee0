"""What a teacher knows, measured on rows of its cache that are decoded a few at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Sampled
from softcache.cache.summary import moves_labels
from softcache.cache.verdict import Predictions
from softcache.data.augment import split_augment
from softcache.errors import FormatError
from softcache.models.calibration import Calibration, calibration_of
from softcache.results.metrics import (
    CPU,
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Floats,
    best_temperature,
)
from softcache.targets.decode import to_dense
from softcache.targets.fetch import tempered_targets

Indices = npt.NDArray[np.int64]

ROWS = 20_000  # of a cache that are read at most
VALUES = 1 << 27  # probabilities that are read at most
CHUNK_VALUES = 1 << 20  # probabilities that are decoded at once
FIT_VALUES = 1 << 22  # logits that the best temperature is fitted to
VIEW_SAMPLES = 2_000  # samples whose views are compared at most
VIEWS = 64  # views of a sample that are compared at most

MAP_CLASSES = 60  # in the map of similar classes
PAIRS = 10  # of similar classes that are listed
CANDIDATE_PAIRS = 60  # whose exact mean probability is computed
LEADING = 8  # classes of each row, besides its own, that can become candidates


@dataclass(frozen=True)
class Pair:
    """Samples of class `own` also look like class `other`, with this mean probability."""

    own: int
    other: int
    probability: float


@dataclass(frozen=True)
class Likeness:
    """Mean soft targets by class.

    Attributes:
        classes: (K,) the classes that are compared, similar ones next to each other if there are many.
        means: (K, K) mean probability of the column's class on samples of the row's class.
        pairs: the most similar pairs among all classes, in descending order.
        all_classes: whether `classes` are all that have samples.
    """

    classes: Indices
    means: Floats
    pairs: Sequence[Pair]
    all_classes: bool


@dataclass(frozen=True)
class Knowledge:
    """What was measured on the first view of N rows of a cache, spread evenly over its samples.

    Attributes:
        cache_rows: (N,) the rows.
        entropy: (N,) entropy in nats at the cache's temperature.
        top: (N,) the largest probability at the cache's temperature.
        top_at_one: (N,) the largest probability at temperature 1; None if the encoding cannot be re-tempered.
        leading: (N, 2) the two most likely classes.
        leading_probabilities: (N, 2) their probabilities at the cache's temperature.
        predictions: labels, top classes and their probabilities at temperature 1 (NaN if the encoding cannot
            be re-tempered) of the labelled rows; empty if samples are mixed.
        calibrations: confidence against accuracy by temperature, in words; empty where labels or
            temperatures do not allow it.
        likeness: mean soft targets by class.
    """

    cache_rows: Indices
    entropy: Floats
    top: Floats
    top_at_one: Floats | None
    leading: Indices
    leading_probabilities: Floats
    predictions: Predictions
    calibrations: Mapping[str, Calibration]
    likeness: Likeness

    @property
    def agreement(self) -> float | None:
        """Share of the labelled rows whose top class is their label; None without labels."""
        return self.predictions.agreement if len(self.predictions.labels) else None


@dataclass(frozen=True)
class ViewDivergence:
    """How much the soft targets of one sample differ between its first n views, n = 1, 2, ...

    Attributes:
        divergence: (V,) mean KL in nats of each view's row to the sample's mean over the n views.
        changed: (V,) share of samples whose top class is not the same in all n views.
        samples: number of samples compared.
        all_views: whether V is the number of views of the cache.
    """

    divergence: Floats
    changed: Floats
    samples: int
    all_views: bool


def measure_knowledge(cache: Cache) -> Knowledge:
    """Measure up to ROWS rows of the first view of a cache."""
    header = cache.header
    count = max(1, min(header.row_count, ROWS, VALUES // header.classes))
    cache_rows = np.unique(np.linspace(0, header.row_count - 1, count).astype(np.int64))
    labels = cache.labels[cache_rows].astype(np.int64)
    labelled = (labels >= 0) & (labels < header.classes) & (not moves_labels(header))
    mixed = bool(split_augment(header.augment).mixup)
    sampled = isinstance(header.encoding, Sampled)
    retempered = not sampled or header.temperature == 1
    named: dict[str, float] = {}
    if labelled.any() and not mixed and not sampled:
        named = _calibration_temperatures(cache, cache_rows[labelled])
    # all results are allocated before the loop: small arrays that outlive the large ones of each chunk
    # would keep the allocator from using the memory of these again
    count, leading = len(cache_rows), min(LEADING + 1, header.classes)
    ids, probabilities = np.zeros((count, leading), np.int64), np.zeros((count, leading))
    entropy, top_at_one = np.zeros(count), np.zeros(count)
    confidence = {name: np.zeros(count) for name in named}
    temperatures = [*named.values(), *([1.0] if retempered else [])]
    for part, by_temperature in _chunks(cache, cache_rows, temperatures):
        log_probs = by_temperature[header.temperature]  # (B, C)
        top = log_probs.topk(leading, -1)
        ids[part], probabilities[part] = top.indices.numpy(), top.values.double().exp().numpy()
        entropy[part] = _entropy(log_probs.double()).numpy()
        if retempered:
            top_at_one[part] = by_temperature[1.0].amax(-1).double().exp().numpy()
        for name, temperature in named.items():
            confidence[name][part] = by_temperature[temperature].amax(-1).double().exp().numpy()
    correct = (ids[:, 0] == labels)[labelled].astype(np.float64)
    own = np.where(labelled, labels, ids[:, 0])  # the class of each row
    return Knowledge(
        cache_rows=cache_rows,
        entropy=entropy,
        top=probabilities[:, 0],
        top_at_one=top_at_one if retempered else None,
        leading=ids[:, :2],
        leading_probabilities=probabilities[:, :2],
        predictions=Predictions(
            labels, ids[:, 0], top_at_one if retempered else np.full(count, np.nan)
        ).only(labelled & (not mixed)),
        calibrations={
            name: calibration_of(values[labelled], correct) for name, values in confidence.items()
        },
        likeness=_likeness(cache, cache_rows, own, ids, probabilities),
    )


def measure_views(cache: Cache) -> ViewDivergence | None:
    """Compare the views of up to VIEW_SAMPLES samples; None for a cache with a single view, or where the rows
    of a view are about other pixels than those of another.

    The mean KL to the mean distribution is the entropy of that mean less the mean entropy of the views
    (the generalised Jensen-Shannon divergence), so one pass over the views is enough.
    """
    header = cache.header
    views = min(header.views, VIEWS)
    if views < 2 or moves_labels(header):
        return None
    count = max(1, min(header.row_count, VIEW_SAMPLES, VALUES // (views * header.classes)))
    cache_rows = np.unique(np.linspace(0, header.row_count - 1, count).astype(np.int64))
    divergence, changed = np.zeros(views), np.zeros(views)
    size = max(1, CHUNK_VALUES // header.classes)
    read = _row_reader(cache)
    for start in range(0, len(cache_rows), size):
        rows = cache_rows[start : start + size]
        total = torch.zeros(len(rows), header.classes, dtype=torch.float64)
        entropy = torch.zeros(len(rows), dtype=torch.float64)
        tops = torch.zeros(len(rows), views, dtype=torch.int64)
        for view in range(views):
            log_probs = read(view, rows)[header.temperature].double()
            total += log_probs.exp()
            entropy += _entropy(log_probs)
            of_mean = _entropy((total / (view + 1)).log())
            divergence[view] += float((of_mean - entropy / (view + 1)).sum())
            tops[:, view] = log_probs.argmax(-1)
            changed[view] += int((tops[:, : view + 1] != tops[:, :1]).any(-1).sum())
    samples = len(cache_rows)
    return ViewDivergence(
        np.maximum(divergence, 0) / samples, changed / samples, samples, views == header.views
    )


def _chunks(
    cache: Cache, cache_rows: Indices, temperatures: Sequence[float] = ()
) -> Iterator[tuple[slice, dict[float, Tensor]]]:
    """Positions within `cache_rows`, and their log-probabilities (B, C) float32, a chunk at a time.

    They come at the cache's own temperature and at `temperatures`.
    """
    read = _row_reader(cache, temperatures)
    size = max(1, CHUNK_VALUES // cache.header.classes)
    for start in range(0, len(cache_rows), size):
        rows = cache_rows[start : start + size]
        yield slice(start, start + len(rows)), read(0, rows)


def _row_reader(
    cache: Cache, temperatures: Sequence[float] = ()
) -> Callable[[int, Indices], dict[float, Tensor]]:
    """A function (view, cache rows (B,)) -> log-probabilities (B, C) float32 by temperature."""
    fetch = tempered_targets(cache, list({cache.header.temperature, *temperatures}), CPU)

    def read(view: int, cache_rows: Indices) -> dict[float, Tensor]:
        targets = fetch(np.full(len(cache_rows), view), cache_rows)
        if cache.buffer is not None and hasattr(mmap, "MADV_DONTNEED"):
            # unmap the pages that were read, or else they count as memory in use
            cache.buffer.madvise(mmap.MADV_DONTNEED)
        dense = {temperature: to_dense(rows) for temperature, rows in targets.items()}
        if any(bool(rows.isnan().any()) for rows in dense.values()):
            raise FormatError(
                f"{cache.path} stores values that are no probabilities; softcache verify names the rows"
            )
        return dense

    return read


def _entropy(log_probs: Tensor) -> Tensor:
    """Entropy (B,) in nats of log-probabilities (B, C), which may be -inf."""
    return -(log_probs.exp() * log_probs.clamp(min=-1e5)).sum(-1)


def _calibration_temperatures(cache: Cache, labelled_rows: Indices) -> dict[str, float]:
    """The temperatures of the reliability diagrams by name: 1, the best fit, and the cache's own."""
    header = cache.header
    count = max(1, min(len(labelled_rows), FIT_VALUES // header.classes))
    rows = labelled_rows[np.unique(np.linspace(0, len(labelled_rows) - 1, count).astype(np.int64))]
    logits = torch.cat([by_temperature[1.0] for _, by_temperature in _chunks(cache, rows, [1.0])])
    best = best_temperature(logits, torch.from_numpy(cache.labels[rows].astype(np.int64)))
    named = {"T = 1": 1.0}
    # where every label is the top class there is no best fit: the colder, the more likely
    if LOWEST_TEMPERATURE * 1.05 < best < HIGHEST_TEMPERATURE / 1.05:
        named[f"T = {best:.2g}, the best fit"] = best
    if header.temperature != 1:
        named[f"T = {header.temperature:g}, as stored"] = header.temperature
    return named


def _likeness(
    cache: Cache,
    cache_rows: Indices,
    own: Indices,
    ids: Indices,
    probabilities: Floats,
) -> Likeness:
    """Exact means for the pairs of classes that look most similar, and for the classes of the map.

    A matrix of all classes would not fit in memory, so the leading classes of each row nominate the pairs
    and a second pass over the rows computes their means.

    Args:
        cache: the cache.
        cache_rows: (N,) its rows.
        own: (N,) the class of each row.
        ids: (N, k) the most likely classes of each row.
        probabilities: (N, k) their probabilities.
    """
    classes = cache.header.classes
    present, counts = np.unique(own, return_counts=True)
    others = ids != own[:, None]
    pairs_of_rows = (own[:, None] * classes + ids)[others]
    codes, inverse = np.unique(pairs_of_rows, return_inverse=True)
    sums = np.bincount(inverse, probabilities[others], len(codes))
    pair_own, pair_other = np.divmod(codes, classes)
    # one more sample in the divisor, or else classes with a single sample would come first
    score = sums / (counts[np.searchsorted(present, pair_own)] + 1)
    order = np.argsort(score, kind="stable")[::-1]
    shown = present
    if len(present) > MAP_CLASSES:
        both = np.stack([pair_own[order], pair_other[order]], -1).reshape(-1)
        both = both[np.isin(both, present)]
        _, first = np.unique(both, return_index=True)
        shown = np.sort(both[np.sort(first)[:MAP_CLASSES]])
    pair_own, pair_other = (ids[order[:CANDIDATE_PAIRS]] for ids in (pair_own, pair_other))
    means = np.zeros((len(shown), len(shown)))
    pair_sums = np.zeros(len(pair_own))
    for part, by_temperature in _chunks(cache, cache_rows):
        log_probs = by_temperature[cache.header.temperature]  # (B, C)
        row_of = np.searchsorted(shown, own[part]).clip(max=len(shown) - 1)
        in_map = shown[row_of] == own[part]
        if in_map.any():
            columns = log_probs[torch.from_numpy(in_map)][:, torch.from_numpy(shown)]
            np.add.at(means, row_of[in_map], columns.double().exp().numpy())
        seen = log_probs[:, torch.from_numpy(pair_other)].double().exp().numpy()  # (B, pairs)
        pair_sums += (seen * (own[part][:, None] == pair_own)).sum(0)
    means /= counts[np.searchsorted(present, shown)][:, None]
    pair_means = pair_sums / counts[np.searchsorted(present, pair_own)]
    pairs = [
        Pair(int(pair_own[i]), int(pair_other[i]), float(pair_means[i]))
        for i in np.argsort(pair_means, kind="stable")[::-1][:PAIRS]
        if pair_means[i] > 0
    ]
    if len(shown) > 20:  # few classes stay in the order that people know
        similar = similarity_order(means)
        shown, means = shown[similar], means[similar][:, similar]
    return Likeness(shown, means, pairs, len(shown) == len(present))


def similarity_order(means: Floats) -> Indices:
    """An order of K classes that puts similar ones next to each other, by average linkage.

    Args:
        means: (K, K) mean probability of the column's class on samples of the row's class.

    Returns:
        (K,) a permutation.
    """
    likeness = (means + means.T) / 2
    similar = likeness.copy()
    np.fill_diagonal(similar, -np.inf)
    clusters: dict[int, list[int]] = {number: [number] for number in range(len(means))}
    while len(clusters) > 1:
        left, right = map(int, np.unravel_index(np.argmax(similar), similar.shape))
        a, b = clusters[left], clusters.pop(right)
        # of the four ways to join two sequences, the one whose ends are most alike
        ways = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
        first, second = max(ways, key=lambda way: likeness[way[0][-1], way[1][0]])
        clusters[left] = first + second
        joined = (len(a) * similar[left] + len(b) * similar[right]) / (len(a) + len(b))
        similar[left], similar[:, left] = joined, joined
        similar[right], similar[:, right] = -np.inf, -np.inf
        similar[left, left] = -np.inf
    return np.array(next(iter(clusters.values())), np.int64)
