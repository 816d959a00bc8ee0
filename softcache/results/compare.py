"""Students side by side: what each costs, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from softcache.cache.reader import open_trainable
from softcache.data.embedded import CacheSource
from softcache.data.open import open_source
from softcache.errors import SettingsError
from softcache.join.joined_data import JoinedData
from softcache.join.match import join
from softcache.models.weights import parameter_count
from softcache.results.metrics import (
    calibration,
    count_macs,
    divergence_from_teacher,
    latencies,
    outputs,
)
from softcache.train.run_folder import Run, expand, open_run

BATCHES = (1, 64)

NOISE = 0.1  # of a latency


@dataclass(frozen=True)
class StudentMetrics:
    """A student's figures; None where they were not measured."""

    name: str
    parameters: int
    count_macs: int
    bytes: int
    seconds: Mapping[int, float]  # of a batch on the CPU, by its size
    error: float | None  # share
    calibration: float | None
    kl: float | None

    def beats(self, other: StudentMetrics) -> bool:
        """At least as good in error, parameters and latency, and better in one.

        Latencies that differ by less than NOISE count as the same.
        """
        pairs = [
            (self.error or 0.0, other.error or 0.0, 0.0),
            (self.parameters, other.parameters, 0.0),
            (self.seconds[BATCHES[0]], other.seconds[BATCHES[0]], NOISE),
        ]
        as_good = all(mine <= theirs * (1 + noise) for mine, theirs, noise in pairs)
        return as_good and any(mine * (1 + noise) < theirs for mine, theirs, noise in pairs)


def compare(
    folders: Sequence[Path],
    *,
    eval_data: str | None = None,
    cache: Path | None = None,
    data: str | None = None,
    student: Sequence[str] = (),
) -> str:
    """A table of students; * marks those that no other beats in error, parameters and latency.

    Args:
        eval_data: test errors and calibration are measured on these; else the errors are those of the
            training's own evaluation.
        cache: KL to the teacher is measured on its first view.
        data: the samples of the cache, if it does not hold them.
        student: where the students' code is, if they are not built-in ones.

    Raises:
        SoftcacheError: a folder is no finished run, or data or cache do not fit it.
    """
    runs = {str(folder): open_run(folder) for folder in expand(folders)}
    if not runs:
        raise SettingsError("no run; name folders of softcache train")
    found = measure_all(runs, eval_data=eval_data, cache=cache, data=data, student=student)
    rows = [
        (
            ("* " if not any(other.beats(one) for other in found) else "  ") + one.name,
            f"{one.parameters:,}",
            f"{one.count_macs:,}",
            f"{one.bytes:,}",
            *(f"{1e3 * one.seconds[batch]:.2f}" for batch in BATCHES),
            "-" if one.error is None else f"{one.error:.2%}",
            "-" if one.kl is None else f"{one.kl:.4f}",
            "-" if one.calibration is None else f"{one.calibration:.4f}",
        )
        for one in found
    ]
    headers = (
        "student", "parameters", "multiply-adds", "bytes", *(f"ms, batch {b}" for b in BATCHES),
        "test error", "KL to teacher", "calibration error",
    )  # fmt: skip
    align = ("left", *["right"] * (len(headers) - 1))
    table = tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
    threads = torch.get_num_threads()
    return (
        f"{table}\n* no other is as good in error, parameters and latency ({threads} CPU threads)"
    )


def measure_all(
    runs: Mapping[str, Run],
    *,
    eval_data: str | None,
    cache: Path | None,
    data: str | None,
    student: Sequence[str],
) -> list[StudentMetrics]:
    """The figures of every run, in the order given."""
    models = {name: run.model(student) for name, run in runs.items()}
    seconds = {
        batch: latencies(models, {name: run.example(batch) for name, run in runs.items()})
        for batch in BATCHES
    }
    source = open_source(eval_data) if eval_data else None
    part = open_joined(cache, data) if cache else None
    found = []
    for name, run in runs.items():
        facts, model = run.facts, models[name]
        error = facts["errors"] / facts["samples"] if "errors" in facts else None
        gap, kl = None, None
        if source is not None:
            rows, labels = outputs(model, source, run.classes)
            error = float((rows.argmax(-1) != labels).double().mean())
            gap = calibration(rows, labels).error
        if part is not None and part.cache is not None:
            kl = divergence_from_teacher(model, part, part.cache.header.temperature)
        found.append(
            StudentMetrics(
                name,
                parameter_count(model),
                count_macs(model, run.example(1)),
                run.weights.stat().st_size,
                {batch: seconds[batch][name] for batch in BATCHES},
                error,
                gap,
                kl,
            )
        )
    return found


def open_joined(path: Path, data: str | None, augment: str | None = None) -> JoinedData:
    """A cache joined to its samples, one view at a time."""
    cache = open_trainable(path)
    return join(
        open_source(data) if data else CacheSource(cache),
        cache,
        augment=augment,
        temperatures=[cache.header.temperature],
        device=torch.device("cpu"),
        rotate=False,
    )
