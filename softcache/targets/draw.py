"""The largest classes of rows, and classes drawn at random, where there may be very many of them.

Both look for blocks of classes first, so that a row is read once and not sorted or cumulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 4096  # classes, from which on a draw looks for a block of classes first
BLOCK = 256  # classes of a block


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their classes, (B, k) each, as torch.topk() gives them.

    Each of them lies in one of the k blocks with the largest maxima.

    Args:
        values: (B, C).
    """
    classes = values.shape[1]
    if classes <= WIDE or k * BLOCK > classes // 2:
        top = values.topk(k)
        return top.values, top.indices
    blocks = in_blocks(values, -torch.inf)
    chosen = blocks.amax(-1).topk(k).indices  # (B, k)
    near = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)  # (B, k · BLOCK)
    top = near.topk(k)
    return top.values, chosen.gather(1, top.indices // BLOCK) * BLOCK + top.indices % BLOCK


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
    blocks = in_blocks(probs, 0)
    return systematic_in_blocks(blocks, blocks.sum(-1).double(), points).clamp(max=classes - 1)


def systematic_in_blocks(blocks: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    """The same, (B, n), of probabilities in blocks.

    Args:
        blocks: (B, N, BLOCK).
        sums: (B, N) float64, of each block.
    """
    cumulative = sums.cumsum(-1)
    targets = points * cumulative[:, -1:]
    targets = torch.minimum(targets, cumulative[:, -1:] * (1 - 2**-50))
    block = torch.searchsorted(cumulative, targets, right=True).clamp(max=sums.shape[1] - 1)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    chosen = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).double()  # (B, n, BLOCK)
    share = ((targets - before) / sums.gather(1, block)).clamp(0, 1)
    inner = _within(chosen.flatten(0, 1), share.reshape(-1, 1)).view(block.shape)
    return block * BLOCK + inner


def in_blocks(values: Tensor, filling: float) -> Tensor:
    """Rows (B, C) as blocks (B, N, BLOCK), of which the last may be filled up; a view where it need not."""
    missing = -values.shape[1] % BLOCK
    padded = torch.nn.functional.pad(values, (0, missing), value=filling) if missing else values
    return padded.view(len(values), -1, BLOCK)


def _within(probs: Tensor, points: Tensor) -> Tensor:
    """The same by the whole cumulative sum, (B, C) float64."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # the last point must not round up to the total: only classes of probability 0 lie beyond it
    targets = torch.minimum(points * total, total * (1 - 2**-50))
    found = torch.searchsorted(cumulative, targets, right=True)
    return found.clamp(max=probs.shape[1] - 1)
