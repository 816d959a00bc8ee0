"""The sentences that a report opens with, from real caches and runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.results import verdict
from softcache.results.knowledge import measure_knowledge, measure_views
from softcache.results.students import group_runs, measure_students
from softcache.results.verdict import (
    file_sentences,
    file_size,
    percent,
    points,
    short_number,
    student_sentence,
    students_verdict,
    teacher_from_runs,
    teacher_sentences,
    teacher_warnings,
)
from softcache.train.run_folder import open_run
from tests.configs import replace
from tests.results.run_cases import ORIGINAL, copy_run, student_with


@pytest.fixture
def right_labels(data_file: Path, cache: Cache, tmp_path: Path) -> str:
    """Data whose labels are the teacher's top classes."""
    images = np.load(data_file)["x_train"]
    labels = cache.rows(0, np.arange(len(images))).argmax(-1)
    np.savez(tmp_path / "right.npz", x=images, y=labels)
    return f"npz:{tmp_path / 'right.npz'}"


# the teacher


@pytest.mark.parametrize("older", [False, True])
def test_the_teacher_is_as_sure_as_its_rows_say(cache: Cache, older: bool) -> None:
    if older:  # a summary without the confidence
        summary = {k: v for k, v in (cache.header.summary or {}).items() if k != "confidence"}
        cache = replace(cache, header=replace(cache.header, summary=summary))
    rows = np.arange(300)
    at_one = np.exp(cache.rows(0, rows, 1.0).astype(np.float64)).max(-1).mean()
    log_probs = cache.rows(0, rows).astype(np.float64)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1).mean()
    agreement = (log_probs.argmax(-1) == cache.labels).mean()
    text = teacher_sentences(cache, measure_knowledge(cache))
    assert "The teacher is models.py:teacher (325 parameters)." in text
    assert cache.header.evaluation is not None
    errors = cache.header.evaluation["errors"]
    assert f"({errors} errors in 100 samples)" in text
    assert f"its top class is the label in {percent(agreement)} of cases" in text
    assert f"its mean top-1 probability at T = 1 is {percent(at_one)}" in text
    assert f"it is surer than it is right, by {points(at_one - agreement)}" in text
    assert f"a mean entropy of {entropy:.3f} nats; hard labels have 0, and 5 equally likely" in text


def test_a_teacher_that_is_sure_and_wrong_is_a_warning(
    cache: Cache, dump_config: DumpConfig, right_labels: str, tmp_path: Path
) -> None:
    assert cache.header.summary is not None
    (known,) = cache.header.summary["warnings"]
    (warning,) = teacher_warnings(cache, measure_knowledge(cache))
    assert warning == f"tiny.h5: {known}."
    # an older version did not look for them
    summary = {k: v for k, v in cache.header.summary.items() if k not in ("warnings", "confidence")}
    older = replace(cache, header=replace(cache.header, summary=summary))
    (warning,) = teacher_warnings(older, measure_knowledge(older))
    assert warning.startswith(
        "tiny.h5: the teacher agrees with 24.7% of the labels, but its mean conf"
    )
    config = replace(dump_config, data=right_labels, eval_data=None, out=tmp_path / "right.h5")
    right = dump(config)
    knowledge = measure_knowledge(right)
    assert teacher_warnings(right, knowledge) == []
    assert "its top class is the label in 100% of cases" in teacher_sentences(right, knowledge)


def test_samples_that_the_teacher_knows_less_well_than_its_evaluation_data_are_a_warning(
    dump_config: DumpConfig, data_file: Path, right_labels: str, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=right_labels, temperature=1.0, out=tmp_path / "soft.h5")
    soft = dump(replace(config, teacher_temperature=0.1))
    (warning,) = teacher_warnings(soft, measure_knowledge(soft))
    assert (
        "classifies 100% of its evaluation data correctly, but its top class is the label"
        in warning
    )


@pytest.mark.parametrize(
    ("temperature", "warning"),
    [(0.05, "almost no entropy"), (4.0, None), (1000.0, "almost uniform")],
)
def test_soft_targets_that_say_nothing_are_a_warning(
    temperature: float,
    warning: str | None,
    dump_config: DumpConfig,
    right_labels: str,
    tmp_path: Path,
) -> None:
    config = replace(dump_config, temperature=temperature, data=right_labels, eval_data=None)
    cache = dump(replace(config, out=tmp_path / "t.h5"))
    warnings = teacher_warnings(cache, measure_knowledge(cache))
    assert [text for text in warnings if "soft targets" in text] == (
        [] if warning is None else [text for text in warnings if warning in text]
    )
    assert bool(warnings) == (warning is not None)


def test_unlabelled_samples_leave_the_confidence(dump_config: DumpConfig, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", x=images)
    cache = dump(replace(dump_config, data=f"npz:{tmp_path / 'bare.npz'}", eval_data=None))
    knowledge = measure_knowledge(cache)
    text = teacher_sentences(cache, knowledge)
    assert "On the cached samples its mean top-1 probability at T = 1 is 9" in text
    assert "label in" not in text
    assert teacher_warnings(cache, knowledge) == []


def test_runs_alone_know_the_teacher(grid: Path) -> None:
    text = teacher_from_runs(open_run(grid / ORIGINAL).facts)
    assert text.startswith("The teacher is models.py:teacher (325 parameters). It classifies")
    assert teacher_from_runs({"teachers": []}) == ""


# the file


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("dense", "10 bytes a row for 5 classes, dense float16. KL(teacher ‖ stored) at T = 4 is"),
        ("quantized", "7 bytes a row for 5 classes, encoding quantized; dense float16 takes 10."),
        ("sampled:9", "encoding sampled; dense float16 takes 10. KL(stored ‖ teacher) at T = 4"),
    ],
)
def test_the_file_has_its_size_and_its_kl(
    encoding: str, words: str, dump_config: DumpConfig
) -> None:
    cache = dump(replace(dump_config, encoding=encoding))
    text = file_sentences(cache, measure_views(cache))
    assert text.startswith("tiny.h5 stores one view of 300 samples in ")
    assert words in text
    assert cache.header.summary is not None
    mean = cache.header.summary["fidelity"]["mean"]
    assert f" is {short_number(max(0.0, mean))} nats on average (99th percentile " in text
    assert "differ between its views" not in text


def test_a_kl_that_was_not_measured_is_admitted(cache: Cache) -> None:
    summary = {k: v for k, v in (cache.header.summary or {}).items() if k != "fidelity"}
    bare = replace(cache, header=replace(cache.header, summary=summary))
    assert "The KL of the stored rows from the teacher was not measured." in file_sentences(
        bare, None
    )


def test_views_that_differ_are_told(dump_config: DumpConfig) -> None:
    cache = dump(replace(dump_config, views=3, augment="shift:2"))
    views = measure_views(cache)
    assert views is not None
    text = file_sentences(cache, views)
    assert "stores 3 views of 300 samples" in text
    assert (
        f"differ between its views by {short_number(views.divergence[-1])} nats on average" in text
    )
    assert f"its top class changes in {percent(views.changed[-1])} of samples" in text


# the students


def test_a_student_that_beats_its_baseline(grid: Path, tmp_path: Path) -> None:
    student = student_with(grid, tmp_path, {0: 10, 1: 12, 2: 14}, {0: 20, 1: 21, 2: 25})
    assert student_sentence(student) == (
        "mlp:8 is 88.00 ± 2.00% accurate: it gained 10.00 percentage points over its hard-label baseline "
        "(78.00 ± 2.65%) over 3 seeds (standard error 0.58)."
    )
    summary, sentences = students_verdict([student])
    assert summary == (
        "1 distilled student (3 runs): it beats its hard-label baseline. Accuracies are means over seeds ± "
        "their standard deviation."
    )
    assert sentences == [student_sentence(student)]


def test_a_student_that_did_not_beat_its_baseline(grid: Path, tmp_path: Path) -> None:
    student = student_with(grid, tmp_path, {0: 21}, {0: 20})
    assert student_sentence(student) == (
        "mlp:8 is 79.00% accurate. It did not beat its hard-label baseline (80.00%): it is 1.00 percentage "
        "point less accurate with one seed (standard error 5.71), a difference that chance can explain."
    )
    summary, _ = students_verdict([student])
    assert summary == (
        "1 distilled student (1 run): it did not beat its hard-label baseline. Try another temperature, a "
        "larger alpha or more epochs; see the guide on students."
    )


@pytest.mark.parametrize(
    ("ours", "sentence", "summary"),
    [
        (18, "chance can explain a difference this small.", "it may beat its hard-label baseline."),
        (20, "(80.00%): it is equally accurate.", "it did not beat its hard-label baseline."),
        (80, "60.00 percentage points less accurate with one seed", "it did not beat"),
    ],
)
def test_chance_is_not_a_gain(
    ours: int, sentence: str, summary: str, grid: Path, tmp_path: Path
) -> None:
    student = student_with(grid, tmp_path, {0: ours}, {0: 20})
    assert sentence in student_sentence(student)
    assert summary in students_verdict([student])[0]


def test_a_student_without_baseline_or_test_errors(grid: Path, tmp_path: Path) -> None:
    run = copy_run(grid, tmp_path / "run", errors=5)
    (student,) = group_runs({"run": run})
    measure_students([student], (), None)
    assert student_sentence(student) == (
        "mlp:8 is 95.00% accurate; it has no hard-label baseline to compare with (softcache train "
        "--baseline)."
    )
    assert students_verdict([student])[0].endswith(
        "none can be compared with a hard-label baseline."
    )
    del run.facts["errors"]
    measure_students([student], (), None)
    assert "accuracy unknown; add --eval-data with labelled samples" in student_sentence(student)
    student.hard = True
    assert students_verdict([student]) == (
        "All runs learned from hard labels alone, so there is no gain to report.",
        [],
    )


def test_many_students_are_counted_and_the_telling_ones_described(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"a": (10, 60), "b": (20, 60), "c": (30, 60), "d": (59, 60), "e": (90, 60)}
    students = []
    for label, (ours, baseline) in errors.items():
        student = student_with(grid, tmp_path / label, {0: ours}, {0: baseline})
        student.label = label
        students.append(student)
    summary, sentences = students_verdict(students)
    assert summary == (
        "5 distilled students (5 runs): 3 beat their baselines, 1 gained no more than chance can explain, "
        "1 did not beat their baselines. Try another temperature, a larger alpha or more epochs; see the "
        "guide on students."
    )
    assert len(sentences) == 5
    monkeypatch.setattr(verdict, "MOST_STUDENTS", 3)
    summary, sentences = students_verdict(students)
    assert summary.endswith(" The best gains, and students without one:")
    assert [sentence[0] for sentence in sentences] == ["a", "b", "e"]
    assert students_verdict(students[:3])[0].endswith(": all beat their baselines.")
    assert ": none beat their baselines." in students_verdict([students[4], students[4]])[0]


# numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.0038, "0.0038"), (5.7e-6, "5.7 \N{MULTIPLICATION SIGN} 10⁻⁶"), (0.25, "0.25"),
        (float("nan"), "unknown"),
    ],
)  # fmt: skip
def test_small_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_percent_and_points_and_sizes() -> None:
    assert [percent(share) for share in (0, 1, 0.9966, 0.825, 0.001)] == [
        "0%", "100%", "99.66%", "82.5%", "0.10%",
    ]  # fmt: skip
    assert points(-0.0438) == "4.38 percentage points"
    assert points(0.01) == "1.00 percentage point"
    assert [file_size(size) for size in (12, 8_433_088, 3_000_000_000)] == [
        "12 bytes", "8.43 MB", "3 GB",
    ]  # fmt: skip
