"""Classes drawn at random are those of the whole cumulative sum."""

from __future__ import annotations

import pytest
import torch

from softcache.targets.draw import systematic


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
