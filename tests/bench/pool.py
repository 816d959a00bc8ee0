"""Many trainings, a few at once, one thread each; what is done is kept, and a rerun goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

Outcome = dict[str, float]


def run_jobs(
    run: Callable[..., Outcome], jobs: Mapping[str, Sequence[Any]], folder: Path, processes: int
) -> dict[str, Outcome]:
    """What `run(*arguments)` gives for each job, by name; kept in `folder`/results.jsonl."""
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    found: dict[str, Outcome] = dict(json.loads(line) for line in lines)
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {
            pool.submit(run, *arguments): name
            for name, arguments in jobs.items()
            if name not in found
        }
        try:
            for future in as_completed(waiting):
                name = waiting[future]
                found[name] = future.result()
                with results.open("a") as file:
                    file.write(json.dumps([name, found[name]]) + "\n")
                said = ", ".join(f"{key} {value:.5g}" for key, value in found[name].items())
                print(f"{name}: {said}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the end of the block would wait for all of them
            raise
    return {name: found[name] for name in jobs}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)


def shown(values: Sequence[float], form: str = ".1f") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}}"
