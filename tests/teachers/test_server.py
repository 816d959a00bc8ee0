"""Teachers behind servers: the same rows as those of the model itself, and every way to answer wrongly."""

from __future__ import annotations

import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from softcache.cache import Cache, allocate, open_cache
from softcache.cache.reader import partial_path
from softcache.teachers import server_client
from softcache.teachers.server_client import Client, Pace, _retry_after, in_threads
from softcache.teachers.server_options import ServerOptions
from tests.cli.app_cases import softcache
from tests.teachers.server_cases import Handler, Served, language_server
from tests.tokens import make_language_model, write_texts

KEY = "sk-0123456789abcdef"
ROUNDING = 2**-10  # of float16, relative


@dataclass
class Place:
    """A model, texts, and a server of the model."""

    folder: Path
    served: Served
    out: Path = field(init=False)

    def dump(self, *more: str, teacher: str = "", encoding: str = "topk:8") -> Result:
        """Dump the texts; options in `more` override the usual ones."""
        data = (
            f"text:{self.folder / 'corpus.txt'}?documents=lines&tokenizer={self.folder / 'model'}"
        )
        return softcache(
            "dump", "--teacher", teacher or self.served.spec(), "--data", data, "--temperature", "1",
            "--encoding", encoding, "--out", self.out, *more,
        )  # fmt: skip

    def dumped(self, *more: str, **options: str) -> Cache:
        """The cache of a dump that succeeds."""
        result = self.dump(*more, **options)
        assert result.exit_code == 0, result.output
        return open_cache(self.out)

    def refused(self, message: str, *more: str, code: int = 1, **options: str) -> str:
        """The message of a dump that fails."""
        result = self.dump(*more, **options)
        assert result.exit_code == code, result.output
        assert re.search(message, result.stderr), result.stderr
        return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    make_language_model(folder / "model", vocabulary=300)
    write_texts(folder / "corpus.txt", 12)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Served]:
    with language_server(folder / "model") as served:
        yield served


@pytest.fixture
def place(
    folder: Path, running: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setattr(server_client, "FIRST_WAIT", 0.01)
    fresh = Served(running.url)
    running.__dict__.update(fresh.__dict__)
    place = Place(folder, running)
    place.out = tmp_path / "c.h5"
    yield place
    running.__dict__.update(fresh.__dict__)


def once(action: Callable[[Handler], bool], *numbers: int) -> Callable[[Handler, int], bool]:
    """Misbehave at the requests with these numbers alone; 0 is the trial."""
    return lambda handler, number: number in numbers and action(handler)


def after(first: int, action: Callable[[Handler], bool]) -> Callable[[Handler, int], bool]:
    """Misbehave at all requests from this one on."""
    return lambda handler, number: number >= first and action(handler)


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of the model itself."""
    place = Place(folder, Served(""))
    place.out = tmp_path_factory.mktemp("local") / "local.h5"
    return place.dumped(teacher=f"hf:{folder / 'model'}")


# the rows


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_the_rows_are_those_of_the_model(place: Place, local: Cache, api: str) -> None:
    cache = place.dumped(teacher=place.served.spec(api=api))
    assert np.array_equal(cache.keys, local.keys)
    assert np.array_equal(cache.labels, local.labels)
    assert np.array_equal(cache.arrays["ids"], local.arrays["ids"])
    for name in ("log_probs", "tails"):
        # the other classes are known together only: their mass is right at temperature 1
        own, other = (
            c.arrays[name][..., :1] if name == "tails" else c.arrays[name] for c in (cache, local)
        )
        assert np.allclose(
            own.astype(np.float32), other.astype(np.float32), rtol=2 * ROUNDING, atol=1e-3
        )
    path = "/generate" if api == "sglang" else "/v1/completions"
    assert set(place.served.paths) == {path}


def test_a_row_that_has_the_next_token_too_keeps_the_most_probable(place: Place) -> None:
    place.served.extra = True
    first = place.dumped().content_id()
    longest = max(len(body["prompt"]) for body in place.served.asked)
    assert longest > 8
    sizes: set[int] = set()

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        sizes.update(map(len, rows))
        return answer

    place.served.edit = edit
    assert place.dumped("--overwrite").content_id() == first
    assert sizes == {8, 9}


def test_the_request_says_what_is_needed(place: Place) -> None:
    place.dumped()
    body = place.served.asked[-1]
    assert body["prompt_logprobs"] == 8
    assert body["model"] == "tiny"
    assert body["temperature"] == body["top_p"] == body["repetition_penalty"] == 1
    assert all(type(token) is int for token in body["prompt"])


def test_other_encodings_than_the_known_classes_are_refused(place: Place) -> None:
    for encoding in ("dense", "topk:9", "auto", "sampled:8"):
        place.refused(r"tells 8 of 300 tokens.*use --encoding topk:8", code=2, encoding=encoding)
    assert place.dumped(encoding="topk:4").header.classes == 300


def test_a_teacher_that_tells_every_class_may_be_stored_in_any_way(place: Place) -> None:
    place.served.extra = False
    cache = place.dumped(teacher=place.served.spec(300), encoding="dense")
    assert cache.header.encoding.name == "dense"


# what is refused before a server is asked


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "4", "--temperature 4: .*use --temperature 1"),
        ("--teacher-temperature", "2", "use --teacher-temperature 1"),
        ("--precision", "bf16", "--precision bf16: .*runs on a server"),
        ("--batch-size", "auto", "--batch-size auto: .*runs on a server"),
        ("--teacher-output", "probabilities", "runs on a server"),
        ("--teacher-classes", "0-9", "leave --teacher-classes out"),
    ],
)
def test_settings_of_a_model_here_are_refused(
    place: Place, option: str, value: str, message: str
) -> None:
    place.refused(message, option, value, code=2)
    assert not place.served.asked


def test_other_data_than_documents_is_refused(place: Place, data_file: Path) -> None:
    place.refused(
        "one row for each sample, and a server is asked", "--data", f"npz:{data_file}", code=2
    )
    np.save(place.out.with_suffix(".npy"), np.array([[1, 2, 3]]))
    ids = f"ids:{place.out.with_suffix('.npy')}"
    place.refused("does not say how many tokens there are", "--data", ids, code=2)
    place.refused("top=301, and there are 300 tokens", teacher=place.served.spec(301), code=2)


def test_the_message_of_a_dump_says_where(place: Place) -> None:
    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        rows = answer["choices"][0]["prompt_logprobs"]
        if len(rows) > 9:  # not the trial
            rows[9] = dict(list(rows[9].items())[:3])
        return answer

    place.served.edit = edit
    text = place.refused(r"document \d+, position 8: 3 tokens, and top=8 were asked for")
    assert f"kept in {partial_path(place.out)}: run the same command again" in text


# servers that fail for a while, or for good


def hang(handler: Handler) -> bool:
    time.sleep(1.6)
    return True


def reset(handler: Handler) -> bool:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()
    handler.close_connection = True
    return True


def cut(handler: Handler) -> bool:
    handler.answer(200, b'{"choices": [{"prompt_lo', Content_Length="100000")
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


TRANSIENT = {
    "500": lambda h: h.answer(500, {"error": {"message": "out of luck"}}),
    "503": lambda h: h.answer(503, b"<html>no</html>", "text/html"),
    "429": lambda h: h.answer(429, {"error": "slow down"}, Retry_After="0.3"),
    "truncated JSON": lambda h: h.answer(200, b'{"choices": [{"prompt_lo'),
    "cut off": cut,
    "reset": reset,
}


@pytest.mark.parametrize("action", TRANSIENT.values(), ids=TRANSIENT)
def test_what_passes_is_tried_again(
    place: Place, local: Cache, action: Callable[[Handler], bool]
) -> None:
    place.served.misbehave = once(action, 0, 1, 5, 6)
    cache = place.dumped()
    assert np.array_equal(cache.arrays["ids"], local.arrays["ids"])


def test_an_answer_that_does_not_come_is_asked_for_again(place: Place, local: Cache) -> None:
    place.served.misbehave = once(hang, 3)
    cache = place.dumped(teacher=place.served.spec(timeout=1))
    assert np.array_equal(cache.arrays["ids"], local.arrays["ids"])


def test_retry_after_is_waited_for_by_all(place: Place) -> None:
    place.served.misbehave = once(TRANSIENT["429"], 1)
    place.dumped(teacher=place.served.spec(concurrency=1))
    times = place.served.times
    assert times[2] - times[1] >= 0.3
    assert len(place.served.asked) > 13


def test_a_server_that_asks_to_wait_for_hours_is_not_waited_for(place: Place) -> None:
    place.served.misbehave = after(
        0, lambda h: h.answer(429, {"error": "quota"}, Retry_After="86400")
    )
    place.refused(r"answers 429 \(quota\) to document 0, and asks to wait 86,400 seconds")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("1.5", 1.5), ("soon", 0), ("", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float) -> None:
    assert _retry_after(value) == seconds
    assert _retry_after("Thu, 01 Jan 2122 00:00:00 GMT") > 1e9


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda h: h.answer(400, {"error": {"message": "maximum context length is 64 tokens"}}),
         r"answers 400 \(maximum context length is 64 tokens\); .*cut documents with length="),
        (lambda h: h.answer(400, {"message": "Requested prompt logprobs of 8, greater than max allowed: 5"}),
         r"max allowed: 5\); if it allows less than top=8, lower that, or start vLLM with --max-logprobs"),
        (lambda h: h.answer(400, {"error": {"message": "Unrecognized argument: prompt_logprobs"}}),
         "no chat server does; serve the model with vLLM, or with SGLang and api=sglang"),
        (lambda h: h.answer(404, {"detail": "Not Found"}), r"404 \(Not Found\); check the URL and model"),
        (lambda h: h.answer(401, b""), "answers 401; name the environment variable"),
        (lambda h: h.answer(302, b"", Location="http://127.0.0.1:9/"), "answers 302; it redirects"),
        (lambda h: h.answer(200, b"<!DOCTYPE html><p>Log in</p>", "text/html"), "answers with a web page"),
        (lambda h: h.answer(200, {"choices": [{"message": {"content": "hi"}}]}), "no chat server returns"),
        (lambda h: h.answer(200, b"{}", Content_Encoding="gzip"), "packs its answers with gzip"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_an_error_at_once(
    place: Place, action: Callable[[Handler], bool], message: str
) -> None:
    place.served.misbehave = after(0, action)
    place.refused(message)
    assert len(place.served.asked) == 1
    assert not partial_path(place.out).exists()


def test_a_server_that_keeps_failing_is_given_up(place: Place) -> None:
    place.served.misbehave = after(0, TRANSIENT["500"])
    place.refused(
        r"answers 500 \(out of luck\) to document 0, 3 time\(s\)",
        teacher=place.served.spec(retries=2),
    )
    assert len(place.served.asked) == 3


def test_a_server_that_is_not_there_is_not_waited_for(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    place.refused("cannot be reached.*check the URL", teacher=f"openai:{url}?model=m&top=8")
    assert time.monotonic() - start < 5


def test_an_endless_answer_does_not_fill_the_memory(place: Place) -> None:
    sent = [0]

    def endless(handler: Handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        for _ in range(1000):
            handler.wfile.write(b" " * (1 << 18))
            sent[0] += 1 << 18
        return True

    place.served.misbehave = after(0, endless)
    tracemalloc.start()
    place.refused("returns more than 1,[0-9,]+ bytes for one document")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20
    assert sent[0] < 200 << 20
    place.served.misbehave = after(0, lambda h: h.answer(200, b"{}", Content_Length=str(1 << 40)))
    place.refused("returns more than 1,[0-9,]+ bytes for one document")


# resuming


def test_a_dump_that_failed_continues_to_the_same_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "BLOCK_BYTES", 1000)
    small = ("--batch-tokens", "40")
    undisturbed = place.dumped(*small).path.read_bytes()
    place.out.unlink()
    place.served.asked.clear()
    place.served.misbehave = after(9, TRANSIENT["500"])
    failing = place.served.spec(retries=1)
    place.refused("The finished rows are kept in", *small, teacher=failing)
    kept = open_cache(partial_path(place.out), unfinished=True)
    assert 0 < kept.missing_blocks() < kept.header.blocks * 2
    before = [tuple(body["prompt"]) for body in place.served.asked[1:6]]
    place.served.asked.clear()
    place.served.misbehave = lambda handler, number: False
    # how it is asked may be another way
    resumed = place.dumped(*small, teacher=place.served.spec(retries=3, concurrency=2))
    assert resumed.path.read_bytes() == undisturbed
    again = [tuple(body["prompt"]) for body in place.served.asked]
    # asked again for the fidelity, but not for the rows
    assert all(again.count(document) < 3 for document in before[:3])


def test_another_model_or_number_of_tokens_does_not_continue(place: Place) -> None:
    place.dumped()
    place.refused("another teacher.*top=8', now .*top=9", teacher=place.served.spec(9), code=2)


# repeats


def test_the_header_says_how_far_repeated_answers_differ(place: Place) -> None:
    cache = place.dumped()
    fidelity = (cache.header.summary or {})["fidelity"]
    assert fidelity["repeats"] == 0
    assert fidelity["mean"] < 1e-5
    assert "warnings" not in (cache.header.summary or {}) or not any(
        "another answer" in text
        for text in cache.header.summary["warnings"]  # type: ignore[index]
    )


def test_a_server_that_answers_otherwise_each_time_is_warned_of(place: Place) -> None:
    def stale(log_probs: torch.Tensor, number: int) -> torch.Tensor:
        noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(number))
        return torch.log_softmax(log_probs + 0.3 * noise, -1)

    place.served.change = stale
    cache = place.dumped()
    summary = cache.header.summary or {}
    assert summary["fidelity"]["repeats"] > 1e-3
    assert any("another answer to the same document" in text for text in summary["warnings"])
    place.out.unlink()
    place.refused("another answer to the same document.*rows are kept", "--strict")


# the pace


def test_documents_are_asked_for_at_the_same_time_but_not_more(place: Place) -> None:
    place.served.delay = 0.05
    place.dumped(teacher=place.served.spec(concurrency=3))
    assert place.served.busiest == 3


def test_there_are_no_more_requests_in_a_minute_than_allowed(place: Place) -> None:
    place.dumped(teacher=place.served.spec(per_minute=2400))
    gaps = np.diff(place.served.times)
    assert len(gaps) > 12
    assert np.mean(gaps) > 0.8 * 60 / 2400


def test_a_pause_holds_everybody_back() -> None:
    pace, stop = Pace(None), threading.Event()
    start = time.monotonic()
    pace.pause(0.2)
    pace.wait(stop)
    pace.wait(stop)
    assert 0.2 <= time.monotonic() - start < 1


def test_an_error_in_a_thread_stops_the_others() -> None:
    seen: list[int] = []

    def work(number: int, stop: threading.Event) -> None:
        seen.append(number)
        if number == 1:
            raise ValueError("one")
        stop.wait(0.05)

    with pytest.raises(ValueError, match="one"):
        in_threads(1000, work, 2)
    assert len(seen) < 100


# the key


def test_the_key_is_sent_but_never_shown(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    with_key = place.served.spec(key_env="TINY_KEY", retries=1)
    place.served.misbehave = once(lambda h: h.answer(500, {"error": f"bad key {KEY}"}), 1)
    result = place.dump(teacher=with_key)
    assert result.exit_code == 0, result.output
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in place.served.headers)
    written = place.out.read_bytes()
    for secret in (KEY, "TINY_KEY", "127.0.0.1"):
        assert secret.encode() not in written
    assert open_cache(place.out).header.teachers[0]["name"] == "openai:tiny?api=vllm&top=8"
    texts = [result.output, caplog.text]
    for status in (401, 500):
        answer = partial(Handler.answer, status=status, body={"error": f"bad key {KEY}"})
        place.served.misbehave = after(0, answer)
        texts.append(place.refused("bad key …", "--overwrite", teacher=with_key))
    assert KEY not in "".join(texts)


@pytest.mark.parametrize("value", [None, "", f"{KEY} {KEY}", f"{KEY}\n{KEY}"])
def test_a_key_that_is_none_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TINY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TINY_KEY", value)
    text = place.refused(
        "key_env=TINY_KEY: this environment variable",
        teacher=place.served.spec(key_env="TINY_KEY"),
        code=2,
    )
    assert KEY not in text


def test_without_a_key_none_is_sent(place: Place) -> None:
    Client(ServerOptions(place.served.url, "tiny", 8)).post(
        {"prompt": [1, 2, 3], "prompt_logprobs": 8}, 1 << 20, "document 0", threading.Event()
    )
    assert "Authorization" not in place.served.headers[0]
