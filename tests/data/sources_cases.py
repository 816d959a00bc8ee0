"""Helpers shared by the tests of data sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from softcache.data.open import open_source


def fetch(spec: str, indices: Sequence[int] = (0,)) -> tuple[Tensor, npt.NDArray[np.int64]]:
    return open_source(spec).fetch(indices)
