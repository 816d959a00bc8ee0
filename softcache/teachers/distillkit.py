"""The compression of DistillKit (arcee-ai): sorted log-probabilities in bytes, and packed token ids.

A row of `compressed_logprobs` holds, one after the other: the `exact_k` largest values as they are; the
coefficients of a polynomial in the rank, for all others; and for each of `residual_bins` a scale and whole
numbers of `element_bits` bits, which are added to the polynomial. With `delta_encoding` the values are the
differences of each from the one before. A row of `bytepacked_indices` holds the ids, of as many bits as the
vocabulary `d` needs. Numbers of bits are packed from the highest bit on, and bytes are little-endian.

The configuration is not in the file. DistillKit writes it beside, as compression_config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.errors import ModelError, SettingsError
from softcache.teachers.token_columns import Nested
from softcache.util.extras import import_extra
from softcache.util.messages import one_line
from softcache.util.spec import Spec

COMPRESSED = "bytepacked_indices", "compressed_logprobs"
CONFIGURATION = "compression_config.yaml"
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes
MOST_BITS = 32  # of a packed number
FAR = 1.25  # a sum of probabilities that the polynomial does not explain

Bytes = npt.NDArray[np.uint8]
Floats64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bin:
    """Whole numbers of some bits, times a scale that is stored before them."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Codec:
    """How the log-probabilities and ids of a file are packed; the fields are those of DistillKit.

    Attributes:
        d: the size of the vocabulary.
        k: entries of a row.
        exact_k: how many of these are stored as they are.
        polynomial_terms: exponents of the rank, or `sqrt` or `exp` of it.
        normalize_t: whether the rank goes from 0 to 1, instead of from 0 on in steps of 1.
    """

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...]
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return max(1, math.ceil(math.log2(self.d)))

    @property
    def row_bytes(self) -> int:
        """Bytes of the log-probabilities of a row."""
        size = self.exact_k * WIDTHS[self.exact_dtype]
        size += len(self.polynomial_terms) * WIDTHS[self.term_dtype]
        for part in self.residual_bins:
            size += WIDTHS[part.scale_dtype] + -(-part.num_elements * part.element_bits // 8)
        return size

    def unpack(
        self, ids: Nested, log_probs: Nested, where: str
    ) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:
        """The counts (rows,), ids and log-probabilities (entries,) of a document.

        Probabilities that are approximate may sum to a little more than 1; they are divided by their sum.

        Raises:
            ModelError: the rows have another size than the configuration says, or hold no log-probabilities.
        """
        packed_ids = _matrix(ids, -(-self.k * self.id_bits // 8), COMPRESSED[0], where)
        packed = _matrix(log_probs, self.row_bytes, COMPRESSED[1], where)
        if len(packed_ids) != len(packed):
            raise ModelError(
                f"{where} has {len(packed_ids)} rows of {COMPRESSED[0]} and {len(packed)} of "
                f"{COMPRESSED[1]}; expected as many"
            )
        values = np.minimum(self._log_probs(packed), 0)
        sums = np.exp(values).sum(-1)
        if not (sums <= FAR).all():
            row = int((~(sums <= FAR)).argmax())
            raise ModelError(
                f"{where}, row {row} has probabilities that sum to {sums[row]:.4g}; expected at most 1: is "
                "the configuration that of another file?"
            )
        values -= np.log(np.maximum(sums, 1))[:, None]
        counts = np.full(len(packed), self.k, np.int64)
        numbers = _unpacked(packed_ids, self.id_bits, self.k)
        return counts, numbers.reshape(-1), values.astype(np.float32).reshape(-1)

    def _log_probs(self, packed: Bytes) -> Floats64:
        """The values (rows, k) of packed rows (rows, row_bytes)."""
        exact, packed = _floats(packed, self.exact_dtype, self.exact_k)
        approximate = self.k - self.exact_k
        coefficients, packed = _floats(packed, self.term_dtype, len(self.polynomial_terms))
        rest = coefficients @ self._terms(approximate).T if self.polynomial_terms else 0.0
        rest = rest + np.zeros((len(packed), approximate))
        start = 0
        for part in self.residual_bins:
            scale, packed = _floats(packed, part.scale_dtype, 1)
            size = -(-part.num_elements * part.element_bits // 8)
            numbers = _unpacked(packed[:, :size], part.element_bits, part.num_elements)
            packed = packed[:, size:]
            half = 1 << part.element_bits - 1
            levels = numbers * 2 - 1 if part.element_bits == 1 else numbers - half
            rest[:, start : start + part.num_elements] += levels * scale
            start += part.num_elements
        values = np.concatenate([exact, rest], -1)
        return values.cumsum(-1) if self.delta_encoding else values

    def _terms(self, count: int) -> Floats64:
        """The terms of the polynomial at each rank, (count, terms)."""
        ranks = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        columns = [
            functions[term](ranks) if isinstance(term, str) else ranks**term
            for term in self.polynomial_terms
        ]
        return np.stack(columns, -1)


def read_codec(spec: Spec) -> Codec:
    """The configuration of the compression of a file: `?config=FILE`, or the one beside the file.

    Raises:
        SettingsError: there is none, or it is not one of DistillKit.
    """
    folder = spec.path if spec.path.is_dir() else spec.path.parent
    path = Path(spec.options.get("config", folder / CONFIGURATION)).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"teacher {spec.text} has the columns {' and '.join(COMPRESSED)} of DistillKit, which are read "
            f"with the configuration that wrote them, and there is no {path}; name it with ?config=FILE.yaml"
        )
    yaml = import_extra("yaml", extra="data", what=f"teacher {spec.text}")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parse_codec(given.get("logprob_compressor", given))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, AttributeError) as error:
        raise SettingsError(f"config={path} cannot be read ({one_line(error)[:200]})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"config={path} is no configuration of DistillKit's logprob_compressor ({one_line(error)[:200]})"
        ) from error


def parse_codec(given: Mapping[str, Any]) -> Codec:
    """The codec of a configuration.

    Raises:
        KeyError: a field is missing.
        ValueError: a value is out of range.
    """
    bins = tuple(
        Bin(str(b["scale_dtype"]), int(b["element_bits"]), int(b["num_elements"]))
        for b in given.get("residual_bins") or ()
    )
    codec = Codec(
        d=int(given["d"]),
        k=int(given["k"]),
        exact_k=int(given["exact_k"]),
        residual_bins=bins,
        exact_dtype=str(given.get("exact_dtype", "float32")),
        polynomial_terms=tuple(given.get("polynomial_terms") or ()),
        term_dtype=str(given.get("term_dtype", "float32")),
        delta_encoding=bool(given.get("delta_encoding", True)),
        normalize_t=bool(given.get("normalize_t", False)),
    )
    types = {codec.exact_dtype, codec.term_dtype, *(b.scale_dtype for b in bins)}
    if unknown := types - set(WIDTHS):
        raise ValueError(f"type {min(unknown)}; expected {', '.join(WIDTHS)}")
    for term in codec.polynomial_terms:
        if term not in ("sqrt", "exp") and not (isinstance(term, int) and 0 <= term < 64):
            raise ValueError(f"polynomial term {term!r}; expected sqrt, exp or an exponent")
    sizes = all(1 <= b.element_bits <= MOST_BITS and b.num_elements > 0 for b in bins)
    rest = codec.k - codec.exact_k - sum(b.num_elements for b in bins)
    if codec.d < 2 or codec.d > 1 << MOST_BITS - 1 or codec.exact_k < 0 or rest < 0 or not sizes:
        raise ValueError(
            f"d {codec.d}, k {codec.k}, exact_k {codec.exact_k} and its bins do not fit"
        )
    return codec


def _matrix(rows: Nested, width: int, name: str, where: str) -> Bytes:
    """Rows of bytes, (rows, width)."""
    other = np.flatnonzero(rows.counts != width)
    if len(other):
        raise ModelError(
            f"{where}, row {other[0]} has {rows.counts[other[0]]} bytes of {name}; expected {width}, as the "
            "configuration says: is it that of another file?"
        )
    values = np.asarray(rows.values)
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255):
        raise ModelError(f"{where}: {name} holds more than bytes; expected numbers from 0 to 255")
    return values.astype(np.uint8).reshape(len(rows.counts), width)


def _floats(packed: Bytes, dtype: str, count: int) -> tuple[Floats64, Bytes]:
    """The first `count` floats of each row, (rows, count), and the bytes behind them."""
    size = count * WIDTHS[dtype]
    raw = np.ascontiguousarray(packed[:, :size])
    if dtype == "bfloat16":
        values = (raw.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        values = raw.view(f"<f{WIDTHS[dtype]}")
    return values.reshape(len(packed), count).astype(np.float64), packed[:, size:]


def _unpacked(packed: Bytes, bits: int, count: int) -> Indices:
    """`count` whole numbers of some bits in each row, (rows, count)."""
    flags = np.unpackbits(packed, axis=-1)[:, : count * bits].reshape(len(packed), count, bits)
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return np.asarray(flags @ powers, np.int64)
