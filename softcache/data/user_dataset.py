"""A user's own map-style Dataset as a data source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softcache.cache.layout import RowLayout, even_layout
from softcache.data.images import Pixels, as_array, decided
from softcache.data.items import as_label, as_values, is_image, split_item
from softcache.data.layout import Layout, layout_of
from softcache.data.rows import PIXEL, without_ignored
from softcache.data.source import DEFAULT_SPLIT, UNLABELLED, Source
from softcache.data.token_dicts import source_of_dicts
from softcache.errors import DataError, SettingsError
from softcache.util.callables import call_user, import_callable
from softcache.util.log import inform
from softcache.util.messages import one_line
from softcache.util.spec import Spec


@dataclass(frozen=True)
class DatasetSource:
    """A user's own map-style Dataset; `split_item` says what its items may be.

    How inputs are converted, such as from channels last, is decided from the first item alone.
    """

    name: str
    dataset: Dataset[Any]
    length: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        items = [self._item(index) for index in indices]
        samples = [self._sample(item[0], index) for item, index in zip(items, indices, strict=True)]
        layouts = {(str(sample.dtype), tuple(sample.shape)) for sample in samples}
        if len(layouts) > 1:
            raise DataError(
                f"{self.name}: inputs of one batch have different shapes or dtypes, {sorted(layouts)}; "
                "the Dataset must return the same shape and dtype for every sample"
            )
        labels = [item[1] for item in items]
        if len({np.shape(label) for label in labels}) > 1:
            raise DataError(
                f"{self.name}: labels of one batch have different shapes, "
                f"{sorted({np.shape(label) for label in labels})}; the Dataset must return a class number "
                "for every sample, or a 0 or 1 for each class"
            )
        return torch.stack(samples), np.array(labels, np.int64)

    def _item(self, index: int) -> tuple[Any, int | npt.NDArray[np.int64]]:
        """The input of an item, as a PIL image or an array (...), and its label or labels."""
        try:
            item = self.dataset[index]
        except Exception as error:  # a user's code can fail in any way
            raise DataError(
                f"{self.name}: item {index} raised {type(error).__name__}: {one_line(error)}"
            ) from error
        try:
            sample, label = split_item(item)
            values: Any = sample if is_image(sample) else as_values(sample)
            return values, as_label(label)
        except DataError as error:
            raise DataError(f"{self.name}: item {index} {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.name}: item {index} is {type(item).__name__}, which is neither an input (a tensor, "
                f"array or image) nor a pair (input, label) with a whole number as its label: {error}"
            ) from error

    @cached_property
    def _conversion(self) -> tuple[Pixels, Layout]:
        """How inputs become tensors; the first item decides."""
        values, _ = self._item(0)
        if is_image(values):
            return decided(Pixels(), [values]), Layout()
        layout = layout_of(values[None])
        description = layout.describe(values[None])
        if description:
            inform(f"{self.name}: {description}")
        return Pixels(), layout

    def _sample(self, values: Any, index: int) -> Tensor:  # noqa: ANN401  # an image or an array
        pixels, layout = self._conversion
        if is_image(values):
            try:
                return torch.from_numpy(as_array(values, pixels))
            except Exception as error:  # Pillow reads lazily, and damaged files raise anything
                raise DataError(
                    f"{self.name}: item {index} cannot be read as an image ({one_line(error)})"
                ) from error
        misfit = layout.misfit(values)
        if misfit:
            raise DataError(
                f"{self.name}: item {index} {misfit}, unlike item 0, which decides how items are read; "
                "the Dataset must return one layout for all, such as uint8 (channels, height, width)"
            )
        return torch.from_numpy(np.array(layout.apply(values[None])[0], order="C"))


@dataclass(frozen=True)
class PixelDatasetSource(DatasetSource):
    """The same, with a mask in the place of a label: the class of each pixel."""

    shape: tuple[int, int] = (0, 0)  # height and width of the masks
    unit: str = PIXEL

    @property
    def layout(self) -> RowLayout:
        """A row for each pixel, in reading order."""
        return even_layout(self.length, self.shape[0] * self.shape[1])

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        samples, masks = super().fetch(indices)
        if tuple(samples.shape[-2:]) != self.shape:
            raise DataError(
                f"{self.name}: item {indices[0]} has an input of shape {tuple(samples.shape[1:])}, and masks "
                f"have shape {self.shape}; expected images (channels, height, width) with a class for each "
                "pixel, all of one size"
            )
        return samples, without_ignored(masks).reshape(-1)

    def _item(self, index: int) -> tuple[Any, int | npt.NDArray[np.int64]]:
        values, label = super()._item(index)
        if np.ndim(label) == 0 and int(label) == UNLABELLED:
            return values, np.full(self.shape, UNLABELLED, np.int64)
        if np.shape(label) != self.shape:
            raise DataError(
                f"{self.name}: item {index} has a label of shape {np.shape(label)}, and item 0 a mask of "
                f"shape {self.shape}; expected a mask of that shape, or None"
            )
        return values, label


def dataset_source(
    name: str,
    dataset: Any,  # noqa: ANN401  # a user's Dataset
    class_names: tuple[str, ...] = (),
) -> Source:
    """A user's map-style Dataset as a source: of samples with a label, of tokens, or of images with masks.

    Raises:
        DataError: an item cannot be read.
    """
    length = len(dataset)
    source = DatasetSource(name, dataset, length, class_names)
    try:
        first = dataset[0] if length else None
    except Exception:  # what is wrong with an item is said where it is fetched
        return source
    if isinstance(first, Mapping) and "input_ids" in first:
        return source_of_dicts(name, [dataset[index] for index in range(length)])
    try:
        mask = as_label(split_item(first)[1]) if first is not None else UNLABELLED
    except Exception:  # the same
        return source
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        height, width = mask.shape
        return PixelDatasetSource(name, dataset, length, class_names, (height, width))
    return source


def open_dataset(spec: Spec) -> Source:
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
    return dataset_source(replace(spec, split=split).public_name, dataset, class_names)
