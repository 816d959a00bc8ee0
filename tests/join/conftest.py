"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import Cache, Header
from softcache.data.source import ArraySource
from tests.conftest import make_arrays
from tests.join.fingerprints_cases import AUGMENTATIONS, COUNT


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with callables of a user's own."""
    path = tmp_path / "aug.py"
    path.write_text(AUGMENTATIONS)
    return path


@pytest.fixture
def source() -> ArraySource:
    return ArraySource("mine", *make_arrays(COUNT))


# which augmentation replays a cache
@pytest.fixture
def header(cache: Cache) -> Header:
    return cache.header
