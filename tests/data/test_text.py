"""Texts as Unicode code points and back, and their keys."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from softcache.data.keys import sample_keys
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.text import decode, encode, text_lengths

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


# keys


@given(st.lists(texts, min_size=1, max_size=5))
def test_a_key_is_that_of_the_characters_alone(batch: list[str]) -> None:
    seed = xxhash.xxh3_64_intdigest(b"<u4 text")
    expected = [xxhash.xxh3_64_intdigest(text.encode("utf-32-le"), seed) for text in batch]
    for length in (20, 21, 50):
        points = encode(batch, length)
        assert sample_keys(points, text=True).tolist() == expected
        assert sample_keys(points.int(), text=True).tolist() == expected
        assert text_lengths(points.numpy()).tolist() == [len(text) for text in batch]


def test_texts_that_differ_have_different_keys() -> None:
    batch = ["", "a", "b", "ab", "ba", "a b", "a\0b", " a", "a "]
    assert len(set(sample_keys(encode(batch, 9), text=True).tolist())) == len(batch)


def test_other_samples_keep_their_keys() -> None:
    # by dtype and shape, as in caches that were dumped before
    points = encode(["ab"], 3)
    seed = xxhash.xxh3_64_intdigest(b"<i8(3,)")
    expected = xxhash.xxh3_64_intdigest(np.array([97, 98, 0], "<i8").tobytes(), seed)
    assert sample_keys(points).tolist() == [expected]


def saved(folder: Path, *rows: str) -> str:
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(folder))
    return f"hfds:{folder}"


def keys_of(spec: str, samples: int, workers: int = 0) -> list[int]:
    batch = next(iter(loader(open_source(spec), [range(samples)], workers=workers, keys=True)))
    return [int(key) for key in batch.keys.numpy().view(np.uint64)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_longest_text_of_the_data_does_not_change_keys(tmp_path: Path, workers: int) -> None:
    few = saved(tmp_path / "few", "good", "☕")
    many = saved(tmp_path / "many", "good", "☕", "a much longer text")
    keys = keys_of(few, 2, workers)
    assert keys_of(many, 2, workers) == keys
    assert keys_of(f"{few}?length=4", 2) == keys
    assert keys_of(f"{few}?length=400", 2) == keys
    assert keys_of(f"{few}?length=3", 2)[0] != keys[0]  # another text: "goo"
