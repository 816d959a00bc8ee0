"""Documents that a small teacher wrote itself, and its largest log-probabilities as other tools write them.

The teacher knows the next token from the current one, and its documents are what its probabilities promise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

VOCABULARY, K = 60, 8
SHARPNESS = 3.0  # standard deviation of the logits: the most probable token has about 0.5

Record = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A document.

    Attributes:
        tokens: token ids.
        log_probs: (tokens, VOCABULARY); row i is about token i + 1.
    """

    tokens: list[int]
    log_probs: npt.NDArray[np.float64]

    def top(self, k: int = K) -> tuple[list[list[int]], list[list[float]]]:
        """The ids and log-probabilities of the k largest entries of each row."""
        ids = np.argsort(-self.log_probs, -1)[:, :k]
        return ids.tolist(), np.take_along_axis(self.log_probs, ids, -1).round(5).tolist()


def write_documents(count: int = 24, seed: int = 0, shortest: int = 30) -> list[Written]:
    """Documents of 30 to 49 tokens."""
    draw = np.random.default_rng(seed)
    logits = np.random.default_rng(1).normal(0, SHARPNESS, (VOCABULARY, VOCABULARY))
    table = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    documents = []
    for _ in range(count):
        tokens = [int(draw.integers(VOCABULARY))]
        for _ in range(int(draw.integers(shortest, shortest + 20)) - 1):
            tokens.append(int(draw.choice(VOCABULARY, p=np.exp(table[tokens[-1]]))))
        documents.append(Written(tokens, table[tokens]))
    return documents


def distillkit(document: Written, k: int = K) -> Record:
    """A document with a list for each token but the last."""
    ids, values = document.top(k)
    return {"input_ids": document.tokens, "token_ids": ids[:-1], "top_values": values[:-1]}


def plain(document: Written, k: int = K) -> Record:
    """A document with a list for each token, the one at position i about token i + 1."""
    ids, values = document.top(k)
    return {"input_ids": document.tokens, "token_ids": ids, "logprobs": values}


def axolotl(document: Written, k: int = K, prompt: int = 0) -> Record:
    """A document with a list and a mask for each token, of which the first `prompt` do not count."""
    ids, values = document.top(k)
    length = len(document.tokens)
    counts = [place + 1 >= max(prompt, 1) for place in range(length - 1)] + [False]
    first = [-100] * max(prompt, 1)
    return {
        "input_ids": document.tokens,
        "attention_mask": [1] * length,
        "labels": first + document.tokens[len(first) :],
        "target_token_ids": ids,
        "target_logprobs": [v if c else [-1e9] * k for v, c in zip(values, counts, strict=True)],
        "target_mask": [[int(c)] * k for c in counts],
    }


def vllm(document: Written, k: int = K, *, short: bool = False) -> Record:
    """A document with `prompt_logprobs`, where the entries at position i are about token i itself."""
    ids, values = document.top(k)
    rows: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(document.tokens[1:]):
        row: dict[str, dict[str, Any]] = {
            str(i): {"logprob": x, "rank": r, "decoded_token": "x"}
            for r, (i, x) in enumerate(zip(ids[place], values[place], strict=True), 1)
        }
        own = {"logprob": round(float(document.log_probs[place, token]), 5), "rank": 40}
        row.setdefault(str(token), own)
        rows.append({i: e["logprob"] for i, e in row.items()} if short else row)
    return {"prompt_token_ids": document.tokens, "prompt_logprobs": rows}


def write_jsonl(path: Path, records: Sequence[Record]) -> Path:
    """A file with an object on each line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, records: Sequence[Record]) -> Path:
    """A file with a row for each document."""
    table = pyarrow.table({name: [record[name] for record in records] for name in records[0]})
    pyarrow.parquet.write_table(table, path)
    return path


def write_ids(path: Path, documents: Sequence[Written]) -> str:
    """The specification of the documents alone."""
    return f"ids:{write_jsonl(path, [{'input_ids': d.tokens} for d in documents])}"


def expected_rows(
    documents: Sequence[Written], k: int = K, *, own: bool = False
) -> npt.NDArray[np.float64]:
    """The probabilities (R, VOCABULARY) of all tokens but the first, with an even tail.

    Args:
        own: whether each row also has an entry for the token that it is about.
    """
    rows = np.exp(np.concatenate([document.log_probs[:-1] for document in documents]))
    known = np.zeros(rows.shape, np.bool_)
    np.put_along_axis(known, np.argsort(-rows, -1)[:, :k], True, -1)
    if own:
        known[np.arange(len(rows)), np.concatenate([d.tokens[1:] for d in documents])] = True
    rest = 1 - (rows * known).sum(-1, keepdims=True)
    tail = rest / np.maximum(1, (~known).sum(-1, keepdims=True))
    return np.asarray(np.where(known, rows, tail), np.float64)
