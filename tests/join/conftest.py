"""Fixtures for the tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache, Header
from softcache.data.source import ArraySource
from tests.conftest import make_arrays
from tests.join.fingerprints_cases import AUGMENTATIONS, COUNT


@pytest.fixture
def augment_file(tmp_path: Path) -> Path:
    """A file with a user's own callables."""
    path = tmp_path / "aug.py"
    path.write_text(AUGMENTATIONS)
    return path


@pytest.fixture
def source() -> ArraySource:
    return ArraySource("mine", *make_arrays(COUNT))


@pytest.fixture
def header(cache: Cache) -> Header:
    return cache.header
