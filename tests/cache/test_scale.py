"""More than 2^31 rows and 2^40 bytes, in a sparse file: no index overflows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import Cache, Sampled
from softcache.cache.reader import open_cache, partial_path
from softcache.cache.verify import block_damage
from softcache.cache.writer import Writer
from softcache.targets.fetch import soft_targets
from tests.bench import create_cache

CLASSES = 256  # 512 bytes per row
SAMPLES = (1 << 31) + (1 << 24) + 5


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unfinished cache of more than a tebibyte, sparse, so that it takes no room on disk."""
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: os.truncate(file, size))
    try:
        create_cache(tmp_path / "big.h5", SAMPLES, CLASSES, 2.0, views=2, augment="flip")
    except Exception as error:
        if partial_path(tmp_path / "big.h5").exists():
            raise
        pytest.skip(f"this file system cannot hold a sparse file of 2 TiB: {error}")
    return tmp_path / "big.h5"


def rows_of(block: range, view: int) -> np.ndarray:
    """Log-probabilities (B, C) float16 that depend on cache_row and view."""
    logits = np.zeros((len(block), CLASSES), np.float32)
    logits[np.arange(len(block)), (np.arange(block.start, block.stop) + view) % CLASSES] = 5
    log_probs: np.ndarray = torch.log_softmax(torch.from_numpy(logits), -1).half().numpy()
    return log_probs


def test_the_last_rows_of_a_file_of_two_tebibytes_come_back(path: Path) -> None:
    with Writer(path) as writer:
        header = writer.header
        blocks = [header.block_range(block) for block in (0, header.blocks // 2, header.blocks - 1)]
        for view in range(2):
            for block in blocks:
                cache_rows = np.arange(block.start, block.stop)
                samples = {"labels": cache_rows % CLASSES, "keys": cache_rows.astype(np.uint64)}
                writer.write(view, block.start, {"log_probs": rows_of(block, view)}, samples)
                assert not writer.missing(view, block.start, block.stop).any()
                assert not writer._filling  # a block is written as soon as it is full
    cache = open_cache(partial_path(path), unfinished=True)
    assert cache.header.file_bytes > 1 << 40
    assert cache.header.views * cache.header.samples > 1 << 32
    check_rows(cache, blocks)


def check_rows(cache: Cache, blocks: list[range]) -> None:
    fetch = soft_targets(cache, 2.0, torch.device("cpu"))
    for view in range(2):
        for block in blocks:
            cache_rows = np.arange(block.start, block.stop)[-7:]
            expected = rows_of(block, view)[-7:].astype(np.float32)
            np.testing.assert_allclose(cache.rows(view, cache_rows), expected, atol=2e-3)
            targets = fetch(view, cache_rows)
            assert isinstance(targets, torch.Tensor)
            np.testing.assert_allclose(targets.numpy(), expected, atol=2e-3)
            np.testing.assert_array_equal(cache.labels[cache_rows], cache_rows % CLASSES)
            assert block_damage(cache, view, block.start // cache.header.block_rows) is None
            assert block_damage(cache, None, block.start // cache.header.block_rows) is None
    assert cache.missing_blocks() == 3 * (cache.header.blocks - 3)


def test_a_class_id_beyond_two_bytes_is_stored_in_four() -> None:
    ids = Sampled(8).arrays(128_000)[0]
    assert ids.dtype == "<u4"
