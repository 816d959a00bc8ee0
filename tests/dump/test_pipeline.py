"""Concurrent stages: order, bounds, and errors that reach the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from softcache.dump.pipeline import ADVICE, BackgroundConsumer, Stopwatch, prefetch


def threads() -> int:
    return sum(thread.name.startswith("softcache-") for thread in threading.enumerate())


def test_items_come_in_order_and_once() -> None:
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert threads() == 0


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        while made < 50:
            made += 1
            yield made

    prefetched = prefetch(items(), depth=2)
    assert next(prefetched) == 1
    await_quiet(lambda: made)
    assert made <= 1 + 2 + 1  # taken, queued, and the one that the full queue blocks
    prefetched.close()  # type: ignore[attr-defined]


def await_quiet(value: object) -> None:
    """Wait until a value has stopped changing."""
    before = None
    while before != (now := value()):  # type: ignore[operator]
        before = now
        time.sleep(0.05)


def test_an_error_in_the_source_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("no third")

    seen: list[int] = []
    with pytest.raises(ValueError, match="no third"):
        seen.extend(prefetch(items()))
    assert seen == [1, 2]
    assert threads() == 0


def test_a_loop_that_stops_early_leaves_no_thread() -> None:
    for item in prefetch(iter(range(10**9)), depth=2):
        if item == 5:
            break
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_all_that_was_put_is_consumed_in_order() -> None:
    seen: list[int] = []
    with BackgroundConsumer(seen.append, depth=2) as consumer:
        for item in range(50):
            consumer.put(item)
    assert seen == list(range(50))
    assert threads() == 0


def test_finish_waits_for_the_last_item() -> None:
    seen: list[int] = []

    def slowly(item: int) -> None:
        time.sleep(0.02)
        seen.append(item)

    with BackgroundConsumer(slowly) as consumer:
        for item in range(4):
            consumer.put(item)
        consumer.finish()
        assert seen == [0, 1, 2, 3]


def test_an_error_in_the_consumer_fails_the_loop() -> None:
    def consume(item: int) -> None:
        if item == 3:
            raise OSError("the disk is gone")

    def loop() -> None:
        with BackgroundConsumer(consume, depth=1) as consumer:
            for item in range(1000):
                consumer.put(item)

    with pytest.raises(OSError, match="the disk is gone"):
        loop()
    assert threads() == 0


def test_an_error_at_the_last_item_is_not_lost() -> None:
    def consume(item: int) -> None:
        raise OSError("too late")

    def loop() -> None:
        with BackgroundConsumer(consume) as consumer:
            consumer.put(1)

    with pytest.raises(OSError, match="too late"):
        loop()


def test_what_was_put_before_the_loop_failed_is_kept() -> None:
    seen: list[int] = []

    def slowly(item: int) -> None:
        time.sleep(0.01)
        seen.append(item)

    def loop() -> None:
        with BackgroundConsumer(slowly, depth=8) as consumer:
            for item in range(5):
                consumer.put(item)
            raise ValueError("the teacher failed")

    with pytest.raises(ValueError, match="the teacher failed"):
        loop()
    assert seen == [0, 1, 2, 3, 4]


def test_time_goes_to_the_stage_that_takes_it() -> None:
    watch = Stopwatch()

    def items() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.05)
            yield item

    for _ in watch.waits("data", items()):
        with watch.time("teacher"):
            pass
    assert watch.shares()["data"] > 0.9
    assert sum(watch.shares().values()) == pytest.approx(1)
    assert watch.advice().endswith(ADVICE["data"])
    assert "teacher" in watch.note()


def test_a_watch_that_saw_nothing_says_so() -> None:
    assert Stopwatch().advice() == "time: there was nothing left to do"
