"""Seeds become one student, students find their baselines, and gains have their noise."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.results import students as students_module
from softcache.results.compare import measure_all
from softcache.results.metrics import calibration
from softcache.results.student_figures import cost_points, pair_numbers
from softcache.results.students import (
    Spread,
    error_curve,
    group_runs,
    loss_curve,
    measure_students,
)
from softcache.train.run_folder import Run, expand, open_run
from softcache.util.tensors import to_float
from tests.results.run_cases import copy_run, student_with


def open_all(grid: Path) -> dict[str, Run]:
    """All runs of the grid and their baselines, by name."""
    folders = expand([grid])
    return {folder.name: open_run(folder) for folder in folders} | {
        f"{folder.name}/baseline": open_run(folder / "baseline") for folder in folders
    }


# which runs are one student


def test_runs_that_differ_in_their_seed_are_one_student(grid: Path) -> None:
    students = group_runs(open_all(grid))
    assert [student.label for student in students] == [
        "mlp:16", "mlp:16, hard labels", "mlp:8", "mlp:8, hard labels",
    ]  # fmt: skip
    assert all(student.seeds == [0, 1, 2] for student in students)
    assert students[0].baseline is students[1]
    assert students[2].baseline is students[3]
    assert students[1].baseline is None


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"epochs": 5}, "mlp:8, epochs=5"),
        ({"learning_rate": 0.01}, "mlp:8, lr=0.01"),
        ({"student": "mlp:9"}, "mlp:9"),
        ({"eval_data": "npz:other.npz"}, "mlp:8, eval-data=npz:other.npz"),
    ],
)
def test_any_other_setting_makes_another_student(
    settings: dict[str, Any], label: str, grid: Path, tmp_path: Path
) -> None:
    runs = {
        "first": copy_run(grid, tmp_path / "first"),
        "second": copy_run(grid, tmp_path / "second", seed=1, **settings),
    }
    students = group_runs(runs)
    assert len(students) == 2
    assert students[1].label == label


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_alpha_tells_students_apart_but_not_their_baselines(
    alpha: float, grid: Path, tmp_path: Path
) -> None:
    runs = {
        "first": copy_run(grid, tmp_path / "first"),
        "second": copy_run(grid, tmp_path / "second", facts={"alpha": alpha}, seed=1),
        "hard": copy_run(grid, tmp_path / "hard", baseline=True),
    }
    students = group_runs(runs)
    labels = [student.label for student in students]
    if alpha == 1.0:
        assert labels == ["mlp:8", "mlp:8, hard labels"]
    else:
        assert labels == ["mlp:8, alpha=1", "mlp:8, alpha=0.5", "mlp:8, hard labels"]
    assert all(student.baseline is students[-1] for student in students[:-1])
    assert pair_numbers(students)[id(students[-1])] == 0


def test_settings_without_effect_do_not_tell_students_apart(grid: Path, tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "workers": 3,
        "device": "cuda",
        "out": "elsewhere",
        "cache": ["renamed.h5"],
    }
    runs = {
        "first": copy_run(grid, tmp_path / "first"),
        "second": copy_run(grid, tmp_path / "second", seed=1, **changed),
    }
    assert len(group_runs(runs)) == 1


def test_caches_of_one_name_but_another_content_make_another_student(
    grid: Path, tmp_path: Path
) -> None:
    facts = {"content_ids": ["0" * 64]}
    runs = {
        "first": copy_run(grid, tmp_path / "first"),
        "second": copy_run(grid, tmp_path / "second", facts=facts),
        "hard": copy_run(grid, tmp_path / "hard", baseline=True),
    }
    students = group_runs(runs)
    assert [student.label for student in students] == [
        "mlp:8 (1)",
        "mlp:8, hard labels",
        "mlp:8 (2)",
    ]
    assert students[2].baseline is None


# what it gained


def test_a_gain_is_measured_seed_by_seed(grid: Path, tmp_path: Path) -> None:
    student = student_with(grid, tmp_path, {0: 10, 1: 12, 2: 14}, {0: 20, 1: 21, 2: 25})
    accuracy, gain = student.accuracy(), student.gain()
    assert accuracy is not None
    assert gain is not None
    assert accuracy.mean == pytest.approx(0.88)
    assert accuracy.deviation == pytest.approx(0.02)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.86, 0.90))
    assert gain.mean == pytest.approx(0.10)
    assert gain.noise == pytest.approx(0.01 / math.sqrt(3))  # of 10, 9 and 11 points
    assert gain.seeds == 3
    assert gain.beats
    assert gain.certain


def test_only_seeds_that_both_have_are_compared(grid: Path, tmp_path: Path) -> None:
    gain = student_with(grid, tmp_path, {0: 10, 1: 10, 7: 90}, {0: 12, 1: 14, 8: 1}).gain()
    assert gain is not None
    assert gain.mean == pytest.approx(0.03)
    assert gain.seeds == 2


@pytest.mark.parametrize(
    ("ours", "baseline", "beats", "certain"),
    [
        ({0: 10}, {0: 60}, True, True),
        ({0: 10}, {0: 12}, True, False),
        ({0: 12}, {0: 10}, False, False),
        ({0: 60}, {0: 10}, False, True),
        ({0: 10}, {3: 60}, True, True),  # no seed in common
        ({0: 10, 1: 14}, {0: 11, 1: 14}, True, False),
    ],
)
def test_a_gain_within_the_noise_is_not_certain(
    ours: dict[int, int],
    baseline: dict[int, int],
    beats: bool,
    certain: bool,
    grid: Path,
    tmp_path: Path,
) -> None:
    gain = student_with(grid, tmp_path, ours, baseline).gain()
    assert gain is not None
    assert (gain.beats, gain.certain) == (beats, certain)


def test_the_noise_of_one_seed_is_that_of_two_error_counts(grid: Path, tmp_path: Path) -> None:
    gain = student_with(grid, tmp_path, {0: 10}, {0: 20}).gain()
    assert gain is not None
    assert gain.noise == pytest.approx(math.sqrt((0.1 * 0.9 + 0.2 * 0.8) / 100))


# what is measured, and drawn


def outputs(run: Run, source: Source) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) of a student, and labels (N,)."""
    inputs, labels = source.fetch(range(len(source)))
    with torch.inference_mode():
        return torch.log_softmax(run.model()(to_float(inputs)), -1), torch.from_numpy(labels)


def test_only_one_batch_of_outputs_is_held_at_once(
    grid: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held, most = torch.log_softmax, list[weakref.ref[Tensor]](), 0

    def log_softmax(*arguments: Any) -> Tensor:
        nonlocal most
        rows: Tensor = real(*arguments)
        held.append(weakref.ref(rows))
        most = max(most, sum(reference() is not None for reference in held))
        return rows

    monkeypatch.setattr("softcache.results.metrics.BATCH", 10)
    monkeypatch.setattr(torch, "log_softmax", log_softmax)
    run, source = open_all(grid)["mlp-16-seed=1"], open_source(f"npz:{data_file}@test")
    (student,) = measure_all({"mlp": run}, source, None)
    assert len(held) == 10
    assert most == 2  # the batch before is replaced only then
    monkeypatch.undo()
    log_probs, labels = outputs(run, source)
    assert student.error == float((log_probs.argmax(-1) != labels).double().mean())
    assert student.ece == pytest.approx(calibration(log_probs, labels).error)


def test_measured_accuracy_and_ece_are_those_of_the_weights(grid: Path, data_file: Path) -> None:
    source = open_source(f"npz:{data_file}@test")
    students = group_runs(open_all(grid))
    measure_students(students, (), source)
    student = students[0]
    run = student.runs["mlp-16-seed=1"]
    log_probs, labels = outputs(run, source)
    right = float((log_probs.argmax(-1) == labels).double().mean())
    assert student.accuracy_by_seed()[1] == pytest.approx(right)
    assert right == pytest.approx(1 - run.facts["errors"] / run.facts["samples"])
    quality = student.measured["mlp-16-seed=1"].quality
    assert quality is not None
    assert quality.calibration.error == pytest.approx(calibration(log_probs, labels).error)
    assert student.parameters == run.facts["parameters"]
    assert student.macs == 64 * 16 + 16 * 5


def test_predictions_that_cannot_be_right_are_a_warning(
    grid: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"npz:{data_file}@test")
    students = group_runs(open_all(grid))
    run = students[0].runs["mlp-16-seed=1"]
    top = outputs(run, source)[0].argmax(-1).numpy()
    images = np.load(data_file)["x_test"]
    for shift in (0, 1):
        np.savez(tmp_path / "shifted.npz", x=images, y=(top + shift) % 5)
        measure_students(students, (), open_source(f"npz:{tmp_path / 'shifted.npz'}"))
        warnings = students[0].measured["mlp-16-seed=1"].warnings
        assert len(warnings) == shift
        assert all("the student in mlp-16-seed=1 agrees with 0.0%" in text for text in warnings)
    monkeypatch.setattr(students_module, "SAMPLES_PER_CLASS", 21)
    measure_students(students, (), open_source(f"npz:{tmp_path / 'shifted.npz'}"))
    assert not students[0].measured["mlp-16-seed=1"].warnings


def test_without_evaluation_data_the_accuracy_is_that_of_the_run(grid: Path) -> None:
    students = group_runs(open_all(grid))
    measure_students(students, (), None)
    facts = students[0].runs["mlp-16-seed=1"].facts
    assert students[0].accuracy_by_seed()[1] == 1 - facts["errors"] / facts["samples"]
    assert students[0].ece() is None


def test_curves_are_means_and_bands_over_the_seeds(grid: Path, tmp_path: Path) -> None:
    losses = {0: [3.0, 1.0], 1: [5.0, 2.0], 2: [4.0, math.nan]}
    runs = {
        f"run-{seed}": copy_run(
            grid, tmp_path / f"run-{seed}", seed=seed,
            metrics=[
                {"epoch": epoch}
                | ({} if math.isnan(loss) else {"total": loss})
                | ({"errors": 7 + seed, "samples": 50} if epoch == 2 else {})
                for epoch, loss in enumerate(values, 1)
            ],
        )
        for seed, values in losses.items()
    }  # fmt: skip
    (student,) = group_runs(runs)
    loss, error = loss_curve(student), error_curve(student)
    assert list(loss.epochs) == [1, 2]
    assert list(loss.mean) == [4.0, 1.5]  # what is not a number does not count
    assert (list(loss.low), list(loss.high)) == ([3.0, 1.0], [5.0, 2.0])
    assert list(error.epochs) == [2]
    assert list(error.mean) == [16.0]
    assert (error.low[0], error.high[0]) == (14.0, 18.0)


def test_a_student_is_one_point_with_the_spread_of_its_seeds(grid: Path, tmp_path: Path) -> None:
    student = student_with(grid, tmp_path, {0: 10, 1: 12, 2: 14}, {0: 20})
    assert student.baseline is not None
    point, baseline = cost_points([student, student.baseline])
    assert point.accuracy == Spread.of([90.0, 88.0, 86.0])
    assert (point.label, point.hard, point.pair) == ("mlp:8", False, 0)
    assert (baseline.label, baseline.hard, baseline.pair) == ("mlp:8, hard labels", True, 0)
    median, low, high = point.milliseconds
    times = 1e3 * np.array(student.seconds)
    assert len(times) == 60
    assert times.min() <= low <= median <= high <= times.max()
    assert median == pytest.approx(np.median(times))


def test_a_student_without_test_errors_is_no_point(grid: Path, tmp_path: Path) -> None:
    run = copy_run(grid, tmp_path / "run")
    del run.facts["errors"]
    students = group_runs({"run": run})
    measure_students(students, (), None)
    assert cost_points(students) == []
    assert students[0].accuracy() is None
