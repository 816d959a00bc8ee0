"""Arrays of images in the layouts of other libraries, turned to (N, C, H, W) and uint8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CHANNELS = (1, 3, 4)  # numbers of channels by which an axis of channels is recognised
CHUNK = 1024  # samples composited at a time, so that memory stays bounded


@dataclass(frozen=True)
class Layout:
    """What is done to arrays (N, ...) of one data set; by default nothing.

    Attributes:
        narrow: integers of a wide type, with values of 0 to 255, become uint8.
        channels: the length of the last axis, if it holds the channels; else 0.
        grey: grey images (N, H, W) get an axis of channels.
        white: the value of white by which an alpha channel is composited; None if there is none.
    """

    narrow: bool = False
    channels: int = 0
    grey: bool = False
    white: int | float | None = None

    def apply(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Convert arrays (N, ...); the result may be a view of them."""
        if self.narrow:
            inputs = inputs.astype(np.uint8)
        if self.white is not None:
            inputs = _composited(inputs, self.white)
        if self.channels:
            inputs = np.moveaxis(inputs, -1, 1)
        return inputs[:, None] if self.grey else inputs

    def misfit(self, sample: npt.NDArray[Any]) -> str:
        """Why a sample (...) cannot be converted as the first one of its data set was; empty if it can."""
        if axes_of((1, *sample.shape), np.dtype(np.uint8) if self.narrow else sample.dtype) != (
            self.channels,
            self.grey,
        ):
            return f"is {sample.dtype} of shape {sample.shape}, which is another layout"
        if self.narrow and not (_is_wide(sample.dtype) and _is_byte(sample)):
            return f"holds {sample.dtype} with values {_range(sample)}, beyond the 0 to 255 of an image"
        if isinstance(self.white, float) and _white(sample[None]) not in (1.0, self.white):
            return f"has values {_range(sample)}, beyond an image's 0 to {self.white:g}"
        return ""

    def describe(self, inputs: npt.NDArray[Any]) -> str:
        """What is done to arrays (N, ...), in a phrase; empty if nothing is."""
        steps = []
        if self.narrow:
            steps.append(f"their {inputs.dtype} values of 0 to 255 become uint8")
        if self.channels:
            steps.append("channels are last and become the first axis")
        if self.channels == 4:
            steps.append(
                "alpha is composited on white"
                if self.white
                else "there is no alpha among the 4 channels"
            )
        if self.grey:
            steps.append("they are grey and get an axis of channels")
        shape = self.apply(inputs[:1]).shape[1:] if steps else ()
        return (
            f"samples {inputs.shape[1:]} are read as {shape}: {', '.join(steps)}" if steps else ""
        )


def layout_of(inputs: npt.NDArray[Any]) -> Layout:
    """Recognise the layout of arrays (N, ...) from their shape, dtype and values.

    Integers of 16 bits and more are narrowed only if all their values lie in 0 to 255 and samples have two
    axes or more; uint16 has a scale of its own and is left alone. Channels are last if the last axis has
    length 1, 3 or 4 and the one after N has not. Where the last axis is as long as the one before it, as in
    (N, 256, 4, 4), the arrays are feature maps and are left alone.
    """
    if inputs.dtype.kind not in "uif" or not inputs.size:
        return Layout()
    narrow = inputs.ndim >= 3 and _is_wide(inputs.dtype) and _is_byte(inputs)
    dtype = np.dtype(np.uint8) if narrow else inputs.dtype
    channels, grey = axes_of(inputs.shape, dtype)
    white: int | float | None = None
    if channels == 4:
        white = int(np.iinfo(dtype).max) if dtype.kind == "u" else _white(inputs)
    return Layout(narrow, channels, grey, white)


def axes_of(shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, bool]:
    """The number of channels in the last axis, 0 if they are elsewhere, and whether images are grey.

    Args:
        shape: (N, ...).
        dtype: the type of the values.
    """
    if len(shape) == 3:
        return 0, dtype == np.uint8
    if len(shape) != 4 or not (dtype.kind == "f" or dtype in (np.uint8, np.uint16)):
        return 0, False
    last = shape[3] in CHANNELS and shape[1] not in CHANNELS and shape[2] != shape[3]
    return (shape[3] if last else 0), False


def on_white(rgba: npt.NDArray[Any], white: int | float) -> npt.NDArray[Any]:
    """Composite RGBA on white; opaque pixels keep their values exactly.

    Args:
        rgba: (..., 4), with alpha from 0 to `white`.
        white: the value of white, an integer for arrays of integers.

    Returns:
        (..., 3) in the dtype of `rgba`.
    """
    if isinstance(white, int):
        values = rgba.astype(np.int64)
        colours, alpha = values[..., :3], values[..., 3:]
        mixed = colours * alpha + white * (white - alpha) + white // 2
        return (mixed // white).astype(rgba.dtype)
    opacity = rgba[..., 3:] / white
    composite: npt.NDArray[Any] = rgba[..., :3] * opacity + white * (1 - opacity)
    return composite.astype(rgba.dtype)


def _composited(inputs: npt.NDArray[Any], white: int | float) -> npt.NDArray[Any]:
    outputs = np.empty((*inputs.shape[:-1], 3), inputs.dtype)  # (N, H, W, 3)
    for start in range(0, len(inputs), CHUNK):
        outputs[start : start + CHUNK] = on_white(inputs[start : start + CHUNK], white)
    return outputs


def _white(inputs: npt.NDArray[Any]) -> float | None:
    """The white of float images with an alpha channel, 1 or 255; None if their values are beyond both."""
    low, high = float(inputs.min()), float(inputs.max())
    if low >= 0 and high <= 255:
        return 1.0 if high <= 1 else 255.0
    return None


def _is_wide(dtype: np.dtype[Any]) -> bool:
    """Whether a type of integers is wider than uint8 and has no scale of its own, as uint16 has."""
    return dtype.kind in "ui" and dtype.itemsize > 1 and dtype.newbyteorder("=") != np.uint16


def _is_byte(inputs: npt.NDArray[Any]) -> bool:
    return bool(inputs.min() >= 0 and inputs.max() <= 255)


def _range(sample: npt.NDArray[Any]) -> str:
    return f"from {sample.min():g} to {sample.max():g}"
