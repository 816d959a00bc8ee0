"""A server of a tiny language model, as vLLM and SGLang answer, which can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tests.servers import running_server

# gets the handler of a request and its number from 0 on; True if it has answered itself
Misbehaviour = Callable[["Handler", int], bool]
# gets the log-probabilities (n, V) of a document and the number of the request
Change = Callable[[Tensor, int], Tensor]


@dataclass
class Served:
    """A running server.

    Attributes:
        url: its address, as a specification has it.
        asked: the body of each request.
        paths: the path of each request.
        headers: the headers of each request.
        times: when each request came.
        busiest: the most requests at a time.
        misbehave: see Misbehaviour.
        change: changes log-probabilities before they are sent.
        edit: changes an answer before it is sent.
        extra: whether a row also has the token that comes next, as with vLLM.
        delay: seconds until an answer is sent.
    """

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busiest: int = 0
    misbehave: Misbehaviour = lambda handler, number: False
    change: Change = lambda log_probs, number: log_probs
    edit: Callable[[dict[str, Any]], object] = lambda answer: answer
    extra: bool = True
    delay: float = 0.0

    def spec(self, top: int = 8, **options: object) -> str:
        """The specification of the teacher."""
        more = "".join(f"&{name}={value}" for name, value in options.items())
        return f"openai:{self.url}?model=tiny&top={top}{more}"


class Handler(BaseHTTPRequestHandler):
    """Answers a request; `answer` is how a test sends something else."""

    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    protocol_version = "HTTP/1.1"
    served: Served
    model: GPT2LMHeadModel
    lock: threading.Lock
    active: list[int]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(405, {"error": {"message": "only POST"}})

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            number = len(served.asked)
            served.asked.append(body)
            served.paths.append(self.path)
            served.headers.append(dict(self.headers))
            served.times.append(time.monotonic())
            self.active.append(number)
            served.busiest = max(served.busiest, len(self.active))
        time.sleep(served.delay)
        with self.lock:  # before the answer, after which the next request may come
            self.active.remove(number)
        if not served.misbehave(self, number):
            self.answer(200, self.regular(body, number))

    def regular(self, body: dict[str, Any], number: int) -> object:
        """The answer of vLLM, or of SGLang."""
        tokens = body.get("prompt") or body["input_ids"]
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0]
        log_probs = self.served.change(torch.log_softmax(logits, -1), number)[:-1]
        if "input_ids" in body:
            values, ids = log_probs.topk(body["top_logprobs_num"])
            entries = [
                [[value, token, None] for value, token in zip(*pair, strict=True)]
                for pair in zip(values.tolist(), ids.tolist(), strict=True)
            ]
            meta = {
                "input_token_logprobs": [
                    [None if n == 0 else -1.0, t, None] for n, t in enumerate(tokens)
                ],
                "input_top_logprobs": [None, *entries],
            }
            return self.served.edit({"text": "", "meta_info": meta})
        values, ids = log_probs.topk(body["prompt_logprobs"])
        listed: list[dict[str, Any] | None] = [None]
        for row, (of_row, own) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
            entry = {
                str(token): {"logprob": value, "rank": rank, "decoded_token": "x"}
                for rank, (token, value) in enumerate(zip(own, of_row, strict=True), 1)
            }
            if self.served.extra:
                following = tokens[row + 1]
                value = log_probs[row, following].item()
                entry.setdefault(
                    str(following), {"logprob": value, "rank": 99, "decoded_token": "x"}
                )
            listed.append(entry)
        return self.served.edit({"choices": [{"text": "", "prompt_logprobs": listed}]})

    def answer(
        self, status: int, body: object, kind: str = "application/json", **headers: str
    ) -> bool:
        """Send an answer: JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        headers = {"Content_Length": str(len(content))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content)
        return True

    def handle(self) -> None:
        with suppress(ConnectionError, BrokenPipeError):
            super().handle()


@contextmanager
def language_server(folder: Path) -> Iterator[Served]:
    """Serve the model in a folder on a free local port."""

    class OwnHandler(Handler):
        """With attributes of this server alone."""

    OwnHandler.model = GPT2LMHeadModel.from_pretrained(folder).eval()
    OwnHandler.lock, OwnHandler.active = threading.Lock(), []
    with running_server(OwnHandler) as url:
        served = OwnHandler.served = Served(f"{url}/v1")
        yield served
