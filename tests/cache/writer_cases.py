"""Helpers shared by the tests of the writer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import Dense, Header
from softcache.cache import allocate as cache_allocate
from softcache.cache.allocate import create
from softcache.cache.reader import partial_path
from softcache.cache.writer import Writer

VIEWS, SAMPLES, CLASSES = 2, 30, 5
ROWS_OF_A_BLOCK = 8  # four blocks per view, the last with 6 rows
BATCH = 12  # straddles blocks
SUMMARY = {"entropy": 1.25, "agreement": 0.5, "rows": VIEWS * SAMPLES}
CLASS_NAMES = ("zero", "one", "two", "three", "quatre à cinq")

Values = dict[str, npt.NDArray[Any]]


def draft(positions: tuple[int, ...] = ()) -> Header:
    """The header of a tiny cache, without its layout."""
    return Header(
        views=VIEWS,
        samples=SAMPLES,
        positions=positions,
        classes=CLASSES,
        temperature=4.0,
        encoding=Dense(),
        seed=3,
        augment="shift:2",
        first_view=0,
        first_sample=0,
        data_samples=SAMPLES,
        precision="fp32",
        data="npz:tiny.npz@train",
        choice=None,
        teachers=(
            {"name": "mlp:8", "weights": None, "parameters": 77, "sha256": "0f", "weight": 1.0},
        ),
        evaluation={"data": "npz:tiny.npz@test", "digest": "0a", "errors": 3, "samples": 10},
        software={"softcache": "0.1.0", "numpy": "2.0.0"},
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )


def shared_values() -> Values:
    return {
        "class_names": np.array([name.encode() for name in CLASS_NAMES]),
        "fingerprinted": np.array([0, 14, 29]),
        "fingerprints": np.random.default_rng(7).random((VIEWS, 3, 8)).astype("<f4"),
    }


def row_values(view: int, positions: tuple[int, ...] = ()) -> Values:
    """The stored arrays of a view, the same in every call."""
    random = np.random.default_rng(view)
    probabilities = random.dirichlet(np.ones(CLASSES), (SAMPLES, *positions))
    return {"log_probs": np.log(probabilities).astype("<f2")}


def sample_values(positions: tuple[int, ...] = ()) -> Values:
    random = np.random.default_rng(99)
    return {
        "labels": random.integers(-1, CLASSES, (SAMPLES, *positions)),
        "keys": random.integers(0, 1 << 64, SAMPLES, np.uint64),
    }


def part(values: Values, start: int, stop: int) -> Values:
    return {name: array[start:stop] for name, array in values.items()}


def begin(
    path: Path, positions: tuple[int, ...] = (), rows_of_a_block: int = ROWS_OF_A_BLOCK
) -> None:
    """Allocate a tiny unfinished cache with several blocks."""
    row_bytes = 2 * CLASSES * int(np.prod(positions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_allocate, "BLOCK_BYTES", rows_of_a_block * row_bytes)
        create(path, draft(positions), shared_values())


def fill(
    writer: Writer, batch: int = BATCH, positions: tuple[int, ...] = (), batches: int | None = None
) -> None:
    """Write the batches with missing rows, as a dump does; at most `batches` of them."""
    samples = sample_values(positions)
    missing = [writer.missing(view) for view in range(VIEWS)]
    grid = [
        (view, start, min(start + batch, SAMPLES))
        for view in range(VIEWS)
        for start in range(0, SAMPLES, batch)
    ]
    to_write = [(v, start, stop) for v, start, stop in grid if missing[v][start:stop].any()]
    for view, start, stop in to_write[:batches]:
        rows = part(row_values(view, positions), start, stop)
        writer.write(view, start, rows, part(samples, start, stop))


def run_dump(path: Path) -> bytes:
    """Start or resume a dump, and finish it; returns the bytes of the finished file."""
    if not path.exists():
        if not partial_path(path).exists():
            begin(path)
        with Writer(path) as writer:
            fill(writer)
            writer.finish(SUMMARY)
    return path.read_bytes()


# finish
class Stopped(BaseException):
    """Stands for the death of the process; nothing catches it."""


def stop(patch: pytest.MonkeyPatch, at: int, *, torn: bool) -> list[str]:
    """Stop after the `at`-th write or sync, or in the middle of it; later calls do nothing."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any) -> int | None:
            calls.append(name)
            if len(calls) > at:
                raise Stopped
            if len(calls) == at and torn and name == "pwrite" and arguments[2]:
                # any write can be torn, except of the preamble, which lies in one sector
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            elif not (len(calls) == at and torn):
                real(*arguments)
            if len(calls) == at:
                raise Stopped
            return len(arguments[1]) if name == "pwrite" else None

        return stopping

    for name in ("pwrite", "fdatasync", "fsync"):
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls
