"""Fixtures shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as cache_writer
from tests.dump.loop_cases import StopAt


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StopAt:
    """A function that makes the teacher raise at its n-th batch from now on; 0 means never."""

    def stop_at(batch: int, error: type[BaseException] = ValueError) -> None:
        (tmp_path / "calls").unlink(missing_ok=True)
        monkeypatch.setenv("TEACHER_AT", str(batch))
        monkeypatch.setenv("TEACHER_RAISES", error.__name__)

    return stop_at


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows, each committed as soon as it is whole; no batch ends where a block does."""
    monkeypatch.setattr(cache_allocate, "block_rows", lambda *layout: 7)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
