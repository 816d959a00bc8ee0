"""Join a data set to a cache by sample: a soft label on the wrong sample is worse than none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.data import Source, check_labels
from softcache.errors import DataError, SettingsError
from softcache.loader import Batch, Request, augmented, loader, make_request, sequential_batches
from softcache.losses import LOWEST
from softcache.replay import check_replay, replayed
from softcache.targets import tempered_targets, to_dense
from softcache.types import Labels, MixedLabels, SparseTargets, Targets, Views
from softcache.util.counter_rng import uniform
from softcache.util.progress import progress
from softcache.util.tensors import to_float
from softcache.views import ROTATION_STREAM, Augmentation, parse_augment

BATCH = 1000

Indices = npt.NDArray[np.int64]


class TrainingBatch(NamedTuple):
    """What a student sees of some samples, and what it is to say of them."""

    inputs: Tensor  # (B, *shape) float, augmented
    labels: Labels  # (B,)
    targets: Mapping[float, Targets]  # the teacher's log-probabilities (B, C) by temperature


@dataclass(frozen=True)
class JoinedData:
    """The samples of a source that are learned from, and what a cache says of them.

    Without a cache there are labels alone, and every epoch is a view of its own.
    """

    source: Source
    places: Indices  # (N,) where in the source each sample is
    numbers: Indices  # (N,) its number in the draws of the augmentation
    where: Indices | None  # (all samples,) the place of each number, for mixup
    augmentation: Augmentation
    classes: int
    cache: Cache | None = None
    # by view and row of the cache, at each temperature
    targets: Callable[[Views, Indices], Mapping[float, Targets]] | None = None
    rotate: bool = True

    def __len__(self) -> int:
        return len(self.places)

    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.first_input().shape[1:])

    def first_input(self) -> Tensor:
        """The first sample as float (1, *shape), after the user's own transform."""
        raw, first = self.source.fetch([int(self.places[0])])[0], self.numbers[:1]
        return to_float(self.augmentation.transformed(raw, self.views(0, first), first))

    def views(self, epoch: int, numbers: Indices) -> Views:
        """The view in which each sample is seen in an epoch, one for all or (B,).

        All views of a cache in turn; if rotated, each sample begins with another one, so that an
        epoch is a mixture of all views.
        """
        if self.cache is None:
            return epoch
        header, turn = self.cache.header, np.asarray(epoch, np.int64)
        if self.rotate:
            drawn = uniform(header.seed, 0, numbers, stream=ROTATION_STREAM, draws=1)[:, 0]
            turn = epoch + (drawn * header.views).astype(np.int64)
        return np.asarray(header.first_view + turn % header.views)

    def request(self, at: Indices, epoch: int) -> Request:
        """What to ask a loader for, for samples `at` (B,) in 0 to N - 1."""
        places, numbers = self.places[at].tolist(), self.numbers[at]
        return make_request(
            self.augmentation, places, self.views(epoch, numbers), numbers, self.where
        )

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        """What came for a request of this epoch, augmented, with its labels and soft targets."""
        numbers = batch.samples.numpy()
        view = self.views(epoch, numbers)
        check_labels(batch.labels.numpy(), batch.indices.numpy(), self.classes, self.source)
        inputs = augmented(batch, self.augmentation, view, numbers, device)
        own = batch.labels.to(device)
        labels: Labels = own
        if self.augmentation.mixup:
            shares = torch.from_numpy(self.augmentation.shares(view, numbers)).to(device)
            labels = MixedLabels(own, batch.partner_labels.to(device), shares.float())
        if self.cache is None or self.targets is None:
            return TrainingBatch(inputs, labels, {})
        header = self.cache.header
        soft = self.targets(view - header.first_view, numbers - header.first_sample)
        return TrainingBatch(inputs, labels, soft)


def together(batches: Sequence[TrainingBatch]) -> TrainingBatch:
    """Batches of several data sets as one.

    Raises:
        DataError: their inputs have different shapes or types.
    """
    if len(batches) == 1:
        return batches[0]
    layouts = {(str(batch.inputs.dtype), tuple(batch.inputs.shape[1:])) for batch in batches}
    if len(layouts) > 1:
        raise DataError(
            f"inputs of the data sets differ: {sorted(layouts)}; expected one shape and type"
        )
    return TrainingBatch(
        torch.cat([batch.inputs for batch in batches]),
        labels_together([batch.labels for batch in batches]),
        {
            temperature: targets_together([batch.targets[temperature] for batch in batches])
            for temperature in batches[0].targets
        },
    )


def targets_together(targets: Sequence[Targets]) -> Targets:
    """Targets of several batches; sparse if all are, of the same number of ids."""
    sparse = [one for one in targets if isinstance(one, SparseTargets)]
    if len(sparse) == len(targets) and len({one.ids.shape[1] for one in sparse}) == 1:
        return SparseTargets(
            torch.cat([one.ids for one in sparse]),
            torch.cat([one.log_probs for one in sparse]),
            torch.cat([one.rest for one in sparse]),
            sparse[0].classes,
        )
    # a class that was not drawn has -inf, which would make 0 · -inf of a dense one
    return torch.cat([to_dense(one).clamp(min=LOWEST) for one in targets])


def labels_together(labels: Sequence[Labels]) -> Labels:
    """Labels of several batches; those that are not mixed count as mixed with nothing."""
    plain = [one for one in labels if isinstance(one, Tensor)]
    if len(plain) == len(labels):
        return torch.cat(plain)
    mixed = [
        MixedLabels(one, one, torch.zeros(len(one), device=one.device))
        if isinstance(one, Tensor)
        else one
        for one in labels
    ]
    return MixedLabels(*(torch.cat(part) for part in zip(*mixed, strict=True)))


def labels_alone(source: Source, augment: str | None, seed: int, classes: int) -> JoinedData:
    """A source to learn from without a teacher."""
    every = np.arange(len(source))
    known = getattr(source, "labels", None)  # those of a Dataset come one by one
    if known is not None:
        check_labels(known, every, classes, source)
    augmentation = parse_augment(augment, seed=seed, total=len(source))
    return JoinedData(source, every, every, every, augmentation, classes)


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
    places = join_samples(source, cache, workers)
    augmentation = replayed(header, augment)
    if augmentation.mixup and len(source) < header.data_samples:
        raise SettingsError(
            f"{cache.path} holds {header.samples:,} of {header.data_samples:,} samples, mixed with any of "
            f"them; {source.name} has {len(source):,}: give the whole data set"
        )
    whole = np.arange(len(source))  # a shard's data set has its order; a whole cache's may not
    where = places if header.samples == header.data_samples else whole
    check_replay(cache, source, augmentation, places, where)
    numbers = header.first_sample + np.arange(header.samples)
    return JoinedData(
        source, places, numbers, where, augmentation, header.classes, cache, targets, rotate
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
    places = np.arange(first, first + header.samples)
    differs = np.flatnonzero(keys[places] != cache.keys)
    if len(differs) and len(source) > header.samples:
        raise DataError(
            f"sample {places[differs[0]]} of {source.name} is not the one of {cache.path}, a shard of "
            f"{header.data} in the dump's order; give the data the cache was made from"
        )
    if len(differs):
        places = _by_key(keys, labels, cache, source)
        print(
            f"note: {source.name} is in another order than the cache (first at sample {differs[0]}); "
            "joined by content",
            file=sys.stderr,
        )
    _check_labels(labels, cache, places, source)
    return places


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
    """Places by key; the same content twice goes to its places by label, then in turn."""
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
    places = np.empty(len(keys), np.int64)
    places[order] = wanted
    return places


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
    labels: npt.NDArray[np.int64], cache: Cache, places: Indices, source: Source
) -> None:
    given = labels[places]
    differs = np.flatnonzero((given != cache.labels) & (given >= 0) & (cache.labels >= 0))
    if len(differs):
        row = differs[int(places[differs].argmin())]
        raise DataError(
            f"sample {places[row]} of {source.name} has label {given[row]}, and {cache.labels[row]} in "
            f"{cache.path} ({len(differs):,} labels differ); give the data the cache was made from"
        )
