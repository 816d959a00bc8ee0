"""Batches: what a loop asks of a source, and what it gets, in any order and any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from softcache.data.augment import Augmentation
from softcache.data.keys import sample_keys
from softcache.data.source import Source
from softcache.errors import SoftcacheError
from softcache.types import Views
from softcache.util.tensors import to_float


@dataclass(frozen=True)
class Request:
    """What a loader is asked for: samples of the source, in one view."""

    source_indices: Sequence[int]  # (B,)
    view: Views = 0
    sample_ids: npt.NDArray[np.int64] | None = None  # (B,) in the draws; by default source_indices
    partner_indices: Sequence[int] = ()  # (B,) in the source, of those that mixup mixes in
    raw: bool = False  # also as the source has them

    def __len__(self) -> int:
        return len(self.source_indices)


class Batch(NamedTuple):
    """Samples as the source holds them, before they become floats."""

    source_indices: Tensor  # (B,) int64
    sample_ids: Tensor  # (B,) int64, in the draws of the augmentation
    inputs: Tensor  # (B, *shape), uint8 for images, else as the source gives them
    labels: Tensor  # (B,) int64, UNLABELLED where there is none
    keys: Tensor  # (B,) int64, the bits of sample_keys(); empty where they were not asked for
    partners: Tensor  # (B, *shape), inputs of the partners; empty without
    partner_labels: Tensor  # (B,) int64, their labels; empty without
    raw: Tensor  # (B, *shape), inputs as the source has them; empty where they were not asked for


def loader(
    source: Source,
    batches: Sampler[Any] | Iterable[Request] | Iterable[Sequence[int]],
    *,
    augmentation: Augmentation | None = None,
    workers: int = 0,
    keys: bool = False,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A DataLoader that fetches a whole batch at a time.

    Args:
        batches: what each batch is to hold: a Request, or only indices.
        augmentation: whose own transform, if the user gave one, is applied where samples are loaded.
        keys: whether batches carry the samples' keys.
    """
    return _loader(_Batches(source, keys, augmentation), batches, workers, pin_memory)


def joint_loader(
    parts: Sequence[tuple[Source, Augmentation]],
    batches: Sampler[Any] | Sequence[dict[int, Request]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[int, Batch]]:
    """The same over several sources: a batch is asked for, and comes, by the source's number."""
    each = [_Batches(source, False, augmentation) for source, augmentation in parts]
    return _loader(_JointBatches(each), batches, workers, pin_memory)


def _loader(
    dataset: Dataset[Any], batches: Sampler[Any] | Iterable[Any], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    as_is: Any = _as_is  # what __getitems__ gives is one batch already
    wanted: Any = batches
    return _Loader(
        dataset,
        batch_sampler=wanted,
        num_workers=workers,
        collate_fn=as_is,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


class _Loader(DataLoader[Any]):
    """Raises softcache's own errors as they were raised in a worker, without its traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, SoftcacheError):
                # workers that are left behind with the error would hold up what comes after it
                self._iterator = None
                getattr(batches, "_shutdown_workers", lambda: None)()
                raise batch
            yield batch


def make_request(
    augmentation: Augmentation,
    source_indices: Sequence[int],
    view: Views,
    sample_ids: npt.NDArray[np.int64],
    source_index_of: npt.NDArray[np.int64] | None = None,
) -> Request:
    """Ask for samples in a view, and for the partners that the augmentation mixes in.

    Args:
        sample_ids: (B,) the ids of the samples at `source_indices`.
        source_index_of: (all samples,) by sample id; None where the two are the same.
    """
    partners = augmentation.partners(view, sample_ids)
    if partners is None:
        return Request(source_indices, view, sample_ids)
    partner_indices = partners if source_index_of is None else source_index_of[partners]
    return Request(source_indices, view, sample_ids, partner_indices.tolist())


def augmented(
    batch: Batch,
    augmentation: Augmentation,
    view: Views,
    sample_ids: npt.NDArray[np.int64],
    device: torch.device,
) -> Tensor:
    """The inputs of a batch as teacher and student see them in a view, (B, *shape), on `device`."""
    partners = to_float(batch.partners.to(device)) if len(batch.partners) else None
    return augmentation(to_float(batch.inputs.to(device)), partners, view, sample_ids)


def sequential_batches(samples: int, batch_size: int) -> list[range]:
    """Every sample once, in order; the last batch may be smaller."""
    return [range(a, min(a + batch_size, samples)) for a in range(0, samples, batch_size)]


class ShuffledBatches(Sampler[Any]):
    """Every sample once per epoch, in an order drawn from (seed, epoch) alone.

    Of several processes, each gets its share of every batch. A last batch that gives one of them
    fewer than two samples is left out: batch normalization has no variance of one sample.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        request: Callable[[npt.NDArray[np.int64], int], Any] | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """`request` makes of samples (B,) and the epoch what the loader is asked for."""
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch = self.first = 0
        self.process, self.processes = process, processes
        last = samples % batch_size
        self.drop_last = 0 < last < 2 * processes and samples > last and batch_size > 1
        self.request = request or (lambda indices, epoch: Request(indices.tolist()))

    def set_epoch(self, epoch: int, first: int = 0) -> int:
        """Go to an epoch, of which the batches before `first` are done; returns `first`."""
        self.epoch, self.first = epoch, first
        return first

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size) - int(self.drop_last)

    def weights(self) -> Iterator[float]:
        """Of this process's share of each batch, so that the mean of all is that of the batch."""
        for step in range(self.first, len(self)):
            batch = min(self.batch_size, self.samples - step * self.batch_size)
            own = len(range(self.process, batch, self.processes))
            yield own * self.processes / batch

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)
        for step in range(self.first, len(self)):
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = indices[self.process :: self.processes]
            yield self.request(share, self.epoch)


class _Batches(Dataset[Batch]):
    """The source as torch's fetcher wants it: one call of __getitems__ a batch."""

    def __init__(self, source: Source, keys: bool, augmentation: Augmentation | None) -> None:
        self.source, self.keys = source, keys
        self.augmentation = augmentation or Augmentation(None, 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, wanted: Request | Sequence[int]) -> Batch | SoftcacheError:
        try:
            return self.batch(wanted)
        except SoftcacheError as error:  # torch would wrap it in the text of a traceback
            return error

    def batch(self, wanted: Request | Sequence[int]) -> Batch:
        request = wanted if isinstance(wanted, Request) else Request(wanted)
        source_indices = np.asarray(request.source_indices, np.int64)
        sample_ids = source_indices
        if request.sample_ids is not None:
            sample_ids = np.asarray(request.sample_ids, np.int64)
        transformed = self.augmentation.transformed
        inputs, labels = self.source.fetch(request.source_indices)
        keys = sample_keys(inputs) if self.keys else np.empty(0, np.uint64)
        partners, partner_labels = torch.empty(0), np.empty(0, np.int64)
        if len(request.partner_indices):
            partners, partner_labels = self.source.fetch(request.partner_indices)
            partners = transformed(partners, request.view, sample_ids, partner=True)
        return Batch(
            torch.from_numpy(source_indices),
            torch.from_numpy(sample_ids),
            transformed(inputs, request.view, sample_ids),
            torch.from_numpy(labels),
            torch.from_numpy(keys.view(np.int64)),
            partners,
            torch.from_numpy(partner_labels),
            inputs if request.raw else torch.empty(0),
        )


class _JointBatches(Dataset[dict[int, Batch]]):
    """Several sources as torch's fetcher wants them."""

    def __init__(self, parts: Sequence[_Batches]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitems__(self, wanted: dict[int, Request]) -> dict[int, Batch] | SoftcacheError:
        try:
            return {part: self.parts[part].batch(request) for part, request in wanted.items()}
        except SoftcacheError as error:
            return error


def _as_is(batch: Any) -> Any:  # noqa: ANN401  # batches of either kind
    return batch
