"""Samples with any number of labels: their classes in a batch, in a cache, and as one number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from softcache.cache.encodings import LABEL_SETS
from softcache.cache.header import Header
from softcache.data.loader import Batch
from softcache.data.source import Source, check_labels, label_sets
from softcache.errors import DataError
from softcache.types import LabelSets


def batch_sets(batch: Batch, classes: int) -> npt.NDArray[np.uint8]:
    """The classes of the samples of a batch, (B, C): those of their sets, or their only one."""
    return batch.sets.numpy() if len(batch.sets) else label_sets(batch.labels.numpy(), classes)


def check_batch_labels(batch: Batch, classes: int, source: Source) -> None:
    """Raise DataError if a label is no class, or a set is of another number of classes."""
    if not len(batch.sets):
        samples = batch.source_indices
        if len(batch.row_samples):
            samples = samples[batch.row_samples]
        check_labels(batch.labels.numpy(), samples.numpy(), classes, source)
    elif batch.sets.shape[1] != classes:
        raise DataError(
            f"{source.name}: samples have a 0 or 1 for each of {batch.sets.shape[1]} classes; expected "
            f"{classes}"
        )


def training_sets(
    batch: Batch, classes: int, partner_weights: Tensor | None, device: torch.device
) -> LabelSets:
    """The labels of a batch as training needs them; those of mixed samples are mixed.

    Args:
        partner_weights: (B,) the weight of each sample's partner; None without mixup.
    """
    applies = torch.from_numpy(batch_sets(batch, classes)).to(device).float()
    known = (batch.labels >= 0).to(device)
    if partner_weights is not None:
        partners = batch.partner_sets.numpy()
        if not len(partners):
            partners = label_sets(batch.partner_labels.numpy(), classes)
        mixed = torch.from_numpy(partners).to(device).float()
        applies = torch.lerp(applies, mixed, partner_weights.to(applies)[:, None])
        known = known & (batch.partner_labels >= 0).to(device)
    return LabelSets(applies, known)


def stored_labels(batch: Batch, header: Header) -> dict[str, npt.NDArray[Any]]:
    """The arrays of labels as a cache stores them, by name, each (B, ...)."""
    labels = batch.labels.numpy()
    if not header.multi_label:
        return {"labels": labels}
    packed = np.packbits(batch_sets(batch, header.classes), axis=-1)
    return {"labels": np.minimum(labels, 0), LABEL_SETS: packed}


def set_codes(sets: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """A number from 0 for each set of classes (B, C), the same for equal sets: 62 bits of their hash."""
    packed = np.packbits(sets, axis=-1)
    codes = [xxhash.xxh3_64_intdigest(row.tobytes()) >> 2 for row in packed]
    return np.array(codes, np.int64)
