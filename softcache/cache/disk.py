"""Writing to a disk: all bytes or an error that says which file it hit, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softcache.errors import SoftcacheError


def pwrite(file: int, values: bytes | memoryview, offset: int) -> None:
    """Write all of `values`: a single pwrite may take fewer bytes, 2 GiB at the most."""
    rest = memoryview(values)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def reason(error: OSError) -> str:
    # of h5py's own, the text has several lines and addresses
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


@contextmanager
def disk_errors(path: Path, deed: str) -> Iterator[None]:
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
            f"cannot {deed} {path}: {reason(error)}; {advice}, then run the same command: "
            "it goes on where it stopped"
        ) from error
