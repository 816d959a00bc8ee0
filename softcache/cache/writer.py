"""Allocate, then fill: a cache's byte layout is fixed before its first row is computed.

libhdf5 makes the empty file and never touches it again; rows go in with pwrite, and a block counts
only once its digest is written, after its data have reached the disk.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from softcache.cache.encodings import ArraySpec, Axis
from softcache.cache.header import (
    MAX_BLOCKS,
    PREAMBLE,
    Array,
    Header,
    digest_arrays,
    expected_arrays,
    parse_header,
    parse_preamble,
    preamble,
)
from softcache.cache.reader import (
    Cache,
    digest_of,
    hdf5_digest,
    open_cache,
    partial_path,
    raw_bytes,
    shared_digest,
)
from softcache.errors import DataError, SoftcacheError

BLOCK_BYTES = 1 << 20
LEAST_ROWS, BLOCKS_OF_A_VIEW = (
    1024,
    64,
)  # blocks of a view: so many at least, if they have enough rows
COMMIT_BYTES = 64 << 20  # how much may wait for one fdatasync,
COMMIT_SECONDS = 1.0  # and how long: what a kill costs at most
ALIGNMENT = 64  # bytes, of every array: a cache line of memory
USER_BLOCK = 1 << 16  # room for two headers: the one begun with, and the final one
HEADER_ROOM = 1 << 14  # what the summary may add to the header

Stored = dict[str, npt.NDArray[Any]]
Values = Mapping[str, npt.NDArray[Any]]


def block_rows(views: int, samples: int, row_bytes: int, batch: int = 1) -> int:
    """Rows of a block: about 1 MiB; fewer, where a small file would have too few blocks to share
    out; more, where there would be too many. Batches and blocks do not straddle each other."""
    fewest = -(-views * samples // (MAX_BLOCKS // 2))
    shared_out = max(LEAST_ROWS, samples // BLOCKS_OF_A_VIEW)
    rows = max(1, fewest, min(BLOCK_BYTES // row_bytes, shared_out))
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
    partial = partial_path(path)
    unborn = partial.with_name(f"{partial.name}.new")
    with _explained(partial, "create"):
        try:
            try:
                header = _allocate(unborn, draft, shared, batch, inputs)
            except RuntimeError as error:  # so h5py says at close that the disk took no more
                number = re.search(r"errno = (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
            file = os.open(unborn, os.O_RDWR)
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file, 0, header.file_bytes)
                for array in header.arrays:
                    if array.axis == "shared":
                        _pwrite(file, _bytes(shared[array.name], array), array.offset)
                header = dataclasses.replace(
                    header,
                    hdf5_digest=hdf5_digest(file, header),
                    shared_digest=shared_digest(shared, header),
                )
                text, at = header.to_bytes(), header.user_block // 2
                # what no reader would open must not be begun
                parse_header(text, xxhash.xxh3_64_intdigest(text), header.file_bytes)
                _pwrite(file, text, at)
                _pwrite(file, preamble(at, text), 0)
                os.fsync(file)
            finally:
                os.close(file)
            unborn.replace(partial)
            _sync_folder(partial.parent)
        except BaseException:
            unborn.unlink(missing_ok=True)
            raise


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
    row_bytes = sum(
        np.dtype(spec.dtype).itemsize * int(np.prod(shape[2:], dtype=np.int64))
        for spec, shape in wanted
        if spec.axis == "rows"
    )
    header = dataclasses.replace(
        draft, block_rows=block_rows(draft.views, draft.samples, row_bytes, batch)
    )
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
        arrays=tuple(arrays),
        summary=None,
    )


class Writer:
    """Fills an unfinished cache, block by block; a context manager, which commits at its end.

    Blocks that were committed before are checked as it opens, and those found bad are missing; not with
    `recheck` unset, for who has just written them all.
    """

    def __init__(self, path: Path, *, recheck: bool = True) -> None:
        self.path = path
        self.cache: Cache = open_cache(partial_path(path), unfinished=True)
        self.header: Header = self.cache.header
        with _explained(path, "open"):
            self._file = os.open(partial_path(path), os.O_RDWR)
        self._filling: dict[
            tuple[int | None, int], tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.bool_]]
        ] = {}
        self._written: list[tuple[int, int]] = []  # (where its digest goes, digest)
        self._written_bytes = 0
        self._last_commit = time.monotonic()
        self._committed: dict[int | None, npt.NDArray[np.bool_]] = {
            None: self.cache.arrays["sample_digests"] != 0,
            **{view: digests != 0 for view, digests in enumerate(self.cache.arrays["digests"])},
        }
        try:
            if recheck:
                with _explained(path, "write"):
                    self._recheck()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.commit()
        finally:
            os.close(self._file)

    def missing(self, view: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.bool_]:
        """Which samples from start to stop of a view are not committed yet, (stop - start,)."""
        samples = range(self.header.samples)[start:stop]
        first, last = (
            samples.start // self.header.block_rows,
            -(-samples.stop // self.header.block_rows),
        )
        committed = self._committed[view][first:last]
        if view == 0:
            committed = committed & self._committed[None][first:last]
        rows = np.repeat(~committed, self.header.block_rows)
        offset = samples.start - first * self.header.block_rows
        return rows[offset : offset + len(samples)]

    def write(self, view: int, start: int, rows: Values, samples: Values) -> None:
        """Take the rows of samples start, start + 1, …; those already committed are left alone.

        Args:
            rows: the encoding's arrays, each (B, …) in the file's dtype.
            samples: labels (B, *positions) int64 and keys (B,) uint64; stored with view 0,
                compared with what is stored in any other.

        Raises:
            DataError: the samples differ from those of view 0.
            SoftcacheError: the disk is full, or fails.
        """
        with _explained(self.path, "write"):
            self._fill(view, start, rows)
            if view == 0:
                self._fill(None, start, samples)
            else:
                self._compare(start, samples)
            waited = time.monotonic() - self._last_commit
            if self._written_bytes >= COMMIT_BYTES or waited >= COMMIT_SECONDS:
                self.commit()

    def commit(self) -> None:
        """Make every whole block count: its data to the disk, then its digest."""
        written, self._written, self._written_bytes = self._written, [], 0
        # what fails here stays missing: after a failed sync the system forgets the lost pages, and a
        # second sync would succeed without them
        with _explained(self.path, "write"):
            if written:
                os.fdatasync(self._file)
                for offset, digest in written:
                    _pwrite(self._file, digest.to_bytes(8, "little"), offset)
            self._last_commit = time.monotonic()

    def finish(self, summary: dict[str, Any]) -> Path:
        """Write the summary into the header, and give the file its name."""
        self.commit()
        missing = self.cache.missing_blocks()
        if missing:
            raise SoftcacheError(
                f"cannot finish {self.path}: {missing} blocks are missing; run the same command again"
            )
        header = dataclasses.replace(self.header, summary=summary)
        text, old = header.to_bytes(), self.header.user_block // 2
        if PREAMBLE.size + len(text) > old:
            raise SoftcacheError(f"header of {len(text):,} bytes; the file has room for {old:,}")
        with _explained(self.path, "finish"):
            raw = os.pread(self._file, PREAMBLE.size, 0)
            if parse_preamble(raw, self.header.file_bytes)[0] == old:
                _pwrite(self._file, text, PREAMBLE.size)
                os.fsync(self._file)
                _pwrite(self._file, preamble(PREAMBLE.size, text), 0)
                os.fsync(self._file)
            _pwrite(self._file, bytes(self.header.user_block - old), old)
            os.fsync(self._file)
            partial_path(self.path).replace(self.path)
            _sync_folder(self.path.parent)
        return self.path

    def _recheck(self) -> None:
        for view, committed in self._committed.items():
            for block in map(int, np.flatnonzero(committed)):
                if view is None:
                    good = (
                        self.cache.sample_digest(block)
                        == self.cache.arrays["sample_digests"][block]
                    )
                else:
                    stored = self.cache.arrays["digests"][view, block]
                    good = self.cache.block_digest(view, block) == stored
                if not good:
                    committed[block] = False
                    _pwrite(self._file, bytes(8), digest_offset(self.header, view, block))

    def _arrays(self, axis: Axis) -> list[Array]:
        return [array for array in self.header.arrays if array.axis == axis]

    def _fill(self, view: int | None, start: int, values: Values) -> None:
        """Copy values into the buffers of their blocks; write those that become whole."""
        arrays = self._arrays("samples" if view is None else "rows")
        count = len(values[arrays[0].name])
        per_block = self.header.block_rows
        for block in range(start // per_block, (start + count - 1) // per_block + 1):
            if self._committed[view][block]:
                continue
            samples = self.header.block_range(block)
            low, high = max(start, samples.start), min(start + count, samples.stop)
            if (view, block) not in self._filling:
                there = np.zeros(len(samples), np.bool_)
                self._filling[view, block] = self._buffers(arrays, len(samples)), there
            buffers, there = self._filling[view, block]
            for array in arrays:
                part = values[array.name][low - start : high - start]
                buffers[array.name][low - samples.start : high - samples.start] = part
            there[low - samples.start : high - samples.start] = True
            if there.all():
                self._write_block(view, block, arrays, buffers)

    def _buffers(self, arrays: list[Array], rows: int) -> Stored:
        return {
            array.name: np.empty(
                (rows, *array.shape[1 if array.axis == "samples" else 2 :]), array.dtype
            )
            for array in arrays
        }

    def _write_block(
        self,
        view: int | None,
        block: int,
        arrays: list[Array],
        buffers: Stored,
    ) -> None:
        first = self.header.block_range(block).start
        row = first if view is None else view * self.header.samples + first
        for array in arrays:
            values = raw_bytes(buffers[array.name])
            _pwrite(self._file, values, array.offset + row * array.row_bytes)
            self._written_bytes += len(values)
        digest = digest_of(buffers[array.name] for array in arrays)
        self._written.append((digest_offset(self.header, view, block), digest))
        self._committed[view][block] = True
        del self._filling[view, block]

    def _compare(self, start: int, samples: Values) -> None:
        count = len(next(iter(samples.values())))
        blocks = np.arange(start, start + count) // self.header.block_rows
        # another process may not have written view 0 of these samples yet
        there = self._committed[None][blocks] | (self.cache.arrays["sample_digests"][blocks] != 0)
        for name, values in samples.items():
            stored = self.cache.arrays[name][start : start + count]
            differs = np.flatnonzero((stored != values).reshape(count, -1).any(1) & there)
            if len(differs):
                at = int(differs[0])
                raise DataError(
                    f"sample {start + at}: its {name} are {values[at]} now and were {stored[at]} in "
                    "view 0; the data changed under the dump: give it data that stay the same"
                )


def forget(partial: Path, blocks: Iterable[tuple[int | None, int]]) -> None:
    """Mark blocks (view, block) of an unfinished file as missing; view None: labels and keys."""
    header = open_cache(partial, unfinished=True).header
    with _explained(partial, "write"):
        file = os.open(partial, os.O_RDWR)
        try:
            for view, block in blocks:
                _pwrite(file, bytes(8), digest_offset(header, view, block))
            os.fsync(file)
        finally:
            os.close(file)


def digest_offset(header: Header, view: int | None, block: int) -> int:
    """Where the digest of a block lies in the file; view None: of labels and keys."""
    if view is None:
        return header.array("sample_digests").offset + 8 * block
    return header.array("digests").offset + 8 * (view * header.blocks + block)


def _bytes(values: npt.NDArray[Any], array: Array) -> memoryview:
    if values.shape != array.shape:
        raise ValueError(f"{array.name} has shape {values.shape}; expected {array.shape}")
    return raw_bytes(np.ascontiguousarray(values, array.dtype))


def _pwrite(file: int, values: bytes | memoryview, offset: int) -> None:
    """Write all of `values`: a single pwrite may take fewer bytes, 2 GiB at the most."""
    rest = memoryview(values)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _reason(error: OSError) -> str:
    # of h5py's own, the text has several lines and addresses
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


@contextmanager
def _explained(path: Path, deed: str) -> Iterator[None]:
    """Say of an error of the disk which file it hit, and what to do."""
    try:
        yield
    except OSError as error:
        advice = (
            "free some space, or give another --out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "see to the disk and its permissions"
        )
        raise SoftcacheError(
            f"cannot {deed} {path}: {_reason(error)}; {advice}, then run the same command: "
            "it goes on where it stopped"
        ) from error
