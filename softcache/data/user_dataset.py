"""A user's own map-style Dataset as a data source."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softcache.data.source import DEFAULT_SPLIT, UNLABELLED
from softcache.errors import DataError, SettingsError
from softcache.util.callables import call_user, import_callable
from softcache.util.messages import one_line
from softcache.util.spec import Spec


@dataclass(frozen=True)
class DatasetSource:
    """A user's own map-style Dataset, whose items are an input or a pair (input, label)."""

    name: str
    dataset: Dataset[Any]
    length: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        items = [self._item(index) for index in indices]
        layouts = {(str(item[0].dtype), tuple(item[0].shape)) for item in items}
        if len(layouts) > 1:
            raise DataError(
                f"{self.name}: inputs of one batch have different shapes or dtypes, {sorted(layouts)}; "
                "the Dataset must return the same shape and dtype for every sample"
            )
        inputs = torch.stack([item[0] for item in items])
        return inputs, np.array([item[1] for item in items], np.int64)

    def _item(self, index: int) -> tuple[Tensor, int]:
        try:
            item = self.dataset[index]
        except Exception as error:  # a user's code can fail in any way
            raise DataError(
                f"{self.name}: item {index} raised {type(error).__name__}: {one_line(error)}"
            ) from error
        sample, label = item if isinstance(item, tuple) and len(item) == 2 else (item, UNLABELLED)
        try:
            return _as_input(sample), _as_label(label)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.name}: item {index} is {type(item).__name__}, which is neither an input (a tensor, "
                f"array or image) nor a pair (input, label) with a whole number as its label: {error}"
            ) from error


def open_dataset(spec: Spec) -> DatasetSource:
    """Open the Dataset that a callable returns; the split is passed if it has a parameter `split`.

    Raises:
        SettingsError: the callable cannot be imported or called, or a split is given that it does not take.
        DataError: it does not return a map-style Dataset.
    """
    where, split = f"{spec.place}:{spec.attribute}", spec.split or DEFAULT_SPLIT
    make = import_callable(where, what="data")
    takes_split = "split" in inspect.signature(make).parameters
    if split != DEFAULT_SPLIT and not takes_split:
        raise SettingsError(
            f"data {where}@{split}: the callable takes no argument 'split', so it has no split "
            f"{split!r}; add one, or leave @{split} out"
        )
    arguments = {"split": split} if takes_split else {}
    dataset = call_user(make, what=f"data {where}", **arguments)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"data {where} returned {type(dataset).__name__}; expected a map-style Dataset, with "
            "__getitem__ and __len__"
        )
    classes = getattr(dataset, "classes", ())  # some data sets have the number of classes here
    class_names = tuple(map(str, classes)) if isinstance(classes, list | tuple) else ()
    name = replace(spec, split=split).public_name
    return DatasetSource(name, dataset, len(dataset), class_names)


def _as_input(sample: object) -> Tensor:
    if not isinstance(sample, Tensor):
        array = np.asarray(sample)
        if array.ndim == 3 and hasattr(sample, "getbands"):  # Pillow: height, width, bands
            array = array.transpose(2, 0, 1)
        return torch.from_numpy(np.array(array))
    if sample.dtype == torch.bfloat16:
        raise TypeError("numpy has no bfloat16; return float32")
    return sample.detach()


def _as_label(label: object) -> int:
    if label is None:
        return UNLABELLED
    number = int(label)  # type: ignore[call-overload]  # anything that int() accepts
    if number != label or abs(number) >= 1 << 62:
        raise ValueError(f"label {label} is not a class number")
    return int(number)
