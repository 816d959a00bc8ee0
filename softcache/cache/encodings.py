"""What each encoding stores of a row of log-probabilities, and its decode in plain numpy.

Stored are log-probabilities at the dump temperature T. Any other temperature follows exactly:
log p' = log_softmax(log p · T / T'), since log p differs from z / T by a constant of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from softcache.errors import FormatError, SettingsError

# what the leading axes of an array count: (views, samples, *positions); (samples,); or nothing, as
# in arrays that all rows share and in the digests that commit blocks of rows
Axis = Literal["rows", "samples", "shared", "commits"]
DTYPES = frozenset({"<f2", "<f4", "|u1", "|i1", "<u2", "<u4", "<i8", "<u8"})
FLOAT16_LOWEST = -65504.0  # log p below it is stored as it: exp of both is 0, and no inf - inf

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """An array an encoding needs: `shape` is that of one row, or the whole of a shared one."""

    name: str
    dtype: str
    axis: Axis
    shape: tuple[int, ...]


class Encoding(Protocol):
    """How rows of C log-probabilities are stored."""

    name: ClassVar[str]

    def arrays(self, classes: int) -> list[ArraySpec]:
        """What is stored of a row of `classes` log-probabilities."""

    def decode(self, stored: Arrays, temperature: float, wanted: float) -> Floats:
        """Log-probabilities at temperature `wanted` of rows stored at `temperature`, (B, C)."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Dense:
    """float16 log-probabilities: 2C bytes a row, re-tempered exactly, KL at most 1e-5."""

    name: ClassVar[str] = "dense"

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [ArraySpec("log_probs", "<f2", "rows", (classes,))]

    def decode(self, stored: Arrays, temperature: float, wanted: float) -> Floats:
        return log_softmax(stored["log_probs"].astype(np.float32) * (temperature / wanted))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


def log_softmax(logits: Floats) -> Floats:
    """log softmax over the last axis, (..., C), in float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def parse_encoding(spec: str) -> Encoding:
    """The encoding that a specification on the command line names.

    Raises:
        SettingsError: there is no such encoding.
    """
    if spec == "dense":
        return Dense()
    raise SettingsError(f"encoding {spec!r} is unknown; expected dense")


def encoding_from_json(fields: object) -> Encoding:
    """The encoding that a header describes.

    Raises:
        FormatError: the description is not one of an encoding that this reader knows.
    """
    if fields == {"name": "dense"}:
        return Dense()
    raise FormatError(f"encoding is {ascii(fields)[:80]}; this softcache knows dense")
