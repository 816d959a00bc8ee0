"""Allocate an unfinished file: its layout is fixed and every byte reserved before the first row.

libhdf5 creates the empty file and never touches it again.
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

from softcache.cache.array_spec import ArraySpec
from softcache.cache.arrays import INPUTS, Array, digest_arrays, expected_arrays
from softcache.cache.disk import disk_errors, pwrite, sync_folder
from softcache.cache.header import MAX_BLOCKS, Header, parse_header, preamble
from softcache.cache.layout import RUN_ROWS
from softcache.cache.reader import hdf5_digest, partial_path, raw_bytes, shared_digest
from softcache.errors import FormatError

BLOCK_BYTES = 1 << 20  # bytes of rows in a block, about
BLOCK_INPUT_BYTES = 8 << 20  # of embedded inputs in a block, since a pull holds a few in memory
BLOCKS_PER_VIEW = 64  # at least, so that processes can share a small file out
MIN_BLOCK_ROWS = 1024  # but no block is made smaller than this to get there
ALIGNMENT = 64  # bytes, of every array: one cache line
USER_BLOCK = 1 << 16  # bytes: room for the initial and the final header
HEADER_ROOM = 1 << 14  # bytes that the summary may add to the header

Stored = dict[str, npt.NDArray[Any]]
Values = Mapping[str, npt.NDArray[Any]]


def block_rows(views: int, total: int, row_bytes: int, batch: int = 1, input_bytes: int = 0) -> int:
    """Rows of a block: about 1 MiB of them.

    A block has fewer rows if a small file would otherwise have too few blocks to share out among
    processes, or if its embedded inputs are large; and more if the file would have too many blocks.
    It is a multiple of the batch, or the batch of it, so that the two do not straddle each other.

    Args:
        total: rows of one view.
        row_bytes: bytes of one row in one view.
        batch: rows that are written at a time.
        input_bytes: bytes of one embedded input; 0 if inputs are not embedded.
    """
    min_rows = -(-views * total // (MAX_BLOCKS // 2))
    rows_to_share = max(MIN_BLOCK_ROWS, total // BLOCKS_PER_VIEW)
    rows_by_inputs = BLOCK_INPUT_BYTES // max(1, input_bytes)
    rows = max(1, min_rows, min(BLOCK_BYTES // row_bytes, rows_to_share, rows_by_inputs))
    if rows >= batch:
        rows -= rows % batch if rows - rows % batch >= min_rows else 0
    else:
        rows = next(divisor for divisor in range(rows, batch + 1) if batch % divisor == 0)
    return min(total, rows)


def create(
    path: Path, draft: Header, shared: Values, batch: int = 1, inputs: ArraySpec | None = None
) -> None:
    """Allocate the unfinished file for `path`: every byte is reserved, all blocks are missing.

    Args:
        draft: the header without its layout, which is filled in here.
        shared: the arrays that all rows share, among them class_names |S (C,),
            fingerprinted int64 (F,) and fingerprints float32 (views, F, FINGERPRINT).
        batch: rows that will be written at a time.
        inputs: dtype and shape of one sample, if the draft says that inputs are embedded; not of tokens,
            which are among the shared arrays.

    Raises:
        SoftcacheError: the file cannot be created, for lack of space or of permission.
    """
    with _new_file(path) as new_path:
        try:
            header = _allocate(new_path, draft, shared, batch, inputs)
        except RuntimeError as error:  # what h5py raises if the disk is full as it closes the file
            code = re.search(r"errno = (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
        _initialize(new_path, header, shared)


def clone(
    path: Path, header: Header, shared: Values, structure: Iterable[tuple[int, bytes]]
) -> None:
    """Allocate the unfinished file for `path` with the layout of a finished one.

    Args:
        header: of the finished file; filled with the same rows, the clone has the same bytes.
        shared: the arrays of the finished file that all its rows share.
        structure: (offset, bytes) of the HDF5 structures, for each of gaps(header).

    Raises:
        FormatError: `shared` or `structure` do not match the header's digests.
        SoftcacheError: the file cannot be created, for lack of space or of permission.
    """
    with _new_file(path) as new_path:
        with new_path.open("wb") as file:
            for offset, part in structure:
                file.seek(offset)
                file.write(part)
        _initialize(new_path, header, shared)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes the unfinished file for `path` if the block succeeds."""
    partial = partial_path(path)
    new_path = partial.with_name(f"{partial.name}.new")
    with disk_errors(partial, "create"):
        try:
            yield new_path
            new_path.replace(partial)
            sync_folder(partial.parent)
        except BaseException:
            new_path.unlink(missing_ok=True)
            raise


def _initialize(path: Path, header: Header, shared: Values) -> None:
    """Reserve every byte; write the shared arrays and the initial header."""
    file = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with disk_errors(
                path.with_name(path.name.removesuffix(".new")), "create", header.file_bytes
            ):
                os.posix_fallocate(file, 0, header.file_bytes)
        for array in header.arrays:
            if array.axis == "shared":
                pwrite(file, _bytes(shared[array.name], array), array.offset)
        initial = dataclasses.replace(
            header,
            summary=None,
            hdf5_digest=hdf5_digest(file, header),
            shared_digest=shared_digest(shared, header),
        )
        for name in ("hdf5_digest", "shared_digest"):
            actual, expected = getattr(initial, name), getattr(header, name)
            if expected and actual != expected:
                raise FormatError(f"the {name} is {actual}; the header says {expected}")
        text, offset = initial.to_bytes(), header.user_block // 2
        # a dump must not start on a file that no reader would open
        parse_header(text, xxhash.xxh3_64_intdigest(text), header.file_bytes)
        pwrite(file, text, offset)
        pwrite(file, preamble(offset, text), 0)
        os.fsync(file)
    finally:
        os.close(file)


def _allocate(
    path: Path, draft: Header, shared: Values, batch: int, inputs: ArraySpec | None
) -> Header:
    """Create the empty HDF5 file, and return the header with the offsets of its arrays."""
    import h5py
    from h5py import h5d, h5f, h5p, h5s, h5t

    if draft.rows is not None and draft.embeds_inputs:
        inputs = ArraySpec(INPUTS, "<i4", "shared", shared[INPUTS].shape)
    layout = expected_arrays(
        draft,
        name_bytes=shared["class_names"].dtype.itemsize,
        fingerprinted=len(shared["fingerprinted"]),
        inputs=inputs,
        runs=len(shared.get(RUN_ROWS, ())),
    )
    row_bytes, input_bytes = (
        sum(
            np.dtype(spec.dtype).itemsize * int(np.prod(shape[leading:], dtype=np.int64))
            for spec, shape in layout
            if spec.axis == axis
        )
        for axis, leading in (("rows", 2), ("samples", 1))
    )
    rows = block_rows(draft.views, draft.row_count, row_bytes, batch, input_bytes)
    header = dataclasses.replace(draft, block_rows=rows)
    layout += digest_arrays(header.views, header.blocks).values()
    user_block = USER_BLOCK
    while user_block < 2 * (len(header.to_bytes()) + HEADER_ROOM):
        user_block *= 2

    access = h5p.create(h5p.FILE_ACCESS)
    access.set_alignment(1, ALIGNMENT)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_userblock(user_block)
    # without timestamps, in the root group and in the arrays, the same dump gives the same bytes
    creation.set_obj_track_times(False)
    with h5py.File(h5f.create(os.fsencode(path), h5f.ACC_TRUNC, creation, access)) as file:
        file.attrs["softcache"] = np.bytes_(
            b"a softcache cache: soft targets of a teacher; the header is JSON at the file's start"
        )
        arrays = []
        for spec, shape in layout:
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
