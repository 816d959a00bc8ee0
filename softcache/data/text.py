"""Texts as tensors: a raw sample is its Unicode code points, so that any tokenizer can begin with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def encode(texts: Sequence[str], length: int) -> Tensor:
    """Texts as code points (B, length) int64; longer ones are cut, shorter ones end in zeros."""
    points = np.array(texts, f"<U{length}").reshape(-1, 1).view("<i4")  # (B, length)
    return torch.from_numpy(points.astype(np.int64))


def decode(points: Tensor) -> list[str]:
    """The texts of code points (B, length), whole numbers of any type.

    Raises:
        ValueError: these are no code points.
    """
    if points.ndim != 2 or points.dtype.is_floating_point:
        raise ValueError(
            f"inputs {tuple(points.shape)} of {points.dtype} are no texts; expected code points "
            "(samples, length), as hfds: gives them of a column of texts"
        )
    rows = points.cpu().numpy()
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) > 0x10FFFF):
        raise ValueError(f"{int(rows.max())} is no Unicode code point; these inputs are no texts")
    width = rows.shape[1]
    return [str(text) for text in np.ascontiguousarray(rows, "<i4").view(f"<U{width}")[:, 0]]
