"""Documents cut into samples of tokens, and which of their tokens a model is to predict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache.layout import layout_of
from softcache.data.rows import NO_ROW, TOKEN, WORD, TokenSource
from softcache.errors import DataError

DEFAULT_LENGTH = 1024  # tokens of a sample, if neither the data nor the model says how many

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """A text as tokens.

    Attributes:
        ids: (tokens,).
        counts: (tokens,) whether a model is to predict each token; None for all.
    """

    ids: Ids
    counts: npt.NDArray[np.bool_] | None = None


def language_source(
    name: str,
    documents: Iterable[Document],
    facts: dict[str, Any],
    *,
    length: int,
    stride: int | None = None,
) -> TokenSource:
    """Documents for a language model: the row at position i predicts token i + 1.

    A document that is longer than `length` becomes several samples, each `stride` tokens after the one
    before. A token that several of them hold is predicted by the first alone; in the others it is context.

    Args:
        facts: what a header says of the tokens, besides their number.
        length: the most tokens of a sample.
        stride: tokens between the starts of two samples of a document; `length` by default.

    Raises:
        DataError: no token is to be predicted.
    """
    stride = length if stride is None else stride
    ids: list[Ids] = []
    positions: list[npt.NDArray[np.int64]] = []
    labels: list[Ids] = []
    for document in documents:
        predicted = 1  # the first token of the document that no sample has predicted yet
        for start in range(0, max(1, len(document.ids)), stride):
            part = document.ids[start : start + length]
            if len(part) < 2 and (start > 0 or not len(part)):
                break
            targets = np.arange(max(predicted, start + 1), start + len(part))
            if document.counts is not None:
                targets = targets[document.counts[targets]]
            ids.append(part)
            positions.append(targets - 1 - start)
            labels.append(document.ids[targets])
            predicted = start + len(part)
            if predicted >= len(document.ids):
                break
    if not sum(map(len, positions)):
        raise DataError(
            f"{name}: no token is to be predicted in {len(ids):,} samples; expected documents of two tokens "
            "or more, and for chats a turn of the assistant"
        )
    return token_source(name, ids, positions, labels, facts, TOKEN)


def token_source(
    name: str,
    ids: Sequence[Ids],
    positions: Sequence[npt.NDArray[np.int64]],
    labels: Sequence[npt.NDArray[Any]],
    facts: dict[str, Any],
    unit: str,
    class_names: tuple[str, ...] = (),
) -> TokenSource:
    """A source of samples of tokens, from one array of each kind for each sample."""
    lengths = np.array([len(part) for part in ids], np.int64)
    counts = np.array([len(part) for part in positions], np.int64)
    return TokenSource(
        name,
        np.concatenate(ids).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        layout_of(counts, np.concatenate(positions).astype(np.int64)),
        np.concatenate(labels).astype(np.int32),
        facts | {"tokens": int(lengths.sum())},
        unit,
        class_names,
    )


def labelled_source(
    name: str,
    ids: Sequence[Ids],
    labels: Sequence[npt.NDArray[np.int64]],
    facts: dict[str, Any],
    class_names: tuple[str, ...] = (),
) -> TokenSource:
    """Tokens with a label each for a token classifier, and no row where the label is NO_ROW.

    Raises:
        DataError: a sample has another number of labels than of tokens, or there is no row.
    """
    for number, (tokens, given) in enumerate(zip(ids, labels, strict=True)):
        if len(tokens) != len(given):
            raise DataError(
                f"{name}: sample {number} has {len(tokens)} tokens and {len(given)} labels; expected a label "
                f"for each token, and {NO_ROW} where there is none"
            )
    rows = [np.flatnonzero(given != NO_ROW) for given in labels]
    if not sum(map(len, rows)):
        raise DataError(
            f"{name}: no token has a label; expected one at the first token of each word"
        )
    kept = [given[row] for given, row in zip(labels, rows, strict=True)]
    return token_source(name, ids, rows, kept, facts, WORD, class_names)
