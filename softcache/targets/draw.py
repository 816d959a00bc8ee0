"""Draw classes of rows at random."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 4096  # classes, from which on a draw looks for a block of classes first
BLOCK = 256  # classes of a block


def systematic(probs: Tensor, points: Tensor) -> Tensor:
    """The class at each point of the cumulative distribution, (B, n) int64.

    The sum over all classes is not cumulated where there are many: a point is looked for among the sums of
    blocks, and then within its block, which is exact to float32 and takes a fraction of the time.

    Args:
        probs: (B, C) float32, not negative; they need not sum to 1.
        points: (B, n) float64, shares of the sum, from 0 to below 1.
    """
    classes = probs.shape[1]
    if classes <= WIDE:
        return _within(probs.double(), points)
    padded = torch.nn.functional.pad(probs, (0, -classes % BLOCK))
    blocks = padded.view(len(probs), -1, BLOCK)  # (B, blocks, BLOCK)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    targets = points * cumulative[:, -1:]
    targets = torch.minimum(targets, cumulative[:, -1:] * (1 - 2**-50))
    block = torch.searchsorted(cumulative, targets, right=True).clamp(max=sums.shape[1] - 1)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    chosen = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).double()  # (B, n, BLOCK)
    share = ((targets - before) / sums.gather(1, block)).clamp(0, 1)
    inner = _within(chosen.flatten(0, 1), share.reshape(-1, 1)).view(block.shape)
    return (block * BLOCK + inner).clamp(max=classes - 1)


def _within(probs: Tensor, points: Tensor) -> Tensor:
    """The same by the whole cumulative sum, (B, C) float64."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # the last point must not round up to the total: only classes of probability 0 lie beyond it
    targets = torch.minimum(points * total, total * (1 - 2**-50))
    found = torch.searchsorted(cumulative, targets, right=True)
    return found.clamp(max=probs.shape[1] - 1)
