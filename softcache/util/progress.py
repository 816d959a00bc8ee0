"""Progress of long work: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from softcache.util.distributed import rank
from softcache.util.log import report_progress

LOG_SECONDS = 30.0  # between two lines of the log


class Advance(Protocol):
    """Counts `amount` more units as done; `note` is shown next to the progress."""

    def __call__(self, amount: int, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of the work in the `with` block; yields a function that advances it.

    Only the process of rank 0 shows anything.

    Args:
        what: the name of the work.
        total: the number of units there are.
        unit: the name of a unit, in the plural.
        done: the number of units that were already done before this run.
    """
    if rank() != 0:
        yield lambda amount, note="": None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=True) as bar:

            def advance_bar(amount: int, note: str = "") -> None:
                if note:
                    bar.set_postfix_str(note, refresh=False)
                bar.update(amount)

            yield advance_bar
        return

    start = last = time.monotonic()
    count = done

    def advance_log(amount: int, note: str = "") -> None:
        nonlocal count, last
        count += amount
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            rate = (count - done) / (now - start)
            seconds_left = (total - count) / rate if rate else float("inf")
            report_progress(
                f"{what}: {count:,} of {total:,} {unit} ({count / total:.0%}), {rate:,.0f} {unit}/s, "
                f"{seconds_left:,.0f} s left{', ' + note if note else ''}"
            )

    yield advance_log
