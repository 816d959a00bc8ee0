"""Disk writes that either complete or raise an error naming the file and what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softcache.errors import SoftcacheError


def pwrite(file: int, values: bytes | memoryview, offset: int) -> None:
    """Write all of `values`; a single os.pwrite may write less, and at most 2 GiB."""
    remaining = memoryview(values)
    while remaining:
        count = os.pwrite(file, remaining, offset)
        remaining, offset = remaining[count:], offset + count


def pread(file: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes at `offset`; Windows lacks os.pread."""
    if hasattr(os, "pread"):
        return os.pread(file, count, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, count)


def sync_data(file: int) -> None:
    """Wait until the data of a file are on the disk; macOS lacks fdatasync, so there fsync does it."""
    getattr(os, "fdatasync", os.fsync)(file)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def reason(error: OSError) -> str:
    """The cause of `error` in one line."""
    # the message of h5py's own errors spans several lines and contains memory addresses
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


def _free(path: Path) -> int:
    """Bytes that are free where a file is or will be; 0 if that cannot be found out."""
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 0


@contextmanager
def disk_errors(path: Path, action: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a SoftcacheError that says what failed, on which file, and what to do.

    Args:
        action: what is being done to `path`, as a verb: "create", "write".
        needed: bytes that the file needs, if that is known.
    """
    try:
        yield
    except OSError as error:
        advice = "check the disk and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = f"{needed:,} bytes are needed, " if needed else ""
            advice = f"free some space, or give another --out ({size}{_free(path):,} are free)"
        raise SoftcacheError(
            f"cannot {action} {path}: {reason(error)}; {advice}, then run the same command again: "
            "it continues where it stopped"
        ) from error
