"""Texts as tensors: a raw sample is its Unicode code points, so any tokenizer can be applied to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def encode(texts: Sequence[str], length: int) -> Tensor:
    """Encode texts as code points (B, length) int64; longer ones are cut, shorter ones padded with 0."""
    points = np.array(texts, f"<U{length}").reshape(-1, 1).view("<i4")  # (B, length)
    return torch.from_numpy(points.astype(np.int64))


def decode(points: Tensor) -> list[str]:
    """Decode code points (B, length), integers of any dtype, into texts.

    Raises:
        ValueError: the values are not code points.
    """
    if points.ndim != 2 or points.dtype.is_floating_point:
        raise ValueError(
            f"inputs {tuple(points.shape)} of {points.dtype} are not texts; expected code points "
            "(samples, length), as hfds: returns for a text column"
        )
    rows = points.cpu().numpy()
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) > 0x10FFFF):
        value = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise ValueError(f"{value} is not a Unicode code point; these inputs are not texts")
    width = rows.shape[1]
    return [str(text) for text in np.ascontiguousarray(rows, "<i4").view(f"<U{width}")[:, 0]]


def text_lengths(points: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The number of characters of each text, (B,), in code points (B, length) padded with 0."""
    ends = (points != 0) * np.arange(1, points.shape[1] + 1)  # (B, length)
    return np.asarray(ends.max(1, initial=0), np.int64)
