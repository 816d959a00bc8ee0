"""Atomic file writes."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from softcache.errors import FormatError, SoftcacheError


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
        _remove_stale(path)
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SoftcacheError(
                f"cannot write {path}: {error.strerror or error}; free some space ({_free(path)}) or choose "
                "another path, then run the same command again"
            ) from error
        raise


def _remove_stale(path: Path) -> None:
    """Remove what processes of this host that were killed have left of a file."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.partial")
    for entry in os.scandir(path.parent):
        found = name.fullmatch(entry.name)
        if found and not _is_running(int(found[1])):
            Path(entry).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid() or os.name == "nt":  # there, signal 0 would be Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _free(path: Path) -> str:
    """How much space is free where a file is to be, for messages."""
    try:
        return f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        return "how much is free is not known"


def refuse_special_file(path: Path, error: type[SoftcacheError]) -> None:
    """Raise `error` if there is a folder, a pipe or a device at `path`: reading it might never end."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise error(f"{path} is {kind}; expected a file")


def read_regular_file(path: Path, limit: int) -> bytes:
    """The contents of a file of at most `limit` bytes; pipes and devices, which may never end, are refused.

    Raises:
        FormatError: it cannot be read, is not a regular file, or is larger.
    """
    try:
        # without O_NONBLOCK, opening a pipe waits for somebody to write to it
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is not a regular file")
            if status.st_size > limit:
                raise FormatError(
                    f"{path} has {status.st_size:,} bytes; expected at most {limit:,}"
                )
            return opened.read(limit)
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror or error})") from error
