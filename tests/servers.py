"""File servers for tests: HTTP with byte ranges, well-behaved or not, and S3."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any

# from (start, requested bytes) to the bytes that are sent; None cuts the connection half way
Answer = Callable[[int, bytes], bytes | None]


@dataclass
class Served:
    """A running server: the requests it received, and how it answers.

    Attributes:
        url: address of the server, without a trailing slash.
        folder: the folder whose files it serves.
        asked: (first byte, number of bytes) of each range request.
        headers: the headers of each request.
        answer: what it sends for a body; see Answer.
        ranges: whether it supports range requests.
        redirect: where it redirects every request; empty for no redirect.
        size_said: the size it claims in reply to HEAD; None for the real one.
        raw: writes the whole reply to a GET itself, given the first byte that was asked for, if it is set.
    """

    url: str
    folder: Path
    asked: list[tuple[int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Answer = lambda start, body: body
    ranges: bool = True
    redirect: str = ""
    size_said: int | None = None
    raw: Callable[[BufferedIOBase, int], object] | None = None


@contextmanager
def http_server(folder: Path) -> Iterator[Served]:
    """Serve the files of a folder on a free local port."""
    served: Served

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def reply(self, *, with_body: bool) -> None:
            served.headers.append(dict(self.headers))
            file = served.folder / self.path.partition("?")[0].lstrip("/")
            if served.redirect:
                self.send_response(302)
                self.send_header("Location", served.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if not file.is_file():
                self.send_error(404)
                return
            if served.raw and with_body:
                first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                served.raw(self.wfile, int(first[1]) if first else 0)
                self.close_connection = True
                return
            size = file.stat().st_size
            byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end, status = 0, size if with_body else 0, 200
            if byte_range and served.ranges:
                start, end = int(byte_range[1]), min(int(byte_range[2]) + 1, size)
                status = 206
                served.asked.append((start, end - start))
            with file.open("rb") as opened:
                opened.seek(start)
                body = opened.read(end - start)
            sent = served.answer(start, body) if with_body else body
            length = len(body) if sent is None else len(sent)
            if not with_body:
                length = size if served.size_said is None else served.size_said
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if served.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                last = start + len(body) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if sent is None else sent)
            if sent is None:
                self.close_connection = True

        def handle(self) -> None:
            with suppress(ConnectionError, BrokenPipeError):
                super().handle()

    with running_server(Handler) as url:
        served = Served(url, folder)
        yield served


@contextmanager
def running_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free local port; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False  # no answer that hangs is waited for
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server in this process; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
