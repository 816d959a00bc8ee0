"""F1 and mean average precision of sets of classes, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from softcache.models.multi_label import MultiLabelScores, average_precision, score
from softcache.models.scores import scores_from


@pytest.mark.parametrize(
    ("applies", "scores", "expected"),
    [
        # the example in scikit-learn's documentation of average_precision_score
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.5 * 1 + 0.5 * 2 / 3),
        ([1, 1, 0, 0], [4, 3, 2, 1], 1.0),
        ([0, 0, 0, 1], [4, 3, 2, 1], 1 / 4),
        ([1, 0, 1, 0], [1, 1, 1, 1], 1 / 2),  # equal scores share one threshold
        ([1], [0], 1.0),
    ],
)
def test_average_precision(applies: list[int], scores: list[float], expected: float) -> None:
    value = average_precision(np.array(applies, bool), np.array(scores, np.float32))
    assert value == pytest.approx(expected)
    # the order of the samples does not matter
    order = np.random.default_rng(0).permutation(len(applies))
    again = average_precision(np.array(applies, bool)[order], np.array(scores, np.float32)[order])
    assert again == pytest.approx(expected)


def test_f1_and_errors() -> None:
    sets = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], np.uint8)
    logits = np.array([[2, 1, -1, -1], [-1, -2, 3, -1], [-1, -1, -1, -1], [1, 1, -1, -1]], "f4")
    scores, wrong = score(sets, logits)
    # TP, FP, FN of the classes: 2 0 0, 1 1 1, 0 1 0, none
    assert scores.micro_f1 == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert scores.macro_f1 == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert wrong == 2


def test_scores_of_nothing_are_zero() -> None:
    scores, wrong = score(np.zeros((3, 2), np.uint8), np.full((3, 2), -1, "f4"))
    assert scores == MultiLabelScores(0.0, 0.0, 0.0)
    assert wrong == 0


def test_scores_are_read_back_from_a_record() -> None:
    scores = MultiLabelScores(0.5, 0.25, 0.125)
    assert scores_from(scores.line() | {"errors": 3}) == scores
    assert scores_from({"errors": 3}) is None
    assert scores_from(scores.line() | {"micro_f1": "x"}) is None
    assert str(scores) == "mean average precision 50.00%, micro F1 25.00%, macro F1 12.50%"
