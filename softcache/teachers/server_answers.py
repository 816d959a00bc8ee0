"""The answers of vLLM and SGLang about a document, checked: the most probable tokens at each position."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softcache.errors import RemoteError
from softcache.teachers.outputs import TOLERANCE

ROUNDING = 1e-4  # a log-probability may be above 0 by so much
NO_ID = 1 << 62  # in the place of an entry that a row does not have
ADVICE = (
    "softcache needs the log-probabilities of the tokens of a prompt, which no chat server returns: serve "
    "the model with vLLM, or with SGLang and api=sglang"
)

Entries = Sequence[tuple[int, float]]  # of one position: token ids with their log-probabilities


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens of some rows, largest first.

    Attributes:
        ids: (n, k) int64.
        log_probs: (n, k) float64, at most 0.
    """

    ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """What a server was asked.

    Attributes:
        who: the server, for messages.
        document: the number of the sample, for messages.
        tokens: its token ids.
        top: how many tokens were asked for at each position.
        classes: number of tokens of the data's vocabulary.
    """

    who: str
    document: int
    tokens: Sequence[int]
    top: int
    classes: int

    def error(self, what: str, position: int | None = None) -> RemoteError:
        """An error that says where in the data the answer is wrong."""
        where = f"document {self.document}"
        where += "" if position is None else f", position {position}"
        return RemoteError(f"{self.who}, {where}: {what}")


def read_answer(answer: object, api: str, question: Question) -> TopTokens:
    """The rows of a document of n tokens: that at position i speaks of token i + 1; n - 1 rows.

    Args:
        answer: the JSON of the server.
        api: one of APIS.

    Raises:
        RemoteError: the answer is not that of such a server to this document. The message names document and
            position.
    """
    return _most_probable(READERS[api](answer, question), question)


def _check_count(listed: list[object], question: Question) -> None:
    """Raise RemoteError unless there is an entry for each token, and nothing in that of the first."""
    if len(listed) != len(question.tokens):
        raise question.error(
            f"the answer has {len(listed):,} positions for {len(question.tokens):,} tokens; expected one "
            "each. The server may add a start token of its own, or cut the document off"
        )
    if listed[0]:
        raise question.error(
            "the answer has log-probabilities for the first token, which nothing stands before: positions "
            "are shifted, and the rows would belong to other tokens"
        )


def _read_vllm(answer: object, question: Question) -> list[Entries]:
    """The entries for each token but the first; they have the token itself, be it probable or not."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    listed = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(listed, list) or not listed:
        raise question.error(f"the answer has no choices[0].prompt_logprobs; {ADVICE}")
    _check_count(listed, question)
    rows: list[Entries] = []
    for position, (entry, following) in enumerate(
        zip(listed[1:], question.tokens[1:], strict=True)
    ):
        if not isinstance(entry, dict):
            raise question.error(f"{_shown(entry)} in the place of log-probabilities", position)
        row = [
            (_token(key, position, question), _vllm_value(value)) for key, value in entry.items()
        ]
        if len(row) >= question.top and not any(token == following for token, _ in row):
            raise question.error(
                f"the entry does not have token {following}, which comes next: it is of another text, or "
                "positions are shifted",
                position,
            )
        rows.append(row)
    return rows


def _read_sglang(answer: object, question: Question) -> list[Entries]:
    """The entries for each token but the first: the most probable ones."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    listed = meta.get("input_top_logprobs") if isinstance(meta, dict) else None
    own = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(listed, list) or not listed or not isinstance(own, list):
        raise question.error(
            "the answer has no meta_info.input_top_logprobs with input_token_logprobs; " + ADVICE
        )
    _check_count(listed, question)
    for position, token in enumerate(question.tokens[1:]):
        entry = own[position + 1] if position + 1 < len(own) else None
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise question.error(
                f"the answer speaks of {_shown(entry)}, and token {token} comes next: it is of another text, "
                "or positions are shifted",
                position,
            )
    rows: list[Entries] = []
    for position, entry in enumerate(listed[1:]):
        if not isinstance(entry, list) or not all(
            isinstance(item, list) and len(item) >= 2 for item in entry
        ):
            raise question.error(f"{_shown(entry)} in the place of log-probabilities", position)
        rows.append([(_token(item[1], position, question), _number(item[0])) for item in entry])
    return rows


READERS: dict[str, Callable[[object, Question], list[Entries]]] = {
    "vllm": _read_vllm,
    "sglang": _read_sglang,
}


def _token(value: object, position: int, question: Question) -> int:
    """A token id; JSON writes one that names a field as text."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value, re.ASCII):
        value = int(value)
    if type(value) is not int:
        raise question.error(
            f"the answer names the token {_shown(value)} by its text; expected its id, since several ids may "
            "have the same text",
            position,
        )
    if not 0 <= value < question.classes:
        raise question.error(
            f"token id {value}, and the tokenizer of the data has ids from 0 to {question.classes - 1}: give "
            "the data the tokenizer of the server's model",
            position,
        )
    return value


def _vllm_value(value: object) -> float:
    return _number(value.get("logprob") if isinstance(value, dict) else value)


def _number(value: object) -> float:
    """A log-probability; NaN if it is no number."""
    if type(value) not in (int, float):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]  # checked above
    except OverflowError:
        return math.nan


def _most_probable(rows: Sequence[Entries], question: Question) -> TopTokens:
    """The `top` most probable entries of each row, checked; of equal ones that of the smaller id."""
    top = question.top
    for position, row in enumerate(rows):
        if len(row) < top:
            raise question.error(
                f"{len(row)} tokens, and top={top} were asked for; lower top=, or let the server return more "
                "(vLLM: --max-logprobs)",
                position,
            )
        if len(row) > top + 1:
            raise question.error(
                f"{len(row)} tokens, and top={top} were asked for; expected as many, or one more",
                position,
            )
    ids = np.full((len(rows), top + 1), NO_ID, np.int64)
    log_probs = np.full((len(rows), top + 1), -np.inf)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = [token for token, _ in row]
        log_probs[position, : len(row)] = [value for _, value in row]
    _check_values(ids, log_probs, question)
    order = np.lexsort((ids, -log_probs), axis=-1)[:, :top]
    return TopTokens(
        np.take_along_axis(ids, order, 1), np.minimum(np.take_along_axis(log_probs, order, 1), 0.0)
    )


def _check_values(
    ids: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float64], question: Question
) -> None:
    """Raise RemoteError for entries (n, k) that are no log-probabilities, or name a token twice."""
    invalid = np.isnan(log_probs) | (log_probs > ROUNDING)
    if invalid.any():
        position, column = map(int, np.argwhere(invalid)[0])
        raise question.error(
            f"log-probability {log_probs[position, column]:.6g} of token {ids[position, column]}; expected a "
            "number of at most 0",
            position,
        )
    sums = np.exp(log_probs).sum(1)
    if (sums > 1 + TOLERANCE).any():
        position = int((sums > 1 + TOLERANCE).argmax())
        raise question.error(
            f"probabilities that sum to {sums[position]:.4g}; expected at most 1: they are not those of a "
            "softmax at temperature 1",
            position,
        )
    ordered = np.sort(ids, axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        position, column = map(int, np.argwhere(twice)[0])
        raise question.error(f"token {ordered[position, column]} twice", position)


def _shown(value: object) -> str:
    """A value of an answer, short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
