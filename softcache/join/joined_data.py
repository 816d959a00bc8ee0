"""Samples joined to the soft targets of a cache, and training batches of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from softcache.cache import Cache
from softcache.cache.layout import RowLayout
from softcache.data.augment import ROTATION_STREAM, Augmentation, parse_augment
from softcache.data.label_sets import check_batch_labels, training_sets
from softcache.data.loader import (
    Batch,
    Request,
    augmented,
    loader,
    make_request,
    sequential_batches,
)
from softcache.data.masks import augmented_labels, check_masks_follow
from softcache.data.rows import PADDING, layout_of_source
from softcache.data.source import Source, check_labels, has_label_sets
from softcache.errors import DataError
from softcache.losses import LOWEST
from softcache.targets.decode import to_dense
from softcache.types import (
    Labels,
    LabelSets,
    MixedLabels,
    RowIndex,
    SparseTargets,
    StoredTargets,
    Targets,
    Views,
)
from softcache.util.counter_rng import uniform
from softcache.util.tensors import to_float

READ_BATCH = 1000  # samples per batch when all labels are read

Indices = npt.NDArray[np.int64]
AnyTargets = Targets | StoredTargets


class TrainingBatch(NamedTuple):
    """The inputs of a training step, with their labels and soft targets."""

    inputs: Tensor  # (B, *shape) float, augmented
    labels: Labels  # (B,), or (R,) of the rows
    targets: Mapping[
        float, AnyTargets
    ]  # the teacher's log-probabilities (B, C) or (R, C) by temperature
    rows: RowIndex | None = None  # which rows of the samples these are, if samples have many


@dataclass(frozen=True)
class JoinedData:
    """The training samples of a source, joined to the soft targets of a cache.

    Without a cache there are only labels, and every epoch is a view of its own.

    Attributes:
        source: the source of the inputs and labels.
        source_indices: (N,) the index of each sample in the source.
        sample_ids: (N,) the number of each sample in the augmentation's draws.
        source_index_of: (all samples,) the source index of each sample id, for mixup; None if they are equal.
        augmentation: makes the views.
        classes: the number of classes.
        cache: the cache with the soft targets; None for hard labels alone.
        targets: fetches soft targets by view and cache row, at each temperature.
        multi_label: whether samples have any number of labels.
        rotate: whether each sample starts with a view of its own, so that an epoch mixes all views.
        layout: which rows of the cache, or of the source, belong to which of its samples; None if each sample
            has one row.
    """

    source: Source
    source_indices: Indices
    sample_ids: Indices
    source_index_of: Indices | None
    augmentation: Augmentation
    classes: int
    cache: Cache | None = None
    targets: Callable[[Views, Indices], Mapping[float, AnyTargets]] | None = None
    rotate: bool = True
    multi_label: bool = False
    layout: RowLayout | None = None

    def __len__(self) -> int:
        return len(self.source_indices)

    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension."""
        return tuple(self.first_input().shape[1:])

    def first_input(self) -> Tensor:
        """The first sample as float (1, *shape), after the user's own transform."""
        raw, first = self.source.fetch([int(self.source_indices[0])])[0], self.sample_ids[:1]
        return to_float(self.augmentation.transformed(raw, self.views(0, first), first))

    def labels(self) -> Indices:
        """The label of each sample (N,), UNLABELLED where there is none.

        They are the source's own if it keeps them, else those of the cache; else all samples are read.

        Raises:
            DataError: a label is not a class.
        """
        labels = getattr(self.source, "labels", None)
        if self.layout is not None:
            raise DataError(f"{self.source.name} has no label for a sample, but one for each row")
        if labels is not None:
            labels = np.asarray(labels, np.int64)[self.source_indices]
        elif self.cache is not None:
            labels = self.cache.labels[self.sample_ids - self.cache.header.first_sample]
        else:
            labels = np.empty(len(self), np.int64)
            batches = sequential_batches(len(self), READ_BATCH)
            indices = [self.source_indices[rows.start : rows.stop].tolist() for rows in batches]
            for rows, batch in zip(batches, loader(self.source, indices), strict=True):
                labels[rows.start : rows.stop] = batch.labels.numpy()
        labels = np.asarray(labels, np.int64)
        if not self.multi_label:
            check_labels(labels, self.source_indices, self.classes, self.source)
        return labels

    def views(self, epoch: int, sample_ids: Indices) -> Views:
        """The view of each sample in an epoch: one for the whole batch, or (B,) one for each sample.

        The views of a cache take turns. With rotation each sample starts with a view of its own, so that
        an epoch is a mixture of all views.
        """
        if self.cache is None:
            return epoch
        header, turn = self.cache.header, np.asarray(epoch, np.int64)
        if self.rotate:
            drawn = uniform(header.seed, 0, sample_ids, stream=ROTATION_STREAM, draws=1)[:, 0]
            turn = epoch + (drawn * header.views).astype(np.int64)
        return np.asarray(header.first_view + turn % header.views)

    def request(self, rows: Indices, epoch: int) -> Request:
        """The request to a loader for cache rows (B,), or for samples (B,) if there is no cache."""
        source_indices, sample_ids = self.source_indices[rows].tolist(), self.sample_ids[rows]
        view = self.views(epoch, sample_ids)
        return make_request(
            self.augmentation, source_indices, view, sample_ids, self.source_index_of
        )

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        """A batch requested in this epoch, augmented on `device`, with its labels and soft targets.

        Raises:
            DataError: a label is not a class.
        """
        sample_ids = batch.sample_ids.numpy()
        view = self.views(epoch, sample_ids)
        check_batch_labels(batch, self.classes, self.source)
        if self.layout is not None:
            return self._batch_of_rows(batch, view, device)
        inputs = augmented(batch, self.augmentation, view, sample_ids, device)
        own_labels = batch.labels.to(device)
        labels: Labels = own_labels
        weights = None
        if self.augmentation.mixup:
            drawn = self.augmentation.partner_weights(view, sample_ids)
            weights = torch.from_numpy(drawn).to(device).float()
        if self.multi_label:
            labels = training_sets(batch, self.classes, weights, device)
        elif weights is not None:
            labels = MixedLabels(own_labels, batch.partner_labels.to(device), weights)
        if self.cache is None or self.targets is None:
            return TrainingBatch(inputs, labels, {})
        header = self.cache.header
        cache_rows = sample_ids - header.first_sample
        return TrainingBatch(inputs, labels, self.targets(view - header.first_view, cache_rows))

    def row_counts(self) -> Indices:
        """The number of rows of each sample, (N,)."""
        if self.layout is None:
            return np.ones(len(self), np.int64)
        return self.layout.counts(self._samples_of_layout(self.sample_ids))

    def _samples_of_layout(self, sample_ids: Indices) -> Indices:
        """Where samples are in the layout: of the cache, or else of the source."""
        return sample_ids - (0 if self.cache is None else self.cache.header.first_sample)

    def _batch_of_rows(self, batch: Batch, view: Views, device: torch.device) -> TrainingBatch:
        """A batch of samples that have many rows, whose soft targets stay as they are stored."""
        sample_ids = batch.sample_ids.numpy()
        inputs = augmented(batch, self.augmentation, view, sample_ids, device)
        rows = RowIndex(batch.row_samples.to(device), batch.row_positions.to(device))
        labels = augmented_labels(batch, self.augmentation, view, sample_ids).to(device)
        if self.cache is None or self.targets is None or self.layout is None:
            return TrainingBatch(inputs, labels, {}, rows)
        samples = self._samples_of_layout(sample_ids)
        first_view = self.cache.header.first_view
        views = np.broadcast_to(view, len(samples))[batch.row_samples.numpy()] - first_view
        return TrainingBatch(
            inputs, labels, self.targets(views, self.layout.rows_of(samples)), rows
        )


def concatenate_batches(batches: Sequence[TrainingBatch]) -> TrainingBatch:
    """Concatenate batches of several data sets.

    Raises:
        DataError: the inputs have different shapes or dtypes.
    """
    if len(batches) == 1:
        return batches[0]
    if batches[0].rows is not None:
        return _concatenate_rows(batches)
    layouts = {(str(batch.inputs.dtype), tuple(batch.inputs.shape[1:])) for batch in batches}
    if len(layouts) > 1:
        raise DataError(
            f"inputs of the data sets differ: {sorted(layouts)}; expected the same shape and dtype"
        )
    return TrainingBatch(
        torch.cat([batch.inputs for batch in batches]),
        concatenate_labels([batch.labels for batch in batches]),
        {
            temperature: concatenate_targets([batch.targets[temperature] for batch in batches])
            for temperature in batches[0].targets
        },
    )


def _concatenate_rows(batches: Sequence[TrainingBatch]) -> TrainingBatch:
    """The same for samples with many rows; those of tokens are padded to the longest."""
    longest = max(batch.inputs.shape[-1] for batch in batches)
    inputs = [
        pad(batch.inputs, (0, longest - batch.inputs.shape[-1]), value=PADDING)
        if batch.inputs.ndim == 2
        else batch.inputs
        for batch in batches
    ]
    starts = np.cumsum([0, *(len(batch.inputs) for batch in batches)]).tolist()
    rows = [
        RowIndex(batch.rows.samples + start, batch.rows.positions)
        for batch, start in zip(batches, starts, strict=False)
        if batch.rows is not None
    ]
    return TrainingBatch(
        torch.cat(inputs),
        concatenate_labels([batch.labels for batch in batches]),
        {
            temperature: concatenate_stored([batch.targets[temperature] for batch in batches])
            for temperature in batches[0].targets
        },
        RowIndex(*(torch.cat(parts) for parts in zip(*rows, strict=True))),
    )


def concatenate_stored(targets: Sequence[AnyTargets]) -> StoredTargets:
    """Concatenate targets as they are stored, each of which is decoded in its own way."""
    parts = [part for part in targets if isinstance(part, StoredTargets)]
    edges = np.cumsum([0, *(part.count for part in parts)]).tolist()

    def decode(stored: Mapping[str, Tensor]) -> Targets:
        wanted = stored["row"]
        decoded = []
        for part, start, stop in zip(parts, edges, edges[1:], strict=False):
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(inside):
                decoded.append(part.rows(slice(int(inside[0]), int(inside[-1]) + 1)).decoded())
        return concatenate_targets(decoded)

    device = next(iter(parts[0].stored.values())).device
    every = {"row": torch.arange(edges[-1], device=device)}
    return StoredTargets(every, decode, edges[-1], parts[0].classes)


def concatenate_targets(targets: Sequence[AnyTargets]) -> Targets:
    """Concatenate targets; the result is sparse only if all are sparse with the same number of ids."""
    targets = [part.decoded() if isinstance(part, StoredTargets) else part for part in targets]
    sparse = [part for part in targets if isinstance(part, SparseTargets)]
    if len(sparse) == len(targets) and len({part.ids.shape[1] for part in sparse}) == 1:
        return SparseTargets(
            torch.cat([part.ids for part in sparse]),
            torch.cat([part.log_probs for part in sparse]),
            torch.cat([part.rest for part in sparse]),
            sparse[0].classes,
            all(part.bucket for part in sparse),
        )
    # a class that was not drawn has -inf, which would become 0 · -inf in a dense loss
    return torch.cat([to_dense(part).clamp(min=LOWEST) for part in targets])


def concatenate_labels(labels: Sequence[Labels]) -> Labels:
    """Concatenate labels; if any are mixed, plain labels become mixed ones with partners of weight 0."""
    sets = [part for part in labels if isinstance(part, LabelSets)]
    if sets:
        return LabelSets(*(torch.cat(parts) for parts in zip(*sets, strict=True)))
    plain = [part for part in labels if isinstance(part, Tensor)]
    if len(plain) == len(labels):
        return torch.cat(plain)
    mixed = [
        MixedLabels(part, part, torch.zeros(len(part), device=part.device))
        if isinstance(part, Tensor)
        else part
        for part in labels
        if not isinstance(part, LabelSets)
    ]
    return MixedLabels(*(torch.cat(parts) for parts in zip(*mixed, strict=True)))


def hard_label_data(source: Source, augment: str | None, seed: int, classes: int) -> JoinedData:
    """A source to train on without a teacher.

    Args:
        source: the source of the inputs and labels.
        augment: the specification of the augmentation; None for none.
        seed: the seed of the augmentation.
        classes: the number of classes.

    Raises:
        DataError: a label is not a class.
        SettingsError: the augmentation is invalid.
    """
    indices = np.arange(len(source))
    labels = getattr(source, "labels", None)  # a Dataset has none; its labels are checked by batch
    multi_label = has_label_sets(source)
    if labels is not None and not multi_label:
        check_labels(labels, indices, classes, source)
    augmentation = parse_augment(augment, seed=seed, total=len(source))
    check_masks_follow(source, augmentation)
    return JoinedData(
        source,
        indices,
        indices,
        indices,
        augmentation,
        classes,
        multi_label=multi_label,
        layout=layout_of_source(source),
    )
