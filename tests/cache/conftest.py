"""Fixtures shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import writer as writer_module
from tests.cache.writer_cases import run_dump


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The finished file of an undisturbed dump."""
    return run_dump(tmp_path_factory.mktemp("reference") / "tiny.h5")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits depend on how much was written, not on how long it took."""
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", float("inf"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.h5"


@pytest.fixture
def new_path(tmp_path: Path) -> Path:
    """Where a test can create a cache."""
    return tmp_path / "new.h5"
