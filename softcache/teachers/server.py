"""A language model behind a server of vLLM or SGLang, which tells the most probable tokens of each row."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.rows import PADDING, TOKEN
from softcache.errors import ModelError, SettingsError
from softcache.teachers.matrix import with_even_tail
from softcache.teachers.server_answers import Question, TopTokens, read_answer
from softcache.teachers.server_client import Client, in_threads
from softcache.teachers.server_options import ServerOptions, server_options
from softcache.types import RowIndex
from softcache.util.spec import Spec

TRIED_TOKENS = 8  # of the first document, to see whether the server answers as it should
BYTES_OF_ANSWER = 1 << 20  # the most bytes of an answer, and so many more
BYTES_OF_ENTRY = 256  # for each token of each position


class Server(nn.Module):
    """A teacher that is asked over HTTP.

    Attributes:
        options: where it is and how it is asked.
        classes: number of tokens of the data's vocabulary.
    """

    def __init__(self, options: ServerOptions, classes: int) -> None:
        super().__init__()
        self.options, self.classes = options, classes
        self.client = Client(options)

    def forward(self, inputs: Tensor) -> Tensor:
        raise ModelError(
            f"server {self.options.url} tells a few tokens of each row, not all logits at once; it is a "
            "teacher of softcache dump alone"
        )

    def try_out(self, inputs: Tensor) -> None:
        """Ask for the first tokens of a document (1, L).

        Raises:
            RemoteError: the server cannot be reached, or does not answer as it should.
        """
        tokens = _tokens(inputs[0].cpu().numpy())[:TRIED_TOKENS]
        self._ask(0, tokens if len(tokens) > 1 else tokens * 2, threading.Event())

    def ask(self, inputs: Tensor, rows: RowIndex, samples: npt.NDArray[np.int64]) -> TopTokens:
        """The most probable tokens of some rows (R,), of documents of which several are asked for at a time.

        Args:
            inputs: (B, L) token ids, padded with PADDING.
            rows: the row at position i of a document speaks of its token i + 1.
            samples: (B,) the numbers of the documents, for messages.

        Raises:
            RemoteError: the server cannot be reached, or does not answer as it should.
        """
        ids, of_row, positions = (t.cpu().numpy() for t in (inputs, rows.samples, rows.positions))
        top = self.options.top
        result = TopTokens(np.zeros((len(of_row), top), np.int64), np.zeros((len(of_row), top)))
        documents = np.unique(of_row).tolist()

        def work(number: int, stop: threading.Event) -> None:
            document = documents[number]
            own = of_row == document
            answer = self._ask(int(samples[document]), _tokens(ids[document]), stop)
            result.ids[own] = answer.ids[positions[own]]
            result.log_probs[own] = answer.log_probs[positions[own]]

        in_threads(len(documents), work, self.options.concurrency)
        return result

    def dense(self, rows: TopTokens, part: Tensor) -> Tensor:
        """Log-probabilities (n, C) float32 of a part (n,) of rows; the rest of the mass is spread evenly."""
        chosen = part.cpu().numpy()
        return with_even_tail(
            torch.from_numpy(rows.ids[chosen]),
            torch.from_numpy(rows.log_probs[chosen]),
            self.classes,
        )

    def _ask(self, document: int, tokens: list[int], stop: threading.Event) -> TopTokens:
        """The rows (n - 1) of a document of n tokens."""
        top = self.options.top
        limit = BYTES_OF_ANSWER + BYTES_OF_ENTRY * len(tokens) * (top + 1)
        answer = self.client.post(
            request_body(self.options, tokens), limit, f"document {document}", stop
        )
        question = Question(self.client.who, document, tokens, top, self.classes)
        return read_answer(answer, self.options.api, question)


def open_server(spec: Spec, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Prepare to ask a server; nothing is sent yet.

    Returns:
        The server as a module, and its provenance, which names neither the host nor a key.

    Raises:
        SettingsError: the data has no tokens or no vocabulary, there are fewer tokens than `top`, or the
            environment variable of the key holds none.
    """
    options = server_options(spec)
    if spec.task != TOKEN:
        rows = f"a row for each {spec.task}" if spec.task else "one row for each sample"
        raise SettingsError(
            f"teacher {spec.text}: the data has {rows}, and a server is asked about the tokens of documents; "
            "give text:, jsonl: or ids: data with ?tokenizer=ID_OR_FOLDER"
        )
    if classes is None:
        raise SettingsError(
            f"teacher {spec.text}: the data does not say how many tokens there are; name its tokenizer with "
            "?tokenizer=ID_OR_FOLDER, or their number with --classes"
        )
    if options.top > classes:
        raise SettingsError(
            f"teacher {spec.text}: top={options.top}, and there are {classes:,} tokens; lower it"
        )
    return Server(options, classes), {"name": options.name, "parameters": 0}


def request_body(options: ServerOptions, tokens: list[int]) -> dict[str, Any]:
    """The question for the log-probabilities of the tokens of a prompt, at temperature 1.

    One token is generated, which nobody needs: servers differ in whether they accept none.
    """
    if options.api == "sglang":
        return {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": options.top,
        }
    return {
        "model": options.model,
        "prompt": tokens,
        "max_tokens": 1,
        # the defaults of a model may be others, and change what a server returns
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "add_special_tokens": False,
        "prompt_logprobs": options.top,
    }


def _tokens(row: npt.NDArray[np.int64]) -> list[int]:
    """The token ids of a document, without its padding."""
    return [int(token) for token in row[row != PADDING]]
