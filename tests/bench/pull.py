"""Pulling one view of many from an HTTP server, against the whole file, against fetching its bare bytes.

The server is this machine's, in a process of its own; the bytes that come over it are counted, and it can be
slowed down to what a network gives.
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
        "--rates", type=float, nargs="+", default=[0, 10], help="MB/s of a connection"
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
    headers = ("what", "MB/s of a connection", "seconds", "/ whole", "min", "max")
    print(f"\n{machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def measure(folder: Path, rate: float, repeats: int) -> list[list[str]]:
    """Lines of the table, of one speed of the server."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, rate, there))
    server.start()
    url = f"{here.recv()}/cache.h5"

    def one_view() -> float:
        return timed_pull(url, folder, (0, 1))

    def whole() -> float:
        return timed_pull(url, folder, None)

    def bytes_alone() -> float:
        start = time.perf_counter()
        with urllib.request.urlopen(url) as response, (folder / "bare").open("wb") as file:
            while part := response.read(1 << 20):
                file.write(part)
        return time.perf_counter() - start

    runs = {"one view": one_view, "whole": whole, "bare bytes, one connection": bytes_alone}
    try:
        seconds = alternate(runs, repeats)
    finally:
        here.send("stop")
        server.join()
    return [
        [
            name,
            f"{rate:g}" if rate else "all",
            spread(found)[0],
            *spread(ratios(found, seconds["whole"])),
        ]
        for name, found in seconds.items()
    ]


def timed_pull(url: str, folder: Path, views: tuple[int, int] | None) -> float:
    start = time.perf_counter()
    pull(url, folder / "copy.h5", views=views, overwrite=True)
    return time.perf_counter() - start


def serve(folder: Path, rate: float, parent: Connection) -> None:
    """A server that gives each answer no faster than `rate` MB/s, until it is told to stop."""

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
