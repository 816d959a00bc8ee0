"""Disk writes that either complete or raise an error naming the file and what to do about it."""

from __future__ import annotations

import errno
import os
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


@contextmanager
def disk_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError into a SoftcacheError that says what failed, on which file, and what to do.

    Args:
        action: what is being done to `path`, as a verb: "create", "write".
    """
    try:
        yield
    except OSError as error:
        advice = (
            "free some space, or give another --out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "check the disk and its permissions"
        )
        raise SoftcacheError(
            f"cannot {action} {path}: {reason(error)}; {advice}, then run the same command again: "
            "it continues where it stopped"
        ) from error
