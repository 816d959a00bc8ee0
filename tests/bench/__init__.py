"""Benchmarks. They report ratios of variants that run side by side, not speeds of one machine."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softcache.cache import Cache, Dense, Header, open_cache
from softcache.cache.allocate import create
from softcache.cache.arrays import FINGERPRINT
from softcache.cache.writer import Writer
from softcache.data.open import open_source
from softcache.data.source import ArraySource

WRITE_ROWS = 4096  # that write_cache() writes at a time


def alternate(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run returns in the order A B A B …, after a warm-up round."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            value = run()
            if repeat:
                measured[name].append(value)
    return measured


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each pair that was measured back to back."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float]) -> list[str]:
    """Median, min and max, as table cells."""
    return [f"{statistic(values):.3f}" for statistic in (statistics.median, min, max)]


def machine() -> str:
    """The machine and software that the figures come from, in one line."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{os.cpu_count()} CPU cores, load {load:.1f} at the end, torch {torch.__version__} with "
        f"{torch.get_num_threads()} thread(s)"
    )


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, which is kept, or a temporary one, which is deleted."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="softcache-bench-") as name:
        yield Path(name)


def first_samples(spec: str, samples: int | None, folder: Path) -> str:
    """A data specification of the first `samples` samples of `spec`, or of all if None."""
    if samples is None:
        return spec
    source = open_arrays(spec)
    path = folder / f"first-{samples}.npz"
    np.savez(path, x=source.inputs[:samples], y=source.labels[:samples])
    return f"npz:{path}"


def open_arrays(spec: str) -> ArraySource:
    """Open a data set that has to be arrays in memory."""
    source = open_source(spec)
    if not isinstance(source, ArraySource):
        raise SystemExit(f"data {spec} is not held in memory; expected idx:DIR or npz:FILE")
    return source


def first(source: ArraySource, samples: int) -> ArraySource:
    """The first `samples` samples of a source."""
    return dataclasses.replace(
        source, inputs=source.inputs[:samples], labels=source.labels[:samples]
    )


def synthetic_images(samples: int, classes: int, seed: int = 0) -> ArraySource:
    """Noise in the shape of CIFAR images, (samples, 3, 32, 32) uint8, with random labels."""
    random = np.random.default_rng(seed)
    inputs = random.integers(0, 256, (samples, 3, 32, 32), dtype=np.uint8)
    return ArraySource("synthetic", inputs, random.integers(0, classes, samples))


def random_log_probs(samples: int, classes: int, temperature: float, seed: int) -> Tensor:
    """Random log-probabilities (samples, classes) float32, as peaked as those of a trained teacher."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return torch.log_softmax(logits / temperature, dim=-1)


def create_cache(
    path: Path,
    samples: int,
    classes: int,
    temperature: float,
    views: int,
    augment: str | None = None,
) -> None:
    """Allocate a dense cache that has no rows yet."""
    header = Header(
        views=views,
        samples=samples,
        first_view=0,
        first_sample=0,
        data_samples=samples,
        positions=(),
        classes=classes,
        temperature=temperature,
        encoding=Dense(),
        seed=0,
        augment=augment,
        precision="fp32",
        data="synthetic",
        choice=None,
        teachers=({"name": "synthetic", "parameters": 0, "weight": 1.0},),
        evaluation=None,
        software={},
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )
    shared = {
        "class_names": np.array([str(number).encode() for number in range(classes)]),
        "fingerprinted": np.zeros(1, np.int64),
        "fingerprints": np.zeros((views, 1, FINGERPRINT), np.float32),
    }
    create(path, header, shared)


def write_cache(
    path: Path,
    rows: Callable[[range], Tensor],
    samples: int,
    classes: int,
    temperature: float,
    views: int = 1,
) -> Cache:
    """Write a dense cache whose views are all the same.

    Args:
        rows: returns the log-probabilities (B, C) of a range of samples.
    """
    create_cache(path, samples, classes, temperature, views)
    with Writer(path) as writer:
        for start in range(0, samples, WRITE_ROWS):
            part = range(start, min(start + WRITE_ROWS, samples))
            keys = np.arange(part.start, part.stop, dtype=np.uint64)
            labels = np.full(len(part), -1, np.int64)
            log_probs = rows(part).half().numpy()  # (B, C)
            for view in range(views):
                writer.write(
                    view, start, {"log_probs": log_probs}, {"labels": labels, "keys": keys}
                )
        writer.finish({"entropy": 0.0, "agreement": None, "rows": 1})  # a summary that nobody reads
    return open_cache(path)
