"""Verdicts: predictions that cannot be right are named with their cause, and right ones are left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from softcache.cache.verdict import (
    Predictions,
    describe_order,
    judge,
    judge_entropy,
    mapped,
    other_order,
)
from tests.bench.verdicts import campaign, noisy, part, wrong

CLASSES = 10
NAMES = [str(number) for number in range(CLASSES)]


def predictions(
    accuracy: float,
    *,
    rows: int = 2000,
    confidence: float | None = None,
    classes: int = CLASSES,
    seed: int = 0,
) -> Predictions:
    """Those of a teacher of this accuracy, with a mean confidence that is as high unless it is given."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    others = (labels + random.integers(1, classes, rows)) % classes
    guesses = np.where(random.random(rows) < accuracy, labels, others)
    mean = accuracy if confidence is None else confidence
    return Predictions(labels, guesses, np.full(rows, mean))


@pytest.mark.parametrize("accuracy", [0.15, 0.4, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_teacher_that_is_as_good_as_it_is_sure_is_right(accuracy: float, by_row: bool) -> None:
    assert judge("the teacher", predictions(accuracy), NAMES, by_row=by_row) == []


def test_a_weak_teacher_that_is_too_sure_is_no_mistake_of_the_data() -> None:
    assert judge("the teacher", predictions(0.5, confidence=0.95), NAMES) == []


@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.99])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("permuted", "the classes look to be in another order"),
        ("shifted", "the labels look shifted by one"),
        ("shuffled", "the rows of the matrix are in another order"),
    ],
)
def test_each_mistake_has_its_own_cause(accuracy: float, kind: str, cause: str) -> None:
    some = wrong(kind, predictions(accuracy), CLASSES, seed=3)
    (warning,) = judge("the teacher", some, NAMES, by_row=kind == "shuffled")
    assert warning.startswith(f"the teacher agrees with {some.agreement:.1%} of the labels")
    assert cause in warning


def test_a_campaign_with_a_fixed_seed() -> None:
    weak = [predictions(0.4 + 0.03 * n, confidence=0.9, seed=n) for n in range(10)]
    rows, missed = campaign(predictions(0.95, rows=5000), weak, CLASSES, 30)
    assert rows == [
        ("permuted", 30, 30),
        ("shifted", 30, 30),
        ("shuffled", 30, 30),
        ("right", 10, 0),
        ("right, weak teacher", 10, 0),
        ("right, label noise", 10, 0),
    ]
    assert missed == 0
    # a campaign whose wrong trials are right finds fault with the verdict
    right = predictions(0.95, rows=300)
    assert not judge("t", part(right, 0), NAMES)
    assert not judge("t", noisy(right, CLASSES, 0), NAMES)


def test_inputs_on_another_scale_are_a_likely_cause() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, 500)
    always_three = Predictions(labels, np.full(500, 3), np.full(500, 0.99))
    (warning,) = judge(
        "the teacher", always_three, NAMES, inputs="mean 127 and standard deviation 60"
    )
    assert "not normalized as the model expects (they have mean 127" in warning
    assert "which is chance" in warning


def test_of_a_few_rows_and_of_rows_without_confidence_nothing_is_said() -> None:
    few = Predictions(np.arange(7), np.arange(7) + 1, np.ones(7))
    assert judge("t", few, NAMES) == []
    unknown = predictions(0.1, confidence=math.nan)
    assert judge("t", unknown, NAMES) == []


def test_few_rows_show_another_order_but_not_more() -> None:
    labels = np.arange(15) % 3
    confidence = np.full(15, 0.95)
    names = ["a", "b", "c"]
    (warning,) = judge("t", Predictions(labels, (labels + 2) % 3, confidence), names)
    assert "agrees with 0.0% of the labels" in warning
    half_right = np.where(np.arange(15) < 8, labels, (labels + np.arange(15)) % 3)
    assert judge("t", Predictions(labels, half_right, confidence), names) == []


def test_far_above_chance_is_not_called_chance() -> None:
    labels = np.arange(30) % 3
    guesses = np.where(labels == 2, 0, labels)  # 66.7 %, where chance is 33.3 %
    warnings = judge("t", Predictions(labels, guesses, np.full(30, 0.99)), ["a", "b", "c"])
    assert not any("chance" in warning for warning in warnings)


def test_views_of_one_sample_are_no_more_evidence_than_one_row() -> None:
    one = predictions(0.2, rows=40, confidence=0.6)
    many = Predictions(
        np.tile(one.labels, 50), np.tile(one.classes, 50), np.tile(one.confidence, 50)
    )
    assert bool(judge("t", one, NAMES)) == bool(judge("t", many, NAMES, repeats=50))


@pytest.mark.parametrize("seed", range(20))
def test_an_order_is_not_fitted_to_noise(seed: int) -> None:
    # two rows of each of 100 classes, and guesses without any relation to them
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(100), 2)
    some = Predictions(labels, random.integers(0, 100, 200), np.full(200, 0.5))
    assert other_order(some, 100) == {}


def test_an_order_is_told_by_name() -> None:
    names = ["ant", "bee", "cat", "dog"]
    assert "0 (ant) is 2 (cat), 2 (cat) is 0 (ant)" in describe_order({0: 2, 2: 0}, names)
    assert "shifted by one (+1)" in describe_order({0: 1, 1: 2, 2: 3, 3: 0}, names)
    assert mapped(np.array([0, 1, 2]), {0: 2, 2: 0}).tolist() == [2, 1, 0]
    assert mapped(np.array([0, 1]), {}).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("entropy", "agreement", "cause"),
    [
        (math.log(10) * 0.999, 0.1, "almost uniform"),
        (0.0, 0.5, "never in doubt"),
        (0.0, 0.99, None),  # a very good teacher
        (0.5, 0.9, None),
    ],
)
def test_an_entropy_that_cannot_be(entropy: float, agreement: float, cause: str | None) -> None:
    warnings = judge_entropy("the teacher", entropy, 10, agreement)
    assert bool(warnings) == (cause is not None)
    assert all(str(cause) in warning for warning in warnings)
