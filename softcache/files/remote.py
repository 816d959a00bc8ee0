"""A cache on a server or a disk, of which byte ranges are read: header and digests first, then rows.

Where the file is may be a path, or any URL of fsspec: http, https, s3, gs, hf, file. Nothing of a URL that
may be a secret (user, password, query) is ever printed or kept.
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
from softcache.cache.header import MAX_HEADER, PREAMBLE, Array, Header, parse_header, parse_preamble
from softcache.cache.reader import SHOWN_CLASSES, gaps, shared_digest
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.util.extras import import_extra

FIRST_READ = 1 << 16  # bytes: preamble and, of most caches, the whole header

PART = 4 << 20  # bytes of one request

MAX_HELD = 1 << 30  # bytes of a block, or of what is no row, which are held in memory

THREADS = 8

TRIES = 4

WAIT = 0.5  # seconds before the second try, twice as many before each other

SILENCE = 60.0  # seconds without a byte, after which a connection is given up

EXTRAS = {
    "http": "remote", "https": "remote", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub",
    "file": "remote", "memory": "remote",
}  # fmt: skip

FileSystem = Any  # of fsspec

Digests = npt.NDArray[Any]


class NoRanges(Exception):
    """A server's answer that will not become better by asking again."""


FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NoRanges)


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def public_url(place: str) -> str:
    """A URL without user, password, query and fragment; a path as it is."""
    if not is_url(place):
        return place
    chain, mark, rest = place.rpartition("::")
    if (
        mark and "://" not in chain
    ):  # of fsspec, such as simplecache::http://…; not of an IPv6 address
        return f"{chain}::{public_url(rest)}"
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def without_secrets(text: str) -> str:
    """A message of a library in one line, with its URLs as public_url() writes them."""
    line = " ".join(text.split())
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)\]]+", lambda m: public_url(m[0]), line)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a server; `size` is what the server says."""

    shown: str  # without secrets
    filesystem: FileSystem
    path: str
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.shown).path).name or "cache.h5"

    def read(self, start: int, length: int) -> bytes:
        """Bytes from start to start + length; tried again where a connection breaks.

        Raises:
            RemoteError: the server does not give them, or gives others than were asked for.
        """
        if not length:
            return b""
        for turn in range(TRIES):
            try:
                found: bytes = self.filesystem.cat_file(self.path, start=start, end=start + length)
                break
            except Exception as error:
                if turn == TRIES - 1 or isinstance(error, FINAL):
                    raise RemoteError(
                        f"{self.shown}: bytes {start:,} to {start + length - 1:,} cannot be read "
                        f"({_said(error)}); try again"
                    ) from None
                time.sleep(WAIT * 2**turn)
        if len(found) != length:
            raise RemoteError(
                f"{self.shown}: the server gave {len(found):,} bytes where {length:,} were asked for, from "
                f"{start:,} on; it does not serve byte ranges, or the file has changed"
            )
        return found

    def read_long(self, start: int, length: int) -> bytes:
        """The same in requests of PART bytes, side by side."""
        ranges = [(at, min(PART, start + length - at)) for at in range(start, start + length, PART)]
        return b"".join(in_parallel(lambda part: self.read(*part), ranges))


def in_parallel(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """The result of each task, in order; a few tasks at a time are done or wait to be taken."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting = iter(tasks)
        running: list[Future[Any]] = [
            pool.submit(work, task) for task in islice(waiting, 2 * THREADS)
        ]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(work, task) for task in islice(waiting, 1)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def file_system(place: str) -> tuple[FileSystem, str]:
    """The filesystem of a path or URL, and the path in it.

    Raises:
        SettingsError: it is of no known kind, or an extra is not there.
    """
    fsspec = import_extra("fsspec", extra="remote", what="a URL")
    scheme = place.partition("://")[0] if is_url(place) else "file"
    if scheme not in EXTRAS:
        raise SettingsError(
            f"{public_url(place)} is of unknown kind {scheme!r}; expected a path, or a URL of "
            f"{', '.join(EXTRAS)}"
        )
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            options = _http_options()
        filesystem, path = fsspec.core.url_to_fs(place, **options)
    except ImportError as error:
        raise SettingsError(
            f"{scheme}:// needs a library ({error}); pip install 'softcache[{EXTRAS[scheme]}]'"
        ) from None
    except Exception as error:  # a library may refuse its settings in any way
        raise SettingsError(f"{public_url(place)} cannot be used ({_said(error)})") from None
    return filesystem, str(path)


def open_file(place: str) -> RemoteFile:
    """Find a file; only its size is asked for.

    Raises:
        SettingsError: it is of no known kind, or an extra is not there.
        RemoteError: there is no such file, or the server does not say how large it is.
    """
    filesystem, path = file_system(place)
    shown = public_url(place)
    try:
        filesystem.invalidate_cache()
        size = filesystem.info(path).get("size")
    except Exception as error:  # servers and libraries fail in many ways
        raise RemoteError(
            f"{shown} cannot be opened ({_said(error)}); expected a cache as softcache dump makes it"
        ) from None
    if not isinstance(size, int):
        raise RemoteError(f"{shown}: the server does not say how large the file is")
    return RemoteFile(shown, filesystem, path, size)


@dataclass(frozen=True)
class RemoteCache:
    """A finished cache elsewhere: what its header and digests say."""

    file: RemoteFile
    header: Header
    header_bytes: bytes
    digests: Digests  # (views, blocks)
    sample_digests: Digests  # (blocks,)

    @property
    def content_id(self) -> str:
        return self.as_cache({}).content_id()

    def as_cache(self, arrays: dict[str, npt.NDArray[Any]]) -> Cache:
        """With some arrays that were read; rows are not among them."""
        known = {"digests": self.digests, "sample_digests": self.sample_digests}
        return Cache(Path(self.file.name), self.header, self.header_bytes, known | arrays)

    def with_names(self) -> Cache:
        """With the first names of the classes, for people."""
        array = self.header.array("class_names")
        return self.as_cache(
            {"class_names": self.array(array, 0, min(array.shape[0], SHOWN_CLASSES))}
        )

    def shared(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that all rows share, checked.

        Raises:
            RemoteError: they cannot be read.
            FormatError: they do not match their digest.
        """
        header = self.header
        found = {a.name: self.array(a) for a in header.arrays if a.axis == "shared"}
        if shared_digest(found, header) != header.shared_digest:
            raise FormatError(
                f"{self.file.shown} is damaged, or its server gives wrong bytes: the arrays shared by all "
                "rows do not match their digest"
            )
        return found

    def structure(self) -> list[tuple[int, bytes]]:
        """Offset and bytes of what libhdf5 wrote for itself."""
        return [(a, self.file.read_long(a, b - a)) for a, b in gaps(self.header)]

    def array(self, array: Array, start: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """An array, or `count` entries from `start` on, of its first axis."""
        return _read_array(self.file, array, start, array.shape[0] if count is None else count)


def open_remote(place: str) -> RemoteCache:
    """Read the header and the digests of a finished cache elsewhere.

    Raises:
        RemoteError: it cannot be read.
        FormatError: it breaks a rule of FORMAT.md, or is unfinished.
    """
    file = open_file(place)
    try:
        begun = file.read(0, min(FIRST_READ, file.size))
        offset, length, digest = parse_preamble(begun[: PREAMBLE.size], file.size)
        text = begun[offset : offset + length]
        if len(text) < length:
            text = file.read(offset, min(length, MAX_HEADER))
        header = parse_header(text, digest, file.size)
        _check_held(header)
    except FormatError as error:
        raise FormatError(f"{file.shown}: {error}") from None
    rows, samples = header.array("digests"), header.array("sample_digests")
    found = RemoteCache(
        file,
        header,
        text,
        _read_array(file, rows, 0, rows.shape[0]),
        _read_array(file, samples, 0, samples.shape[0]),
    )
    missing = int((found.digests == 0).sum() + (found.sample_digests == 0).sum())
    if header.summary is None or missing:
        raise FormatError(
            f"{file.shown} is unfinished or damaged: {missing:,} of its blocks are missing; finish its dump, "
            "and put it there again"
        )
    return found


def held(header: Header) -> dict[str, int]:
    """Bytes of a cache that a pull holds in memory at a time."""
    samples = sum(array.row_bytes for array in header.arrays if array.axis == "samples")
    beside = (array.nbytes for array in header.arrays if array.axis not in ("rows", "samples"))
    return {
        "arrays beside the rows": sum(beside),
        "the structure of HDF5": sum(stop - start for start, stop in gaps(header)),
        "one block": header.block_rows * (header.bytes_per_row + samples),
    }


def _check_held(header: Header) -> None:
    """Refuse what no softcache writes, before a server can fill the memory with it."""
    for what, size in held(header).items():
        if size > MAX_HELD:
            raise FormatError(
                f"{what}: {size:,} bytes, which have to be read into memory; expected at most "
                f"{MAX_HELD:,}, as softcache writes it: do not trust this file"
            )


def _read_array(file: RemoteFile, array: Array, start: int, count: int) -> npt.NDArray[Any]:
    size = array.nbytes // array.shape[0]
    raw = file.read_long(array.offset + start * size, count * size)
    return np.frombuffer(raw, array.dtype).reshape(count, *array.shape[1:])


def _said(error: Exception) -> str:
    """A library's error without secrets."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says so of a server that is down or wants a password, too
    text = without_secrets(str(error))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _http_options() -> dict[str, Any]:
    """Of fsspec's HTTP: whole bytes as they lie in the file, and never more of them than were asked for."""
    aiohttp = import_extra("aiohttp", extra="remote", what="http://")

    class Bounded(aiohttp.ClientResponse):  # type: ignore[misc, name-defined]  # a module found late
        """A response that is no longer than the range that was asked for."""

        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            if asked is None or self.status >= 400:
                return bytes(await super().read())
            wanted = int(asked[2]) - int(asked[1]) + 1
            said = self.headers.get("Content-Range", "")
            if self.status != 206 or not said.startswith(f"bytes {asked[1]}-"):
                self.close()
                raise NoRanges(
                    f"the server answers {self.status} {said or 'without a range'}; it serves no byte ranges"
                )
            parts, length = [], 0
            async for part in self.content.iter_chunked(1 << 16):
                parts.append(part)
                length += len(part)
                if length > wanted:
                    self.close()
                    raise NoRanges(f"the server gives more than the {wanted:,} bytes asked for")
            return b"".join(parts)

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {
        "client_kwargs": {"response_class": Bounded, "timeout": timeout},
        "headers": {"Accept-Encoding": "identity"},
        "skip_instance_cache": True,
    }
