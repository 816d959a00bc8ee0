"""Helpers on tensors: what is finite."""

from __future__ import annotations

import pytest
import torch

from softcache.util.tensors import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 517, 1023])
def test_one_value_that_is_not_finite_is_found(value: float, place: int) -> None:
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    assert all_finite(values.view(32, 32))
    values[place] = value
    assert not all_finite(values.view(32, 32))
    assert not all_finite(torch.tensor([value, -value, value]))


def test_nothing_is_finite() -> None:
    assert all_finite(torch.zeros(0, 5))
