"""The header of a cache: its schema, and a parser that checks every rule of FORMAT.md.

A file begins with a preamble of 32 bytes: the magic, the offset and length of the header's JSON, and
its xxh3 digest. They fit one disk sector, so that pointing to another header is atomic.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass

import xxhash

from softcache.cache import provenance
from softcache.cache.array_spec import ArraySpec
from softcache.cache.arrays import INPUTS, MAX_FILE, Array, check_arrays, parse_array
from softcache.cache.encodings import (
    LABEL_SETS,
    MAX_TEMPERATURE,
    Bernoulli,
    Encoding,
    encoding_from_json,
    encoding_to_json,
)
from softcache.cache.fields import JSON, MAX_COUNT, integer, integers, load_json, shown, text_of
from softcache.errors import FormatError

MAGIC = b"\x89SFTC\r\n\x1a"
PREAMBLE = struct.Struct("<8sQQQ")  # magic, offset, length, digest of the JSON
VERSION = (1, 3)  # the newest that this reader knows
BASE_VERSION = (1, 0)  # of a cache without features, so that older readers open it
ROWS = "rows"  # the feature of samples with many rows, and the field that describes them
# the features that a cache may need, with the version that added each
FEATURES = {INPUTS: (1, 1), LABEL_SETS: (1, 2), ROWS: (1, 3)}
PACKED_VERSION = (1, 3)  # that added the encoding `packed`
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_USER_BLOCK = 8 << 20  # bytes
MAX_CLASSES = 1 << 24
MAX_BLOCKS = 1 << 22  # in all views together
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


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
    rows: JSON | None = None  # of samples with many: count, unit, and how texts became tokens

    @property
    def embeds_inputs(self) -> bool:
        """Whether the file contains the samples themselves."""
        return INPUTS in self.must_understand

    @property
    def multi_label(self) -> bool:
        """Whether each class applies or not on its own, so that a sample may have several labels."""
        return isinstance(self.encoding, Bernoulli)

    @property
    def row_count(self) -> int:
        """Rows of one view: one for each sample, or those of all its tokens, frames or pixels."""
        return self.samples if self.rows is None else int(self.rows["count"])

    @property
    def unit(self) -> str:
        """What a row is: a token, word, frame or pixel; or a sample."""
        return "sample" if self.rows is None else str(self.rows["unit"])

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
        """Dtype and shape of one embedded sample; None if none is embedded, or they are tokens."""
        if not self.embeds_inputs or self.rows is not None:
            return None
        array = self.array(INPUTS)
        return ArraySpec(INPUTS, array.dtype, "samples", array.shape[1:])

    @property
    def blocks(self) -> int:
        """Blocks of one view."""
        return -(-self.row_count // self.block_rows)

    def array(self, name: str) -> Array:
        return next(array for array in self.arrays if array.name == name)

    def block_range(self, block: int) -> range:
        """The rows of one block."""
        start = block * self.block_rows
        return range(start, min(start + self.block_rows, self.row_count))

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the soft targets of one row in one view, over all arrays."""
        return sum(array.row_bytes for array in self.arrays if array.axis == "rows")

    def to_json(self) -> JSON:
        """The header as a JSON object."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["encoding"] = encoding_to_json(self.encoding)
        fields["arrays"] = [dataclasses.asdict(array) for array in self.arrays]
        if self.rows is None:
            del fields[ROWS]  # files without the feature stay as older versions wrote them
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
    if ROWS not in fields["must_understand"]:
        expected.remove(ROWS)
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
    if header.multi_label and header.rows is not None:
        raise FormatError(
            f"must_understand has both {LABEL_SETS} and {ROWS}; expected one of them at most, since each row "
            "has one class"
        )
    check_arrays(header, file_bytes)
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
    rows = provenance.rows(fields[ROWS]) if ROWS in fields["must_understand"] else None
    row_count = samples if rows is None else int(rows["count"])
    views = integer(fields, "views", 1, MAX_COUNT // max(samples, row_count))
    block_rows = integer(fields, "block_rows", 1, row_count)
    blocks = views * -(-row_count // block_rows)
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
        positions=integers(fields, "positions", 1, MAX_COUNT if rows is None else 0),
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
        arrays=tuple(parse_array(array) for array in arrays),
        summary=provenance.summary(fields["summary"]),
        must_understand=tuple(fields["must_understand"]),
        version=version,
        rows=rows,
    )
