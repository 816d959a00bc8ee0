"""Read a cache on a server or a disk by byte ranges: first the header and the digests, then rows.

A location is a path, or a URL that fsspec can open: http, https, s3, gs, hf, file. The parts of a URL that
can hold secrets (user, password, query) are never printed or stored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache
from softcache.cache.arrays import Array
from softcache.cache.header import MAX_HEADER, PREAMBLE, Header, parse_header, parse_preamble
from softcache.cache.reader import ONCE, SHOWN_CLASSES, gaps, shared_digest
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.util.extras import import_extra, install_command
from softcache.util.urls import is_url, public_url, without_secrets

FIRST_READ = 1 << 16  # bytes: the preamble and, for most caches, the whole header

PART = 4 << 20  # bytes per request

MAX_IN_MEMORY = 1 << 30  # limit in bytes on each part of a cache that has to be held in memory

THREADS = 8

TRIES = 4

WAIT = 0.5  # seconds before the first retry; doubled for each further one

SILENCE = 60.0  # seconds without a byte after which a connection is given up

SLOWEST = 2048  # bytes per second below which a connection is given up,

PATIENCE = 30.0  # after so many seconds

LONGEST = 3600.0  # seconds that a request may take in all, with its headers

MAX_ANSWER = (
    1 << 16
)  # bytes of an answer that is not a range of the file, such as an error, that are read

EXTRAS = {
    "http": "remote", "https": "remote", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub",
    "file": "remote", "memory": "remote",
}  # fmt: skip

FileSystem = Any  # an fsspec.AbstractFileSystem

Digests = npt.NDArray[Any]


class NoRanges(Exception):
    """The server does not serve byte ranges, so there is no point in asking again."""


class TooSlow(Exception):
    """The server sends so little that waiting for it would take for ever."""


FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NoRanges,
    TooSlow,
)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server or a disk."""

    shown: str  # its URL without secrets, for messages
    filesystem: FileSystem
    path: str  # in the file system
    size: int  # bytes, according to the server

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.shown).path).name or "cache.h5"

    def read(self, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, with retries if a connection breaks.

        Raises:
            RemoteError: the server does not return them, or returns more or fewer bytes.
        """
        if not length:
            return b""
        for attempt in range(TRIES):
            try:
                content: bytes = self.filesystem.cat_file(
                    self.path, start=start, end=start + length
                )
                break
            except Exception as error:  # servers and libraries fail in many ways
                if attempt == TRIES - 1 or isinstance(error, FINAL):
                    raise RemoteError(
                        f"{self.shown}: bytes {start:,} to {start + length - 1:,} cannot be read "
                        f"({_public_error(error)}); try again"
                    ) from None
                time.sleep(WAIT * 2**attempt)
        if len(content) != length:
            raise RemoteError(
                f"{self.shown}: the server returned {len(content):,} bytes from offset {start:,}; expected "
                f"{length:,}: it does not serve byte ranges, or the file has changed; try again"
            )
        return content

    def read_long(self, start: int, length: int) -> bytes:
        """The same as read(), in parallel requests of PART bytes."""
        ranges = [
            (offset, min(PART, start + length - offset))
            for offset in range(start, start + length, PART)
        ]
        return b"".join(in_parallel(lambda byte_range: self.read(*byte_range), ranges))


def in_parallel(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """The result of each task, in order. At most 2 * THREADS results are computed ahead."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        remaining = iter(tasks)
        futures: list[Future[Any]] = [
            pool.submit(work, task) for task in islice(remaining, 2 * THREADS)
        ]
        while futures:
            yield futures.pop(0).result()
            futures += [pool.submit(work, task) for task in islice(remaining, 1)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def file_system(location: str) -> tuple[FileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        SettingsError: the URL has an unknown scheme, or an extra is not installed.
    """
    fsspec = import_extra("fsspec", extra="remote", what="a URL")
    scheme = location.partition("://")[0] if is_url(location) else "file"
    if scheme not in EXTRAS:
        raise SettingsError(
            f"{public_url(location)} has unknown scheme {scheme!r}; expected a path, or a URL with "
            f"{', '.join(EXTRAS)}"
        )
    if not is_url(location):  # as a path, it may hold ::, which would be a chain of file systems
        return fsspec.filesystem("file"), str(Path(location).absolute())
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            options = _http_options()
        filesystem, path = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise SettingsError(
            f"{scheme}:// needs a library ({error}); {install_command(EXTRAS[scheme])}"
        ) from None
    except Exception as error:  # libraries reject their settings in many ways
        raise SettingsError(
            f"{public_url(location)} cannot be used ({_public_error(error)}); check the URL"
        ) from None
    return filesystem, str(path)


def open_file(location: str) -> RemoteFile:
    """Find a file and ask for its size; none of its content is read.

    Raises:
        SettingsError: the URL has an unknown scheme, or an extra is not installed.
        RemoteError: there is no such file, or the server does not say how large it is.
    """
    filesystem, path = file_system(location)
    shown = public_url(location)
    try:
        filesystem.invalidate_cache()
        size = filesystem.info(path).get("size")
    except Exception as error:  # servers and libraries fail in many ways
        raise RemoteError(
            f"{shown} cannot be opened ({_public_error(error)}); expected a cache made by softcache dump"
        ) from None
    if not isinstance(size, int):
        raise RemoteError(
            f"{shown}: the server does not say how large the file is; it has to report a Content-Length"
        )
    return RemoteFile(shown, filesystem, path, size)


@dataclass(frozen=True)
class RemoteCache:
    """A finished cache on a server or a disk, with its header and digests in memory."""

    file: RemoteFile
    header: Header
    header_bytes: bytes
    digests: Digests  # (views, blocks)
    sample_digests: Digests  # (blocks,)

    @property
    def content_id(self) -> str:
        return self.as_cache({}).content_id()

    def as_cache(self, arrays: dict[str, npt.NDArray[Any]]) -> Cache:
        """A Cache with the digests and the given arrays; its rows cannot be read."""
        digests = {"digests": self.digests, "sample_digests": self.sample_digests}
        return Cache(Path(self.file.name), self.header, self.header_bytes, digests | arrays)

    def with_names(self) -> Cache:
        """A Cache with the first class names, for describe()."""
        array = self.header.array("class_names")
        return self.as_cache(
            {"class_names": self.array(array, 0, min(array.shape[0], SHOWN_CLASSES))}
        )

    def shared(self) -> dict[str, npt.NDArray[Any]]:
        """Fetch the arrays that all rows share, and check them.

        Raises:
            RemoteError: they cannot be read.
            FormatError: they do not match their digest.
        """
        header = self.header
        arrays = {a.name: self.array(a) for a in header.arrays if a.axis == "shared"}
        if shared_digest(arrays, header) != header.shared_digest:
            raise FormatError(
                f"{self.file.shown} is damaged, or its server returns wrong bytes: the arrays shared by all "
                "rows do not match their digest; run softcache verify where the file is"
            )
        return arrays

    def structure(self) -> list[tuple[int, bytes]]:
        """Fetch the metadata that libhdf5 wrote, as pairs of offset and bytes."""
        return [
            (start, self.file.read_long(start, end - start)) for start, end in gaps(self.header)
        ]

    def array(self, array: Array, start: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Fetch `count` entries of an array's first axis from `start`; by default all after `start`."""
        return _read_array(self.file, array, start, array.shape[0] if count is None else count)


def open_remote(location: str) -> RemoteCache:
    """Fetch the header and the digests of a finished cache.

    Args:
        location: a path or a URL.

    Raises:
        SettingsError: the URL has an unknown scheme, or an extra is not installed.
        RemoteError: the file cannot be read.
        FormatError: it breaks a rule of FORMAT.md, or is unfinished.
    """
    file = open_file(location)
    try:
        start_of_file = file.read(0, min(FIRST_READ, file.size))
        offset, length, digest = parse_preamble(start_of_file[: PREAMBLE.size], file.size)
        text = start_of_file[offset : offset + length]
        if len(text) < length:
            text = file.read(offset, min(length, MAX_HEADER))
        header = parse_header(text, digest, file.size)
        _check_memory(header)
    except FormatError as error:
        raise FormatError(f"{file.shown}: {error}") from None
    digests, sample_digests = header.array("digests"), header.array("sample_digests")
    remote = RemoteCache(
        file,
        header,
        text,
        _read_array(file, digests, 0, digests.shape[0]),
        _read_array(file, sample_digests, 0, sample_digests.shape[0]),
    )
    missing = int((remote.digests == 0).sum() + (remote.sample_digests == 0).sum())
    if header.summary is None or missing:
        raise FormatError(
            f"{file.shown} is unfinished or damaged: {missing:,} of its blocks are missing; finish its dump, "
            "and upload it again"
        )
    return remote


def memory_sizes(header: Header) -> dict[str, int]:
    """The parts of a cache that a pull holds in memory, with their sizes in bytes."""
    sample_bytes = sum(array.row_bytes for array in header.arrays if array.axis in ONCE)
    other_arrays = (a.nbytes for a in header.arrays if a.axis not in ("rows", *ONCE))
    return {
        "arrays other than rows": sum(other_arrays),
        "the HDF5 structure": sum(stop - start for start, stop in gaps(header)),
        "one block": header.block_rows * (header.bytes_per_row + sample_bytes),
    }


def _check_memory(header: Header) -> None:
    """Refuse a header that no softcache writes, before a server can fill the memory.

    Raises:
        FormatError: a part that has to be held in memory is larger than MAX_IN_MEMORY.
    """
    for what, size in memory_sizes(header).items():
        if size > MAX_IN_MEMORY:
            raise FormatError(
                f"{what}: {size:,} bytes to read into memory; expected at most {MAX_IN_MEMORY:,}, as "
                "softcache writes it: do not trust this file"
            )


def _read_array(file: RemoteFile, array: Array, start: int, count: int) -> npt.NDArray[Any]:
    entry_bytes = array.nbytes // array.shape[0]
    raw = file.read_long(array.offset + start * entry_bytes, count * entry_bytes)
    return np.frombuffer(raw, array.dtype).reshape(count, *array.shape[1:])


def _public_error(error: Exception) -> str:
    """Type and message of a library's error, without secrets."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        # fsspec also raises FileNotFoundError if a server is down or wants a password
        error = error.__cause__
    text = without_secrets(str(error))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _http_options() -> dict[str, Any]:
    """Options for fsspec's HTTP file system: no compression, no endless waiting, no oversized responses."""
    aiohttp = import_extra("aiohttp", extra="remote", what="http://")

    class Bounded(aiohttp.ClientResponse):  # type: ignore[misc, name-defined]  # imported at run time
        """A response that may not be longer than the requested range."""

        async def read(self) -> bytes:
            requested = re.fullmatch(
                r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", "")
            )
            if requested is None or self.status >= 400:
                return await self._bounded(MAX_ANSWER, cut=True)
            content_range = self.headers.get("Content-Range", "")
            if self.status != 206 or not content_range.startswith(f"bytes {requested[1]}-"):
                self.close()
                raise NoRanges(
                    f"the server answers {self.status} {content_range or 'without a range'}; it does not "
                    "serve byte ranges"
                )
            packed = self.headers.get("Content-Encoding", "identity")
            if packed != "identity":
                self.close()
                raise NoRanges(
                    f"the server packs its answers with {packed}, which was not asked for"
                )
            return await self._bounded(int(requested[2]) - int(requested[1]) + 1)

        async def _bounded(self, limit: int, *, cut: bool = False) -> bytes:
            """At most `limit` bytes; with `cut`, what comes after them is not read, else it is an error."""
            chunks, length, start = [], 0, time.monotonic()
            async for chunk in self.content.iter_chunked(1 << 16):
                chunks.append(chunk)
                length += len(chunk)
                if length > limit:
                    self.close()
                    if cut:
                        break
                    raise NoRanges(f"the server returns more than the {limit:,} bytes requested")
                waited = time.monotonic() - start
                if waited > PATIENCE and length < SLOWEST * waited:
                    self.close()
                    raise TooSlow(
                        f"{length:,} bytes in {waited:.0f} seconds; expected at least {SLOWEST:,} a second"
                    )
            return b"".join(chunks)[:limit]

    timeout = aiohttp.ClientTimeout(total=LONGEST, sock_connect=SILENCE, sock_read=SILENCE)
    return {
        "client_kwargs": {"response_class": Bounded, "timeout": timeout},
        "headers": {"Accept-Encoding": "identity"},
        "skip_instance_cache": True,
    }
