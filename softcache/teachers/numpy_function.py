"""Functions of numpy arrays as teachers: scikit-learn, XGBoost, a model behind an API."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class NumpyTeacher(nn.Module):
    """Wraps a function of numpy arrays as a module.

    Args:
        function: from inputs (B, *shape) float32 to outputs (B, C).
    """

    def __init__(self, function: Callable[[npt.NDArray[np.float32]], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (B, *shape) to the function's outputs (B, C) float32, on the same device."""
        outputs = self.function(inputs.float().cpu().numpy())
        return torch.as_tensor(np.asarray(outputs, np.float32)).to(inputs.device)
