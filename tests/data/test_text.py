"""Texts as Unicode code points and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache.data.text import decode, encode

# the texts that a data set can hold; a NUL ends a text
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.lists(texts, min_size=1, max_size=5))
def test_texts_of_any_language_come_back(batch: list[str]) -> None:
    points = encode(batch, 20)
    assert points.shape == (len(batch), 20)
    assert points.dtype == torch.int64
    assert decode(points) == batch
    assert decode(points.int()) == batch


def test_longer_texts_are_cut() -> None:
    assert decode(encode(["naïve ☕ talk"], 7)) == ["naïve ☕"]


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"inputs \(1, 3\) of torch\.float32 are not texts; expected"
    ):
        decode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"inputs \(1, 2, 3\) of torch\.int32 are not texts"):
        decode(torch.zeros(1, 2, 3, dtype=torch.int32))
    for value in (0x110000, -1):
        expected = f"{value} is not a Unicode code point; these inputs are not texts"
        with pytest.raises(ValueError, match=expected):
            decode(torch.tensor([[value, 65]]))
