"""Directions from hidden states and the head are those of the rows themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softcache.dump.config import DumpConfig
from softcache.dump.fit_basis import principal_directions
from softcache.dump.fit_head import directions_of
from softcache.dump.loop import dump
from softcache.models.language import TokenModel
from tests.models.test_language import models
from tests.tokens import make_language_model, write_texts


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_they_are_the_principal_directions_of_the_rows(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 12, generator=generator) * torch.linspace(0.2, 2, 12) + 1
    weight, bias = torch.randn(90, 12, generator=generator), torch.randn(90, generator=generator)
    rows = torch.log_softmax((states @ weight.T + bias) / temperature, -1)
    ours, theirs = (
        directions_of(states, weight, bias, temperature, 8),
        principal_directions(rows, 8),
    )
    torch.testing.assert_close(ours.deviations, theirs.deviations, rtol=1e-3, atol=1e-4)
    same = (ours.directions @ theirs.directions.T).diagonal().abs()
    torch.testing.assert_close(same, torch.ones(8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)


def test_a_head_of_fewer_dimensions_gives_fewer_directions() -> None:
    states = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    assert len(directions_of(states, weight, torch.zeros(50), 1.0, 30).directions) == 4


def test_only_a_linear_head_has_a_matrix() -> None:
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    for name, is_linear in (("gpt2", True), ("llama", True), ("soft cap", False), ("scale", False)):
        found = TokenModel(models()[name], 45).eval().linear_head(states)
        assert (found is not None) == is_linear, name
        if found is not None:
            assert found[0].shape == (45, 16)


def test_at_the_width_of_the_teacher_basis_is_nearly_exact(tmp_path: Path) -> None:
    make_language_model(tmp_path / "teacher")
    text = write_texts(tmp_path / "train.txt", 30)
    cache = dump(
        DumpConfig(
            teacher=f"hf:{tmp_path / 'teacher'}",
            data=f"text:{text}?documents=lines",
            temperature=1.0,
            encoding="basis:16,4",
            out=tmp_path / "cache.h5",
        )
    )
    assert (cache.header.summary or {})["fidelity"]["mean"] < 1e-3
