"""Types that several packages share: labels, soft targets, indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Log-probabilities of a few classes, and a single one that all other classes share.

    An id may occur several times in a row if all but one of its log-probabilities are -inf.
    """

    ids: Tensor  # (B, k) int64
    log_probs: Tensor  # (B, k) float32
    rest: Tensor  # (B,) float32, log-probability of each class that is not among the ids
    classes: int
    bucket: bool = (
        False  # whether a loss compares the mass of all other classes as one, not class by class
    )

    @property
    def shape(self) -> torch.Size:
        """The shape of the same targets as a dense tensor, (B, C)."""
        return torch.Size((len(self.ids), self.classes))


class MixedLabels(NamedTuple):
    """Labels of samples that mixup has mixed with a partner."""

    own: Tensor  # (B,) int64
    partners: Tensor  # (B,) int64
    partner_weights: Tensor  # (B,) float32: 1 - lambda, the weight of each partner


class LabelSets(NamedTuple):
    """The classes of samples that may have several, or none."""

    applies: Tensor  # (B, C) float32: 1 where a class applies; between 0 and 1 if mixup has mixed samples
    known: Tensor  # (B,) bool: False for an unlabelled sample


Labels = Tensor | MixedLabels | LabelSets  # a tensor: (B,) int64, negative where unlabelled
# a tensor: (B, C) float32 log-probabilities, or log-odds of each class
Targets = Tensor | SparseTargets
SampleIds = npt.NDArray[np.int64]  # (B,) numbers of samples in the augmentation's draws
Views = int | npt.NDArray[np.int64]  # one view for the whole batch, or (B,) one for each sample


class RowIndex(NamedTuple):
    """Which rows of a batch are meant, where samples have many."""

    samples: Tensor  # (R,) int64, the sample of the batch that each row belongs to, ascending
    positions: Tensor  # (R,) int64, where in that sample it stands

    def flat(self, positions: int) -> Tensor:
        """Their numbers (R,) among all `positions` of all samples."""
        return self.samples * positions + self.positions


@dataclass(frozen=True)
class StoredTargets:
    """Soft targets as a cache stores them, which are decoded a few rows at a time."""

    stored: Mapping[str, Tensor]  # (R, ...) by array name
    decode: Callable[[Mapping[str, Tensor]], Tensor | SparseTargets]
    count: int
    classes: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the same targets as a dense tensor, (R, C)."""
        return torch.Size((self.count, self.classes))

    def rows(self, rows: slice) -> StoredTargets:
        """Some of the rows, still stored."""
        stored = {name: tensor[rows] for name, tensor in self.stored.items()}
        return replace(self, stored=stored, count=len(range(self.count)[rows]))

    def decoded(self) -> Tensor | SparseTargets:
        """All rows as log-probabilities."""
        return self.decode(self.stored)
