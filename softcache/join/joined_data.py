"""The samples of a source with what a cache says of them, and batches of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.data.augment import ROTATION_STREAM, Augmentation, parse_augment
from softcache.data.loader import Batch, Request, augmented, make_request
from softcache.data.source import Source, check_labels
from softcache.errors import DataError
from softcache.losses import LOWEST
from softcache.targets.decode import to_dense
from softcache.types import Labels, MixedLabels, SparseTargets, Targets, Views
from softcache.util.counter_rng import uniform
from softcache.util.tensors import to_float


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
    source_indices: Indices  # (N,) index of each sample in the source
    sample_ids: Indices  # (N,) id of each sample in the draws of the augmentation
    source_index_of: Indices | None  # (all samples,) by sample id, for mixup
    augmentation: Augmentation
    classes: int
    cache: Cache | None = None
    # by view and row of the cache, at each temperature
    targets: Callable[[Views, Indices], Mapping[float, Targets]] | None = None
    rotate: bool = True

    def __len__(self) -> int:
        return len(self.source_indices)

    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.first_input().shape[1:])

    def first_input(self) -> Tensor:
        """The first sample as float (1, *shape), after the user's own transform."""
        raw, first = self.source.fetch([int(self.source_indices[0])])[0], self.sample_ids[:1]
        return to_float(self.augmentation.transformed(raw, self.views(0, first), first))

    def views(self, epoch: int, sample_ids: Indices) -> Views:
        """The view in which each sample is seen in an epoch, one for all or (B,).

        All views of a cache in turn; if rotated, each sample begins with another one, so that an
        epoch is a mixture of all views.
        """
        if self.cache is None:
            return epoch
        header, turn = self.cache.header, np.asarray(epoch, np.int64)
        if self.rotate:
            drawn = uniform(header.seed, 0, sample_ids, stream=ROTATION_STREAM, draws=1)[:, 0]
            turn = epoch + (drawn * header.views).astype(np.int64)
        return np.asarray(header.first_view + turn % header.views)

    def request(self, rows: Indices, epoch: int) -> Request:
        """What to ask a loader for, for rows (B,) of the cache, or samples where there is none."""
        source_indices, sample_ids = self.source_indices[rows].tolist(), self.sample_ids[rows]
        view = self.views(epoch, sample_ids)
        return make_request(
            self.augmentation, source_indices, view, sample_ids, self.source_index_of
        )

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        """What came for a request of this epoch, augmented, with its labels and soft targets."""
        sample_ids = batch.sample_ids.numpy()
        view = self.views(epoch, sample_ids)
        check_labels(batch.labels.numpy(), batch.source_indices.numpy(), self.classes, self.source)
        inputs = augmented(batch, self.augmentation, view, sample_ids, device)
        own = batch.labels.to(device)
        labels: Labels = own
        if self.augmentation.mixup:
            shares = torch.from_numpy(self.augmentation.partner_weights(view, sample_ids)).to(
                device
            )
            labels = MixedLabels(own, batch.partner_labels.to(device), shares.float())
        if self.cache is None or self.targets is None:
            return TrainingBatch(inputs, labels, {})
        header = self.cache.header
        soft = self.targets(view - header.first_view, sample_ids - header.first_sample)
        return TrainingBatch(inputs, labels, soft)


def concatenate_batches(batches: Sequence[TrainingBatch]) -> TrainingBatch:
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
        concatenate_labels([batch.labels for batch in batches]),
        {
            temperature: concatenate_targets([batch.targets[temperature] for batch in batches])
            for temperature in batches[0].targets
        },
    )


def concatenate_targets(targets: Sequence[Targets]) -> Targets:
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


def concatenate_labels(labels: Sequence[Labels]) -> Labels:
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


def hard_label_data(source: Source, augment: str | None, seed: int, classes: int) -> JoinedData:
    """A source to learn from without a teacher."""
    every = np.arange(len(source))
    known = getattr(source, "labels", None)  # those of a Dataset come one by one
    if known is not None:
        check_labels(known, every, classes, source)
    augmentation = parse_augment(augment, seed=seed, total=len(source))
    return JoinedData(source, every, every, every, augmentation, classes)


Indices = npt.NDArray[np.int64]
