"""A file that is cut short while it is mapped into memory: say so, instead of dying without a word."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 1
MESSAGE = (
    b"Error: a cache was cut short or overwritten in place while it was being read (SIGBUS); write the new "
    b"file under another name and rename it, then run the same command again: finished work is kept\n"
)


@contextmanager
def bus_errors_explained() -> Iterator[None]:
    """End the process with a message at SIGBUS, which the system sends for a page that the file has lost.

    Python's own handlers would run only after the faulting instruction, which is tried again for ever; so
    this one is installed through the C library.
    """
    if not hasattr(signal, "SIGBUS"):  # Windows
        yield
        return

    def explain(number: int) -> None:
        os.write(2, MESSAGE)
        os._exit(EXIT_CODE)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    before = library.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGBUS, before)
