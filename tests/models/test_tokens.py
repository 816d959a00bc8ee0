"""Texts become the same tokens as without a cache, each is tokenized once, and cuts are told."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.data.text import encode
from softcache.models import tokens
from softcache.models.tokens import TokenCache, Tokenize, Tokens
from tests.hub import save_tokenizer

TEXTS = [
    "The film was great",
    "The book was dull ☕ and the room grim",
    "",
    "song",
    "The film was great",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("models") / "pairs", "pairs")


def load(folder: Path, **changes: Any) -> Any:  # noqa: ANN401  # a tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), **changes)


class Counted:
    """A tokenizer that keeps the texts of every call."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer, self.calls = tokenizer, []  # type: ignore[var-annotated]

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:  # noqa: ANN401
        self.calls.append(texts)
        return self.tokenizer(texts, **options)

    def __repr__(self) -> str:
        return repr(self.__dict__["tokenizer"])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.__dict__["tokenizer"], name)


def plain(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:  # noqa: ANN401
    """What the tokenizer itself makes of a batch."""
    return dict(
        tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
    )


def points(texts: Sequence[str]) -> Tensor:
    return encode(texts, 60)


def assert_same(batch: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(batch) == list(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
        assert batch[name].dtype == values.dtype


@pytest.mark.parametrize("max_length", [32, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {
            "pad_token": "[UNK]",
            "pad_token_type_id": 3,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
        {"model_input_names": ["input_ids"]},
        {"model_input_names": ["input_ids", "attention_mask", "special_tokens_mask"]},
    ],
)
def test_tokens_are_those_of_the_tokenizer(
    pairs: Path, changes: dict[str, Any], max_length: int
) -> None:
    tokenizer = load(pairs, **changes)
    tokenize = Tokenize(tokenizer, max_length)
    for batch in (TEXTS, TEXTS[2:4], TEXTS[::-1], TEXTS[:1]):
        assert_same(tokenize(points(batch)), plain(tokenizer, batch, max_length))


def test_a_tokenizer_in_python_is_used_in_the_same_way(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Counted):
        """Returns no encodings, and has no backend, as tokenizers written in Python."""

        def __call__(self, texts: Sequence[str], **options: Any) -> Any:  # noqa: ANN401
            encoded = super().__call__(texts, **options)
            encoded._encodings = None
            return encoded

        @property
        def backend_tokenizer(self) -> None:
            return None

    tokenizer = load(pairs)
    tokenize = Tokenize(Slow(tokenizer), 3, "model hf:x")
    assert_same(tokenize(points(TEXTS)), plain(tokenizer, TEXTS, 3))
    assert "3 of the 5 texts of a batch have more and are cut" in capsys.readouterr().out
    assert Tokenize(Slow(tokenizer), 3).cache is not tokenize.cache


# each text once


def test_a_text_is_tokenized_once(pairs: Path) -> None:
    tokenizer = Counted(load(pairs))
    tokenize = Tokenize(tokenizer, 32)
    for _ in range(2):
        tokenize(points(TEXTS))
        tokenize(points(TEXTS[::-1]))
    assert tokenizer.calls == [TEXTS[:4]]  # the fifth is the first again
    tokenize(points(["new", "song"]))
    assert tokenizer.calls[1:] == [["new"]]


def test_models_with_the_same_tokenizer_share_their_tokens(pairs: Path, tmp_path: Path) -> None:
    first, second = Counted(load(pairs)), Counted(load(pairs))
    one, other = Tokenize(first, 32), Tokenize(second, 32)
    expected = one(points(TEXTS))
    assert_same(other(points(TEXTS)), expected)
    assert second.calls == []
    assert (
        copy.deepcopy(Tokenize(load(pairs), 32)).cache is one.cache
    )  # such as the average of the weights
    assert len(pickle.loads(pickle.dumps(one.cache))) == 0


def test_other_tokenizers_and_limits_share_nothing(pairs: Path, tmp_path: Path) -> None:
    words = load(save_tokenizer(tmp_path / "words", "words"))
    cases = [
        Tokenize(load(pairs), 32),
        Tokenize(load(pairs), 5),
        Tokenize(load(pairs, truncation_side="left"), 5),
        Tokenize(words, 5),
    ]
    assert len({id(tokenize.cache) for tokenize in cases}) == len(cases)
    for tokenize in cases:
        assert_same(tokenize(points(TEXTS)), plain(tokenize.tokenizer, TEXTS, tokenize.max_length))


def test_tokens_are_forgotten_with_the_last_model(pairs: Path) -> None:
    tokenize = Tokenize(load(pairs), 31)
    cache = weakref.ref(tokenize.cache)
    del tokenize
    gc.collect()
    assert cache() is None


# the bounds


def of_length(length: int) -> Tokens:
    return Tokens({"input_ids": np.zeros(length, np.uint8)}, False)


def test_the_texts_used_last_are_kept() -> None:
    cache, made = TokenCache(texts=2), []

    def lookup(*texts: str) -> None:
        cache.lookup(texts, lambda new: made.append(new) or [of_length(1) for _ in new])  # type: ignore[func-returns-value]

    lookup("a", "b")
    lookup("a", "c")  # b was used before a and c
    assert len(cache) == 2
    lookup("c", "a")
    assert made == [["a", "b"], ["c"]]
    lookup("b")
    assert made[-1] == ["b"]
    lookup("d", "e", "f", "d")  # a batch larger than the cache
    assert made[-1] == ["d", "e", "f"]
    assert len(cache) == 2


def test_the_number_of_tokens_is_bounded() -> None:
    cache = TokenCache(tokens=10)
    for text in "abcd":
        cache.lookup([text], lambda new: [of_length(4)])
    assert len(cache) == 2
    assert len(cache.lookup(["huge"], lambda new: [of_length(11)])[0]) == 11
    assert len(cache) == 0
    cache.lookup(["a", "a"], lambda new: [of_length(4)])
    assert len(cache) == 1


def test_tokens_take_little_memory(pairs: Path) -> None:
    tokenize = Tokenize(load(pairs), 30)
    tokenize(points(TEXTS))
    (text, *_) = tokenize.cache._kept.values()
    assert {name: str(ids.dtype) for name, ids in text.fields.items()} == {
        "input_ids": "uint8",
        "attention_mask": "uint8",
    }
    assert tokens._compact([0, 256]).dtype == np.uint16
    assert tokens._compact([1 << 17]).dtype == np.uint32
    assert tokens.KEPT_TEXTS == 1 << 18


# the note


def test_texts_that_are_cut_are_told_once(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenize = Tokenize(load(pairs), 3, "model hf:x")
    average = copy.deepcopy(tokenize)
    tokenize(points(["film", "room"]))
    assert capsys.readouterr().out == ""
    tokenize(points(["film", TEXTS[1], TEXTS[0]]))
    told = "model hf:x takes at most 3 tokens: 2 of the 3 texts of a batch have more and are cut"
    assert told in capsys.readouterr().out
    tokenize(points(TEXTS))
    average(points(TEXTS))
    assert capsys.readouterr().out == ""
    # another model with this tokenizer tells it too, though the texts are in the cache
    Tokenize(load(pairs), 3, "model hf:y")(points([TEXTS[1]]))
    assert "model hf:y takes at most 3 tokens: 1 of the 1 texts" in capsys.readouterr().out
