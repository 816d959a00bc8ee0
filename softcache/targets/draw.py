"""Draw classes of rows at random, and pack their ids: the encodings `sampled` and `distinct` in torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache.draws import LEVELS, id_bits, packed_bytes

WIDE = 4096  # classes, from which on a draw looks for a block of classes first
BLOCK = 256  # classes of a block
# relative: a class whose probability is this close to the distance of the draws is kept, or it might be drawn
# twice
MARGIN = 1e-4

Draws = npt.NDArray[np.float64]


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


def draw_distinct(log_probs: Tensor, draws: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose n different classes of each row, as cache.draws.Distinct describes.

    Args:
        log_probs: (B, C) float32.
        draws: (B, 1) float64, uniform in [0, 1).

    Returns:
        The ids (B, n) int64, the kept ones first, by falling probability; how many are kept (B,); and tau,
        the probability that each of the others stands for, (B,) float32.
    """
    head, order = log_probs.topk(n, dim=-1)  # (B, n), largest first
    probs = log_probs.exp()
    head_probs = head.exp().double()
    # the mass that is left after the first h classes: a sum of small numbers, not a difference of large ones
    rest = probs.scatter(1, order, 0).double().sum(-1, keepdim=True)
    left = rest + head_probs.flip(-1).cumsum(-1).flip(-1)  # (B, n), for h = 0 to n - 1
    slots = n - torch.arange(n, device=log_probs.device)
    # the first h for which the next class is not certain to be drawn
    fits = head_probs * slots <= left * (1 - MARGIN)
    fits[:, -1] = True
    kept = fits.int().argmax(-1)  # (B,)
    tau = left.gather(1, kept[:, None]) / (n - kept)[:, None]  # (B, 1)
    place = (
        torch.arange(n, device=log_probs.device) - kept[:, None]
    )  # (B, n), from 0 for a drawn class
    points = (draws + place.clamp(min=0)) / (n - kept)[:, None]
    is_kept = place < 0
    certain = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, is_kept)
    others = probs.masked_fill(certain, 0)
    # where too few classes have any probability, the next in order stand for next to nothing
    too_few = (others > 0).sum(-1, keepdim=True) < n - kept[:, None]
    drawn = systematic(others, points)
    return torch.where(is_kept | too_few, order, drawn), kept, tau[:, 0].float()


def encode_distinct(log_probs: Tensor, draws: Tensor, n: int) -> dict[str, Tensor]:
    """The arrays of `distinct` for rows (B, C)."""
    ids, kept, tau = draw_distinct(log_probs, draws, n)
    is_kept = torch.arange(n, device=ids.device) < kept[:, None]
    depth = -log_probs.gather(1, ids).clamp(max=0)  # (B, n)
    span = depth.masked_fill(~is_kept, 0).amax(-1, keepdim=True)
    ranges = torch.cat([_above(span), _nearest(-tau.clamp(min=1e-38).log()[:, None])], -1)
    codes = (depth / ranges[:, :1].float() * LEVELS).round().clamp(0, LEVELS) + 1
    return {
        "packed": pack(ids, log_probs.shape[1]),
        "codes": torch.where(is_kept, codes, 0).to(torch.uint8),
        "ranges": ranges,
    }


def decode_distinct(
    packed: Tensor, codes: Tensor, ranges: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """The ids (B, n) int64 and their log-probabilities (B, n) float32, which sum to 1."""
    ids = unpack(packed, codes.shape[1], classes)
    levels, ranges = codes.float(), ranges.float()
    log_probs = torch.where(codes > 0, (1 - levels) / LEVELS * ranges[:, :1], -ranges[:, 1:])
    return ids, torch.log_softmax(log_probs, -1)


def pack(ids: Tensor, classes: int) -> Tensor:
    """Ids (B, n) as bits, (B, bytes) uint8; see cache.draws.unpacked()."""
    bits, count = id_bits(classes), packed_bytes(ids.shape[1], classes)
    packed = torch.zeros((len(ids), count + 4), dtype=torch.int64, device=ids.device)
    starts = torch.arange(ids.shape[1], device=ids.device) * bits
    shifted = ids << (starts % 8)
    for byte in range(4):
        # bits of different ids never overlap, so adding them is or-ing them
        place = (starts // 8 + byte).expand(len(ids), -1)
        packed.scatter_add_(1, place, (shifted >> (8 * byte)) & 255)
    return packed[:, :count].to(torch.uint8)


def unpack(packed: Tensor, n: int, classes: int) -> Tensor:
    """Ids (B, n) int64 from their bits."""
    bits = id_bits(classes)
    starts = torch.arange(n, device=packed.device) * bits
    padded = torch.nn.functional.pad(packed, (0, 4)).long()
    word = padded[:, starts // 8]
    for byte in range(1, 4):
        word = word | padded[:, starts // 8 + byte] << (8 * byte)
    return (word >> (starts % 8)) & ((1 << bits) - 1)


def _above(values: Tensor) -> Tensor:
    """float16, rounded up and above 0, so that a range reaches the largest value."""
    half = values.clamp(min=1e-3).half()
    up = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < values, up, half)


def _nearest(values: Tensor) -> Tensor:
    """float16 above 0."""
    return values.clamp(min=1e-4, max=math.log(1e38)).half()
