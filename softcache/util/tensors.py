"""Small helpers on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(inputs: Tensor) -> Tensor:
    """Unsigned integer images as float32 in [0, 1], the largest value of their type being 1.

    Floats become float32; other integers (ids of tokens, say) stay as they are.
    """
    if inputs.dtype in (torch.uint8, torch.uint16):
        return inputs.float() / torch.iinfo(inputs.dtype).max
    return inputs.float() if inputs.dtype.is_floating_point else inputs
