"""Tokenizers of transformers: loaded from a folder, a file or the hub, and identified by their content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from softcache.errors import DataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.log import inform
from softcache.util.messages import one_line

BATCH = 1000  # texts tokenized at a time
SAMPLE = "The quick brown fox — jumps: 0123456789\n\tnaïve façade 東京 🦊 def f(x): return x  # ok"


class TextTokenizer:
    """A tokenizer of transformers, as data needs it: texts and chats to token ids."""

    def __init__(self, tokenizer: Any, place: str) -> None:  # noqa: ANN401  # of transformers
        """Wrap a tokenizer.

        Args:
            tokenizer: a tokenizer of transformers.
            place: where it was loaded from, for messages.
        """
        self.tokenizer, self.place = tokenizer, place

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the vocabulary, its ids, and how texts are divided."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        ids = self.tokenizer(SAMPLE)["input_ids"]
        described = json.dumps([vocabulary, list(ids)], ensure_ascii=True)
        return xxhash.xxh3_64_hexdigest(described.encode())

    @property
    def vocabulary(self) -> int:
        """The number of ids: the largest one, and 1."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @property
    def template(self) -> str | None:
        """The hash of its chat template, 16 hex digits; None if it has none."""
        template = getattr(self.tokenizer, "chat_template", None)
        return xxhash.xxh3_64_hexdigest(str(template).encode()) if template else None

    def facts(self, *, chat: bool = False) -> dict[str, Any]:
        """What a header says of the tokenizer."""
        template = {"template": self.template} if chat and self.template else {}
        return {"tokenizer": self.fingerprint, "vocabulary": self.vocabulary, **template}

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The token ids of texts, each with the special tokens that the tokenizer adds, once."""
        documents = []
        for start in range(0, len(texts), BATCH):
            part = list(texts[start : start + BATCH])
            encoded = self.tokenizer(part, truncation=False, verbose=False)["input_ids"]
            documents += [self._once(np.array(ids, np.int32)) for ids in encoded]
        return documents

    def _once(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The ids without a second start token, of a text that began with one itself."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        if start is not None and len(ids) > 1 and ids[0] == start == ids[1]:
            return ids[1:]
        return ids

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], loss_on: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """A chat as token ids, and which of them a model is to predict.

        The template is rendered once, for the whole chat; where a turn begins and ends in it is found by
        rendering the turns before it.

        Args:
            loss_on: `all` tokens; those of the `assistant`'s turns; or the `completion`, its last turn.

        Raises:
            DataError: there is no template, or it renders a chat in another way than its beginning.
        """
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer {self.place} has no chat template, which messages= needs; give texts, or a "
                "tokenizer with one"
            )
        text = self._render(messages)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoded["input_ids"], np.int32)
        if loss_on == "all":
            return ids, np.ones(len(ids), np.bool_)
        turns = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
        spans = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        counts = np.zeros(len(ids), np.bool_)
        for turn in turns[-1:] if loss_on == "completion" else turns:
            before = self._render(messages[:turn], add_generation_prompt=True)
            until = self._render(messages[: turn + 1])
            if not text.startswith(until) and text.startswith(until.rstrip()):
                until = until.rstrip()  # a template may end a whole chat with a line feed
            if not (text.startswith(until) and until.startswith(before)):
                raise DataError(
                    f"the chat template of {self.place} renders the first {turn + 1} turns in another way "
                    "alone than within the chat, so the assistant's tokens cannot be found; use "
                    "?loss_on=all"
                )
            counts |= (spans[:, 1] > len(before)) & (spans[:, 0] < len(until))
        return ids, counts

    def _render(self, messages: Sequence[dict[str, Any]], **options: bool) -> str:
        if not messages:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            )
        except Exception as error:  # a template is code of its own
            raise DataError(
                f"the chat template of {self.place} cannot render a chat ({type(error).__name__}: "
                f"{one_line(error)}); expected turns with role and content"
            ) from error


def load_tokenizer(place: str) -> TextTokenizer:
    """Load a tokenizer from a folder, a tokenizer.json or the hub.

    Raises:
        SettingsError: transformers is not installed, or there is no tokenizer.
    """
    library = import_extra("transformers", extra="hf", what=f"tokenizer {place}")
    path = Path(place).expanduser()
    try:
        if path.is_file():
            tokenizer = library.PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            tokenizer = library.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the library raises errors of many types
        raise SettingsError(
            f"tokenizer {place} cannot be loaded ({type(error).__name__}: {one_line(error)[:300]}); expected "
            "a folder with tokenizer.json, that file, or a hub id"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        inform(f"note: the tokenizer {place} is not a fast one; large texts take long")
    return TextTokenizer(tokenizer, place)
