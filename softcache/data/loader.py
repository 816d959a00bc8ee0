"""Requests for batches, and the loaders that answer them, in any order and with any number of workers."""

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
from softcache.data.keys import keys_of
from softcache.data.rows import layout_of_source
from softcache.data.source import UNLABELLED, Source, label_sets
from softcache.data.workers import Portable, start_worker
from softcache.errors import SoftcacheError
from softcache.types import Views
from softcache.util.tensors import to_float


@dataclass(frozen=True)
class Request:
    """A request for one batch of a source.

    Attributes:
        source_indices: (B,) indices of the samples in the source.
        view: one view for the whole batch, or (B,) one for each sample.
        sample_ids: (B,) numbers of the samples in the augmentation's draws; by default `source_indices`.
        partner_indices: (B,) indices in the source of the samples that mixup mixes in; empty without mixup.
        raw: whether the batch also holds the inputs before the user's own transform.
    """

    source_indices: Sequence[int]
    view: Views = 0
    sample_ids: npt.NDArray[np.int64] | None = None
    partner_indices: Sequence[int] = ()
    raw: bool = False

    def __len__(self) -> int:
        return len(self.source_indices)


class Batch(NamedTuple):
    """Samples after the user's own transform, before they become floats."""

    source_indices: Tensor  # (B,) int64
    sample_ids: Tensor  # (B,) int64, numbers in the augmentation's draws
    inputs: Tensor  # (B, *shape), uint8 for images, else the dtype of the source
    labels: Tensor  # (B,) int64, UNLABELLED where there is no label
    keys: Tensor  # (B,) int64, the bits of sample_keys(); empty unless requested
    partners: Tensor  # (B, *shape), inputs of the partners; empty without mixup
    partner_labels: Tensor  # (B,) int64, labels of the partners; empty without mixup
    raw: Tensor  # (B, *shape), inputs before the user's transform; empty unless requested
    sets: Tensor = torch.empty(
        0
    )  # (B, C) uint8, the classes of samples with any number; else empty
    partner_sets: Tensor = torch.empty(0)  # (B, C) uint8, the same of the partners
    # of samples with many rows, whose labels are those of the rows, (R,)
    row_samples: Tensor = torch.empty(
        0
    )  # (R,) int64, which sample of the batch each row belongs to
    row_positions: Tensor = torch.empty(0)  # (R,) int64, where in that sample it stands


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
        source: the source to fetch from.
        batches: a Request or the source indices of each batch.
        augmentation: if it has the user's own transform, this is applied in the worker processes.
        workers: the number of worker processes; 0 loads in this process.
        keys: whether the batches hold content keys.
        pin_memory: whether the batches are copied into pinned memory.
    """
    return _loader(_Batches(source, keys, augmentation), batches, workers, pin_memory)


def fetch_batch(source: Source, request: Request, augmentation: Augmentation) -> Batch:
    """One batch of a source, without a DataLoader, which would draw from torch's global generator."""
    return _Batches(source, False, augmentation).batch(request)


def joint_loader(
    parts: Sequence[tuple[Source, Augmentation]],
    batches: Sampler[Any] | Sequence[dict[int, Request]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[int, Batch]]:
    """A DataLoader over several sources.

    Args:
        parts: each source with its augmentation.
        batches: for each joint batch, the Request to each part by the part's index.
        workers: the number of worker processes; 0 loads in this process.
        pin_memory: whether the batches are copied into pinned memory.

    Returns:
        A loader of joint batches: for each, the Batch of each part by the part's index.
    """
    datasets = [_Batches(source, False, augmentation) for source, augmentation in parts]
    return _loader(_JointBatches(datasets), batches, workers, pin_memory)


def _loader(
    dataset: Dataset[Any], batches: Sampler[Any] | Iterable[Any], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    batch_sampler: Any = batches
    as_is: Any = _as_is  # __getitems__ returns a complete batch
    return _Loader(
        Portable(dataset),
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=as_is,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
    )


class _Loader(DataLoader[Any]):
    """Raises softcache's own errors from worker processes as they are, without a worker traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, SoftcacheError):
                # workers left running would block whatever comes after the error
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
    """Request samples in a view, along with the partners that the augmentation mixes in.

    Args:
        augmentation: chooses the partners.
        source_indices: (B,) indices of the samples in the source.
        view: one view for the whole batch, or (B,) one for each sample.
        sample_ids: (B,) ids of the samples at `source_indices`.
        source_index_of: (all samples,) the source index of each sample id; None if the two are equal.
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
    """The inputs of a batch as teacher and student see them in a view, (B, *shape) float on `device`."""
    partners = to_float(batch.partners.to(device)) if len(batch.partners) else None
    return augmentation(to_float(batch.inputs.to(device)), partners, view, sample_ids)


def sequential_batches(samples: int, batch_size: int) -> list[range]:
    """Every sample once, in order; the last batch may be smaller."""
    starts = range(0, samples, batch_size)
    return [range(start, min(start + batch_size, samples)) for start in starts]


class ShuffledBatches(Sampler[Any]):
    """Every sample once per epoch, in an order that depends on (seed, epoch) alone.

    Each process gets its share of every batch. A last batch is dropped if it would leave a process with
    fewer than two samples, since batch normalization needs two.
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
        """Prepare the batches of epoch 0.

        Args:
            samples: the number of samples.
            batch_size: the number of samples in a batch of all processes together.
            seed: the seed of the order.
            request: makes the request to the loader from the samples (B,) and the epoch.
            process: the rank of this process.
            processes: the number of processes.
        """
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch = self.first = 0
        self.process, self.processes = process, processes
        remainder = samples % batch_size
        self.drop_last = 0 < remainder < 2 * processes and samples > remainder and batch_size > 1
        self.request = request or (lambda indices, epoch: Request(indices.tolist()))

    def set_epoch(self, epoch: int, first: int = 0) -> int:
        """Move to an epoch and skip its batches before `first`; returns `first`."""
        self.epoch, self.first = epoch, first
        return first

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size) - int(self.drop_last)

    def weights(self) -> Iterator[float]:
        """Loss weights of this process, by batch: the mean over processes is then the batch mean."""
        for step in range(self.first, len(self)):
            batch = min(self.batch_size, self.samples - step * self.batch_size)
            share = len(range(self.process, batch, self.processes))
            yield share * self.processes / batch

    def order(self) -> npt.NDArray[np.int64]:
        """The samples of the epoch (N,), in order."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)

    def __iter__(self) -> Iterator[Any]:
        order = self.order()
        for step in range(self.first, len(self)):
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = indices[self.process :: self.processes]
            yield self.request(share, self.epoch)


class _Batches(Dataset[Batch]):
    """A source as a Dataset whose __getitems__ is called once per batch by torch's fetcher."""

    def __init__(self, source: Source, keys: bool, augmentation: Augmentation | None) -> None:
        self.source, self.keys, self.layout = source, keys, layout_of_source(source)
        self.augmentation = augmentation or Augmentation(None, 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, request: Request | Sequence[int]) -> Batch | SoftcacheError:
        try:
            return self.batch(request)
        except (
            SoftcacheError
        ) as error:  # raised here, torch would wrap it in the text of a traceback
            return error

    def batch(self, request: Request | Sequence[int]) -> Batch:
        """Fetch the samples of a request; plain indices are a request without a view."""
        request = request if isinstance(request, Request) else Request(request)
        source_indices = np.asarray(request.source_indices, np.int64)
        sample_ids = source_indices
        if request.sample_ids is not None:
            sample_ids = np.asarray(request.sample_ids, np.int64)
        transformed = self.augmentation.transformed
        inputs, labels = self.source.fetch(request.source_indices)
        keys = np.empty(0, np.uint64)
        if self.keys:
            keys = keys_of(inputs, self.source)
        sets = partner_sets = torch.empty(0)
        if labels.ndim == 2:
            labels, sets = _split_sets(labels)
        partners, partner_labels = torch.empty(0), np.empty(0, np.int64)
        if len(request.partner_indices):
            partners, partner_labels = self.source.fetch(request.partner_indices)
            if partner_labels.ndim == 2:
                partner_labels, partner_sets = _split_sets(partner_labels)
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
            sets,
            partner_sets,
            *self._rows(source_indices),
        )

    def _rows(self, source_indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Which sample of the batch each row belongs to, and its position there; empty for one row each."""
        if self.layout is None:
            return torch.empty(0), torch.empty(0)
        samples = np.repeat(np.arange(len(source_indices)), self.layout.counts(source_indices))
        positions = self.layout.positions_of(self.layout.rows_of(source_indices))
        return torch.from_numpy(samples), torch.from_numpy(positions)


def _split_sets(labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Tensor]:
    """From labels (B, C): 0 or UNLABELLED (B,), and the classes that apply (B, C) uint8."""
    return np.where(labels[:, 0] < 0, UNLABELLED, 0), torch.from_numpy(label_sets(labels, 0))


class _JointBatches(Dataset[dict[int, Batch]]):
    """Several sources as one Dataset, for joint batches."""

    def __init__(self, parts: Sequence[_Batches]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitems__(self, requests: dict[int, Request]) -> dict[int, Batch] | SoftcacheError:
        try:
            return {part: self.parts[part].batch(request) for part, request in requests.items()}
        except SoftcacheError as error:
            return error


def _as_is(batch: Any) -> Any:  # noqa: ANN401  # a Batch or a joint batch
    return batch
