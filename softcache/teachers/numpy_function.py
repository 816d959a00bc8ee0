"""Functions of numpy arrays as teachers: scikit-learn, XGBoost, a remote model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class NumpyTeacher(nn.Module):
    """A function of numpy arrays as a module."""

    def __init__(self, function: Callable[[npt.NDArray[np.float32]], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *shape) float32 to what the function gives, (B, C)."""
        found = self.function(inputs.float().cpu().numpy())
        return torch.as_tensor(np.asarray(found, np.float32)).to(inputs.device)
