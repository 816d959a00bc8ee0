"""One writer at a time for a file or a run folder; the system releases the lock of a process that ends."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softcache.errors import InUseError
from softcache.util.log import inform, warn

try:
    import fcntl
except ImportError:  # Windows, where caches are read only
    fcntl = None  # type: ignore[assignment]

POLL = 0.2  # seconds between two tries of a process that waits
PATIENCE = 50  # tries to read who holds a lock, a tenth of POLL apart
HOLDER_BYTES = 256  # of a lock file that are read


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder while it is written.

    The lock is on a file beside `path`, `.NAME.lock`, which says who holds it and is removed at the end. It
    is a POSIX record lock, which processes forked by the holder, such as data loading workers, do not
    inherit: if the holder is killed, the lock is free at once. Where the file system has no locks, or the
    lock file cannot be created, nothing is locked: writing will say what is wrong.

    Args:
        path: what is written; its parent folder is created, and removed if nothing was written to it.
        wait: wait for another holder to finish instead of raising.

    Raises:
        InUseError: another process holds the lock; the message names it.
    """
    target = path.resolve()  # one lock for all names of a file
    if not target.name:  # the root of the file system, which is no run folder either
        yield
        return
    lock_path = target.with_name(f".{target.name}.lock")
    folders = (lock_path.parent, *lock_path.parent.parents)
    new_folders = [folder for folder in folders if not folder.exists()]
    file = _acquire(lock_path, path, wait=wait)
    try:
        yield
    finally:
        if file is not None:
            lock_path.unlink(missing_ok=True)  # before it is released: see _acquire()
            os.close(file)
            for folder in new_folders:
                with suppress(OSError):  # it holds what was written
                    folder.rmdir()


def _acquire(lock_path: Path, path: Path, *, wait: bool) -> int | None:
    """The open lock file, locked; None where there are no locks."""
    if fcntl is None:
        return None
    waiting = False
    while True:
        try:
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            file, how = _open(lock_path)
        except OSError:
            if os.path.lexists(lock_path):
                warn(f"{lock_path} is no lock file, so {path} is written without a lock; remove it")
            return None
        try:
            fcntl.lockf(file, how | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them depends on the system
            holder = _holder(file, patient=True)
            os.close(file)
            if not wait:
                raise InUseError(
                    f"{path} is being written by {holder}; wait until that has finished, or give another "
                    "name"
                ) from None
            if not waiting:
                inform(f"waiting for {holder}, which is writing {path}")
            waiting = True
            time.sleep(POLL)
            continue
        except OSError:
            os.close(file)
            lock_path.unlink(missing_ok=True)
            return None
        if _is_current(file, lock_path) and how == fcntl.LOCK_EX:
            break
        if how == fcntl.LOCK_SH:  # nobody holds the lock of another user's file
            with suppress(OSError):
                lock_path.unlink()
            if os.path.lexists(lock_path):
                os.close(file)
                warn(
                    f"{lock_path} belongs to somebody else, so {path} is written without a lock; remove it"
                )
                return None
        os.close(
            file
        )  # the last holder has removed this file: another one may have been locked since
    if os.fstat(file).st_size and not waiting:
        inform(f"note: {_holder(file)} stopped while it was writing {path}")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return file


def _open(lock_path: Path) -> tuple[int, int]:
    """Open a lock file, and say which lock it can have: one to write, or to read if it is another user's.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file, how = os.open(lock_path, flags | os.O_RDWR, 0o666), fcntl.LOCK_EX
    except PermissionError:
        if not lock_path.exists():
            raise
        file, how = os.open(lock_path, os.O_NOFOLLOW | os.O_RDONLY), fcntl.LOCK_SH
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("not a regular file")
    return file, how


def _is_current(file: int, lock_path: Path) -> bool:
    """Whether an open lock file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file), lock_path.stat())
    except OSError:
        return False


def _holder(file: int, *, patient: bool = False) -> str:
    """Who holds or held a lock, as its file says.

    Args:
        patient: give a holder that has the lock, but is not written down yet, a moment for it.
    """
    for _ in range(PATIENCE if patient else 1):
        text = os.pread(file, HOLDER_BYTES, 0).decode("utf-8", "replace").strip()
        if text and text.isprintable():
            return text
        time.sleep(POLL / 10)
    return "another process"
