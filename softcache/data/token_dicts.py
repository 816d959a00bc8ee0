"""Token ids in dicts, as trainers take them: `input_ids`, with masks or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.rows import NO_ROW, TokenSource
from softcache.data.tokens import Document, labelled_source, language_source
from softcache.errors import DataError

MAX_ID = (1 << 31) - 1
TOKENS = ("input_ids", "prompt_token_ids")  # names of a column of token ids; the latter is vLLM's


def source_of_dicts(name: str, records: Sequence[Mapping[str, Any]]) -> TokenSource:
    """Samples of dicts with `input_ids`, as trainers take them, for a language model or a token classifier.

    `labels` are those of transformers: the tokens themselves for a language model, which shifts them, and
    NO_ROW where none counts; or, if they are anything else, the class of each token.

    Raises:
        DataError: an item holds no token ids, or labels of another length.
    """
    documents = [document_of(record, number, name) for number, record in enumerate(records)]
    if all(_repeats_ids(record) for record in records):
        longest = max((len(document.ids) for document in documents), default=2)
        return language_source(name, documents, {}, length=max(2, longest))
    labels = []
    for number, record in enumerate(records):
        given = np.asarray(record.get("labels"), np.int64).reshape(-1)
        present = record.get("attention_mask")
        keep = slice(None) if present is None else np.asarray(present, np.bool_).reshape(-1)
        tokens = np.asarray(record["input_ids"]).size
        if len(given) != tokens:
            raise DataError(
                f"{name}: sample {number} has {tokens} input_ids and {len(given)} "
                "labels; expected one for each token"
            )
        labels.append(given[keep])
    return labelled_source(name, [document.ids for document in documents], labels, {})


def _repeats_ids(record: Mapping[str, Any]) -> bool:
    """Whether the labels of an item are its tokens, where they count, or there are none."""
    if record.get("labels") is None:
        return True
    labels, ids = (np.asarray(record[name]).reshape(-1) for name in ("labels", "input_ids"))
    return len(labels) == len(ids) and bool(((labels == ids) | (labels == NO_ROW)).all())


def document_of(record: Mapping[str, Any], number: int, where: str) -> Document:
    """A document from `input_ids` and, optionally, `loss_mask` or `labels` with NO_ROW where none counts.

    Raises:
        DataError: they are no token ids, or of different lengths.
    """
    column = next((name for name in TOKENS if record.get(name) is not None), None)
    if column is None:
        raise DataError(
            f"{where}: sample {number} has no input_ids; it has {', '.join(map(str, record))[:200]}"
        )
    ids = token_ids(record[column], f"{where}: sample {number}")
    present = record.get("attention_mask")
    keep = slice(None) if present is None else np.asarray(present, np.bool_).reshape(-1)
    counts = None
    if record.get("loss_mask") is not None:
        counts = np.asarray(record["loss_mask"], np.bool_).reshape(-1)
    elif record.get("labels") is not None:
        counts = np.asarray(record["labels"], np.int64).reshape(-1) != NO_ROW
    for name, values in (("attention_mask", present), ("loss_mask or labels", counts)):
        found = len(ids) if values is None else np.asarray(values).size
        if found != len(ids):
            raise DataError(
                f"{where}: sample {number} has {len(ids)} input_ids and {found} of {name}; "
                "expected as many"
            )
    return Document(ids[keep], None if counts is None else counts[keep])


def token_ids(values: Any, where: str) -> npt.NDArray[np.int32]:  # noqa: ANN401  # whatever a file holds
    """Token ids (tokens,), checked.

    Raises:
        DataError: they are no list of whole numbers from 0.
    """
    ids = np.asarray(values)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    invalid = ids.ndim != 1 or (ids.size and ids.dtype.kind not in "ui")
    if invalid or (ids.size and (ids.min() < 0 or ids.max() > MAX_ID)):
        what = (
            f"{ids.dtype} of shape {ids.shape}" if invalid else f"from {ids.min()} to {ids.max()}"
        )
        raise DataError(f"{where}: input_ids are {what}; expected a list of whole numbers from 0")
    return ids.astype(np.int32)
