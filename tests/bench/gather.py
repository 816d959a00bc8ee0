"""Reading random rows of a 2 GB cache: by memory map, from a tensor in memory, and through h5py.

Each batch has random rows, and no row is repeated before all have been read, as in training. "raw" are the
stored float16 values; "decoded" are float32 log-probabilities, ready for the loss. The file is in the page
cache. "first touch" maps the file again, so that every page causes a fault.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate

from softcache.cache import open_cache
from softcache.targets.fetch import as_tensor, soft_targets
from tests.bench import (
    alternate,
    machine,
    random_log_probs,
    ratios,
    spread,
    work_folder,
    write_cache,
)

TEMPERATURE = 4.0
Gather = Callable[[npt.NDArray[np.int64]], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the float16 rows")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256, help="rows per gather")
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of one measurement")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="folder for the cache [default: a temporary one]"
    )
    options = parser.parse_args()
    samples = int(options.gigabytes * 1e9) // (2 * options.classes)
    if samples < options.batch_size:
        parser.error(f"{samples} rows are fewer than a batch of {options.batch_size}")
    with work_folder(options.folder) as folder:
        path = folder / "gather.h5"
        path.unlink(missing_ok=True)
        write_cache(
            path,
            lambda part: random_log_probs(len(part), options.classes, TEMPERATURE, part.start),
            samples=samples,
            classes=options.classes,
            temperature=TEMPERATURE,
        )
        print(f"{path.stat().st_size:,} bytes, {samples:,} rows written", flush=True)
        try:
            rates = measure(path, samples, options)
        finally:
            path.unlink()
    memory = {name: rates[f"memory, {name.split(', ')[1]}"] for name in rates}
    lines = [
        (name, f"{statistics.median(values):,.0f}", *spread(ratios(values, memory[name])))
        for name, values in rates.items()
    ]
    print(
        f"\nGathers of {options.batch_size} of {samples:,} rows of {options.classes:,} classes, "
        f"median of {options.repeats} rounds, side by side; {machine()}"
    )
    headers = ("rows", "rows/s", "/ memory", "min", "max")
    print(
        tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4))
    )


def measure(path: Path, samples: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Rows per second of each method, for every round."""
    cache = open_cache(path)
    mapped = as_tensor(cache.arrays["log_probs"][0])  # (N, C)
    memory = mapped.clone()
    random = np.random.default_rng(0)
    batch: int = options.batch_size
    seconds: float = options.seconds

    def batches() -> list[npt.NDArray[np.int64]]:
        order = random.permutation(samples)
        return [order[a : a + batch] for a in range(0, samples - batch + 1, batch)]

    def rows_per_second(gather: Gather) -> float:
        order = itertools.cycle(batches())
        done, start = 0, time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            for indices in itertools.islice(order, 8):  # so that reading the clock costs nothing
                gather(indices)
            done += 8
        return done * batch / (now - start)

    def first_touch() -> float:
        newly_mapped = as_tensor(open_cache(path).arrays["log_probs"][0])
        order = batches()
        start = time.perf_counter()
        for indices in order:
            torch.index_select(newly_mapped, 0, torch.from_numpy(indices))
        return len(order) * batch / (time.perf_counter() - start)

    def from_memory(indices: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.index_select(memory, 0, torch.from_numpy(indices))

    fetch = soft_targets(cache, TEMPERATURE, torch.device("cpu"))
    with h5py.File(path) as file:
        dataset = file["log_probs"]

        def from_h5py(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
            order = np.argsort(indices)  # h5py only takes increasing indices
            rows = np.empty((len(indices), options.classes), np.float16)
            rows[order] = dataset[0, indices[order]]
            return rows

        methods: dict[str, Gather] = {
            "memory, raw": from_memory,
            "cache, raw": lambda i: torch.index_select(mapped, 0, torch.from_numpy(i)),
            "h5py, raw": from_h5py,
            "memory, decoded": lambda i: torch.log_softmax(from_memory(i).float(), dim=-1),
            "cache, decoded": lambda i: fetch(0, i),
        }
        check_same_rows(methods, batches()[0])
        runs = {
            name: (lambda gather=gather: rows_per_second(gather))
            for name, gather in methods.items()
        }
        return alternate({**runs, "cache first touch, raw": first_touch}, options.repeats)


def check_same_rows(methods: dict[str, Gather], indices: npt.NDArray[np.int64]) -> None:
    """Stop unless all methods return the same values."""
    for kind in ("raw", "decoded"):
        rows_by_method = {
            name: np.asarray(gather(indices)) for name, gather in methods.items() if kind in name
        }
        expected = rows_by_method[f"memory, {kind}"]
        for name, rows in rows_by_method.items():
            if not np.array_equal(rows, expected):
                raise SystemExit(f"{name} returns other values than memory; expected the same")


if __name__ == "__main__":
    main()
