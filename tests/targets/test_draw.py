"""The largest classes are those of a sort, and those drawn at random those of the whole cumulative sum."""

from __future__ import annotations

import pytest
import torch

from softcache.targets.draw import largest, systematic


@pytest.mark.parametrize("classes", [4097, 10_000, 152_064])
def test_blocks_find_the_classes_of_the_whole_sum(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(8, classes, generator=generator)).softmax(-1)
    points = (torch.arange(50, dtype=torch.float64) + 0.37) / 50
    found = systematic(probs, points.expand(8, -1))
    cumulative = probs.double().cumsum(-1)
    exact = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    # a point at the edge between two classes may fall on either side
    assert (found != exact).double().mean() < 0.01
    before = cumulative.gather(1, (found - 1).clamp(min=0)) * (found > 0)
    assert (before <= points * cumulative[:, -1:] + 1e-6).all()
    assert (cumulative.gather(1, found) >= points * cumulative[:, -1:] - 1e-6).all()


@pytest.mark.parametrize("classes", [100, 4097, 10_000, 152_064])
@pytest.mark.parametrize("k", [1, 12, 64])
def test_the_largest_classes_are_those_of_a_sort(classes: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, classes, generator=generator)
    values[0] = -torch.inf
    values[0, -k:] = torch.arange(k).float()  # all in the last block
    found, ids = largest(values, k)
    exact = values.topk(k)
    assert torch.equal(found, exact.values)
    assert torch.equal(ids, exact.indices)
