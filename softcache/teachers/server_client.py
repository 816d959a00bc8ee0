"""Requests to a server that may be busy, slow, wrong or gone: retries, a pace, and bounds on its answers."""

from __future__ import annotations

import http.client
import json
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any

from softcache.errors import RemoteError
from softcache.teachers.server_options import ServerOptions
from softcache.util.log import inform
from softcache.util.urls import without_secrets

FIRST_WAIT = 1.0  # seconds before the first retry; doubled for each further one,
LONGEST_WAIT = 60.0  # up to so many
MOST_PATIENCE = 3600.0  # seconds that a server may ask to wait
BETWEEN_NOTES = 60.0  # seconds between two lines about retries
MAX_ERROR = 1 << 16  # bytes of an error message that are read
SHOWN = 300  # characters of it that are shown
UNKNOWN_FIELD = re.compile(
    "unrecogni|unknown|unsupported|not support|extra|unexpected", re.IGNORECASE
)
TRANSIENT = (408, 409, 425, 429)  # besides all from 500


class Stopped(Exception):
    """The answer is not needed any more."""


class _TryAgain(Exception):
    """A request failed in a way that may pass.

    Attributes:
        wait: seconds that the server asks to wait, if it does.
    """

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Pace:
    """When the next request may be sent, for all threads together."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Wait for a turn.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        if stop.wait(start - now):
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Let nobody have a turn for some seconds."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Client:
    """Sends JSON to a server and reads its answers."""

    def __init__(self, options: ServerOptions) -> None:
        """Prepare to ask a server; nothing is sent yet.

        Raises:
            SettingsError: the environment variable of its key holds none.
        """
        self.options, self._key = options, options.key()
        self.who = f"server {options.url}"
        self._pace = Pace(options.per_minute)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._reached = False  # a server that was never there is not waited for
        self._told = -BETWEEN_NOTES

    def post(self, body: dict[str, Any], limit: int, where: str, stop: threading.Event) -> Any:  # noqa: ANN401  # JSON
        """Send a request, again if it fails in a way that may pass.

        Args:
            limit: the most bytes that the answer may have.
            where: what is asked for, for messages.
            stop: set when the answer is not needed any more.

        Returns:
            The answer, parsed.

        Raises:
            RemoteError: there is no answer, or not the one that was asked for.
            Stopped: `stop` was set.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.options.retries + 1):
            self._pace.wait(stop)
            try:
                answer = self._once(data, limit)
                self._reached = True
                return answer
            except _TryAgain as error:
                what = self._public(str(error))
                if error.wait > MOST_PATIENCE:
                    raise RemoteError(
                        f"{self.who} {what} to {where}, and asks to wait {error.wait:,.0f} seconds; run the "
                        "same command again then"
                    ) from None
                if attempt == self.options.retries:
                    raise RemoteError(
                        f"{self.who} {what} to {where}, {attempt + 1} time(s) in a row; see its log, and try "
                        "again, with a lower concurrency= or a longer timeout= if it is busy"
                    ) from None
                if error.wait:
                    self._pace.pause(error.wait)
                seconds = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                self._tell(what, max(error.wait, seconds))
                if stop.wait(seconds):
                    raise Stopped from None
        raise AssertionError  # unreachable: the last attempt returns or raises

    def _once(self, data: bytes, limit: int) -> Any:  # noqa: ANN401  # JSON
        """Send a request once.

        Raises:
            _TryAgain: it failed in a way that may pass.
            RemoteError: it failed in another way.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.options.endpoint, data, headers)
        deadline = time.monotonic() + self.options.timeout
        try:
            with self._opener.open(request, timeout=self.options.timeout) as response:
                packed = response.headers.get("Content-Encoding", "identity")
                if packed != "identity":
                    raise RemoteError(
                        f"{self.who} packs its answers with {packed[:40]}, which was not asked for; ask it "
                        "directly, not through a proxy that does that"
                    )
                content = self._read(response, limit, deadline)
            return self._parsed(content, response.headers.get("Content-Type", ""))
        except urllib.error.HTTPError as error:
            self._reached = True
            raise self._refusal(error) from None
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # ValueError: no host name
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise self._failure(reason) from None

    def _read(self, response: Any, limit: int, deadline: float) -> bytes:  # noqa: ANN401  # HTTPResponse
        """The body of an answer, at most `limit` bytes."""
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() and len(length) < 16 else None
        parts, size = [], 0
        while (expected or 0) <= limit and (part := response.read1(1 << 16)):
            parts.append(part)
            size += len(part)
            if size > limit:
                break
            if time.monotonic() > deadline:
                raise TimeoutError
        if max(size, expected or 0) > limit:
            raise RemoteError(
                f"{self.who} returns more than {limit:,} bytes for one document, more than its log-"
                "probabilities need; check that the URL is that of the right server"
            )
        if expected is not None and size < expected:
            raise _TryAgain(f"cut its answer off after {size:,} of {expected:,} bytes")
        return b"".join(parts)

    def _parsed(self, content: bytes, kind: str) -> Any:  # noqa: ANN401  # JSON
        if kind.startswith("text/html") or content.lstrip()[:1] == b"<":
            raise RemoteError(
                f"{self.who} answers with a web page, not with JSON; check the URL: it ends in /v1 for most "
                "servers, and a proxy may ask to log in"
            )
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _TryAgain(f"answers with {len(content):,} bytes that are not JSON") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """The error for an answer with another status than 200."""
        text = self._public(_message(error))
        said = f"answers {error.code}{f' ({text})' if text else ''}"
        if error.code in TRANSIENT or error.code >= 500:
            return _TryAgain(said, _retry_after(error.headers.get("Retry-After", "")))
        return RemoteError(f"{self.who} {said}; {self._advice(error.code, text)}")

    def _advice(self, status: int, text: str) -> str:
        options = self.options
        if status in (401, 403):
            return "name the environment variable that holds its key with key_env="
        if 300 <= status < 400:
            return (
                "it redirects, which a key is never sent after; give the URL that it redirects to"
            )
        if status in (404, 405):
            return f"check the URL and model={options.model}: softcache asks {options.endpoint}"
        field = "prompt_logprobs" if options.api == "vllm" else "top_logprobs_num"
        if field in text and UNKNOWN_FIELD.search(text):
            return (
                "it does not return the log-probabilities of the tokens of a prompt, which no chat server "
                "does; serve the model with vLLM, or with SGLang and api=sglang"
            )
        return (
            f"if it allows less than top={options.top}, lower that, or start vLLM with --max-logprobs; if a "
            "document is too long, cut documents with length= of the data, one token below its own limit"
        )

    def _failure(self, error: object) -> Exception:
        """The error for a connection that failed."""
        if isinstance(error, TimeoutError):
            return _TryAgain(f"sends no complete answer within {self.options.timeout} s")
        text = self._public(str(error)) or type(error).__name__
        said = f"cannot be reached ({type(error).__name__}: {text})"
        if isinstance(error, ssl.SSLCertVerificationError) or not (
            self._reached or isinstance(error, ConnectionResetError | http.client.HTTPException)
        ):
            return RemoteError(f"{self.who} {said}; check the URL, and that the server runs")
        return _TryAgain(f"breaks the connection ({text})")

    def _public(self, text: str) -> str:
        """What a server or a library says, short and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "…")
        return without_secrets(text)[:SHOWN]

    def _tell(self, what: str, seconds: float) -> None:
        now = time.monotonic()
        if now - self._told >= BETWEEN_NOTES:
            self._told = now
            inform(f"{self.who} {what}; asking again in {seconds:.1f} s")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host, and turn a POST into a GET."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def in_threads(count: int, work: Callable[[int, threading.Event], None], threads: int) -> None:
    """Call work(0) to work(count - 1), several at a time; the first error stops all and is raised.

    The threads are daemons, so that a server that hangs does not keep the process from ending.

    Args:
        work: takes a number, and an event that is set when its result is not needed any more.
    """
    stop, lock, errors = threading.Event(), threading.Lock(), list[BaseException]()
    numbers, finished = iter(range(count)), threading.Semaphore(0)

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                work(number, stop)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            finished.release()

    started = min(count, threads)
    try:
        for _ in range(started):
            threading.Thread(target=run, name="softcache-ask", daemon=True).start()
        done = 0
        while done < started and not errors:
            # with a timeout, since a signal would not wake the main thread on every system
            done += finished.acquire(timeout=0.2)
    finally:
        stop.set()
    if errors:
        raise errors[0]


def _message(error: urllib.error.HTTPError) -> str:
    """What the body of an error says."""
    try:
        content = error.read(MAX_ERROR)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        text = content.decode("utf-8", "replace").strip()
        return "" if text.startswith("<") else text
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body)


def _retry_after(value: str) -> float:
    """The seconds that a Retry-After asks to wait: a number, or a date; 0 if it is neither."""
    value = value.strip()
    try:
        seconds = float(value) if value[:1].isdigit() else _until(value)
    except ValueError:
        return 0.0
    return max(0.0, seconds)


def _until(date: str) -> float:
    try:
        moment = parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()
