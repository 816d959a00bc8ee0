"""What a source of samples is: inputs and labels by index, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.errors import DataError

DEFAULT_SPLIT = "train"

UNLABELLED = -1


class Source(Protocol):
    """Anything that gives samples by index, a batch at a time."""

    @property
    def name(self) -> str:
        """The specification without folders: what may be written into a shared file."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty if the source has none."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Raw inputs (B, *shape) and labels (B,) of the samples at `indices`."""


@dataclass(frozen=True)
class ArraySource:
    """Samples that lie in one array: `inputs` (N, *shape) and `labels` (N,)."""

    name: str
    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        at = np.asarray(indices, np.int64)
        return torch.from_numpy(self.inputs[at]), self.labels[at]


def array_source(
    name: str, inputs: npt.NDArray[Any], labels: npt.NDArray[Any] | None
) -> ArraySource:
    if inputs.ndim < 2 or inputs.dtype.kind not in "uif":
        raise DataError(
            f"{name}: inputs are {inputs.dtype} of shape {inputs.shape}; expected numbers of shape "
            "(samples, ...)"
        )
    if labels is None:
        labels = np.full(len(inputs), UNLABELLED, np.int64)
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(inputs),) or labels.dtype.kind not in "ui":
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected whole numbers of "
            f"shape ({len(inputs)},), one for each input"
        )
    if inputs.dtype.kind == "u" and inputs.dtype.itemsize > 2:
        inputs = inputs.astype(np.int64)  # torch computes with no wider unsigned types
    if inputs.dtype.kind == "f" and inputs.dtype.itemsize > 8:
        inputs = inputs.astype(np.float64)
    inputs = inputs.astype(inputs.dtype.newbyteorder("="), copy=False)
    return ArraySource(name, inputs, labels.astype(np.int64))


def check_labels(
    labels: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], classes: int, source: Source
) -> None:
    """Raise DataError if a label is neither a class nor UNLABELLED; (B,) each."""
    wrong = np.flatnonzero((labels >= classes) | (labels < UNLABELLED))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{source.name}: sample {samples[at]} has label {labels[at]}; expected 0 to "
            f"{classes - 1}, or {UNLABELLED} for none"
        )
