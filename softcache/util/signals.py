"""Stop cleanly when asked to: Ctrl-C, SIGTERM as SLURM sends it, SIGHUP of a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Windows has no SIGHUP
STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
GRACE = 5.0  # seconds
SECOND = b"Error: stopped at once; what was committed is kept, and the same command continues\n"


@dataclass
class Stop:
    """Which signal asked the process to stop; None if none has."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal stopped, as shells count it."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Raise KeyboardInterrupt in the block at the first signal to stop, and end the process at the second.

    Signals that are ignored, as under nohup, stay so. Outside of the main thread nothing changes.
    """
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            os.write(2, SECOND)
            os._exit(128 + number)
        stop.signal = number
        raise KeyboardInterrupt

    with _handled(on_signal):
        yield stop


def forget_interrupt() -> None:
    """Let the process end with its own exit code after a KeyboardInterrupt that was handled.

    If one is raised within exec() of a string, as in the import of a module that defines dataclasses, CPython
    notes it, and ends `python -m` by SIGINT whatever the exit code is. Another exec() clears the note.
    """
    exec("pass")


@contextmanager
def deferred_stop(*, resend: bool = True) -> Iterator[Stop]:
    """Note a signal to stop instead of acting on it, until the block ends.

    The block looks at `signal` where it can stop with everything in order, and leaves. The signal is then
    sent again, to whatever handled it before. A second signal acts at once, and so does the first after
    GRACE seconds: a batch may take very long, or hang.

    Args:
        resend: whether to send the signal again if the block ends; not where nothing is left to stop.
    """
    stop, ended = Stop(), False
    timers: list[threading.Timer] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        again = stop.signal is not None
        stop.signal = number
        if again:
            raise KeyboardInterrupt
        timers.append(threading.Timer(GRACE, _interrupt, (number,)))
        timers[0].daemon = True
        timers[0].start()

    try:
        with _handled(on_signal):
            try:
                yield stop
                ended = True
            finally:
                for timer in timers:
                    timer.cancel()
    finally:
        if stop.signal is not None and (resend or not ended):
            signal.raise_signal(stop.signal)


def _interrupt(number: int) -> None:
    """Send this process a signal that also interrupts a main thread that sleeps.

    One to the process may reach any thread, and only the main one runs handlers, once it is awake.
    """
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        os.kill(os.getpid(), number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals in STOPS in the block; those that are ignored stay so."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            # None: installed by other code than Python, which could not be restored
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
