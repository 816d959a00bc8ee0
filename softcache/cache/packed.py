"""The encoding `packed`: as many classes of each row as fit into a number of bytes, the others by chance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from softcache.cache.array_spec import Arrays, ArraySpec, Floats
from softcache.cache.draws import Sampled, check_sampled
from softcache.cache.possible_values import flaw_of_ids
from softcache.errors import FormatError, SettingsError

MAX_BYTES = 512  # of a row; the number of kept classes then fits into its byte
KEPT_BITS = 8  # the number of kept classes
FIRST_BITS, NEXT_BITS = 12, 8  # the code of the most probable class, and of each other that is kept
# nats by which the probability of a kept class may be above that of a drawn one, and below it
ABOVE, BELOW = 16.0, 2.0

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed(Sampled):
    """n bytes per row: the most probable classes as they are, and others drawn from the rest.

    Classes are kept until none of the others would be drawn twice, and of these as many are drawn as fit into
    the bytes that are left. Each drawn class stands for the same probability tau: the mass that is not kept,
    over their number. So the expectation of every class is its probability (up to the 8 bits of a kept one),
    and the stored probabilities always sum to 1. This is threshold sampling (Duffield, Lund and Thorup,
    "Learn more, sample less", IEEE Trans. Inf. Theory 51, 2005, section II) with the systematic draw of Madow
    (Ann. Math. Stat. 20, 1949) for a fixed size. The drawn ids are sorted and stored in the code of Elias
    ("Efficient storage and retrieval by content and address of static files", J. ACM 21, 1974) and Fano:
    about log2(C / number) + 2 bits each. The result cannot be re-tempered.
    """

    name: ClassVar[str] = "packed"
    form: ClassVar[str] = "packed:BYTES"
    meaning: ClassVar[str] = (
        "BYTES per row: the most probable classes, and random draws of the others; for large vocabularies, "
        "only usable at the dump temperature"
    )
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_BYTES:
            raise SettingsError(f"packed:{self.n} bytes per row; expected 1 to {MAX_BYTES}")

    def arrays(self, classes: int) -> list[ArraySpec]:
        packing(self.n, classes)
        return [ArraySpec("packed", "|u1", "rows", (self.n,))]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        check_sampled(temperature, requested_temperature)
        packed = stored["packed"]
        ids, weights = _unpacked(packed.reshape(-1, self.n), packing(self.n, classes))
        if ids.size and int(ids.max()) >= classes:
            raise FormatError(
                f"a stored class id is {int(ids.max())}; expected 0 to {classes - 1}: the file is damaged or "
                "forged, get it again"
            )
        with np.errstate(divide="ignore"):
            log_probs = np.log(weights / weights.sum(-1, keepdims=True))
        dense = np.full((len(ids), classes + 1), -np.inf, np.float32)
        np.put_along_axis(dense, np.where(weights > 0, ids, classes), log_probs, -1)
        return dense[:, :classes].reshape(*packed.shape[:-1], classes)

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        try:
            ids, weights = _unpacked(stored["packed"].reshape(-1, self.n), packing(self.n, classes))
        except FormatError as error:
            return str(error)
        # what is no class of the row gets an id of its own
        free = np.where(weights > 0, ids, -1 - np.arange(ids.shape[-1]))
        return flaw_of_ids(free, classes, distinct=True)


@dataclass(frozen=True)
class Packing:
    """Where the bits of a row are. Arrays are indexed by k, the number of kept classes.

    A row is k (8 bits), the codes of the kept classes (12 bits, and 8 for each further one), their ids
    (id_bits each), and the ids of the drawn classes in ascending order: the lower bits of each (low_bits),
    and then a string of bits, in which number i of them sets bit i + (its id >> low_bits).
    """

    classes: int
    bytes: int
    id_bits: int
    drawn: Ints  # (K + 1,)
    low_bits: Ints  # (K + 1,)
    id_starts: Ints  # (K + 1,) the bit where the ids of kept classes start
    low_starts: Ints  # (K + 1,) ... where the lower bits of the drawn ids start
    high_starts: Ints  # (K + 1,) ... where the string of their upper bits starts
    high_bits: Ints  # (K + 1,) the length of that string

    @property
    def width(self) -> int:
        """The most classes that a row stores."""
        return int((self.drawn + np.arange(len(self.drawn))).max())


@lru_cache(maxsize=64)
def packing(size: int, classes: int) -> Packing:
    """Where the bits of a row of `size` bytes are.

    Raises:
        SettingsError: the bytes are too few for one class, or hold all classes.
    """
    id_bits = max(1, (classes - 1).bit_length())
    numbers = np.arange(1, max(2, min(classes, 8 * size + 1)))  # of drawn classes
    low_bits = np.floor(np.log2(np.maximum(classes / numbers, 1))).astype(np.int64)
    high_bits = numbers + ((classes - 1) >> low_bits)
    needed = numbers * low_bits + high_bits
    kept = np.arange(min(1 << KEPT_BITS, max(1, classes - 1)))
    id_starts = KEPT_BITS + np.where(kept > 0, FIRST_BITS + NEXT_BITS * (kept - 1), 0)
    low_starts = id_starts + kept * id_bits
    left = 8 * size - low_starts
    leaves_one = numbers + kept[:, None] < max(2, classes)
    fits = (needed <= left[:, None]) & leaves_one  # (kept, numbers)
    kept = kept[fits.any(-1)]
    if not len(kept):
        fewest = -(-(KEPT_BITS + int(needed.min())) // 8)
        raise SettingsError(
            f"packed:{size} bytes per row are too few for {classes:,} classes; expected at least {fewest}"
        )
    most = fits.shape[1] - 1 - fits[kept, ::-1].argmax(-1)
    if numbers[most[0]] >= classes - 1:
        raise SettingsError(
            f"packed:{size} bytes per row hold all {classes:,} classes; use dense or quantized, or fewer "
            "bytes"
        )
    most[-1] = 0  # one drawn class: any row fits
    drawn, low = numbers[most], low_bits[most]
    high_starts = low_starts[kept] + drawn * low
    starts = id_starts[kept], low_starts[kept], high_starts
    return Packing(classes, size, id_bits, drawn, low, *starts, high_bits[most])


def _unpacked(packed: npt.NDArray[np.uint8], places: Packing) -> tuple[Ints, Floats]:
    """Class ids (B, width) of packed rows (B, bytes), and their weights; 0 for what is no class of the row.

    Raises:
        FormatError: a row is none that can be written.
    """
    kept = packed[:, :1].astype(np.int64)  # (B, 1)
    if kept.size and int(kept.max()) >= len(places.drawn):
        raise FormatError("rows with more kept classes than fit")
    column = np.arange(places.width)[None]  # (1, width)
    drawn, low_bits = places.drawn[kept], places.low_bits[kept]
    is_kept, is_drawn = column < kept, (column >= kept) & (column < kept + drawn)
    number = np.clip(column - kept, 0, None)  # of a drawn class

    code_starts = KEPT_BITS + np.where(column > 0, FIRST_BITS + NEXT_BITS * (column - 1), 0)
    code_bits = np.where(column > 0, NEXT_BITS, FIRST_BITS)
    codes = read_bits(packed, code_starts * is_kept, code_bits) * is_kept
    first = codes[:, :1] * ((ABOVE + BELOW) / ((1 << FIRST_BITS) - 1))
    height = np.where(column > 0, codes * (first / ((1 << NEXT_BITS) - 1)), first)
    weights = np.where(is_kept, np.exp(height - BELOW), is_drawn).astype(np.float32)

    id_starts = (places.id_starts[kept] + column * places.id_bits) * is_kept
    kept_ids = read_bits(packed, id_starts, np.full_like(column, places.id_bits))
    low_starts = (places.low_starts[kept] + number * low_bits) * is_drawn
    low = read_bits(packed, low_starts, low_bits)
    string = np.arange(int(places.high_bits.max()))[None]
    inside = string < places.high_bits[kept]
    bits = read_bits(packed, (places.high_starts[kept] + string) * inside, np.ones_like(string))
    bits *= inside
    if (bits.sum(-1, keepdims=True) != drawn).any():
        raise FormatError("rows without as many drawn classes as fit")
    rank = np.where(bits > 0, kept + bits.cumsum(-1) - 1, places.width)
    high = np.zeros((len(packed), places.width + 1), np.int64)
    np.put_along_axis(high, rank, np.broadcast_to(string, rank.shape), -1)
    drawn_ids = ((high[:, :-1] - number) << low_bits) + low
    return np.where(is_kept, kept_ids, drawn_ids * is_drawn), weights


def read_bits(packed: npt.NDArray[np.uint8], starts: Ints, widths: Ints) -> Ints:
    """Numbers (B, n) of up to 24 bits each from bytes (B, bytes), the lowest bits first.

    Args:
        starts: (B, n) or (1, n), the first bit of each.
        widths: (B, n) or (1, n), their bits.
    """
    starts = np.broadcast_to(starts, (len(packed), starts.shape[1]))
    # 24 bits lie in four bytes; beyond the last byte there are zeros
    padded = np.pad(packed, ((0, 0), (0, 4)))
    word = np.zeros(starts.shape, np.int64)
    for byte in range(4):
        word |= np.take_along_axis(padded, starts // 8 + byte, -1).astype(np.int64) << (8 * byte)
    numbers: Ints = (word >> (starts % 8)) & ((1 << widths) - 1)
    return numbers
