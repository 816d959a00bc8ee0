"""Real run folders with other facts: how many errors, which settings, which metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache.results.students import Student, group_runs, measure_students
from softcache.train.run_folder import Run, open_run

ORIGINAL = "mlp-8-seed=0"  # in the folder that the fixture `grid` makes


def copy_run(
    grid: Path,
    folder: Path,
    *,
    baseline: bool = False,
    errors: int | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
    **settings: object,
) -> Run:
    """Copy a run to `folder`, and change what its files say.

    Args:
        baseline: copy the baseline of the run.
        errors: of 100 test samples.
        metrics: the lines of metrics.jsonl.
        facts: changes to config.json.
        settings: changes to its settings.
    """
    source = grid / ORIGINAL / "baseline" if baseline else grid / ORIGINAL
    folder.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "student.safetensors"):
        shutil.copy(source / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= facts or {}
    config["settings"] |= settings
    if errors is not None:
        config |= {"errors": errors, "samples": 100}
    (folder / "config.json").write_text(json.dumps(config))
    if metrics is not None:
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        (folder / "metrics.jsonl").write_text(lines)
    return open_run(folder)


def student_with(
    grid: Path, folder: Path, ours: Mapping[int, int], baseline: Mapping[int, int]
) -> Student:
    """A student with so many errors of 100 by seed, and its baseline with so many."""
    runs = {
        f"{kind}-{seed}": copy_run(
            grid, folder / f"{kind}-{seed}", baseline=kind == "hard", errors=errors, seed=seed
        )
        for kind, by_seed in (("soft", ours), ("hard", baseline))
        for seed, errors in by_seed.items()
    }
    students = group_runs(runs)
    measure_students(students, (), None)
    return students[0]
