"""Texts as the inputs of a text model; each text is tokenized once, not in every epoch of every model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor, nn

from softcache.data.text import decode
from softcache.util.log import inform

KEPT_TEXTS = 1 << 18  # texts whose tokens are kept
KEPT_TOKENS = 1 << 26  # tokens of all these texts together, at a few bytes each
FIELDS = frozenset(
    {"input_ids", "token_type_ids", "attention_mask"}
)  # have a number for each token

Tokenizer = Any  # a transformers tokenizer


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text, without padding.

    Attributes:
        fields: what the model takes, by name, each (tokens,).
        is_cut: whether the text has more tokens than the model takes.
    """

    fields: Mapping[str, npt.NDArray[Any]]
    is_cut: bool

    def __len__(self) -> int:
        return len(self.fields["input_ids"])


class TokenCache:
    """The tokens of the texts that were used last, shared by all models with the same tokenizer."""

    def __init__(self, texts: int = KEPT_TEXTS, tokens: int = KEPT_TOKENS) -> None:
        """Prepare an empty cache.

        Args:
            texts: the largest number of texts to keep.
            tokens: the largest number of tokens to keep.
        """
        self.texts, self.tokens = texts, tokens
        self._kept: OrderedDict[bytes, Tokens] = OrderedDict()  # the text used last comes last
        self._size = 0  # tokens in _kept

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenCache:
        return self  # the copy of a model uses the same cache

    def __reduce__(self) -> tuple[type[TokenCache], tuple[int, int]]:
        return TokenCache, (self.texts, self.tokens)  # another process starts with an empty one

    def lookup(
        self, texts: Sequence[str], tokenize: Callable[[list[str]], Sequence[Tokens]]
    ) -> list[Tokens]:
        """The tokens of each text.

        Args:
            texts: the texts.
            tokenize: makes the tokens of texts; called with those that are not in the cache, if any.
        """
        keys = [xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts]
        tokens = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in tokens}
        if new:
            tokens.update(zip(new, tokenize(list(new.values())), strict=True))
        for key in keys:
            self._keep(key, tokens[key])
        return [tokens[key] for key in keys]

    def _keep(self, key: bytes, tokens: Tokens) -> None:
        if key not in self._kept:
            self._size += len(tokens)
        self._kept[key] = tokens
        self._kept.move_to_end(key)
        while len(self._kept) > self.texts or self._size > self.tokens:
            self._size -= len(self._kept.popitem(last=False)[1])


_CACHES: WeakValueDictionary[str, TokenCache] = WeakValueDictionary()  # of all models in use


def shared_cache(tokenizer: Tokenizer, max_length: int) -> TokenCache:
    """The cache of all models whose tokenizer and limit are these; one of its own if that cannot be known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return TokenCache()
    described = f"{backend.to_str()}\n{tokenizer!r}\n{max_length}"
    return _CACHES.setdefault(xxhash.xxh3_128_hexdigest(described.encode()), TokenCache())


class Tokenize(nn.Module):
    """Turns code points (B, length) into the inputs of a text model; has no weights.

    Attributes:
        tokenizer: a tokenizer of transformers.
        max_length: the largest number of tokens of a text; longer texts are cut.
        cache: the tokens of texts that were tokenized before.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, model: str = "the model") -> None:
        """Prepare the tokenizer.

        Args:
            tokenizer: a tokenizer of transformers with a padding token.
            max_length: the largest number of tokens of a text.
            model: the name of the model, for the note on texts that are cut.
        """
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cache = shared_cache(tokenizer, max_length)
        self._note = _NoteOfCuts(model, max_length)

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        """Code points (B, length) to the model's inputs by name, (B, tokens) int64 on the same device."""
        texts = decode(points)
        if set(self.tokenizer.model_input_names) <= FIELDS:
            tokens = self.cache.lookup(texts, self._tokenize)
            self._note([text.is_cut for text in tokens])
            padded = self._pad(tokens)
        else:  # fields that only the tokenizer itself can pad
            encoded = self._encode(texts, padding=True, return_tensors="pt")
            self._note(self._are_cut(texts, encoded))
            padded = dict(encoded)
        return {name: ids.to(points.device) for name, ids in padded.items()}

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        encoded = self._encode(texts)
        return [
            Tokens({name: _compact(rows[index]) for name, rows in encoded.items()}, is_cut)
            for index, is_cut in enumerate(self._are_cut(texts, encoded))
        ]

    def _encode(self, texts: list[str], **options: object) -> Any:  # noqa: ANN401  # a BatchEncoding
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)

    def _are_cut(self, texts: list[str], encoded: Any) -> list[bool]:  # noqa: ANN401
        """Whether each text has more tokens than `encoded` holds of it."""
        if encoded.encodings is not None:
            return [bool(encoding.overflowing) for encoding in encoded.encodings]
        # a tokenizer in Python does not say so; only a text that fills the limit can have been cut
        is_full = [len(ids) >= self.max_length for ids in encoded["input_ids"]]
        return [
            full and len(self.tokenizer(text, verbose=False)["input_ids"]) > self.max_length
            for text, full in zip(texts, is_full, strict=True)
        ]

    def _pad(self, texts: Sequence[Tokens]) -> dict[str, Tensor]:
        """Pad the texts of a batch to the longest of them, as the tokenizer does."""
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        longest = max(map(len, texts))
        padded = {}
        for name in texts[0].fields:
            rows = np.full((len(texts), longest), padding[name], np.int64)
            for row, text in zip(rows, texts, strict=True):
                start = longest - len(text) if self.tokenizer.padding_side == "left" else 0
                row[start : start + len(text)] = text.fields[name]
            padded[name] = torch.from_numpy(rows)
        return padded


class _NoteOfCuts:
    """Tells once of a model, and of all its copies, that texts are cut at its largest number of tokens."""

    def __init__(self, model: str, max_length: int) -> None:
        self.model, self.max_length, self.is_done = model, max_length, False

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoteOfCuts:
        return self

    def __call__(self, are_cut: Sequence[bool]) -> None:
        if any(are_cut) and not self.is_done:
            self.is_done = True
            inform(
                f"note: {self.model} takes at most {self.max_length:,} tokens: {sum(are_cut):,} of the "
                f"{len(are_cut):,} texts of a batch have more and are cut (later batches are not counted)"
            )


def _compact(numbers: Sequence[int]) -> npt.NDArray[Any]:
    """Numbers from 0 in the narrowest dtype that holds them."""
    array = np.asarray(numbers, np.int64)
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
