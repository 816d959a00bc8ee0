"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from softcache.errors import SoftcacheError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    Raises:
        SoftcacheError: the disk is full, or fails.
    """
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SoftcacheError(
                f"cannot write {path}: {error.strerror or error}; make room there or give another place, "
                "and run the same command again"
            ) from error
        raise
