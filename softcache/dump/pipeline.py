"""Stages that work at the same time: threads with short queues between them.

An error in a stage is raised where the loop next meets that stage, so that nothing dies in silence.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

DEPTH = 4  # items that wait between two stages, at the most

PATIENCE = 0.1  # seconds between two looks at whether the other side is still there

ADVICE = {
    "data": "waiting for data is the limit: more --workers, or smaller or faster files",
    "teacher": "the teacher is the limit: --batch-size auto, --precision bf16 or --compile may help",
    "disk": "the disk is the limit: a faster one, or a smaller --encoding",
}

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def prefetch(items: Iterable[T], depth: int = DEPTH) -> Iterator[T]:
    """Iterate over `items` in a thread of its own, which is `depth` items ahead at the most."""
    waiting: queue.Queue[T | _Failed | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _Failed | _End) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=PATIENCE)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End())
        except BaseException as error:
            put(_Failed(error))

    thread = threading.Thread(target=produce, name="softcache-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


class BackgroundConsumer(Generic[T]):
    """Calls `consume` on every item in a thread of its own; a context manager.

    At its end everything that was put has been consumed, also if the loop around it failed: what is
    done is kept.
    """

    def __init__(self, consume: Callable[[T], None], depth: int = DEPTH) -> None:
        self._consume = consume
        self._waiting: queue.Queue[T | _End] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="softcache-behind", daemon=True)

    def __enter__(self) -> BackgroundConsumer[T]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._hand_over(_End())
            self._thread.join()

    def put(self, item: T) -> None:
        """Hand an item over; waits while the queue is full, and raises what `consume` raised."""
        self._hand_over(item)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until everything that was put has been consumed."""
        self._hand_over(_End())
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _hand_over(self, item: T | _End) -> None:
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=PATIENCE)
                return
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while not isinstance(item := self._waiting.get(), _End):
                self._consume(item)
        except BaseException as error:
            self._error = error


@dataclass
class Stopwatch:
    """Seconds by stage, of the thread that runs the loop."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def waits(self, stage: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time until each one comes counted."""
        end = _End()
        while True:
            with self.time(stage):
                item = next(items, end)
            if isinstance(item, _End):
                return
            yield item

    def shares(self) -> dict[str, float]:
        """Of the time counted, by stage."""
        total = sum(self.seconds.values()) or 1.0
        return {stage: seconds / total for stage, seconds in self.seconds.items()}

    def note(self) -> str:
        """Shares for a progress line."""
        return ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())

    def advice(self) -> str:
        """One line that says which stage is the limit, and what to change."""
        shares = self.shares()
        if not shares:
            return "time: nothing was left to do"
        limit = max(shares, key=lambda stage: shares[stage])
        return f"time: {self.note()}; {ADVICE.get(limit, limit)}"
