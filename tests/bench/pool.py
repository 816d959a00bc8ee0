"""Run many trainings, a few in parallel, one thread each. Results are kept, and a rerun continues."""

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
    """Run all jobs that have no result yet.

    Args:
        run: the function to call for each job.
        jobs: arguments of `run`, by the name of the job.
        folder: where results.jsonl keeps the results.
        processes: how many jobs run in parallel.

    Returns:
        What `run` returned for each job, by name.
    """
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    outcomes: dict[str, Outcome] = dict(json.loads(line) for line in lines)
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        names = {
            pool.submit(run, *arguments): name
            for name, arguments in jobs.items()
            if name not in outcomes
        }
        try:
            for future in as_completed(names):
                name = names[future]
                outcomes[name] = future.result()
                with results.open("a") as file:
                    file.write(json.dumps([name, outcomes[name]]) + "\n")
                text = ", ".join(f"{key} {value:.5g}" for key, value in outcomes[name].items())
                print(f"{name}: {text}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise the with statement waits for all jobs
            raise
    return {name: outcomes[name] for name in jobs}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)


def shown(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard error as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}}"
