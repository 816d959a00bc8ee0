"""The logits in what models return."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch

from softcache.models.outputs import logits_of

Z = torch.rand(2, 3)
Inception = namedtuple("Inception", ["logits", "aux_logits"])  # as torchvision's, in training


@pytest.mark.parametrize(
    "output",
    [
        Z,
        {"logits": Z, "loss": torch.ones(())},
        OrderedDict(loss=torch.ones(()), logits=Z),
        SimpleNamespace(logits=Z, hidden_states=None),
        Inception(Z, Z + 1),
    ],
)
def test_logits_that_are_named_are_taken(output: object) -> None:
    assert logits_of(output) is Z


@pytest.mark.parametrize(
    "output",
    [(Z, Z), [Z], {"scores": Z}, {"logits": [1, 2]}, SimpleNamespace(logits=None), None, Z.numpy()],
)
def test_anything_else_is_returned_as_it_is(output: object) -> None:
    assert logits_of(output) is output
