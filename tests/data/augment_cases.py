"""Helpers shared by the tests of augmentation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def images_of(samples: int, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    """Images in which no two pixels are equal and none is zero."""
    count = samples * channels * height * width
    return torch.arange(1.0, count + 1).reshape(samples, channels, height, width)


def pixels_of(samples: int, channels: int = 3, height: int = 5, width: int = 7) -> Tensor:
    """Images with random values in [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(samples, channels, height, width, generator=generator)
