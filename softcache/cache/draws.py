"""Encodings of large vocabularies that draw classes at random, so that the mean over draws is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.cache.array_spec import Arrays, ArraySpec, Floats, id_dtype
from softcache.cache.possible_values import flaw_of_ids
from softcache.errors import SettingsError


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


def check_sampled(temperature: float, requested_temperature: float) -> None:
    """Raise SettingsError if a sampled cache is to be used at another temperature than its own."""
    if requested_temperature != temperature:
        raise SettingsError(
            f"temperature {requested_temperature:g} of a sampled cache made at {temperature:g}: draws "
            "cannot be re-tempered; use its own, or dump another encoding"
        )
