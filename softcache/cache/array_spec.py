"""Arrays of a cache: types, axes and shapes, and helpers that all encodings share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# the leading axes of an array: (views, rows) for rows, (rows,) for labels of rows, (samples,) for samples;
# none for the arrays that all rows share and for the digests that commit blocks
Axis = Literal["rows", "labels", "samples", "shared", "commits"]
DTYPES = frozenset({"<f2", "<f4", "|u1", "|i1", "<u2", "<u4", "<i4", "<i8", "<u8"})

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """An array that a cache needs: `shape` is of one row or sample, or of a whole shared array."""

    name: str
    dtype: str
    axis: Axis
    shape: tuple[int, ...]


def log_softmax(logits: Floats) -> Floats:
    """Log softmax over the last axis, (..., C)."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def id_dtype(classes: int) -> str:
    """The dtype of class ids: uint16 for up to 65,536 classes, otherwise uint32."""
    return "<u2" if classes <= 1 << 16 else "<u4"
