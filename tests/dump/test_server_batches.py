"""Batches of samples with many rows."""

from __future__ import annotations

import numpy as np
import pytest

from softcache.data.tokens import Document, language_source
from softcache.dump.rows import sample_batches

LENGTHS = (9, 2, 5, 5, 30, 2, 7)


@pytest.mark.parametrize("in_order", [False, True])
def test_every_sample_is_in_one_batch_of_so_many_tokens(in_order: bool) -> None:
    documents = [Document(np.arange(length, dtype=np.int32)) for length in LENGTHS]
    source = language_source("texts", documents, {}, length=64)
    windows = sample_batches(source, range(1, 7), 256, 12, in_order=in_order)
    batches = [batch for window in windows for batch in window]
    order = np.concatenate(batches).tolist()
    assert sorted(order) == [1, 2, 3, 4, 5, 6]
    assert (order == [1, 2, 3, 4, 5, 6]) == in_order
    # in order, each batch is a window of its own: what precedes it is complete
    assert (len(windows) == len(batches)) == in_order
    for batch in batches:
        tokens = sum(LENGTHS[sample] for sample in batch)
        assert len(batch) == 1 or tokens < 12 + max(LENGTHS)
