"""Servers of files for tests: HTTP with byte ranges, honest or not, and S3."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# of the bytes that were asked for, those that are given; None: the connection is cut in the middle
Answer = Callable[[int, bytes], bytes | None]


@dataclass
class Served:
    """A running server: what it is asked for, and how it answers."""

    url: str
    folder: Path
    asked: list[tuple[int, int]] = field(default_factory=list)  # (first byte, how many) of ranges
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Answer = lambda start, body: body
    ranges: bool = True
    redirect: str = ""
    size_said: int | None = None


@contextmanager
def http_server(folder: Path) -> Iterator[Served]:
    """Serve the files of a folder on a port of this machine."""
    served: Served

    class Handler(BaseHTTPRequestHandler):
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
            size = file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end, status = 0, size if with_body else 0, 200
            if asked and served.ranges:
                start, end, status = int(asked[1]), min(int(asked[2]) + 1, size), 206
                served.asked.append((start, end - start))
            with file.open("rb") as opened:
                opened.seek(start)
                body = opened.read(end - start)
            given = served.answer(start, body) if with_body else body
            said = len(body) if given is None else len(given)
            said = said if with_body else size
            self.send_response(status)
            if not with_body and served.size_said is not None:
                said = served.size_said
            self.send_header("Content-Length", str(said))
            if served.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                last = start + len(body) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if given is None else given)
            if given is None:
                self.close_connection = True

        def handle(self) -> None:
            with suppress(ConnectionError, BrokenPipeError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}", folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server of this process; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
