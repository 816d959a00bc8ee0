"""Open a cache: check its header, map its arrays, read rows. libhdf5 never sees an untrusted file."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from softcache.cache.array_spec import Floats
from softcache.cache.arrays import Array
from softcache.cache.disk import pread
from softcache.cache.encodings import LABEL_SETS
from softcache.cache.header import PREAMBLE, Header, parse_header, parse_preamble
from softcache.cache.layout import RowLayout, read_layout
from softcache.errors import FormatError, MissingCacheError, SettingsError

PARTIAL = ".partial"
ONCE = ("samples", "labels")  # axes of the arrays that are stored once for all views, in blocks
SHOWN_CLASSES = 1 << 12  # class names that are decoded, since people read them


@dataclass(frozen=True)
class Cache:
    """A cache on disk: its header, and its arrays, memory-mapped and read-only.

    Sent to another process, it is opened there again.
    """

    path: Path
    header: Header
    header_bytes: bytes
    arrays: Mapping[str, npt.NDArray[Any]]
    buffer: mmap.mmap | None = None  # the mapped file that the arrays are views of

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path.absolute(), self.path)

    @property
    def complete(self) -> bool:
        """Whether it has a summary, and no block is missing."""
        return self.header.summary is not None and not self.missing_blocks()

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(rows,), of one view."""
        return self.arrays["labels"]

    @cached_property
    def layout(self) -> RowLayout | None:
        """Which rows belong to which sample; None if each sample has one row.

        Raises:
            FormatError: the file describes rows that it does not have.
        """
        if self.header.rows is None:
            return None
        return read_layout(dict(self.arrays), self.header.row_count, self.path)

    def label_sets(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The classes of some samples of a multi-label cache, (B, C): 1 where a class applies."""
        bits = self.arrays[LABEL_SETS][samples]
        return np.unpackbits(bits, axis=-1, count=self.header.classes)

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        return self.arrays["keys"]

    @property
    def class_names(self) -> list[str]:
        """The first SHOWN_CLASSES names, as printable text."""
        names = [
            name.decode("utf-8", "replace") for name in self.arrays["class_names"][:SHOWN_CLASSES]
        ]
        return [name if name.isprintable() else ascii(name) for name in names]

    def missing_blocks(self) -> int:
        """Number of blocks, of rows and of samples, that are not committed."""
        digests = (self.arrays["digests"], self.arrays["sample_digests"])
        return sum(int((array == 0).sum()) for array in digests)

    def rows(
        self, view: int, cache_rows: npt.NDArray[np.int64], temperature: float | None = None
    ) -> Floats:
        """Log-probabilities of rows in one view.

        Args:
            view: 0 to views - 1, counted within the file.
            cache_rows: (B,) rows of the file.
            temperature: the temperature to decode at; by default that of the dump.

        Returns:
            (B, *positions, C) float32, log softmax(z / temperature).

        Raises:
            SettingsError: the temperature is invalid, or the encoding cannot be re-tempered to it.
            FormatError: a stored class id is out of range, or a row is no distribution.
        """
        stored = {
            array.name: self.arrays[array.name][view, cache_rows]
            if array.axis == "rows"
            else self.arrays[array.name]
            for array in self.header.arrays
            if array.axis in ("rows", "shared")
        }
        dump_temperature, classes = self.header.temperature, self.header.classes
        if temperature is None:
            temperature = dump_temperature
        if not 0 < temperature < np.inf:
            raise SettingsError(f"temperature is {temperature}; expected a number above 0")
        if "ids" in stored and stored["ids"].size and int(stored["ids"].max()) >= classes:
            raise FormatError(
                f"{self.path} stores class id {int(stored['ids'].max())}; expected 0 to {classes - 1}: "
                "the file is damaged or forged, get it again"
            )
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of them is checked below
            decoded = self.header.encoding.decode(stored, dump_temperature, temperature, classes)
        if np.isnan(decoded).any():
            raise FormatError(
                f"{self.path} stores values that are no probabilities; softcache verify names the rows"
            )
        return decoded

    def prefetch_rows(self, array: Array, rows: npt.NDArray[np.int64]) -> None:
        """Ask the system to read `rows` (B,), counted through all views, before they are needed."""
        if self.buffer is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for row in rows.tolist():
            start = array.offset + row * array.row_bytes
            page_start = start - start % mmap.PAGESIZE
            self.buffer.madvise(
                mmap.MADV_WILLNEED, page_start, start + array.row_bytes - page_start
            )

    def content_id(self) -> str:
        """SHA-256 of the header and all digests, in hexadecimal: it identifies every byte."""
        digest = hashlib.sha256(self.header_bytes)
        for name in ("sample_digests", "digests"):
            digest.update(np.ascontiguousarray(self.arrays[name]).data)
        return digest.hexdigest()

    def block_digest(self, view: int, block: int) -> int:
        """The digest of a block of rows, computed from its bytes."""
        parts = (self.arrays[a.name][view] for a in self.header.arrays if a.axis == "rows")
        return self._digest(parts, block)

    def sample_digest(self, block: int) -> int:
        """The digest of what all views share of a block (labels, keys and inputs), from its bytes."""
        parts = (self.arrays[a.name] for a in self.header.arrays if a.axis in ONCE)
        return self._digest(parts, block)

    def _digest(self, parts: Iterator[npt.NDArray[Any]], block: int) -> int:
        cache_rows = self.header.block_range(block)
        return digest_of(part[cache_rows.start : cache_rows.stop] for part in parts)


def _open_again(absolute: Path, path: Path) -> Cache:
    return replace(open_cache(absolute, unfinished=True), path=path)


def raw_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def digest_of(parts: Iterator[npt.NDArray[Any]]) -> int:
    """xxh3 of the bytes of the arrays, one after the other; never 0, which means missing."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(raw_bytes(part))
    return digest.intdigest() or 1


def open_cache(path: Path | str, *, unfinished: bool = False) -> Cache:
    """Open and check a cache; only its header and its digests are read.

    Args:
        unfinished: also open a file that its dump has not completed.

    Raises:
        MissingCacheError: there is no such file.
        FormatError: the file breaks a rule of FORMAT.md, or is unfinished.
    """
    path = Path(path)
    try:
        header, text, buffer = _map(path)
        arrays = {array.name: _view(array, buffer) for array in header.arrays}
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise MissingCacheError(f"{path}: {_cannot_open(path, error)}") from error
    except OSError as error:
        raise FormatError(f"{path}: {_cannot_open(path, error)}") from error
    cache = Cache(path, header, text, arrays, buffer)
    if not unfinished and not cache.complete:
        total, missing = header.blocks * (header.views + 1), cache.missing_blocks()
        if header.summary is not None and missing:
            raise FormatError(
                f"{path} is damaged: {missing:,} of its {total:,} digests are missing; softcache verify "
                "names the rows"
            )
        if not missing:
            raise FormatError(
                f"{path} is unfinished: it has all its blocks, but no summary; run the same softcache dump "
                "again"
            )
        raise FormatError(
            f"{path} is unfinished: it has {total - missing:,} of {total:,} blocks; run the same softcache "
            "dump again to continue"
        )
    return cache


def change_check(cache: Cache) -> Callable[[], None]:
    """Make the function that raises FormatError if the file of a complete cache was written to since.

    It costs one stat(). A file that was replaced, as by a rename, does not matter: the map keeps the old one.
    """
    if cache.buffer is None or not cache.complete:
        return lambda: None
    path = cache.path.absolute()
    try:
        before = path.stat()
    except OSError:
        return lambda: None

    def check() -> None:
        try:
            now = path.stat()
        except OSError:  # it was moved or removed
            return
        same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if os.path.samestat(now, before) and not same:
            raise FormatError(
                f"{cache.path} was written to while it was being read ({before.st_size:,} bytes before, "
                f"{now.st_size:,} now); write a new file under another name and rename it, then run the same "
                "command again"
            )

    return check


def open_trainable(path: Path | str) -> Cache:
    """Open a cache to train from: a complete one, or the first complete views of an unfinished one.

    Raises:
        MissingCacheError: there is no such file.
        FormatError: the file breaks a rule of FORMAT.md, or its first view is incomplete.
    """
    cache = open_cache(path, unfinished=True)
    if cache.header.summary is not None:
        return open_cache(path)  # raises if blocks are missing
    complete = (cache.arrays["digests"] != 0).all(1)  # (views,)
    views = len(complete) if complete.all() else int(complete.argmin())
    if not views or not cache.arrays["sample_digests"].all():
        raise FormatError(
            f"{path} is unfinished, and training needs at least its first view complete; run the same "
            "softcache dump again to continue"
        )
    return replace(cache, header=replace(cache.header, views=views))


def _map(path: Path) -> tuple[Header, bytes, mmap.mmap]:
    # without O_NONBLOCK, opening a pipe would block
    # Windows has no O_NONBLOCK, and needs O_BINARY
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(path, os.O_RDONLY | flags)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(
                f"this is a {_kind(status.st_mode)}, not a file; give a cache made by softcache dump"
            )
        size = status.st_size
        offset, length, digest = parse_preamble(pread(file, PREAMBLE.size, 0), size)
        text = pread(file, length, offset)
        header = parse_header(text, digest, size)
        return header, text, mmap.mmap(file, size, access=mmap.ACCESS_READ)
    finally:
        os.close(file)


def _view(array: Array, buffer: mmap.mmap) -> npt.NDArray[Any]:
    dtype = np.dtype(array.dtype)
    count = array.nbytes // dtype.itemsize
    return np.frombuffer(buffer, dtype, count, array.offset).reshape(array.shape)


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISCHR: "device"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "special file")


def _cannot_open(path: Path, error: OSError) -> str:
    partial = partial_path(path)
    if isinstance(error, FileNotFoundError) and partial.exists():
        return (
            f"its dump has not completed ({partial.name} exists); run the same dump again, or train "
            f"from {partial.name} if its first view is complete"
        )
    return f"{error.strerror or error}; expected a cache made by softcache dump"


def partial_path(path: Path) -> Path:
    """The name that a cache has until it is complete."""
    return path.with_name(f"{path.name}{PARTIAL}")


def gaps(header: Header) -> list[tuple[int, int]]:
    """Byte ranges (start, stop) outside of user block and arrays: HDF5's own structures."""
    ranges, end = [], header.user_block
    for array in sorted(header.arrays, key=lambda array: array.offset):
        if array.offset > end:
            ranges.append((end, array.offset))
        end = array.offset + array.nbytes
    if header.file_bytes > end:
        ranges.append((end, header.file_bytes))
    return ranges


def hdf5_digest(file: int, header: Header) -> str:
    """xxh3 of HDF5's own structures, which never change after creation."""
    digest = xxhash.xxh3_64()
    for start, end in gaps(header):
        for offset in range(start, end, 1 << 20):
            digest.update(pread(file, min(1 << 20, end - offset), offset))
    return digest.hexdigest()


def shared_digest(arrays: Mapping[str, npt.NDArray[Any]], header: Header) -> str:
    """xxh3 of the arrays that all rows share, in the order of the header."""
    names = [array.name for array in header.arrays if array.axis == "shared"]
    return f"{digest_of(arrays[name] for name in names):016x}"
