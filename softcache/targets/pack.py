"""The encoding `packed` in torch: choose the classes of a row, and write and read its bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softcache.cache.packed import ABOVE, BELOW, FIRST_BITS, KEPT_BITS, NEXT_BITS, Packing
from softcache.errors import FormatError
from softcache.targets.draw import BLOCK, WIDE, in_blocks, largest, systematic, systematic_in_blocks

# relative: a class whose probability is this close to the distance of the draws is kept, or it might be drawn
# twice
MARGIN = 1e-4


@dataclass(frozen=True)
class Choice:
    """The classes that are stored of some rows."""

    ids: Tensor  # (B, width) int64: the kept ones by falling probability, then the drawn ones, ascending
    heights: Tensor  # (B, width) float32, log(p / tau) of the kept ones, which is above -BELOW
    kept: Tensor  # (B, 1) int64, how many are kept


def choose(log_probs: Tensor, draws: Tensor, places: Packing) -> Choice:
    """Choose the classes of rows, as cache.packed.Packed describes.

    Args:
        log_probs: (B, C) float32.
        draws: (B, 1) float64, uniform in [0, 1).
    """
    width, device = places.width, log_probs.device
    head, order = largest(log_probs, width)  # (B, width), largest first
    head_probs = head.exp().double()
    others = in_blocks(log_probs.exp(), 0)
    flat = others.view(len(log_probs), -1)
    flat.scatter_(1, order, 0)
    sums = others.sum(-1).double()  # (B, N), of each block
    # the mass that is left after the first k classes: a sum of small numbers, not a difference of large ones
    rest = sums.sum(-1, keepdim=True)
    left = rest + head_probs.flip(-1).cumsum(-1).flip(-1)  # (B, width), for k = 0 to width - 1
    drawn_by_kept = torch.from_numpy(places.drawn).to(device)  # (K + 1,)
    possible = len(drawn_by_kept)
    # the first k for which the next class is not certain to be drawn
    fits = head_probs[:, :possible] * drawn_by_kept <= left[:, :possible] * (1 - MARGIN)
    fits[:, -1] = True
    kept = fits.int().argmax(-1, keepdim=True)  # (B, 1)
    drawn = drawn_by_kept[kept]
    left = left.gather(1, kept)  # (B, 1)
    tau = left / drawn
    # next to nothing may be left
    tau = torch.maximum(tau, head_probs[:, :1] * math.exp(-ABOVE))
    column = torch.arange(width, device=device)[None]
    is_kept, is_drawn = column < kept, (column >= kept) & (column < kept + drawn)
    back = head.exp() * ~is_kept
    flat.scatter_(1, order, back)
    sums.scatter_add_(1, order // BLOCK, back.double())
    points = (draws + (column - kept).clamp(min=0)).clamp(max=drawn - 1 + draws) / drawn
    # where no other class has any probability, the next in order stand for next to nothing
    found = (
        systematic(flat, points)
        if flat.shape[1] <= WIDE
        else systematic_in_blocks(others, sums, points)
    )
    found = torch.where(left > 0, found, order)
    ascending = torch.where(is_drawn, found, places.classes).sort(-1).values
    # sorting moves the drawn ones to the front
    ascending = ascending.gather(1, (column - kept).clamp(min=0))
    heights = (head_probs / tau).clamp(min=math.exp(-BELOW)).log().float()
    return Choice(torch.where(is_kept, order, ascending * is_drawn), heights * is_kept, kept)


def encode_packed(log_probs: Tensor, draws: Tensor, places: Packing) -> dict[str, Tensor]:
    """The array of `packed` for rows (B, C)."""
    choice = choose(log_probs, draws, places)
    kept, ids = choice.kept, choice.ids
    on = _Places.of(places, kept)
    heights = choice.heights + BELOW
    step, most = (ABOVE + BELOW) / ((1 << FIRST_BITS) - 1), (1 << NEXT_BITS) - 1
    first = (heights[:, :1] / step).round().long()  # (B, 1)
    codes = (heights / (first.clamp(min=1) * step) * most).round().clamp(0, most).long()
    codes = torch.cat([first, codes[:, 1:]], -1) * on.is_kept
    high = (ids >> on.low_bits) + on.number
    rows = torch.zeros((len(ids), places.bytes + 4), dtype=torch.int64, device=ids.device)
    _add_bits(rows, kept, torch.zeros_like(kept))
    _add_bits(rows, codes, on.code_starts)
    _add_bits(rows, ids * on.is_kept, on.id_starts)
    _add_bits(rows, (ids & ((1 << on.low_bits) - 1)) * on.is_drawn, on.low_starts)
    _add_bits(rows, on.is_drawn.long(), (on.high_start + high) * on.is_drawn)
    return {"packed": rows[:, : places.bytes].to(torch.uint8)}


def decode_packed(packed: Tensor, places: Packing) -> tuple[Tensor, Tensor]:
    """The ids (B, width) int64 and their log-probabilities float32; -inf for what is no class of the row.

    Raises:
        FormatError: a row is none that can be written.
    """
    kept = packed[:, :1].long()
    if kept.numel() and int(kept.max()) >= len(places.drawn):
        raise _damaged("more kept classes than fit")
    on = _Places.of(places, kept)
    codes = _read_bits(packed, on.code_starts, on.code_bits) * on.is_kept
    first = codes[:, :1] * ((ABOVE + BELOW) / ((1 << FIRST_BITS) - 1))
    heights = torch.cat([first, codes[:, 1:] * (first / ((1 << NEXT_BITS) - 1))], -1)
    kept_ids = _read_bits(packed, on.id_starts, torch.full_like(on.number[:1], places.id_bits))
    low = _read_bits(packed, on.low_starts, on.low_bits)
    string = torch.arange(int(places.high_bits.max()), device=packed.device)[None]
    inside = string < torch.from_numpy(places.high_bits).to(packed.device)[kept]
    bits = _read_bits(packed, (on.high_start + string) * inside, torch.ones_like(string)) * inside
    if (bits.sum(-1, keepdim=True) != on.drawn).any():
        raise _damaged("not as many drawn classes as fit")
    rank = torch.where(bits > 0, kept + bits.cumsum(-1) - 1, places.width)
    high = torch.zeros((len(packed), places.width + 1), dtype=torch.int64, device=packed.device)
    high = high.scatter(1, rank, string.expand_as(rank))[:, :-1]
    drawn_ids = (((high - on.number) << on.low_bits) + low) * on.is_drawn
    ids = torch.where(on.is_kept, kept_ids, drawn_ids)
    stored = on.is_kept | on.is_drawn
    log_weights = (heights - BELOW) * on.is_kept
    return ids, torch.log_softmax(log_weights.masked_fill(~stored, -math.inf), -1)


@dataclass(frozen=True)
class _Places:
    """Where the bits of some rows are, (B, width) each; 0 where a row has no such class."""

    is_kept: Tensor  # bool
    is_drawn: Tensor  # bool
    drawn: Tensor  # (B, 1), how many are drawn
    number: Tensor  # of a drawn class, from 0
    code_starts: Tensor
    code_bits: Tensor  # (1, width)
    id_starts: Tensor
    low_bits: Tensor  # (B, 1)
    low_starts: Tensor
    high_start: Tensor  # (B, 1)

    @staticmethod
    def of(places: Packing, kept: Tensor) -> _Places:
        """Those of rows of which `kept` (B, 1) classes are kept."""

        def of_row(values: object) -> Tensor:
            return torch.as_tensor(values, device=kept.device)[kept]  # (B, 1)

        column = torch.arange(places.width, device=kept.device)[None]  # (1, width)
        drawn, low_bits = of_row(places.drawn), of_row(places.low_bits)
        is_kept, is_drawn = column < kept, (column >= kept) & (column < kept + drawn)
        number = (column - kept).clamp(min=0)
        later = KEPT_BITS + FIRST_BITS + NEXT_BITS * (column - 1)
        return _Places(
            is_kept=is_kept,
            is_drawn=is_drawn,
            drawn=drawn,
            number=number,
            code_starts=torch.where(column > 0, later, KEPT_BITS) * is_kept,
            code_bits=torch.where(column > 0, NEXT_BITS, FIRST_BITS),
            id_starts=(of_row(places.id_starts) + column * places.id_bits) * is_kept,
            low_bits=low_bits,
            low_starts=(of_row(places.low_starts) + number * low_bits) * is_drawn,
            high_start=of_row(places.high_starts),
        )


def _add_bits(rows: Tensor, numbers: Tensor, starts: Tensor) -> None:
    """Add numbers (B, n) of up to 24 bits to bytes (B, bytes) int64, each from its first bit on."""
    shifted = numbers << (starts % 8)
    for byte in range(4):
        # bits of different numbers never overlap, so adding them is or-ing them
        rows.scatter_add_(1, starts // 8 + byte, (shifted >> (8 * byte)) & 255)


def _read_bits(packed: Tensor, starts: Tensor, widths: Tensor) -> Tensor:
    """Numbers (B, n) int64; see cache.packed.read_bits()."""
    padded = torch.nn.functional.pad(packed, (0, 4))
    word = torch.zeros_like(starts)
    for byte in range(4):
        word |= padded.gather(1, starts // 8 + byte).long() << (8 * byte)
    return (word >> (starts % 8)) & ((1 << widths) - 1)


def _damaged(what: str) -> FormatError:
    return FormatError(
        f"the cache stores a row with {what}: the file is damaged or forged, get it again"
    )
