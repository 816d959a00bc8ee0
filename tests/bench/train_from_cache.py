"""Training from a cache against training from a tensor in memory, both with fit() of softcache.train.loop.

The tensor holds float32 log-probabilities that need no decoding. Both runs take the same batches and must
reach the same loss, which is checked.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import Cache
from softcache.data.source import ArraySource
from softcache.join.fingerprints import replayed
from softcache.join.joined_data import JoinedData
from softcache.targets.fetch import soft_targets
from softcache.train.accelerator import make_accelerator
from softcache.train.config import TrainConfig
from softcache.train.loop import fit
from softcache.train.options import make_train_config
from softcache.train.run_folder import UNFINISHED_METRICS
from softcache.types import Targets, Views
from tests.bench import (
    alternate,
    first,
    machine,
    open_arrays,
    random_log_probs,
    ratios,
    spread,
    synthetic_images,
    work_folder,
    write_cache,
)

TargetsOf = Callable[[Views, npt.NDArray[np.int64]], Targets]

GOAL = 0.95
TEMPERATURE = 4.0
SAME_LOSS = 1e-3  # relative difference that the cache's float16 can cause


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=["cnn:16,32,64", "mlp:256"])
    parser.add_argument("--mnist", default="idx:data/mnist", help="data specification")
    parser.add_argument("--samples", type=int, default=20_000, help="samples of each data set")
    parser.add_argument("--classes", type=int, default=1000, help="classes of the synthetic data")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--folder", type=Path, help="folder for caches [default: a temporary one]")
    options = parser.parse_args()
    cases = [
        (first(open_arrays(options.mnist), options.samples), 10),
        (synthetic_images(options.samples, options.classes), options.classes),
    ]
    lines = []
    with work_folder(options.folder) as folder:
        for number, (source, classes) in enumerate(cases):
            log_probs = random_log_probs(len(source), classes, TEMPERATURE, seed=1)
            path = folder / f"targets-{number}.h5"
            path.unlink(missing_ok=True)
            cache = write_cache(
                path,
                partial(rows_of, log_probs),
                samples=len(source),
                classes=classes,
                temperature=TEMPERATURE,
            )
            for student in options.students:
                config = make_train_config(
                    student=student,
                    data=source.name,
                    out=folder / "run",
                    cache=cache.path,
                    epochs=1,
                    batch_size=options.batch_size,
                    device=options.device,
                )
                lines.append(measure(config, source, cache, log_probs, options.repeats))
                print(f"{source.name}, {student}: done", flush=True)
    headers = (
        "data", "classes", "student", "steps", "steps/s memory", "steps/s cache", "cache / memory",
        "min", "max", f">= {GOAL}",
    )  # fmt: skip
    print(f"\nRatio of steps/s, median of {options.repeats} pairs, side by side; {machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def measure(
    config: TrainConfig, source: ArraySource, cache: Cache, log_probs: Tensor, repeats: int
) -> list[str]:
    """The line of the table for one data set and one student."""
    accelerator = make_accelerator(config.device, config.precision)
    indices = np.arange(len(source))
    steps = math.ceil(len(source) / config.batch_size)
    losses: dict[str, float] = {}
    classes, augmentation = cache.header.classes, replayed(cache.header, None)

    def run(name: str, targets: TargetsOf) -> Callable[[], float]:
        def steps_per_second() -> float:
            data = JoinedData(
                source, indices, indices, indices, augmentation, classes, cache,
                lambda views, rows: {TEMPERATURE: targets(views, rows)},
            )  # fmt: skip
            start = time.perf_counter()
            fit(config, accelerator, [data], None)
            seconds = time.perf_counter() - start
            losses[name] = json.loads((config.out / UNFINISHED_METRICS).read_text())["total"]
            return steps / seconds

        return steps_per_second

    device = accelerator.device
    rates = alternate(
        {
            "memory": run("memory", in_memory(log_probs, device)),
            "cache": run("cache", soft_targets(cache, TEMPERATURE, device)),
        },
        repeats,
    )
    if not math.isclose(losses["memory"], losses["cache"], rel_tol=SAME_LOSS):
        raise SystemExit(f"the two runs reached different losses, {losses}; expected the same")
    relative_speed = ratios(rates["cache"], rates["memory"])
    return [
        source.name,
        f"{log_probs.shape[1]:,}",
        config.students[0].student,
        f"{steps:,}",
        *(f"{statistics.median(rates[name]):.1f}" for name in ("memory", "cache")),
        *spread(relative_speed),
        "yes" if statistics.median(relative_speed) >= GOAL else "no",
    ]


def rows_of(log_probs: Tensor, samples: range) -> Tensor:
    return log_probs[samples.start : samples.stop]


def in_memory(log_probs: Tensor, device: torch.device) -> TargetsOf:
    """Targets from a tensor (N, C) of log-probabilities."""

    def fetch(views: Views, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.index_select(log_probs, 0, torch.from_numpy(rows)).to(
            device, non_blocking=True
        )

    return fetch


if __name__ == "__main__":
    main()
