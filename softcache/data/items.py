"""Items of a user's Dataset: an input with or without a label, in any of the usual containers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data.source import UNLABELLED
from softcache.errors import DataError

INPUT_KEYS = (
    "image", "img", "images", "pixel_values", "input", "inputs", "x", "data", "features", "text",
)  # fmt: skip
LABEL_KEYS = ("label", "labels", "target", "y", "fine_label")


def split_item(item: object) -> tuple[object, object]:
    """Split an item into its input and its label; the label is None if there is none.

    An item is an input, a tuple of two, a dict with one of INPUT_KEYS and at most one of LABEL_KEYS, or a
    list of two whose parts differ in shape: a list of equal parts is an input.

    Raises:
        DataError: a dict has several inputs or labels.
        TypeError: a dict has no input.
    """
    if isinstance(item, Mapping):
        inputs = [key for key in INPUT_KEYS if key in item]
        labels = [key for key in LABEL_KEYS if key in item]
        for what, keys in (("inputs", inputs), ("labels", labels)):
            if len(keys) > 1:
                raise DataError(
                    f"has {what} under {', '.join(keys)}; expected one of them: return a pair "
                    "(input, label) instead"
                )
        if not inputs:
            raise TypeError(
                f"it has {', '.join(map(str, item)) or 'no keys'}; expected its input under one of "
                f"{', '.join(INPUT_KEYS)}"
            )
        return item[inputs[0]], item[labels[0]] if labels else None
    if isinstance(item, tuple) and len(item) == 2:
        return item
    if isinstance(item, list) and len(item) == 2 and _shape(item[0]) != _shape(item[1]):
        return item[0], item[1]
    return item, None


def is_image(sample: object) -> bool:
    """Whether an input is a PIL image."""
    return hasattr(sample, "getbands")


def as_values(sample: object) -> npt.NDArray[Any]:
    """The values of an input that is not a PIL image.

    Raises:
        TypeError: numpy or torch has no such type.
    """
    if isinstance(sample, Tensor):
        if sample.dtype == torch.bfloat16:
            raise TypeError("numpy has no bfloat16; return float32")
        return sample.detach().cpu().numpy()
    array = np.asarray(sample)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    torch.from_numpy(np.empty(0, array.dtype))  # raises TypeError if torch lacks the type
    return array


def as_label(label: object) -> int | npt.NDArray[np.int64]:
    """The number of a class; UNLABELLED for None and NaN; (C,) a 0 or 1 for each class; (H, W) for a mask.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not a whole number of a class.
        OverflowError: it is infinite.
    """
    if isinstance(label, Tensor | np.ndarray) and math.prod(label.shape) == 1:
        label = label.item()
    if is_image(label):
        label = np.asarray(label)
    if isinstance(label, Tensor | np.ndarray) and label.ndim in (2, 3):
        mask = np.asarray(label)
        mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
        if mask.ndim == 2 and min(mask.shape) > 1:
            if mask.dtype.kind not in "uib":
                raise ValueError(f"its mask is {mask.dtype}; expected whole numbers of classes")
            return mask.astype(np.int64)
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 1 and len(label) > 1:
        applies: npt.NDArray[Any] = np.nan_to_num(np.asarray(label), nan=UNLABELLED)
        if ((applies == 0) | (applies == 1)).all() or (applies == UNLABELLED).all():
            return np.asarray(applies, np.int64)
    if label is None or (isinstance(label, float | np.floating) and math.isnan(label)):
        return UNLABELLED
    number = int(label)  # type: ignore[call-overload]  # anything that int() accepts
    if number != label or abs(number) >= 1 << 62:
        raise ValueError(f"label {label} is not a class number")
    return int(number)


def _shape(part: object) -> tuple[int, ...] | None:
    """The shape of a part of an item; None if it has no shape."""
    shape = getattr(part, "shape", None)
    if shape is not None:
        return tuple(shape)
    if is_image(part):
        return tuple(getattr(part, "size", ()))
    if isinstance(part, list | tuple):
        try:
            return np.shape(part)
        except ValueError:  # rows of different lengths
            return None
    return ()
