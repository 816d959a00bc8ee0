"""What a run says last: no student that lost to its baseline, and no impossible result, passes in silence."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.errors import DataError, ModelError
from softcache.models import evaluate as evaluation_module
from softcache.models.evaluate import Evaluation
from softcache.train import record
from softcache.train.accelerator import make_accelerator
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.loop import conclude, train
from softcache.train.prepare import make_student
from softcache.train.student import Student
from softcache.train.verdict import impossible_results, verdicts
from tests.configs import replace

SAMPLES = 10_000


def student(
    errors: int | None, alpha: float = 0.9, temperature: float = 4.0, **settings: Any
) -> Student:
    """A student that ended with some errors of SAMPLES; a baseline with alpha 0."""
    config = StudentConfig(**{"student": "mlp:32"} | settings)
    config = config.baseline() if alpha == 0 else config
    made = make_student(
        nn.Linear(2, 2),
        make_accelerator("cpu", "fp32"),
        config,
        name="hard labels" if alpha == 0 else "distilled",
        folder=Path(),
        alpha=alpha,
        temperature=1.0 if alpha == 0 else temperature,
        classes=5,
        steps=1,
    )
    made.evaluation = None if errors is None else Evaluation(errors, SAMPLES)
    return made


def test_a_student_that_makes_more_errors_than_its_baseline_is_told() -> None:
    (sentence,) = verdicts([student(406), student(360, alpha=0)])
    # sqrt(406 (1 - 0.0406) + 360 (1 - 0.036)) = 27.1
    assert sentence == (
        "distilled mlp:32 makes 406 errors, its hard-label baseline 360: 46 more (standard error 27). "
        "Try --temperature 1 or 2, a larger --alpha or more epochs; see the guide on students"
    )


def test_a_student_that_beats_its_baseline_is_not() -> None:
    assert verdicts([student(359), student(360, alpha=0)]) == []


def test_as_many_errors_are_not_fewer() -> None:
    (sentence,) = verdicts([student(360), student(360, alpha=0)])
    assert "makes 360 errors, its hard-label baseline 360: as many (standard error 26)." in sentence


def test_without_a_baseline_or_an_evaluation_nothing_is_said() -> None:
    assert verdicts([]) == []
    assert verdicts([student(406)]) == []
    assert verdicts([student(360, alpha=0)]) == []
    assert verdicts([student(None), student(360, alpha=0)]) == []
    assert verdicts([student(406), student(None, alpha=0)]) == []


def test_seeds_are_one_student_and_the_error_is_that_of_their_differences() -> None:
    ours, theirs = [400, 410, 420], [390, 380, 400]  # differences of 10, 30, 20
    students = [student(errors, seed=seed) for seed, errors in enumerate(ours)]
    baselines = [student(errors, alpha=0, seed=seed) for seed, errors in enumerate(theirs)]
    (sentence,) = verdicts([*students, *reversed(baselines)])
    assert sentence.startswith(
        "distilled mlp:32 makes 410 errors on average over 3 seeds, its hard-label baseline 390: "
        "20 more (standard error 5.8)."
    )
    # only seeds that both have are compared
    (sentence,) = verdicts([students[0], baselines[0], baselines[1]])
    assert "makes 400 errors, its hard-label baseline 390: 10 more (standard error 28)" in sentence


def test_each_student_is_compared_with_its_own_baseline() -> None:
    students = [
        student(500, learning_rate=0.1),
        student(300, learning_rate=0.01),
        student(700, student="mlp:8"),
        student(400, alpha=0, learning_rate=0.1),
        student(400, alpha=0, learning_rate=0.01),
        student(600, alpha=0, student="mlp:8"),
    ]
    sentences = verdicts(students)
    assert [sentence.split(" makes ")[0] for sentence in sentences] == [
        "distilled mlp:32 lr=0.1",
        "distilled mlp:8 lr=0.002",
    ]
    assert "baseline 400: 100 more" in sentences[0]
    assert "baseline 600: 100 more" in sentences[1]


@pytest.mark.parametrize(
    ("alpha", "temperature", "advice"),
    [
        (0.9, 4.0, "Try --temperature 1 or 2, a larger --alpha or more epochs"),
        (0.9, 1.0, "Try --temperature 2, a larger --alpha or more epochs"),
        (1.0, 2.0, "Try --temperature 1 or more epochs"),
    ],
)
def test_what_was_tried_is_not_advised(alpha: float, temperature: float, advice: str) -> None:
    (sentence,) = verdicts([student(9, alpha, temperature), student(8, alpha=0)])
    assert f"{advice}; see the guide on students" in sentence


# results that cannot be right


def evaluated(labels: np.ndarray, predictions: np.ndarray, confidence: float) -> Evaluation:
    errors = int((labels != predictions).sum())
    sure = np.full(len(labels), confidence, np.float32)
    return Evaluation(errors, len(labels), labels, predictions, sure)


def shifted(confidence: float = 0.95) -> Student:
    """A student whose classes are all shifted by one."""
    made = student(0)
    labels = np.random.default_rng(0).integers(0, 5, 500).astype(np.int32)
    made.evaluation = evaluated(labels, (labels + 1) % 5, confidence)
    return made


def test_sure_and_wrong_cannot_be_right() -> None:
    (sentence,) = impossible_results([shifted()], ("a", "b", "c", "d", "e"))
    assert sentence.startswith(
        "the student 'distilled' agrees with 0.0% of the labels, but its mean confidence is 95.0%"
    )
    assert "the labels look shifted by one" in sentence
    assert impossible_results([shifted()], ()) == [sentence]  # no names but numbers


def test_a_weak_student_and_one_of_counts_alone_may_be() -> None:
    made = student(9_000)
    assert impossible_results([made, student(None)], ()) == []
    labels, guesses = np.random.default_rng(0).integers(0, 5, (2, 500)).astype(np.int32)
    made.evaluation = evaluated(labels, guesses, 0.22)
    assert impossible_results([made], ()) == []


@pytest.fixture
def impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation is that of a student whose classes are shifted."""
    evaluation = shifted().evaluation
    student_module = import_module("softcache.train.student")
    monkeypatch.setattr(student_module, "evaluate_student", lambda *_: evaluation)


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


@pytest.mark.usefixtures("impossible")
def test_a_run_warns_last_of_all(
    config: TrainConfig, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "softcache")
    caplog.clear()
    train(replace(config, baseline=True, eval_data=f"npz:{data_file}@test"))
    records = caplog.records
    table = next(n for n, entry in enumerate(records) if "test errors" in entry.getMessage())
    # the verdict on the cache's own teacher, who is untrained, is there as well
    last = [
        e.getMessage() for e in records[table + 1 :] if "the teacher agrees" not in e.getMessage()
    ]
    assert len(last) == 3
    assert last[0].startswith(
        "distilled mlp:16 makes 500 errors, its hard-label baseline 500: as m"
    )
    assert last[1].startswith("the student 'distilled' agrees with 0.0% of the labels")
    assert last[2].startswith("the student 'hard labels' agrees with 0.0% of the labels")
    assert {entry.levelno for entry in records[table + 1 :]} == {logging.WARNING}


@pytest.mark.usefixtures("impossible")
def test_with_strict_it_is_an_error_after_everything_is_saved(
    config: TrainConfig, data_file: Path
) -> None:
    # on labels alone: with --strict a cache of the untrained teacher would be refused before the first step
    config = replace(config, cache=None, eval_data=f"npz:{data_file}@test", strict=True)
    with pytest.raises(DataError, match=r"'student' agrees with 0.0% .*shifted.*saved in .*run;"):
        train(config)
    names = {path.name for path in config.out.iterdir()}
    assert names == {"student.safetensors", "config.json", "metrics.jsonl", "README.md"}


def test_strict_is_content_with_a_student_that_lost(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    students = [student(406), student(360, alpha=0)]
    conclude(replace(config, strict=True), students, ())
    assert len(messages(caplog)) == 1
    students[0].fail("the loss is nan")
    with pytest.raises(ModelError, match="1 of 2 students failed: the loss is nan; the others are"):
        conclude(replace(config, strict=True), students, ())


# the evaluation data are read once


def test_the_evaluation_data_are_hashed_once_a_run(
    config: TrainConfig, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []

    def counted(*arguments: Any) -> str:
        digests.append(evaluation_module.data_digest(*arguments))
        return digests[-1]

    monkeypatch.setattr(record, "data_digest", counted)
    students = [{"seed": seed} for seed in range(3)]
    train(replace(config, students=students, baseline=True, eval_data=f"npz:{data_file}@test"))
    assert len(digests) == 1


# two runs in one Python process


def test_two_runs_of_different_precision_in_one_process(config: TrainConfig) -> None:
    weights: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16", "fp32"):
        (trained,) = train(replace(config, precision=precision, overwrite=True))
        assert trained.accelerator.mixed_precision == precision.replace("fp32", "no")
        parameters = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
        assert torch.equal(weights.setdefault(precision, parameters), parameters)
    assert not torch.equal(weights["fp32"], weights["bf16"])
