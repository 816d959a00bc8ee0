"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache
from tests.cli.app_cases import MODELS, Place


@pytest.fixture
def place(tmp_path: Path, cache: Cache, data_file: Path) -> Place:
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "models.py").write_text(MODELS)
    return Place(folder, f"npz:{data_file}", cache)
