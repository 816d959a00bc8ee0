"""Batches of tokens: every sample once, about as many tokens in each, rows that count equally."""

from __future__ import annotations

import numpy as np
import pytest

from softcache.errors import SettingsError
from softcache.train.sampling import RowBatches

LENGTHS = np.random.default_rng(0).integers(2, 60, 400)


def batches_of(
    epoch: int = 0, process: int = 0, processes: int = 1, tokens: int = 300
) -> RowBatches:
    batches = RowBatches(
        LENGTHS - 1, LENGTHS, tokens, 128, 7, lambda samples, epoch: samples, process, processes
    )
    batches.set_epoch(epoch)
    return batches


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_is_in_one_batch(epoch: int) -> None:
    batches = batches_of(epoch)
    found = list(batches)
    assert len(found) == len(batches) == LENGTHS.sum() // 300
    assert sorted(np.concatenate(found).tolist()) == list(range(400))
    assert all(len(batch) for batch in found)
    assert max(LENGTHS[batch].sum() for batch in found) < 300 * 1.5


def test_samples_of_a_batch_are_about_as_long_so_that_little_is_padded() -> None:
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches_of())
    assert padded < 1.15 * LENGTHS.sum()


def test_epochs_differ_and_a_seed_repeats() -> None:
    first, again, other = (np.concatenate(list(batches_of(epoch))) for epoch in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_processes_share_each_batch_with_weights_by_rows() -> None:
    whole = list(batches_of())
    shares = [list(batches_of(process=p, processes=2)) for p in (0, 1)]
    weights = [list(batches_of(process=p, processes=2).weights()) for p in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
    for batch, left, right in zip(whole, *weights, strict=True):
        assert left + right == pytest.approx(2)
        assert left == pytest.approx(
            2 * (LENGTHS[batch[::2]] - 1).sum() / (LENGTHS[batch] - 1).sum()
        )


def test_a_run_goes_on_within_an_epoch() -> None:
    batches = batches_of()
    every = list(batches)
    batches.set_epoch(0, 5)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in every[5:]]
    assert len(list(batches.weights())) == len(every) - 5


def test_a_sample_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(SettingsError, match="--batch-tokens is 50, and a sample has 59 tokens"):
        batches_of(tokens=50)
