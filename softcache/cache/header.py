"""The header of a cache: its schema, and a parser that checks every rule of FORMAT.md.

A file begins with a preamble of 32 bytes: the magic, the offset and length of the header's JSON, and
its xxh3 digest. They fit one disk sector, so that pointing to another header is atomic.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import xxhash

from softcache.cache import provenance
from softcache.cache.encodings import (
    DTYPES,
    LABEL_SETS,
    MAX_TEMPERATURE,
    ArraySpec,
    Axis,
    Bernoulli,
    Encoding,
    encoding_from_json,
    encoding_to_json,
)
from softcache.cache.fields import JSON, MAX_COUNT, integer, integers, load_json, shown, text_of
from softcache.errors import FormatError, SettingsError

MAGIC = b"\x89SFTC\r\n\x1a"
PREAMBLE = struct.Struct("<8sQQQ")  # magic, offset, length, digest of the JSON
VERSION = (1, 2)  # the newest that this reader knows
BASE_VERSION = (1, 0)  # of a cache without features, so that older readers open it
INPUTS = "inputs"  # the feature of embedded samples, and the array that holds them
# the features that a cache may need, with the version that added each
FEATURES = {INPUTS: (1, 1), LABEL_SETS: (1, 2)}
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_USER_BLOCK = 8 << 20  # bytes
MAX_FILE = 1 << 60  # bytes
MAX_CLASSES = 1 << 24
MAX_BLOCKS = 1 << 22  # in all views together
FINGERPRINT = 8  # numbers in the fingerprint of one augmented sample
OFFSET_UNIT = 8  # bytes, so that every value of every array is aligned
MAX_NAME = 1024  # bytes of a class name
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Array:
    """One array of the file: raw little-endian values, `offset` bytes from the file's start."""

    name: str
    dtype: str  # numpy's notation, with byte order
    shape: tuple[int, ...]
    axis: Axis
    offset: int

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample; in arrays of rows, in one view."""
        leading = {"rows": 2, "samples": 1, "shared": 0, "commits": 0}[self.axis]
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[leading:])


@dataclass(frozen=True)
class Header:
    """What is in a cache, where it lies and how it was made.

    The fields up to `augment`, and the teachers, determine the stored values. `summary` is None
    until the cache is complete.
    """

    views: int
    samples: int
    first_view: int  # number of the first view in the augmentation's draws
    first_sample: int  # sample_id of cache_row 0
    data_samples: int  # of the whole data set; the cache may be a shard of it
    positions: tuple[int, ...]
    classes: int
    temperature: float
    encoding: Encoding
    seed: int
    augment: str | None
    precision: str
    data: str
    choice: JSON | None  # of the encoding: asked, max_kl, temperatures, candidates
    teachers: tuple[JSON, ...]  # name, weights (name, sha256), parameters
    evaluation: JSON | None  # data, digest, samples, errors
    software: dict[str, str]
    block_rows: int
    user_block: int
    file_bytes: int
    hdf5_digest: str  # of all bytes outside of the user block and the arrays
    shared_digest: str  # of the arrays that all rows share
    arrays: tuple[Array, ...]
    summary: JSON | None = None
    must_understand: tuple[str, ...] = ()
    version: tuple[int, int] = BASE_VERSION

    @property
    def embeds_inputs(self) -> bool:
        """Whether the file contains the samples themselves."""
        return INPUTS in self.must_understand

    @property
    def multi_label(self) -> bool:
        """Whether each class applies or not on its own, so that a sample may have several labels."""
        return isinstance(self.encoding, Bernoulli)

    @property
    def view_range(self) -> range:
        """Numbers of the views in the augmentation's draws."""
        return range(self.first_view, self.first_view + self.views)

    @property
    def sample_range(self) -> range:
        """The sample_ids: numbers in the whole data set and in the augmentation's draws."""
        return range(self.first_sample, self.first_sample + self.samples)

    @property
    def inputs_spec(self) -> ArraySpec | None:
        """Dtype and shape of one embedded sample; None if samples are not embedded."""
        if not self.embeds_inputs:
            return None
        array = self.array(INPUTS)
        return ArraySpec(INPUTS, array.dtype, "samples", array.shape[1:])

    @property
    def blocks(self) -> int:
        """Blocks of one view."""
        return -(-self.samples // self.block_rows)

    def array(self, name: str) -> Array:
        return next(array for array in self.arrays if array.name == name)

    def block_range(self, block: int) -> range:
        """The cache_rows of one block."""
        start = block * self.block_rows
        return range(start, min(start + self.block_rows, self.samples))

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one sample in one view, over all arrays."""
        return sum(array.row_bytes for array in self.arrays if array.axis == "rows")

    def to_json(self) -> JSON:
        """The header as a JSON object."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["encoding"] = encoding_to_json(self.encoding)
        fields["arrays"] = [dataclasses.asdict(array) for array in self.arrays]
        return {"format": "softcache", **fields}

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII; the same header gives the same bytes."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("ascii")


def preamble(offset: int, text: bytes) -> bytes:
    """The first 32 bytes of a file that has its header `text` at `offset`."""
    return PREAMBLE.pack(MAGIC, offset, len(text), xxhash.xxh3_64_intdigest(text))


def parse_preamble(raw: bytes, file_bytes: int) -> tuple[int, int, int]:
    """Offset, length and digest of the header.

    Raises:
        FormatError: the file is not a cache, or its preamble points outside the file.
    """
    if raw.startswith(MAGIC) and len(raw) < PREAMBLE.size:
        raise FormatError(f"the file was truncated to {len(raw)} bytes; copy it again")
    if not raw.startswith(MAGIC):
        raise FormatError(_not_a_cache(raw))
    _, offset, length, digest = PREAMBLE.unpack(raw[: PREAMBLE.size])
    if length > MAX_HEADER:
        raise FormatError(f"header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    if offset < PREAMBLE.size or offset + length > file_bytes:
        raise FormatError(
            f"header at {offset:,} to {offset + length:,} of a file of {file_bytes:,} bytes; "
            "the file is truncated or damaged"
        )
    return offset, length, digest


def _not_a_cache(raw: bytes) -> str:
    """The message for a file without the magic; it names the kind of file."""
    if not raw:
        return "the file is empty, not a cache; make one with softcache dump"
    if raw.startswith(HDF5_SIGNATURE):
        return "an HDF5 file, but not a softcache cache; make one with softcache dump"
    kinds = {
        b"PK": "a zip archive (npz, pt or pt2)",
        b"\x93NUMPY": "an npy file",
        b"\x1f\x8b": "a gzip file",
    }
    unknown = f"a file that begins with {raw[:8].hex()}"
    kind = next((kind for magic, kind in kinds.items() if raw.startswith(magic)), unknown)
    return f"{kind}, not a cache; make one with softcache dump"


def parse_header(text: bytes, digest: int, file_bytes: int) -> Header:
    """Parse and check a header: every field, and where every array lies in the file.

    Raises:
        FormatError: a rule of FORMAT.md is broken; the message names the value that breaks it.
    """
    if xxhash.xxh3_64_intdigest(text) != digest:
        raise FormatError("the header does not match its digest; the file is damaged, get it again")
    fields = load_json(text)
    name = fields.pop("format", None)
    if name != "softcache":
        raise FormatError(f"format is {shown(name)}; expected 'softcache': this is not a cache")
    version = _version(fields)
    expected = {field.name for field in dataclasses.fields(Header)}
    missing, unknown = sorted(expected - set(fields)), sorted(set(fields) - expected)
    if missing:
        raise FormatError(f"the header lacks {', '.join(missing)}")
    if unknown and version[1] <= VERSION[1]:
        raise FormatError(f"the header has unknown fields: {shown(', '.join(unknown))}")
    header = _build({name: fields[name] for name in expected}, version)
    if header.multi_label != (LABEL_SETS in header.must_understand):
        raise FormatError(
            f"encoding is {header.encoding.name} and must_understand is {list(header.must_understand)}; "
            f"expected {LABEL_SETS} there with bernoulli, and with nothing else"
        )
    _check_layout(header, file_bytes)
    return header


def _version(fields: JSON) -> tuple[int, int]:
    version = integers(fields, "version", 0, 1 << 16)
    if len(version) != 2:
        raise FormatError(f"version is {list(version)}; expected [major, minor]")
    if version[0] != VERSION[0]:
        raise FormatError(
            f"the cache has format version {version[0]}.{version[1]}, this softcache reads "
            f"{VERSION[0]}.x; " + ("update softcache" if version > VERSION else "dump it again")
        )
    features = fields.get("must_understand")
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise FormatError(f"must_understand is {shown(features)}; expected a list of names")
    unknown = sorted(set(features) - set(FEATURES))
    if unknown:
        raise FormatError(
            f"the cache needs features that this softcache does not know: {shown(', '.join(unknown))}; "
            "update softcache"
        )
    return version[0], version[1]


def _build(fields: JSON, version: tuple[int, int]) -> Header:
    samples = integer(fields, "samples", 1, MAX_COUNT)
    data_samples = integer(fields, "data_samples", samples, MAX_COUNT)
    views = integer(fields, "views", 1, MAX_COUNT // samples)
    block_rows = integer(fields, "block_rows", 1, samples)
    blocks = views * -(-samples // block_rows)
    if blocks > MAX_BLOCKS:
        raise FormatError(
            f"block_rows is {block_rows}, which makes {blocks:,} blocks; expected at most {MAX_BLOCKS:,}"
        )
    temperature = fields["temperature"]
    if type(temperature) not in (int, float) or not 0 < temperature <= MAX_TEMPERATURE:
        raise FormatError(
            f"temperature is {shown(temperature)}; expected a number above 0, up to 1e6"
        )
    arrays = fields["arrays"]
    if not isinstance(arrays, list) or len(arrays) > 64:
        raise FormatError(f"arrays is {shown(arrays)}; expected a list of at most 64")
    teachers = provenance.teachers(fields["teachers"])
    software = provenance.software(fields["software"])
    return Header(
        views=views,
        samples=samples,
        first_view=integer(fields, "first_view", 0, MAX_COUNT),
        first_sample=integer(fields, "first_sample", 0, data_samples - samples),
        data_samples=data_samples,
        positions=integers(fields, "positions", 1, MAX_COUNT),
        classes=integer(fields, "classes", 2, MAX_CLASSES),
        temperature=float(temperature),
        encoding=encoding_from_json(fields["encoding"]),
        seed=integer(fields, "seed", 0, (1 << 63) - 1),
        augment=None if fields["augment"] is None else text_of(fields, "augment"),
        precision=text_of(fields, "precision"),
        data=text_of(fields, "data"),
        choice=provenance.choice(fields["choice"]),
        teachers=teachers,
        evaluation=provenance.evaluation(fields["evaluation"]),
        software=software,
        block_rows=block_rows,
        user_block=integer(fields, "user_block", 512, MAX_USER_BLOCK),
        file_bytes=integer(fields, "file_bytes", 1, MAX_FILE),
        hdf5_digest=text_of(fields, "hdf5_digest"),
        shared_digest=text_of(fields, "shared_digest"),
        arrays=tuple(_array(array) for array in arrays),
        summary=provenance.summary(fields["summary"]),
        must_understand=tuple(fields["must_understand"]),
        version=version,
    )


def expected_arrays(
    encoding: Encoding,
    *,
    views: int,
    samples: int,
    positions: tuple[int, ...],
    classes: int,
    name_bytes: int,
    fingerprinted: int,
    inputs: ArraySpec | None = None,
) -> list[tuple[ArraySpec, tuple[int, ...]]]:
    """Every array of a cache but the digests, with its whole shape.

    Args:
        name_bytes: bytes of one class name.
        fingerprinted: number of samples with fingerprints, F.
        inputs: dtype and shape of one embedded sample, if samples are embedded.
    """
    specs = [
        *encoding.arrays(classes),
        ArraySpec("labels", "<i8", "samples", positions),
        ArraySpec("keys", "<u8", "samples", ()),
        *([inputs] if inputs else []),
        ArraySpec("class_names", f"|S{name_bytes}", "shared", (classes,)),
        ArraySpec("fingerprinted", "<i8", "shared", (fingerprinted,)),
        ArraySpec("fingerprints", "<f4", "shared", (views, fingerprinted, FINGERPRINT)),
    ]
    leading: Mapping[Axis, tuple[int, ...]] = {
        "rows": (views, samples, *positions),
        "samples": (samples,),
        "shared": (),
        "commits": (),
    }
    return [(spec, (*leading[spec.axis], *spec.shape)) for spec in specs]


def _check_layout(header: Header, file_bytes: int) -> None:
    """Check that the arrays are the expected ones, lie inside the file and do not overlap."""
    if header.file_bytes != file_bytes:
        raise FormatError(
            f"the file has {file_bytes:,} bytes, its header says {header.file_bytes:,}; it was truncated "
            "or appended to: copy it again"
        )
    if header.user_block & (header.user_block - 1) or header.user_block >= file_bytes:
        raise FormatError(
            f"user block of {header.user_block:,} bytes; expected a power of 2 that fits"
        )
    arrays = {array.name: array for array in header.arrays}
    if len(arrays) < len(header.arrays):
        raise FormatError("two arrays have the same name")
    names, fingerprinted = arrays.get("class_names"), arrays.get("fingerprinted")
    try:
        specs = expected_arrays(
            header.encoding,
            views=header.views,
            samples=header.samples,
            positions=header.positions,
            classes=header.classes,
            name_bytes=np.dtype(names.dtype).itemsize if names else 1,
            fingerprinted=fingerprinted.shape[0] if fingerprinted and fingerprinted.shape else 1,
            inputs=_inputs_spec(header, arrays),
        )
    except SettingsError as error:
        raise FormatError(str(error)) from error
    expected = {spec.name: (spec, shape) for spec, shape in specs}
    expected |= digest_arrays(header.views, header.blocks)
    if set(arrays) != set(expected):
        missing, unknown = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise FormatError(
            f"a {header.encoding.name} cache has arrays {sorted(expected)}; missing here: "
            f"{', '.join(missing) or 'none'}, unknown: {shown(', '.join(unknown)) if unknown else 'none'}"
        )
    for name, (spec, shape) in expected.items():
        array = arrays[name]
        if (array.dtype, array.shape, array.axis) != (spec.dtype, shape, spec.axis):
            raise FormatError(
                f"array {name} is {array.dtype} {list(array.shape)} by {array.axis}; expected "
                f"{spec.dtype} {list(shape)} by {spec.axis}"
            )
    end, previous = header.user_block, "the user block"
    for array in sorted(header.arrays, key=lambda array: array.offset):
        if array.offset < end:
            raise FormatError(
                f"array {array.name} begins at {array.offset:,}, inside {previous}, which ends at {end:,}"
            )
        if array.offset % OFFSET_UNIT:
            raise FormatError(
                f"array {array.name} begins at {array.offset:,}; expected a multiple of {OFFSET_UNIT}"
            )
        end, previous = array.offset + array.nbytes, f"array {array.name}"
        if end > file_bytes:
            raise FormatError(
                f"array {array.name} ends at {end:,}, past the file's end at {file_bytes:,}"
            )


def _inputs_spec(header: Header, arrays: Mapping[str, Array]) -> ArraySpec | None:
    """What the array of embedded samples must be: any numeric dtype, and any shape of a sample."""
    array = arrays.get(INPUTS)
    if not header.embeds_inputs:
        return None
    if array is None or array.dtype not in DTYPES:
        problem = "is missing" if array is None else f"is {array.dtype}"
        raise FormatError(
            f"array {INPUTS} {problem}; expected numbers, since must_understand names it"
        )
    return ArraySpec(INPUTS, array.dtype, "samples", array.shape[1:])


def digest_arrays(views: int, blocks: int) -> dict[str, tuple[ArraySpec, tuple[int, ...]]]:
    """The digests that commit blocks: of each block of rows, and of each block of samples."""
    rows = ArraySpec("digests", "<u8", "commits", (views, blocks))
    samples = ArraySpec("sample_digests", "<u8", "commits", (blocks,))
    return {spec.name: (spec, spec.shape) for spec in (rows, samples)}


def _array(fields: object) -> Array:
    if not isinstance(fields, dict) or set(fields) != {"name", "dtype", "shape", "axis", "offset"}:
        raise FormatError(
            f"an array is described as {shown(fields)}; expected name, dtype, shape, axis, offset"
        )
    name, dtype, axis = text_of(fields, "name"), text_of(fields, "dtype"), fields["axis"]
    if not name.isidentifier():
        raise FormatError(f"array name is {shown(name)}; expected a plain word")
    text = re.fullmatch(r"\|S([1-9][0-9]{0,3})", dtype, re.ASCII)
    text_bytes = int(text[1]) if text else 0
    if dtype not in DTYPES and not 1 <= text_bytes <= MAX_NAME:
        raise FormatError(
            f"array {name} has type {shown(dtype)}; expected one of {', '.join(sorted(DTYPES))}, or "
            f"text |S1 to |S{MAX_NAME}"
        )
    if axis not in get_args(Axis):
        raise FormatError(
            f"array {name} has axis {shown(axis)}; expected {', '.join(get_args(Axis))}"
        )
    shape = integers(fields, "shape", 1, MAX_COUNT)
    if np.dtype(dtype).itemsize * math.prod(shape) > MAX_FILE:
        raise FormatError(f"array {name} of shape {list(shape)} is larger than any file")
    return Array(name, dtype, shape, axis, integer(fields, "offset", 0, MAX_FILE))
