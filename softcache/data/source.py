"""The interface of a data source: inputs and labels by index, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache.layout import RowLayout
from softcache.errors import DataError

DEFAULT_SPLIT = "train"
UNLABELLED = -1  # the label of a sample without one


class Source(Protocol):
    """Anything that returns samples by index, a batch at a time."""

    @property
    def name(self) -> str:
        """The specification without folders, safe to write into a shared file."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty if the source has none."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Raw inputs (B, *shape) and labels (B,) int64 of the samples at `indices` of the source.

        Where samples may have several labels, these are (B, C): 1 for each class that applies, 0 for the
        others, and UNLABELLED in the whole row of a sample without labels.
        """


@dataclass(frozen=True)
class ArraySource:
    """Samples in two arrays: `inputs` (N, *shape) and `labels` (N,)."""

    name: str
    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        rows = np.asarray(indices, np.int64)
        return torch.from_numpy(np.ascontiguousarray(self.inputs[rows])), self.labels[rows]

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        """The samples at `indices`, copied."""
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class MultiLabelSource(ArraySource):
    """Samples with any number of labels; `labels` (N,) is 0, or UNLABELLED.

    Attributes:
        sets: (N, C) 1 where a class applies.
    """

    sets: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        rows = np.asarray(indices, np.int64)
        return super().fetch(indices)[0], self.sets[rows]

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        return replace(super().take(indices), sets=self.sets[indices])


def label_sets(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.uint8]:
    """The classes of samples, (B, C) uint8, from what Source.fetch() returns; none for an unlabelled one."""
    if labels.ndim == 2:
        return (labels > 0).astype(np.uint8)
    sets = np.zeros((len(labels), classes), np.uint8)
    labelled = np.flatnonzero(labels >= 0)
    sets[labelled, labels[labelled]] = 1
    return sets


def has_label_sets(source: Source) -> bool:
    """Whether samples may have several labels."""
    return len(source) > 0 and source.fetch([0])[1].ndim == 2


def check_kind_of_labels(source: Source, *, multi_label: bool) -> None:
    """Raise DataError if samples may have several labels where one is expected."""
    if not multi_label and has_label_sets(source):
        raise DataError(
            f"{source.name}: samples have any number of labels, a 0 or 1 for each class; expected one label "
            "each: add --targets sigmoid to the dump"
        )


@dataclass(frozen=True)
class WrappedSource:
    """Part of a source around another one, which says what it is called and whether it holds texts."""

    source: Source

    @property
    def name(self) -> str:
        """The name of the source, which holds the options that it was opened with."""
        return self.source.name

    @property
    def text(self) -> bool:
        """Whether the samples are texts, whose keys do not depend on their padding."""
        return bool(getattr(self.source, "text", False))

    @property
    def layout(self) -> RowLayout | None:
        """Which rows belong to which sample; None if each has one."""
        layout: RowLayout | None = getattr(self.source, "layout", None)
        return layout

    @property
    def unit(self) -> str | None:
        """What a row is, if samples have many."""
        unit: str | None = getattr(self.source, "unit", None)
        return unit

    @property
    def facts(self) -> dict[str, Any]:
        """What a header says of the rows, besides their number and unit."""
        return dict(getattr(self.source, "facts", {}))

    def __len__(self) -> int:
        return len(self.source)


def array_source(
    name: str, inputs: npt.NDArray[Any], labels: npt.NDArray[Any] | None
) -> ArraySource:
    """Make a source of arrays in any byte order and width.

    Args:
        inputs: (N, *shape), integers or floats.
        labels: (N,) or (N, 1) whole numbers, booleans or words, where NaN is a missing label; or (N, classes)
            a 1 for each class that applies, and 0 or NaN elsewhere; None if all are missing. Words are
            numbered in sorted order.

    Raises:
        DataError: an array has another shape or dtype.
    """
    if inputs.ndim < 2 or inputs.dtype.kind not in "uif":
        raise DataError(
            f"{name}: inputs are {inputs.dtype} of shape {inputs.shape}; expected numbers of shape "
            "(samples, ...)"
        )
    if labels is None:
        labels = np.full(len(inputs), UNLABELLED, np.int64)
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    class_names: tuple[str, ...] = ()
    if labels.dtype.kind in "US" and labels.ndim == 1:
        words, labels = np.unique(labels.astype(np.str_), return_inverse=True)
        class_names = tuple(words.tolist())
    elif labels.dtype.kind == "b" and labels.ndim == 1:
        labels = labels.astype(np.int64)
    elif _is_one_hot(labels):
        labels = labels.argmax(1)
    sets = _label_sets(labels)
    if sets is not None:
        labels = np.where((sets >= 0).any(1), 0, UNLABELLED)
    if labels.shape != (len(inputs),) or labels.dtype.kind not in "uif":
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected integers or words "
            f"of shape ({len(inputs)},), one for each input"
        )
    if labels.dtype.kind == "f":
        labels = _whole(labels, name)
    if inputs.dtype.kind == "u" and inputs.dtype.itemsize > 2:
        inputs = inputs.astype(np.int64)  # torch cannot compute with wider unsigned dtypes
    if inputs.dtype.kind == "f" and inputs.dtype.itemsize > 8:
        inputs = inputs.astype(np.float64)
    inputs = inputs.astype(inputs.dtype.newbyteorder("="), copy=False)
    if sets is not None:
        return MultiLabelSource(name, inputs, labels.astype(np.int64), class_names, sets)
    return ArraySource(name, inputs, labels.astype(np.int64), class_names)


def _label_sets(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Rows (N, classes) of 0 and 1 as sets of labels, a row of NaN or -1 as UNLABELLED; None for others."""
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "buif":
        return None
    values = np.where(np.isnan(labels), UNLABELLED, labels) if labels.dtype.kind == "f" else labels
    unlabelled = (values == UNLABELLED).all(1)
    if not (((values == 0) | (values == 1)).all(1) | unlabelled).all():
        return None
    return values.astype(np.int64)


def _is_one_hot(labels: npt.NDArray[Any]) -> bool:
    """Whether labels (N, classes) have a single 1 in each row, and zeros elsewhere."""
    if labels.ndim != 2 or labels.dtype.kind not in "buif":
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def _whole(labels: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    """Labels (N,) stored as floats as integers; NaN becomes UNLABELLED."""
    filled = np.where(np.isnan(labels), UNLABELLED, labels).astype(np.float64)
    invalid = np.flatnonzero((filled != np.round(filled)) | (np.abs(filled) >= 1 << 62))
    if len(invalid):
        raise DataError(
            f"{name}: labels are {labels.dtype} and sample {invalid[0]} has {filled[invalid[0]]}; expected "
            f"integers of shape {labels.shape}, numbers of classes from 0"
        )
    return filled.astype(np.int64)


def check_labels(
    labels: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], classes: int, source: Source
) -> None:
    """Raise DataError if a label is neither a class nor UNLABELLED.

    Args:
        labels: (B,).
        samples: (B,) numbers of the samples, for the error message.
        classes: the number of classes.
        source: the source that the labels come from, for the error message.
    """
    invalid = np.flatnonzero((labels >= classes) | (labels < UNLABELLED))
    if len(invalid):
        first = int(invalid[0])
        raise DataError(
            f"{source.name}: sample {samples[first]} has label {labels[first]}; expected 0 to "
            f"{classes - 1}, or {UNLABELLED} for none"
        )
