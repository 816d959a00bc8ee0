"""The arrays of a cache: which ones a header has to describe, with their types, shapes and places."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from softcache.cache.array_spec import DTYPES, ArraySpec, Axis
from softcache.cache.fields import MAX_COUNT, integer, integers, shown, text_of
from softcache.cache.layout import OFFSETS, RUN_POSITIONS, RUN_ROWS
from softcache.errors import FormatError, SettingsError

if TYPE_CHECKING:
    from softcache.cache.header import Header

INPUTS = "inputs"  # the feature of embedded samples, and the array that holds them
INPUT_OFFSETS = "input_offsets"  # where the embedded tokens of each sample begin
MAX_FILE = 1 << 60  # bytes
FINGERPRINT = 8  # numbers in the fingerprint of one augmented sample
OFFSET_UNIT = 8  # bytes, so that every value of every array is aligned
MAX_NAME = 1024  # bytes of a class name


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
        """Bytes of one row or sample; in arrays of rows, in one view."""
        leading = {"rows": 2, "labels": 1, "samples": 1, "shared": 0, "commits": 0}[self.axis]
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[leading:])


def expected_arrays(
    header: Header,
    *,
    name_bytes: int,
    fingerprinted: int,
    inputs: ArraySpec | None = None,
    runs: int = 0,
) -> list[tuple[ArraySpec, tuple[int, ...]]]:
    """Every array of a cache but the digests, with its whole shape.

    Args:
        header: a header, or the draft of one, without its layout.
        name_bytes: bytes of one class name.
        fingerprinted: number of samples with fingerprints, F.
        inputs: dtype and shape of one embedded sample, if samples are embedded; of all embedded tokens
            together, if samples have many rows.
        runs: number of runs of positions, if samples have many rows.
    """
    views, samples, positions = header.views, header.samples, header.positions
    classes = header.classes
    specs = header.encoding.arrays(classes)
    if header.rows is None:
        specs += [
            ArraySpec("labels", "<i8", "samples", positions),
            ArraySpec("keys", "<u8", "samples", ()),
            *([inputs] if inputs else []),
        ]
    else:
        specs += [
            ArraySpec("labels", "<i4", "labels", ()),
            ArraySpec("keys", "<u8", "shared", (samples,)),
            ArraySpec(OFFSETS, "<i8", "shared", (samples + 1,)),
            ArraySpec(RUN_ROWS, "<i8", "shared", (runs,)),
            ArraySpec(RUN_POSITIONS, "<i8", "shared", (runs,)),
        ]
        if inputs:
            specs += [inputs, ArraySpec(INPUT_OFFSETS, "<i8", "shared", (samples + 1,))]
    specs += [
        ArraySpec("class_names", f"|S{name_bytes}", "shared", (classes,)),
        ArraySpec("fingerprinted", "<i8", "shared", (fingerprinted,)),
        ArraySpec("fingerprints", "<f4", "shared", (views, fingerprinted, FINGERPRINT)),
    ]
    leading: Mapping[Axis, tuple[int, ...]] = {
        "rows": (views, header.row_count, *positions),
        "labels": (header.row_count,),
        "samples": (samples,),
        "shared": (),
        "commits": (),
    }
    return [(spec, (*leading[spec.axis], *spec.shape)) for spec in specs]


def check_arrays(header: Header, file_bytes: int) -> None:
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
    runs = arrays.get(RUN_ROWS)
    try:
        specs = expected_arrays(
            header,
            name_bytes=np.dtype(names.dtype).itemsize if names else 1,
            fingerprinted=fingerprinted.shape[0] if fingerprinted and fingerprinted.shape else 1,
            inputs=_inputs_spec(header, arrays),
            runs=runs.shape[0] if runs and runs.shape else 1,
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
    if header.rows is not None:
        return ArraySpec(INPUTS, "<i4", "shared", array.shape[:1] or (1,))
    return ArraySpec(INPUTS, array.dtype, "samples", array.shape[1:])


def digest_arrays(views: int, blocks: int) -> dict[str, tuple[ArraySpec, tuple[int, ...]]]:
    """The digests that commit blocks: of soft targets in each view, and of what all views share."""
    rows = ArraySpec("digests", "<u8", "commits", (views, blocks))
    samples = ArraySpec("sample_digests", "<u8", "commits", (blocks,))
    return {spec.name: (spec, spec.shape) for spec in (rows, samples)}


def parse_array(fields: object) -> Array:
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
