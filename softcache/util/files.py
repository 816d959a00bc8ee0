"""Atomic file writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from softcache.errors import SoftcacheError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file to create or replace.
        write: called with the path of a temporary file in the same folder, which it must write.

    Raises:
        SoftcacheError: the disk is full or fails.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two may write at once
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SoftcacheError(
                f"cannot write {path}: {error.strerror or error}; free some space or choose another "
                "path, then run the same command again"
            ) from error
        raise
