"""What stored values can be: checks that the encodings share, at about the speed of reading them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

SUM_TOLERANCE = (
    0.02  # of the sum of a row's probabilities, each rounded to float16 as its logarithm
)


@cache
def half_probabilities() -> npt.NDArray[np.float32]:
    """exp of every float16 by its bits, (65536,): one lookup is faster than converting and exponentiating.

    NaN for what is no log-probability: NaN, infinities, and numbers above 0 by more than rounding.
    """
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.isfinite(values) & (values <= SUM_TOLERANCE), np.exp(values), np.nan)


def are_steps(values: npt.NDArray[Any]) -> bool:
    """Whether all values are finite and above 0."""
    return bool((np.isfinite(values) & (values > 0)).all())


def flaw_of_ids(ids: npt.NDArray[Any], classes: int, *, distinct: bool) -> str | None:
    """What is wrong with class ids (..., k); None if all are classes, and distinct within a row if asked."""
    if ids.size and int(ids.max()) >= classes:
        return "class ids beyond the last class"
    if not distinct:
        return None
    ordered = np.sort(ids, -1)
    return "class ids twice in a row" if (ordered[..., 1:] == ordered[..., :-1]).any() else None
