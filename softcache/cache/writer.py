"""Fill what allocate.py made: rows go in with pwrite, and a block counts only once its digest is written,
after its data have reached the disk.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache.allocate import Stored, Values
from softcache.cache.disk import disk_errors, pwrite, sync_folder
from softcache.cache.encodings import Axis
from softcache.cache.header import (
    PREAMBLE,
    Array,
    Header,
    parse_preamble,
    preamble,
)
from softcache.cache.reader import (
    Cache,
    digest_of,
    open_cache,
    partial_path,
    raw_bytes,
)
from softcache.errors import DataError, SoftcacheError

COMMIT_BYTES = 64 << 20  # how much may wait for one fdatasync,
COMMIT_SECONDS = 1.0  # and how long: what a kill costs at most


class Writer:
    """Fills an unfinished cache, block by block; a context manager, which commits at its end.

    Blocks that were committed before are checked as it opens, and those found bad are missing; not with
    `recheck` unset, for who has just written them all.
    """

    def __init__(self, path: Path, *, recheck: bool = True) -> None:
        self.path = path
        self.cache: Cache = open_cache(partial_path(path), unfinished=True)
        self.header: Header = self.cache.header
        with disk_errors(path, "open"):
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
                with disk_errors(path, "write"):
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
        with disk_errors(self.path, "write"):
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
        with disk_errors(self.path, "write"):
            if written:
                os.fdatasync(self._file)
                for offset, digest in written:
                    pwrite(self._file, digest.to_bytes(8, "little"), offset)
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
        with disk_errors(self.path, "finish"):
            raw = os.pread(self._file, PREAMBLE.size, 0)
            if parse_preamble(raw, self.header.file_bytes)[0] == old:
                pwrite(self._file, text, PREAMBLE.size)
                os.fsync(self._file)
                pwrite(self._file, preamble(PREAMBLE.size, text), 0)
                os.fsync(self._file)
            pwrite(self._file, bytes(self.header.user_block - old), old)
            os.fsync(self._file)
            partial_path(self.path).replace(self.path)
            sync_folder(self.path.parent)
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
                    pwrite(self._file, bytes(8), digest_offset(self.header, view, block))

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
            pwrite(self._file, values, array.offset + row * array.row_bytes)
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


def mark_missing(partial: Path, blocks: Iterable[tuple[int | None, int]]) -> None:
    """Mark blocks (view, block) of an unfinished file as missing; view None: labels and keys."""
    header = open_cache(partial, unfinished=True).header
    with disk_errors(partial, "write"):
        file = os.open(partial, os.O_RDWR)
        try:
            for view, block in blocks:
                pwrite(file, bytes(8), digest_offset(header, view, block))
            os.fsync(file)
        finally:
            os.close(file)


def digest_offset(header: Header, view: int | None, block: int) -> int:
    """Where the digest of a block lies in the file; view None: of labels and keys."""
    if view is None:
        return header.array("sample_digests").offset + 8 * block
    return header.array("digests").offset + 8 * (view * header.blocks + block)
