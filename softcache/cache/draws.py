"""Encodings of large vocabularies that draw classes at random, so that the mean over draws is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from softcache.cache.array_spec import Arrays, ArraySpec, Floats, id_dtype
from softcache.cache.possible_values import are_steps, flaw_of_ids
from softcache.errors import FormatError, SettingsError

LEVELS = 254  # steps of a probability's logarithm in `distinct`; 0 stands for a drawn class
MAX_DISTINCT = 4096


@dataclass(frozen=True)
class Sampled:
    """n draws with replacement from the row's distribution: n · (2 or 4) bytes per row.

    Unbiased at T: the expectation of count / n is p (Anshumann et al., "Sparse Logit Sampling", ACL
    2025). The sampling is systematic: draw i is taken at (u + i) / n of the cumulative
    distribution, with one random u per row, so that each count is within 1 of n p. The result
    cannot be re-tempered.
    """

    name: ClassVar[str] = "sampled"
    form: ClassVar[str] = "sampled:N"
    meaning: ClassVar[str] = (
        "N draws per row, for large vocabularies; only usable at the dump temperature"
    )
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 1 << 16:
            raise SettingsError(f"sampled:{self.n} draws; expected 1 to 65536")

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [ArraySpec("ids", id_dtype(classes), "rows", (self.n,))]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        check_sampled(temperature, requested_temperature)
        ids = stored["ids"].astype(np.int64)
        rows = ids.reshape(-1, self.n)
        counts = np.stack([np.bincount(row, minlength=classes) for row in rows])
        with np.errstate(divide="ignore"):
            log_probs = np.log(counts / self.n).astype(np.float32)
        return log_probs.reshape(*ids.shape[:-1], classes)

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        return flaw_of_ids(stored["ids"], classes, distinct=False)


@dataclass(frozen=True)
class Distinct(Sampled):
    """n different classes: the most probable as they are, the others drawn from the rest.

    Class c is among the n with probability pi_c = min(1, p_c / tau), where tau is such that these sum to n.
    Those with pi_c = 1 keep their probability; each of the others stands for tau. So the expectation of every
    class is p_c, and the stored probabilities always sum to 1. This is threshold sampling (Duffield, Lund and
    Thorup, "Learn more, sample less", IEEE Trans. Inf. Theory 51, 2005, section II) with the systematic draw
    of Madow (Ann. Math. Stat. 20, 1949) for a fixed size. The result cannot be re-tempered.

    n · (bits of an id / 8 + 1) + 4 bytes per row: ids of as many bits as the last one has, a code for each
    class that keeps its probability, their range, and tau.
    """

    name: ClassVar[str] = "distinct"
    form: ClassVar[str] = "distinct:N"
    meaning: ClassVar[str] = (
        "N different classes per row, the most probable and others drawn; for large vocabularies, only "
        "usable at the dump temperature"
    )
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_DISTINCT:
            raise SettingsError(f"distinct:{self.n} classes; expected 1 to {MAX_DISTINCT}")

    def arrays(self, classes: int) -> list[ArraySpec]:
        if self.n >= classes:
            raise SettingsError(
                f"distinct:{self.n} of {classes} classes leaves none out; use dense"
            )
        return [
            ArraySpec("packed", "|u1", "rows", (packed_bytes(self.n, classes),)),
            ArraySpec("codes", "|u1", "rows", (self.n,)),
            ArraySpec("ranges", "<f2", "rows", (2,)),
        ]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        check_sampled(temperature, requested_temperature)
        ids = unpacked(stored["packed"], self.n, classes)
        if ids.size and int(ids.max()) >= classes:
            raise FormatError(
                f"a stored class id is {int(ids.max())}; expected 0 to {classes - 1}: the file is damaged or "
                "forged, get it again"
            )
        codes, ranges = stored["codes"].astype(np.float32), stored["ranges"].astype(np.float32)
        kept = (1 - codes) / LEVELS * ranges[..., :1]
        log_probs = np.where(codes > 0, kept, -ranges[..., 1:])
        log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
        dense = np.full((*ids.shape[:-1], classes), -np.inf, np.float32)
        np.put_along_axis(dense, ids, log_probs, -1)
        return dense

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        if not are_steps(stored["ranges"]):
            return "ranges that are not finite and positive"
        if not (stored["codes"] == 0).any(-1).all():
            return "rows without a drawn class"
        return flaw_of_ids(unpacked(stored["packed"], self.n, classes), classes, distinct=True)


def id_bits(classes: int) -> int:
    """The bits of the last class id."""
    return max(1, (classes - 1).bit_length())


def packed_bytes(n: int, classes: int) -> int:
    """The bytes of n packed ids."""
    return math.ceil(n * id_bits(classes) / 8)


def unpacked(packed: npt.NDArray[np.uint8], n: int, classes: int) -> npt.NDArray[np.int64]:
    """Class ids (..., n) from their bits, the lowest first: id j takes bits j · b to (j + 1) · b - 1.

    Args:
        packed: (..., bytes).
    """
    bits = id_bits(classes)
    starts = np.arange(n) * bits
    # an id of up to 24 bits lies in four bytes; beyond the last byte there are zeros
    padded = np.concatenate([packed, np.zeros((*packed.shape[:-1], 4), np.uint8)], -1)
    parts = [padded[..., starts // 8 + byte].astype(np.int64) << (8 * byte) for byte in range(4)]
    word: npt.NDArray[np.int64] = sum(parts[1:], parts[0])
    ids: npt.NDArray[np.int64] = (word >> (starts % 8)) & ((1 << bits) - 1)
    return ids


def check_sampled(temperature: float, requested_temperature: float) -> None:
    """Raise SettingsError if a sampled cache is to be used at another temperature than its own."""
    if requested_temperature != temperature:
        raise SettingsError(
            f"temperature {requested_temperature:g} of a sampled cache made at {temperature:g}: draws "
            "cannot be re-tempered; use its own, or dump another encoding"
        )
