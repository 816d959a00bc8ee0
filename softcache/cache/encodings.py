"""What each encoding stores of a row of log-probabilities, and its decode in plain numpy.

Stored are log-probabilities at the dump temperature T. Any other temperature follows exactly:
log p' = log_softmax(log p · T / T'), since log p differs from z / T by a constant of the row.
The decodes here are the reference; softcache/targets/ has the same in torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
QUANTIZED_RANGE = 256.0  # how far below the row's largest `quantized` reaches
BASIS_RANGE = 100.0  # the same for `basis`, where one class far down blurs the whole row
MAX_TEMPERATURE = 1e6
TAIL_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)

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
    """How rows of C log-probabilities are stored: a frozen dataclass of its parameters."""

    name: ClassVar[str]
    form: ClassVar[str]  # how a specification is written
    meaning: ClassVar[str]  # what is stored, in a phrase
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def arrays(self, classes: int) -> list[ArraySpec]:
        """What is stored of a row of `classes` log-probabilities.

        Raises:
            SettingsError: the parameters do not fit so many classes.
        """

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        """Log-probabilities at temperature `wanted` of rows stored at `temperature`, (B, C)."""


@dataclass(frozen=True)
class Dense:
    """float16 log-probabilities: 2C bytes a row, re-tempered exactly, KL at most 1e-5."""

    name: ClassVar[str] = "dense"
    form: ClassVar[str] = "dense"
    meaning: ClassVar[str] = "float16 log-probabilities, 2 bytes per class; the default"

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [ArraySpec("log_probs", "<f2", "rows", (classes,))]

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        return log_softmax(stored["log_probs"].astype(np.float32) * (temperature / wanted))


@dataclass(frozen=True)
class Quantized:
    """8 bits a class and a float16 range R for the row: C + 2 bytes.

    Code q stands for R (q / 255)² below the row's largest log-probability: the square puts fine
    steps where the probability is. An entry x below the largest is off by at most
    sqrt(x R) / 255 + R / 255², up to x = 256; what lies deeper is stored as 256.
    """

    name: ClassVar[str] = "quantized"
    form: ClassVar[str] = "quantized"
    meaning: ClassVar[str] = "8 bits per class"

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [
            ArraySpec("codes", "|u1", "rows", (classes,)),
            ArraySpec("ranges", "<f2", "rows", (1,)),
        ]

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        depth = (stored["codes"].astype(np.float32) / 255) ** 2 * stored["ranges"].astype("f4")
        return log_softmax(-depth * np.float32(temperature / wanted))


@dataclass(frozen=True)
class TopK:
    """The k largest classes, and the mass of the other C - k together at several temperatures.

    k · (2 or 4 + 2) bytes and 2 for each temperature. The head is exact to float16 relative to
    itself; its mass against the tail's is exact at the temperatures kept, and interpolated
    between them; the tail is spread evenly over its C - k classes.
    """

    name: ClassVar[str] = "topk"
    form: ClassVar[str] = "topk:K"
    meaning: ClassVar[str] = "the K largest, and the mass of the tail at several temperatures"
    k: int
    temperatures: tuple[float, ...] = TAIL_TEMPERATURES

    def __post_init__(self) -> None:
        ascending = list(self.temperatures) == sorted(set(self.temperatures))
        if self.k < 1 or not 1 <= len(self.temperatures) <= 16 or not ascending:
            raise SettingsError(f"{self} needs k from 1, and 1 to 16 ascending temperatures")
        if not 0 < self.temperatures[0] <= self.temperatures[-1] <= MAX_TEMPERATURE:
            raise SettingsError(f"{self} needs temperatures above 0, up to 1e6")

    def arrays(self, classes: int) -> list[ArraySpec]:
        if self.k >= classes:
            raise SettingsError(f"topk:{self.k} of {classes} classes leaves no tail; use dense")
        return [
            ArraySpec("ids", id_dtype(classes), "rows", (self.k,)),
            ArraySpec("log_probs", "<f2", "rows", (self.k,)),
            ArraySpec("tails", "<f2", "rows", (len(self.temperatures),)),
        ]

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        low, high, share = tail_weights(self.temperatures, wanted)
        tails = stored["tails"].astype(np.float32)
        limit = np.full(tails.shape[:-1], math.log((classes - self.k) / self.k), np.float32)
        odds = [limit if at is None else tails[..., at] for at in (low, high)]
        tail = odds[0] * np.float32(1 - share) + odds[1] * np.float32(share)  # log tail - log head
        head = log_softmax(stored["log_probs"].astype(np.float32) * (temperature / wanted))
        head -= np.logaddexp(0, tail)[..., None]
        rest = -np.logaddexp(0, -tail) - np.float32(math.log(classes - self.k))
        dense = np.broadcast_to(rest[..., None], (*rest.shape, classes)).astype(np.float32)
        np.put_along_axis(dense, stored["ids"].astype(np.int64), head, -1)
        return dense


@dataclass(frozen=True)
class Basis:
    """Log-probabilities projected on a few directions, and the entries where that errs most.

    A classifier ends in a linear layer, so its log-probabilities lie close to a subspace of few
    dimensions. `wide` coefficients have 8 bits, `narrow` further ones 4; each direction has a step
    of its own, all times one step of the row. At the `top` classes, chosen by p · error², the rest
    is stored with 8 bits. wide + narrow / 2 + 4 + top · (2 or 4 + 1) bytes. The error depends on
    the teacher: it is measured, and stands in the header.
    """

    name: ClassVar[str] = "basis"
    form: ClassVar[str] = "basis:BYTES,K"
    meaning: ClassVar[str] = (
        "fitted to the teacher: BYTES of coefficients and K corrected classes per row"
    )
    wide: int
    narrow: int
    top: int

    def __post_init__(self) -> None:
        if min(self.wide, self.narrow) < 0 or self.rank < 1 or self.narrow % 2 or self.top < 1:
            raise SettingsError(f"{self} needs an even narrow, top from 1, and some coefficients")

    @property
    def rank(self) -> int:
        return self.wide + self.narrow

    def arrays(self, classes: int) -> list[ArraySpec]:
        if self.rank > classes or self.top > classes:
            raise SettingsError(f"{self} is more than {classes} classes have; use dense")
        return [
            ArraySpec("codes", "|u1", "rows", (self.wide + self.narrow // 2,)),
            ArraySpec("steps", "<f2", "rows", (2,)),
            ArraySpec("ids", id_dtype(classes), "rows", (self.top,)),
            ArraySpec("rests", "|i1", "rows", (self.top,)),
            ArraySpec("mean", "<f4", "shared", (classes,)),
            ArraySpec("directions", "<f2", "shared", (self.rank, classes)),
            ArraySpec("direction_steps", "<f4", "shared", (self.rank,)),
        ]

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        codes, steps = stored["codes"], stored["steps"].astype(np.float32)
        wide = codes[..., : self.wide].view(np.int8)
        packed = codes[..., self.wide :]
        narrow = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], self.narrow)
        levels = np.concatenate([wide.astype(np.float32), narrow.astype(np.float32) - 8], -1)
        coefficients = levels * steps[..., :1] * stored["direction_steps"]
        rows = coefficients @ stored["directions"].astype(np.float32) + stored["mean"]
        ids = stored["ids"].astype(np.int64)
        rest = stored["rests"].astype(np.float32) * steps[..., 1:]
        np.put_along_axis(rows, ids, np.take_along_axis(rows, ids, -1) + rest, -1)
        return log_softmax(rows.astype(np.float32) * np.float32(temperature / wanted))


@dataclass(frozen=True)
class Sampled:
    """n draws from the row's distribution: n · (2 or 4) bytes; a class drawn twice stands twice.

    Unbiased at T: the expectation of count / n is p (Anshumann et al., "Sparse Logit Sampling", ACL
    2025). The draws of a row are systematic, at (u + i) / n of the cumulated distribution for one
    random u, so that each count is within 1 of n p. It cannot be re-tempered.
    """

    name: ClassVar[str] = "sampled"
    form: ClassVar[str] = "sampled:N"
    meaning: ClassVar[str] = "N draws, for large vocabularies; at the temperature of the dump only"
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 1 << 16:
            raise SettingsError(f"sampled:{self.n} draws; expected 1 to 65536")

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [ArraySpec("ids", id_dtype(classes), "rows", (self.n,))]

    def decode(self, stored: Arrays, temperature: float, wanted: float, classes: int) -> Floats:
        check_sampled(temperature, wanted)
        ids = stored["ids"].astype(np.int64)
        rows = ids.reshape(-1, self.n)
        counts = np.stack([np.bincount(row, minlength=classes) for row in rows])
        with np.errstate(divide="ignore"):
            log_probs = np.log(counts / self.n).astype(np.float32)
        return log_probs.reshape(*ids.shape[:-1], classes)


ENCODINGS: dict[str, Callable[..., Encoding]] = {
    kind.name: kind for kind in (Dense, Quantized, TopK, Basis, Sampled)
}


def log_softmax(logits: Floats) -> Floats:
    """log softmax over the last axis, (..., C), in float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def id_dtype(classes: int) -> str:
    """Class ids: 16 bits without a sign up to 65,536 classes, else 32."""
    return "<u2" if classes <= 1 << 16 else "<u4"


def tail_weights(
    temperatures: Sequence[float], wanted: float
) -> tuple[int | None, int | None, float]:
    """How the log-odds of the tail at `wanted` follow from those at `temperatures`, ascending.

    Linear in 1 / T between neighbours. None stands for infinite temperature, where all classes are
    equal and the log-odds are log((C - k) / k). Below the lowest temperature the line goes on.

    Returns:
        Two places (low, high) and the share of high: odds = (1 - share) · low + share · high.
    """
    inverse = [0.0, *(1 / t for t in reversed(temperatures))]  # ascending
    places: list[int | None] = [None, *reversed(range(len(temperatures)))]
    x = 1 / wanted
    above = next((i for i, value in enumerate(inverse) if i and value >= x), len(inverse) - 1)
    share = (x - inverse[above - 1]) / (inverse[above] - inverse[above - 1])
    return places[above - 1], places[above], share


def check_sampled(temperature: float, wanted: float) -> None:
    """Raise SettingsError if a sampled cache is wanted at another temperature than its own."""
    if wanted != temperature:
        raise SettingsError(
            f"temperature {wanted:g} of a sampled cache made at {temperature:g}: draws cannot be "
            "re-tempered; use its own, or dump another encoding"
        )


def parse_encoding(spec: str, temperature: float) -> Encoding:
    """The encoding that a specification on the command line names, but for `auto` and `basis`.

    Raises:
        SettingsError: there is no such encoding.
    """
    name, _, size = spec.partition(":")
    if name in ("dense", "quantized") and not size:
        return ENCODINGS[name]()
    if name == "topk" and size.isdecimal():
        return TopK(int(size), tuple(sorted({*TAIL_TEMPERATURES, float(temperature)})))
    if name == "sampled" and size.isdecimal():
        return Sampled(int(size))
    raise SettingsError(
        f"encoding {spec!r} is unknown; expected dense, quantized, topk:K, basis:BYTES,K, sampled:N "
        "or auto"
    )


def encoding_to_json(encoding: Encoding) -> dict[str, Any]:
    """The name and the parameters."""
    fields = {f.name: getattr(encoding, f.name) for f in dataclasses.fields(encoding)}
    return {"name": encoding.name, **fields}


def encoding_from_json(fields: object) -> Encoding:
    """The encoding that a header describes.

    Raises:
        FormatError: the description is not one of an encoding that this reader knows.
    """
    shown = ascii(fields)[:80]
    if not isinstance(fields, dict) or fields.get("name") not in tuple(ENCODINGS):
        raise FormatError(f"encoding is {shown}; this softcache knows {', '.join(ENCODINGS)}")
    make = ENCODINGS[fields["name"]]
    wanted = {f.name for f in dataclasses.fields(make)}  # type: ignore[arg-type]
    given = {name: value for name, value in fields.items() if name != "name"}
    if set(given) != wanted:
        raise FormatError(
            f"encoding is {shown}; {fields['name']} has {sorted(wanted) or 'nothing'}"
        )
    for name, value in given.items():
        if name == "temperatures":
            if not isinstance(value, list) or any(
                type(t) not in (int, float) or not 0 < t < 1e300 for t in value
            ):
                raise FormatError(f"encoding is {shown}; {name} are no list of numbers above 0")
            given[name] = tuple(float(t) for t in value)
        elif type(value) is not int or not 0 <= value < 1 << 31:
            raise FormatError(f"encoding is {shown}; {name} is no whole number from 0 up")
    try:
        return make(**given)
    except SettingsError as error:
        raise FormatError(f"encoding is {shown}: {error}") from error
