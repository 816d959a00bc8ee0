"""The encodings: which arrays each one stores, and how to decode them, in plain numpy.

The stored values are log-probabilities at the dump temperature T. Any other temperature T' follows
exactly, log p' = log_softmax(log p · T / T'), because log p differs from z / T by one constant per
row. The decoders here are the reference; softcache/targets/ implements the same in torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from softcache.cache.array_spec import Arrays, ArraySpec, Floats, id_dtype, log_softmax
from softcache.cache.draws import Sampled
from softcache.cache.packed import Packed
from softcache.cache.possible_values import (
    SUM_TOLERANCE,
    are_steps,
    flaw_of_ids,
    half_probabilities,
)
from softcache.cache.tails import tail_weights
from softcache.errors import FormatError, SettingsError

FLOAT16_LOWEST = -65504.0  # log p is clamped here: exp is 0 anyway, and inf - inf never arises
QUANTIZED_RANGE = 256.0  # nats below the row's largest entry that `quantized` can represent
BASIS_RANGE = 100.0  # the same for `basis`, where one very unlikely class blurs the whole row
BASIS_REACH = 1e6  # nats that the coefficients of `basis` may add up to; encoders stay far below
MAX_TEMPERATURE = 1e6
LABEL_SETS = "label_sets"  # the array of the classes of each sample, a bit for each
TAIL_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


class Encoding(Protocol):
    """A way to store rows of C log-probabilities; a frozen dataclass of its parameters."""

    name: ClassVar[str]
    form: ClassVar[str]  # syntax of its specification on the command line
    meaning: ClassVar[str]  # one phrase for the help: what is stored
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def arrays(self, classes: int) -> list[ArraySpec]:
        """The arrays that store rows of `classes` log-probabilities.

        Raises:
            SettingsError: the parameters do not fit this number of classes.
        """

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        """Decode rows stored at `temperature` to another temperature.

        Args:
            stored: the encoding's arrays, each (B, …), or whole if all rows share it.

        Returns:
            (B, C) float32, log-probabilities at `requested_temperature`.
        """

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        """What is wrong with stored values that no encoder writes, in a phrase; None if nothing is.

        Digests say only that a file is as it was written. What is checked is that every row decodes to a
        probability distribution.

        Args:
            stored: the encoding's arrays, each (B, …), or whole if all rows share it.
        """


@dataclass(frozen=True)
class Dense:
    """float16 log-probabilities: 2C bytes per row, exact at any temperature, KL at most 1e-5."""

    name: ClassVar[str] = "dense"
    form: ClassVar[str] = "dense"
    meaning: ClassVar[str] = "float16 log-probabilities, 2 bytes per class; the default"

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [ArraySpec("log_probs", "<f2", "rows", (classes,))]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        ratio = temperature / requested_temperature
        return log_softmax(stored["log_probs"].astype(np.float32) * ratio)

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        sums = half_probabilities()[stored["log_probs"].view(np.uint16)].sum(-1)
        wrong = ~(np.abs(sums - 1) <= SUM_TOLERANCE)
        return f"probabilities that sum to {sums[wrong][0]:.4g}" if wrong.any() else None


@dataclass(frozen=True)
class Quantized:
    """8 bits per class and one float16 range R per row: C + 2 bytes.

    Code q means R (q / 255)² below the row's largest log-probability; the square makes the steps
    finest where the probability is. An entry x below the largest has an error of at most
    sqrt(x R) / 255 + R / 255², up to x = 256; entries further below are stored as 256.
    """

    name: ClassVar[str] = "quantized"
    form: ClassVar[str] = "quantized"
    meaning: ClassVar[str] = "8 bits per class"

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [
            ArraySpec("codes", "|u1", "rows", (classes,)),
            ArraySpec("ranges", "<f2", "rows", (1,)),
        ]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        depth = (stored["codes"].astype(np.float32) / 255) ** 2 * stored["ranges"].astype("f4")
        return log_softmax(-depth * np.float32(temperature / requested_temperature))

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        if not are_steps(stored["ranges"]):
            return "ranges that are not finite and positive"
        return "rows without a largest class" if stored["codes"].min(-1).any() else None


@dataclass(frozen=True)
class TopK:
    """The k largest classes, and the total mass of the other C - k at several temperatures.

    k · (2 or 4 + 2) bytes per row, and 2 for each temperature. Within the head, log-probabilities
    are exact to float16; the odds of tail against head are exact at the stored temperatures and
    interpolated in between; the tail is spread evenly over its C - k classes.
    """

    name: ClassVar[str] = "topk"
    form: ClassVar[str] = "topk:K"
    meaning: ClassVar[str] = (
        "the K largest classes, and the mass of the tail at several temperatures"
    )
    k: int
    temperatures: tuple[float, ...] = TAIL_TEMPERATURES

    def __post_init__(self) -> None:
        ascending = list(self.temperatures) == sorted(set(self.temperatures))
        if self.k < 1 or not 1 <= len(self.temperatures) <= 16 or not ascending:
            raise SettingsError(f"{self} needs k of at least 1, and 1 to 16 ascending temperatures")
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

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        low, high, share = tail_weights(self.temperatures, requested_temperature)
        tails = stored["tails"].astype(np.float32)
        limit = np.full(tails.shape[:-1], math.log((classes - self.k) / self.k), np.float32)
        odds = [limit if index is None else tails[..., index] for index in (low, high)]
        tail = odds[0] * np.float32(1 - share) + odds[1] * np.float32(share)  # log tail - log head
        ratio = temperature / requested_temperature
        head = log_softmax(stored["log_probs"].astype(np.float32) * ratio)
        head -= np.logaddexp(0, tail)[..., None]
        other = -np.logaddexp(0, -tail) - np.float32(math.log(classes - self.k))
        dense = np.broadcast_to(other[..., None], (*other.shape, classes)).astype(np.float32)
        np.put_along_axis(dense, stored["ids"].astype(np.int64), head, -1)
        return dense

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        sums = half_probabilities()[stored["log_probs"].view(np.uint16)].sum(-1)
        if not (sums <= 1 + SUM_TOLERANCE).all():
            return f"probabilities that sum to {sums[~(sums <= 1 + SUM_TOLERANCE)][0]:.4g}"
        if not (sums >= (1 - SUM_TOLERANCE) * self.k / classes).all():
            return "largest probabilities that are below the average"
        if not np.isfinite(stored["tails"]).all():
            return "tails that are not finite"
        # no class of the tail is more probable than one of the head
        if float(stored["tails"].max()) > math.log((classes - self.k) / self.k) + SUM_TOLERANCE:
            return "tails that are heavier than their heads"
        return flaw_of_ids(stored["ids"], classes, distinct=True)


@dataclass(frozen=True)
class Basis:
    """Log-probabilities projected on a few directions, with residuals where the error is largest.

    A classifier ends in a linear layer, so its log-probabilities lie close to a low-dimensional
    subspace. `wide` coefficients have 8 bits and `narrow` more have 4, quantized with the step of
    their direction times the step of the row. For the `top` classes with the largest p · error²,
    the residual is stored in 8 bits. wide + narrow / 2 + 4 + top · (2 or 4 + 1) bytes per row. The
    error depends on the teacher: the dump measures it and records it in the header.
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
            raise SettingsError(
                f"{self} needs an even narrow, top of at least 1, and some coefficients"
            )

    @property
    def rank(self) -> int:
        return self.wide + self.narrow

    def arrays(self, classes: int) -> list[ArraySpec]:
        if self.rank > classes or self.top > classes:
            raise SettingsError(f"{self} needs more than {classes} classes; use dense")
        return [
            ArraySpec("codes", "|u1", "rows", (self.wide + self.narrow // 2,)),
            ArraySpec("steps", "<f2", "rows", (2,)),
            ArraySpec("ids", id_dtype(classes), "rows", (self.top,)),
            ArraySpec("rests", "|i1", "rows", (self.top,)),
            ArraySpec("mean", "<f4", "shared", (classes,)),
            ArraySpec("directions", "<f2", "shared", (self.rank, classes)),
            ArraySpec("direction_steps", "<f4", "shared", (self.rank,)),
        ]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        codes, steps = stored["codes"], stored["steps"].astype(np.float32)
        wide = codes[..., : self.wide].view(np.int8)
        packed = codes[..., self.wide :]
        narrow = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], self.narrow)
        levels = np.concatenate([wide.astype(np.float32), narrow.astype(np.float32) - 8], -1)
        coefficients = levels * steps[..., :1] * stored["direction_steps"]
        rows = coefficients @ stored["directions"].astype(np.float32) + stored["mean"]
        ids = stored["ids"].astype(np.int64)
        residuals = stored["rests"].astype(np.float32) * steps[..., 1:]
        np.put_along_axis(rows, ids, np.take_along_axis(rows, ids, -1) + residuals, -1)
        ratio = np.float32(temperature / requested_temperature)
        return log_softmax(rows.astype(np.float32) * ratio)

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        if not are_steps(stored["steps"]):
            return "steps that are not finite and positive"
        shared = ("mean", "directions", "direction_steps")
        if not all(np.isfinite(stored[name]).all() for name in shared):
            return "a basis that is not finite"
        # what rows can reach at most, if every coefficient had its highest level
        reach = stored["direction_steps"] * np.abs(stored["directions"]).max(-1).astype(np.float64)
        reach = 127 * float(np.abs(reach).sum()) * float(stored["steps"].max())
        if reach + float(np.abs(stored["mean"]).max()) > BASIS_REACH:
            return "coefficients that are too large for log-probabilities"
        return flaw_of_ids(stored["ids"], classes, distinct=True)


@dataclass(frozen=True)
class Bernoulli:
    """Several labels a sample: float16 log-odds of each class on its own, 2C bytes per row.

    Class c applies with probability sigmoid(z_c / T), whatever the others do. Log-odds z / T scale with the
    temperature, so any other follows exactly. Each sample has a set of classes instead of one label, a bit
    for each class; its entry in `labels` is 0, or -1 if it is unlabelled.
    """

    name: ClassVar[str] = "bernoulli"
    form: ClassVar[str] = "bernoulli"
    meaning: ClassVar[str] = (
        "float16 log-odds, 2 bytes per class; only and always with --targets sigmoid"
    )

    def arrays(self, classes: int) -> list[ArraySpec]:
        return [
            ArraySpec("log_odds", "<f2", "rows", (classes,)),
            ArraySpec(LABEL_SETS, "|u1", "samples", (-(-classes // 8),)),
        ]

    def decode(
        self, stored: Arrays, temperature: float, requested_temperature: float, classes: int
    ) -> Floats:
        ratio = np.float32(temperature / requested_temperature)
        log_odds: Floats = stored["log_odds"].astype(np.float32) * ratio
        return log_odds

    def flaw(self, stored: Arrays, classes: int) -> str | None:
        return None if np.isfinite(stored["log_odds"]).all() else "log-odds that are not finite"


ENCODINGS: dict[str, Callable[..., Encoding]] = {
    kind.name: kind for kind in (Dense, Quantized, TopK, Basis, Sampled, Packed, Bernoulli)
}


def parse_encoding(spec: str, temperature: float) -> Encoding:
    """Parse an encoding specification of the command line, except `auto` and `basis`.

    Args:
        temperature: of the dump; `topk` stores the tail at it too.

    Raises:
        SettingsError: the encoding is unknown, or its parameter is out of range.
    """
    name, _, size = spec.partition(":")
    if name in ("dense", "quantized", "bernoulli") and not size:
        return ENCODINGS[name]()
    if not re.fullmatch(r"\d{0,9}", size, re.ASCII):
        name = ""
    if name == "topk" and size:
        return TopK(int(size), tuple(sorted({*TAIL_TEMPERATURES, float(temperature)})))
    if name == "sampled" and size:
        return Sampled(int(size))
    if name == "packed" and size:
        return Packed(int(size))
    raise SettingsError(
        f"encoding {spec!r} is unknown; expected dense, quantized, topk:K, basis:BYTES,K, sampled:N, "
        "packed:BYTES or auto"
    )


def row_bytes(encoding: Encoding, classes: int) -> int:
    """Bytes of a row, over all arrays of an encoding."""
    arrays = encoding.arrays(classes)
    return sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        for array in arrays
        if array.axis == "rows"
    )


def encoding_to_json(encoding: Encoding) -> dict[str, Any]:
    """The encoding as it is written in a header: its name and its parameters."""
    fields = {f.name: getattr(encoding, f.name) for f in dataclasses.fields(encoding)}
    return {"name": encoding.name, **fields}


def encoding_from_json(fields: object) -> Encoding:
    """The encoding that a header describes.

    Raises:
        FormatError: the encoding is unknown, or its parameters are invalid.
    """
    shown = ascii(fields)[:80]
    if not isinstance(fields, dict) or fields.get("name") not in tuple(ENCODINGS):
        raise FormatError(f"encoding is {shown}; this softcache knows {', '.join(ENCODINGS)}")
    make = ENCODINGS[fields["name"]]
    expected = {f.name for f in dataclasses.fields(make)}  # type: ignore[arg-type]
    parameters = {name: value for name, value in fields.items() if name != "name"}
    if set(parameters) != expected:
        names = ", ".join(sorted(expected)) or "no parameters"
        raise FormatError(f"encoding is {shown}; {fields['name']} has {names}")
    for name, value in parameters.items():
        if name == "temperatures":
            if not isinstance(value, list) or any(
                type(t) not in (int, float) or not 0 < t < 1e300 for t in value
            ):
                raise FormatError(
                    f"encoding is {shown}; expected {name} to be a list of numbers above 0"
                )
            parameters[name] = tuple(float(t) for t in value)
        elif type(value) is not int or not 0 <= value < 1 << 31:
            raise FormatError(
                f"encoding is {shown}; expected {name} to be a whole number, 0 or more"
            )
    try:
        return make(**parameters)
    except SettingsError as error:
        raise FormatError(f"encoding is {shown}: {error}") from error
