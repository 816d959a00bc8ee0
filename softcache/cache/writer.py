"""Fill an allocated file: rows are written with pwrite, and committed block by block.

A block counts once its digest is written, which happens only after its data have reached the disk.
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
from softcache.cache.arrays import Array
from softcache.cache.disk import disk_errors, pwrite, sync_data, sync_folder
from softcache.cache.header import PREAMBLE, Header, parse_preamble, preamble
from softcache.cache.reader import ONCE, Cache, digest_of, open_cache, partial_path, raw_bytes
from softcache.errors import DataError, SoftcacheError

COMMIT_BYTES = 64 << 20  # bytes that can wait for one sync,
COMMIT_SECONDS = 1.0  # and for how long: the most that a kill can cost


class Writer:
    """Fills an unfinished cache block by block; a context manager that commits on exit.

    Args:
        path: the final path of the cache; the unfinished file lies beside it.
        recheck: check the blocks that are committed already, and mark those that do not match their
            digest as missing; unset it only if they were written a moment ago.

    Raises:
        MissingCacheError: there is no unfinished file.
        SoftcacheError: the file cannot be opened or written.
    """

    def __init__(self, path: Path, *, recheck: bool = True) -> None:
        self.path = path
        self.cache: Cache = open_cache(partial_path(path), unfinished=True)
        self.header: Header = self.cache.header
        with disk_errors(path, "open"):
            self._file = os.open(partial_path(path), os.O_RDWR)
        # by (view, block), view None for samples: the block's arrays, and which of its rows are filled
        self._filling: dict[tuple[int | None, int], tuple[Stored, npt.NDArray[np.bool_]]] = {}
        self._written: list[tuple[int, int]] = []  # (offset, digest) of blocks to commit
        self._written_bytes = 0
        self._last_commit = time.monotonic()
        # by view, None for samples: which blocks are written
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
        """Which rows are still to be written in a view: bool, (stop - start,).

        Rows that wait for the rest of their block count as written.

        Args:
            start: the first cache_row.
            stop: the cache_row after the last; by default the end of the file.
        """
        cache_rows, block_rows = range(self.header.row_count)[start:stop], self.header.block_rows
        first, last = cache_rows.start // block_rows, -(-cache_rows.stop // block_rows)
        written = {
            part: np.repeat(self._committed[part][first:last], block_rows)
            for part in (
                [view, None] if view == 0 else [view]
            )  # labels and keys are written with view 0
        }
        for (part, block), (_, filled) in list(self._filling.items()):
            if part in written and first <= block < last:
                offset = (block - first) * block_rows
                written[part][offset : offset + len(filled)] |= filled
        missing: npt.NDArray[np.bool_] = ~np.logical_and.reduce(list(written.values()))
        offset = cache_rows.start - first * block_rows
        return missing[offset : offset + len(cache_rows)]

    def write(self, view: int, start: int, rows: Values, samples: Values) -> None:
        """Write B rows of a view; rows of blocks that are committed already are ignored.

        Args:
            start: cache_row of the first.
            rows: the encoding's arrays, each (B, …) in the file's dtype.
            samples: labels (B, *positions) int64, keys (B,) uint64 and any embedded inputs; of samples with
                many rows, labels alone. They are stored with view 0; with any other view they are compared
                with the stored ones.

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
        """Commit every full block: sync its data to the disk, then write its digest."""
        written, self._written, self._written_bytes = self._written, [], 0
        # blocks of a failed commit stay missing: after a failed sync the system drops the pages that it
        # could not write, and a second sync would succeed without them
        with disk_errors(self.path, "write"):
            if written:
                sync_data(self._file)
                for offset, digest in written:
                    pwrite(self._file, digest.to_bytes(8, "little"), offset)
            self._last_commit = time.monotonic()

    def finish(self, summary: dict[str, Any]) -> Path:
        """Write the summary into the header and give the file its final name, which is returned.

        Raises:
            SoftcacheError: blocks are missing, the summary does not fit, or the disk fails.
        """
        self.commit()
        missing = self.cache.missing_blocks()
        if missing:
            raise SoftcacheError(
                f"cannot finish {self.path}: {missing} blocks are missing; run the same command again"
            )
        header = dataclasses.replace(self.header, summary=summary)
        text, initial_offset = header.to_bytes(), self.header.user_block // 2
        if PREAMBLE.size + len(text) > initial_offset:
            raise SoftcacheError(
                f"header of {len(text):,} bytes; the file has room for {initial_offset:,}"
            )
        with disk_errors(self.path, "finish"):
            raw = os.pread(self._file, PREAMBLE.size, 0)
            if parse_preamble(raw, self.header.file_bytes)[0] == initial_offset:
                pwrite(self._file, text, PREAMBLE.size)
                os.fsync(self._file)
                pwrite(self._file, preamble(PREAMBLE.size, text), 0)
                os.fsync(self._file)
            pwrite(self._file, bytes(self.header.user_block - initial_offset), initial_offset)
            os.fsync(self._file)
            partial_path(self.path).replace(self.path)
            sync_folder(self.path.parent)
        return self.path

    def _recheck(self) -> None:
        """Mark committed blocks that do not match their digest as missing."""
        for view, committed in self._committed.items():
            for block in map(int, np.flatnonzero(committed)):
                if view is None:
                    stored = self.cache.arrays["sample_digests"][block]
                    intact = self.cache.sample_digest(block) == stored
                else:
                    stored = self.cache.arrays["digests"][view, block]
                    intact = self.cache.block_digest(view, block) == stored
                if not intact:
                    committed[block] = False
                    pwrite(self._file, bytes(8), digest_offset(self.header, view, block))

    def _arrays(self, view: int | None) -> list[Array]:
        axes = ONCE if view is None else ("rows",)
        return [array for array in self.header.arrays if array.axis in axes]

    def _fill(self, view: int | None, start: int, values: Values) -> None:
        """Copy values into the buffers of their blocks, and write the blocks that become full."""
        arrays = self._arrays(view)
        count = len(values[arrays[0].name])
        per_block = self.header.block_rows
        for block in range(start // per_block, (start + count - 1) // per_block + 1):
            if self._committed[view][block]:
                continue
            cache_rows = self.header.block_range(block)
            low, high = max(start, cache_rows.start), min(start + count, cache_rows.stop)
            inside = slice(low - cache_rows.start, high - cache_rows.start)
            if (view, block) not in self._filling:
                filled = np.zeros(len(cache_rows), np.bool_)
                self._filling[view, block] = self._buffers(arrays, len(cache_rows)), filled
            buffers, filled = self._filling[view, block]
            for array in arrays:
                buffers[array.name][inside] = values[array.name][low - start : high - start]
            filled[inside] = True
            if filled.all():
                self._write_block(view, block, arrays, buffers)

    def _buffers(self, arrays: list[Array], rows: int) -> Stored:
        return {
            array.name: np.empty(
                (rows, *array.shape[2 if array.axis == "rows" else 1 :]), array.dtype
            )
            for array in arrays
        }

    def _write_block(
        self, view: int | None, block: int, arrays: list[Array], buffers: Stored
    ) -> None:
        first = self.header.block_range(block).start
        row = first if view is None else view * self.header.row_count + first
        for array in arrays:
            values = raw_bytes(buffers[array.name])
            pwrite(self._file, values, array.offset + row * array.row_bytes)
            self._written_bytes += len(values)
        digest = digest_of(buffers[array.name] for array in arrays)
        self._written.append((digest_offset(self.header, view, block), digest))
        self._committed[view][block] = True
        del self._filling[view, block]

    def _compare(self, start: int, samples: Values) -> None:
        """Raise DataError if the samples differ from the stored ones, as far as these are written."""
        count = len(next(iter(samples.values())))
        blocks = np.arange(start, start + count) // self.header.block_rows
        # the mapped digests show what other processes have committed meanwhile
        written = self._committed[None][blocks] | (self.cache.arrays["sample_digests"][blocks] != 0)
        for name, values in samples.items():
            stored = self.cache.arrays[name][start : start + count]
            differs = np.flatnonzero((stored != values).reshape(count, -1).any(1) & written)
            if len(differs):
                first = int(differs[0])
                raise DataError(
                    f"{self._sample_of(start + first)}: its {name} are {values[first]}, but were "
                    f"{stored[first]} in view 0; the data changed during the dump: give it data that stay "
                    "the same"
                )

    def _sample_of(self, row: int) -> str:
        """What a row belongs to, for messages."""
        layout = self.cache.layout
        if layout is None:
            return f"sample {row}"
        where = np.array([row])
        return f"sample {layout.samples_of(where)[0]}, {self.header.unit} {layout.positions_of(where)[0]}"


def mark_missing(partial: Path, blocks: Iterable[tuple[int | None, int]]) -> None:
    """Mark blocks of an unfinished file as missing.

    Args:
        blocks: (view, block) for blocks of rows, (None, block) for blocks of samples.
    """
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
    """Offset of a block's digest in the file; with `view` None, of a block of samples."""
    if view is None:
        return header.array("sample_digests").offset + 8 * block
    return header.array("digests").offset + 8 * (view * header.blocks + block)
