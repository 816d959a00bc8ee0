"""Concurrent stages: threads with short queues between them.

An error in a stage is raised where the loop next uses that stage, so that no thread fails silently.
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

DEPTH = 4  # the most items that wait between two stages
POLL_SECONDS = 0.1  # how often a blocked stage checks that the other side is still running
ADVICE = {
    "data": "data loading is the bottleneck; try more --workers, or smaller files or a faster disk",
    "teacher": "the teacher is the bottleneck; try --batch-size auto, --precision bf16 or --compile",
    "disk": "writing is the bottleneck; try a faster disk or a smaller --encoding",
}

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def prefetch(items: Iterable[T], depth: int = DEPTH) -> Iterator[T]:
    """Iterate over `items` in a background thread that stays at most `depth` items ahead."""
    waiting: queue.Queue[T | _Failed | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _Failed | _End) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=POLL_SECONDS)
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
        while True:
            try:
                item = waiting.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                return
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


class BackgroundConsumer(Generic[T]):
    """Calls `consume` on every item in a background thread; a context manager.

    On exit, every item that was put has been consumed, even if the body of the `with` statement
    failed: finished work is kept.
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
            self._enqueue(_End())
            self._thread.join()

    def put(self, item: T) -> None:
        """Queue an item, waiting while the queue is full; re-raise any error from `consume`."""
        self._enqueue(item)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until every item that was put has been consumed; re-raise any error from `consume`."""
        self._enqueue(_End())
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _enqueue(self, item: T | _End) -> None:
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while True:
                try:
                    # with a timeout, since an interrupted put() may leave a get() that nobody wakes
                    item = self._waiting.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(item, _End):
                    return
                self._consume(item)
        except BaseException as error:
            self._error = error


@dataclass
class Stopwatch:
    """The seconds that the thread of the loop spends in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time spent in the `with` block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def waits(self, stage: str, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, adding the time spent waiting for each of them to a stage."""
        end = _End()
        while True:
            with self.time(stage):
                item = next(items, end)
            if isinstance(item, _End):
                return
            yield item

    def shares(self) -> dict[str, float]:
        """Each stage's share of the total time, from 0 to 1."""
        total = sum(self.seconds.values()) or 1.0
        return {stage: seconds / total for stage, seconds in self.seconds.items()}

    def note(self) -> str:
        """The shares as text, for a progress line."""
        return ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())

    def advice(self, of_teacher: str | None = None) -> str:
        """One line that names the slowest stage and what to try.

        Args:
            of_teacher: what to try if that is the teacher, if it is not the usual.
        """
        shares = self.shares()
        if not shares:
            return "time: there was nothing left to do"
        slowest = max(shares, key=lambda stage: shares[stage])
        tips = ADVICE | ({"teacher": of_teacher} if of_teacher else {})
        return f"time: {self.note()}; {tips.get(slowest, slowest)}"
