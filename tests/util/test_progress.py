"""Progress: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from softcache.util.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, which only moves when a test sets it."""
    now = [1000.0]
    monkeypatch.setattr("softcache.util.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_each_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("dump", 100_000, "rows") as advance:
        for _ in range(7):
            clock[0] += 10
            advance(5000)
    assert capsys.readouterr().err.splitlines() == [
        "dump: 15,000 of 100,000 rows (15%), 500 rows/s, 170 s left",
        "dump: 30,000 of 100,000 rows (30%), 500 rows/s, 140 s left",
    ]


def test_short_work_leaves_a_log_alone(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("dump", 100, "rows") as advance:
        clock[0] += 29
        advance(100)
    assert capsys.readouterr() == ("", "")


def test_work_that_goes_on_counts_what_was_done_but_not_as_speed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("dump", 1000, "rows", done=700) as advance:
        clock[0] += 50
        advance(100, "view 2")
    assert capsys.readouterr().err == (
        "dump: 800 of 1,000 rows (80%), 2 rows/s, 100 s left, view 2\n"
    )


def test_work_that_stands_still_has_no_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("dump", 1000, "rows") as advance:
        clock[0] += 50
        advance(0)
    assert capsys.readouterr().err == "dump: 0 of 1,000 rows (0%), 0 rows/s, inf s left\n"


def test_an_error_in_the_work_goes_through() -> None:
    with pytest.raises(OSError, match="disk full"), progress("dump", 10, "rows"):
        raise OSError("disk full")


WORK = """
from softcache.util.progress import progress
with progress("dump", 2000, "rows", done=500) as advance:
    advance(500)
    advance(1000, "view 2")
"""


def on_a_terminal(code: str) -> str:
    """What a process shows when its standard error is a terminal."""
    terminal, child_terminal = pty.openpty()
    termios.tcsetwinsize(child_terminal, (24, 80))
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=child_terminal)
    finally:
        os.close(child_terminal)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        pass  # how Linux reports that the other side has closed
    finally:
        os.close(terminal)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_gets_a_bar() -> None:
    shown = on_a_terminal(WORK)
    assert "dump:  25%" in shown  # done before this run
    assert "dump: 100%|" in shown
    assert "2.00k/2.00k" in shown
    assert "\r" in shown
    assert shown.count("\n") == 1  # one line, which is overwritten


def test_a_pipe_gets_no_bar() -> None:
    result = subprocess.run([sys.executable, "-c", WORK], capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"", b"")


def test_a_terminal_shows_an_error_below_the_bar() -> None:
    code = """
import sys
from softcache.util.progress import progress
try:
    with progress("dump", 2000, "rows") as advance:
        advance(500)
        raise OSError("disk full")
except OSError as error:
    print(error, file=sys.stderr)
"""
    *bar, last = on_a_terminal(code).splitlines()
    assert last == "disk full"
    assert "25%" in bar[-1]
