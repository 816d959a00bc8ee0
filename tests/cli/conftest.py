"""Fixtures for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache
from tests.cli.app_cases import MODELS, Workspace


@pytest.fixture
def workspace(tmp_path: Path, cache: Cache, data_file: Path) -> Workspace:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "models.py").write_text(MODELS)
    return Workspace(folder, f"npz:{data_file}", cache)
