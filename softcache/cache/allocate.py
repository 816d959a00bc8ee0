"""An unfinished file: its byte layout is fixed, and every byte reserved, before the first row is computed.

libhdf5 makes the empty file, and never touches it again.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from softcache.cache.disk import disk_errors, pwrite, sync_folder
from softcache.cache.encodings import ArraySpec
from softcache.cache.header import (
    MAX_BLOCKS,
    Array,
    Header,
    digest_arrays,
    expected_arrays,
    parse_header,
    preamble,
)
from softcache.cache.reader import hdf5_digest, partial_path, raw_bytes, shared_digest
from softcache.errors import FormatError

BLOCK_BYTES = 1 << 20  # of rows
BLOCK_INPUTS = (
    8 << 20
)  # bytes of embedded inputs of a block: whoever pulls it holds a few in memory
LEAST_ROWS, BLOCKS_OF_A_VIEW = (
    1024,
    64,
)  # blocks of a view: so many at least, if they have enough rows
ALIGNMENT = 64  # bytes, of every array: a cache line of memory
USER_BLOCK = 1 << 16  # room for two headers: the one begun with, and the final one
HEADER_ROOM = 1 << 14  # what the summary may add to the header


Stored = dict[str, npt.NDArray[Any]]
Values = Mapping[str, npt.NDArray[Any]]


def block_rows(
    views: int, samples: int, row_bytes: int, batch: int = 1, input_bytes: int = 0
) -> int:
    """Rows of a block: about 1 MiB; fewer, where a small file would have too few blocks to share
    out, or the inputs that it embeds are large; more, where there would be too many. Batches and
    blocks do not straddle each other."""
    fewest = -(-views * samples // (MAX_BLOCKS // 2))
    shared_out = max(LEAST_ROWS, samples // BLOCKS_OF_A_VIEW)
    inputs_fit = BLOCK_INPUTS // max(1, input_bytes)
    rows = max(1, fewest, min(BLOCK_BYTES // row_bytes, shared_out, inputs_fit))
    if rows >= batch:
        rows -= rows % batch if rows - rows % batch >= fewest else 0
    else:
        rows = next(part for part in range(rows, batch + 1) if batch % part == 0)
    return min(samples, rows)


def create(
    path: Path, draft: Header, shared: Values, batch: int = 1, inputs: ArraySpec | None = None
) -> None:
    """Allocate the unfinished file for `path`: every byte is reserved, no row is there.

    Args:
        draft: the header but for its layout, which is filled in here.
        shared: whole arrays that all rows share, among them class_names |S (C,),
            fingerprinted int64 (F,) and fingerprints float32 (views, F, FINGERPRINT).
        batch: how many rows will come at a time.
        inputs: what one sample is, if the draft says that the samples are embedded.

    Raises:
        SoftcacheError: the file cannot be made, for want of space or of permission.
    """
    with _unborn(path) as unborn:
        try:
            header = _allocate(unborn, draft, shared, batch, inputs)
        except RuntimeError as error:  # so h5py says at close that the disk took no more
            number = re.search(r"errno = (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        _begin(unborn, header, shared)


def clone(
    path: Path, header: Header, shared: Values, structure: Iterable[tuple[int, bytes]]
) -> None:
    """Allocate the unfinished file for `path` with the layout of another, finished one.

    Args:
        header: of the other; filled with its rows, this file becomes the same to the byte.
        shared: its arrays that all rows share.
        structure: offset and bytes of what libhdf5 wrote for itself, of all gaps().

    Raises:
        FormatError: what is given does not match the header's digests.
        SoftcacheError: the file cannot be made, for want of space or of permission.
    """
    with _unborn(path) as unborn:
        with unborn.open("wb") as file:
            for offset, part in structure:
                file.seek(offset)
                file.write(part)
        _begin(unborn, header, shared)


@contextmanager
def _unborn(path: Path) -> Iterator[Path]:
    """Where the unfinished file for `path` is made, before it gets its name."""
    partial = partial_path(path)
    unborn = partial.with_name(f"{partial.name}.new")
    with disk_errors(partial, "create"):
        try:
            yield unborn
            unborn.replace(partial)
            sync_folder(partial.parent)
        except BaseException:
            unborn.unlink(missing_ok=True)
            raise


def _begin(unborn: Path, header: Header, shared: Values) -> None:
    """Reserve every byte; write shared arrays, and the header that a dump begins with."""
    file = os.open(unborn, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file, 0, header.file_bytes)
        for array in header.arrays:
            if array.axis == "shared":
                pwrite(file, _bytes(shared[array.name], array), array.offset)
        found = dataclasses.replace(
            header,
            summary=None,
            hdf5_digest=hdf5_digest(file, header),
            shared_digest=shared_digest(shared, header),
        )
        for name in ("hdf5_digest", "shared_digest"):
            known = getattr(header, name)
            if known and known != getattr(found, name):
                raise FormatError(f"the {name} is {getattr(found, name)}; the header says {known}")
        text, at = found.to_bytes(), header.user_block // 2
        # what no reader would open must not be begun
        parse_header(text, xxhash.xxh3_64_intdigest(text), header.file_bytes)
        pwrite(file, text, at)
        pwrite(file, preamble(at, text), 0)
        os.fsync(file)
    finally:
        os.close(file)


def _allocate(
    path: Path, draft: Header, shared: Values, batch: int, inputs: ArraySpec | None
) -> Header:
    """Make the empty HDF5 file, and say where its arrays lie."""
    import h5py
    from h5py import h5d, h5f, h5p, h5s, h5t

    wanted = expected_arrays(
        draft.encoding,
        views=draft.views,
        samples=draft.samples,
        positions=draft.positions,
        classes=draft.classes,
        name_bytes=shared["class_names"].dtype.itemsize,
        fingerprinted=len(shared["fingerprinted"]),
        inputs=inputs,
    )
    row_bytes, input_bytes = (
        sum(
            np.dtype(spec.dtype).itemsize * int(np.prod(shape[leading:], dtype=np.int64))
            for spec, shape in wanted
            if spec.axis == axis
        )
        for axis, leading in (("rows", 2), ("samples", 1))
    )
    rows = block_rows(draft.views, draft.samples, row_bytes, batch, input_bytes)
    header = dataclasses.replace(draft, block_rows=rows)
    wanted += digest_arrays(header.views, header.blocks).values()
    user_block = USER_BLOCK
    while user_block < 2 * (len(header.to_bytes()) + HEADER_ROOM):
        user_block *= 2

    access = h5p.create(h5p.FILE_ACCESS)
    access.set_alignment(1, ALIGNMENT)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_userblock(user_block)
    # no clock in the file: neither the root group nor the arrays record when they were made
    creation.set_obj_track_times(False)
    with h5py.File(h5f.create(os.fsencode(path), h5f.ACC_TRUNC, creation, access)) as file:
        file.attrs["softcache"] = np.bytes_(
            b"a softcache cache: soft targets of a teacher; the header is JSON at the file's start"
        )
        arrays = []
        for spec, shape in wanted:
            properties = h5p.create(h5p.DATASET_CREATE)
            properties.set_layout(h5d.CONTIGUOUS)
            properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)
            kind = h5t.py_create(np.dtype(spec.dtype))
            if spec.dtype.startswith("|S"):
                kind.set_cset(h5t.CSET_UTF8)
            name = spec.name.encode()
            dataset = h5d.create(file.id, name, kind, h5s.create_simple(shape), properties)
            offset = dataset.get_offset()
            arrays.append(Array(spec.name, spec.dtype, shape, spec.axis, offset))
    return dataclasses.replace(
        header,
        user_block=user_block,
        file_bytes=path.stat().st_size,
        hdf5_digest="",
        shared_digest="",
        arrays=tuple(arrays),
        summary=None,
    )


def _bytes(values: npt.NDArray[Any], array: Array) -> memoryview:
    if values.shape != array.shape:
        raise ValueError(f"{array.name} has shape {values.shape}; expected {array.shape}")
    return raw_bytes(np.ascontiguousarray(values, array.dtype))
