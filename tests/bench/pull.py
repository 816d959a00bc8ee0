"""Pulling one view of many from an HTTP server, against the whole file and against its bare bytes.

The server runs on this machine in a process of its own. It can be slowed down to the speed of a network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path

from tabulate import tabulate

from softcache.files.pull import pull
from tests.bench import (
    alternate,
    machine,
    random_log_probs,
    ratios,
    spread,
    work_folder,
    write_cache,
)
from tests.servers import http_server


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0, 10], help="MB/s per connection; 0: unlimited"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    lines = []
    with work_folder(options.folder) as folder:
        cache = write_cache(
            folder / "cache.h5",
            lambda part: random_log_probs(len(part), options.classes, 1.0, part.start),
            options.samples,
            options.classes,
            1.0,
            options.views,
        )
        print(f"{options.views} views, {cache.header.file_bytes:,} bytes", flush=True)
        for rate in options.rates:
            lines += measure(folder, rate, options.repeats)
    headers = ("what", "MB/s per connection", "seconds", "/ whole", "min", "max")
    print(f"\n{machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def measure(folder: Path, rate: float, repeats: int) -> list[list[str]]:
    """Lines of the table for one speed of the server."""
    parent, child = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, rate, child))
    server.start()
    url = f"{parent.recv()}/cache.h5"

    def one_view() -> float:
        return timed_pull(url, folder, (0, 1))

    def whole() -> float:
        return timed_pull(url, folder, None)

    def bare_bytes() -> float:
        start = time.perf_counter()
        with urllib.request.urlopen(url) as response, (folder / "bare").open("wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
        return time.perf_counter() - start

    runs = {"one view": one_view, "whole": whole, "bare bytes, one connection": bare_bytes}
    try:
        seconds = alternate(runs, repeats)
    finally:
        parent.send("stop")
        server.join()
    return [
        [
            name,
            f"{rate:g}" if rate else "unlimited",
            spread(values)[0],
            *spread(ratios(values, seconds["whole"])),
        ]
        for name, values in seconds.items()
    ]


def timed_pull(url: str, folder: Path, views: tuple[int, int] | None) -> float:
    start = time.perf_counter()
    pull(url, folder / "copy.h5", views=views, overwrite=True)
    return time.perf_counter() - start


def serve(folder: Path, rate: float, parent: Connection) -> None:
    """Serve `folder` at no more than `rate` MB/s per connection, until a message arrives."""

    def slow(start: int, body: bytes) -> bytes:
        if rate:
            time.sleep(len(body) / rate / 1e6)
        return body

    with http_server(folder) as served:
        served.answer = slow
        parent.send(served.url)
        parent.recv()


if __name__ == "__main__":
    main()
