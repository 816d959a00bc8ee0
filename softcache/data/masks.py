"""Labels of pixels: they move with the pixels that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.data.augment import Augmentation
from softcache.data.augmentations import OPERATIONS
from softcache.data.loader import Batch
from softcache.data.rows import has_masks
from softcache.data.source import UNLABELLED, Source
from softcache.errors import SettingsError
from softcache.types import SampleIds, Views


def check_masks_follow(source: Source, augmentation: Augmentation) -> None:
    """Raise SettingsError if labels of pixels could not be moved as an augmentation moves the pixels."""
    refused = [
        part
        for part, given in (
            ("mixup", augmentation.mixup),
            ("an augmentation of your own", augmentation.transform is not None),
        )
        if given
    ]
    if refused and has_masks(source):
        raise SettingsError(
            f"--augment {augmentation.spec}: {refused[0]} cannot be replayed on the masks of {source.name}, "
            f"whose labels move with their pixels; use {', '.join(OPERATIONS)}, or leave the masks out"
        )


def augmented_labels(
    batch: Batch, augmentation: Augmentation, view: Views, sample_ids: SampleIds
) -> Tensor:
    """The labels of all rows of a batch, (R,) int64, in a view.

    The labels of images move as their pixels do, if a row is a pixel; a pixel that comes from outside of the
    image has none.
    """
    height, width = batch.inputs.shape[-2:] if batch.inputs.ndim == 4 else (0, 0)
    if not augmentation.ops or len(batch.labels) != len(batch.inputs) * height * width:
        return batch.labels
    masks = batch.labels.view(len(batch.inputs), 1, height, width)
    # exact in float32: an operation moves or blanks values, and 0 stands for no label
    moved = augmentation.moved((masks + 1).float(), view, sample_ids)
    return (moved.round().long() - 1).flatten().clamp(min=UNLABELLED).to(torch.int64)
