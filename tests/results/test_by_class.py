"""Errors by class."""

from __future__ import annotations

import numpy as np

from softcache.cache.verdict import Predictions
from softcache.results.by_class import SHOWN, error_shares, errors_by_class


def predictions(labels: list[int], classes: list[int]) -> Predictions:
    return Predictions(np.array(labels), np.array(classes), np.ones(len(labels)))


def test_the_hardest_classes_come_first_and_each_counts_the_same() -> None:
    # nine of class 0, all right; two of class 1, one wrong; none of class 2
    some = predictions([0] * 9 + [1, 1], [0] * 9 + [1, 2])
    other = predictions([0] * 9 + [1, 1], [0] * 9 + [0, 2])
    np.testing.assert_array_equal(error_shares(some, 3), [0, 0.5, np.nan])
    assert errors_by_class({"a": some, "b": other}, ["ant", "bee", "cat"]) == [
        ("balanced error", "25.00%", "50.00%"),
        ("bee", "50.00%", "100.00%"),
        ("ant", "0.00%", "0.00%"),
    ]


def test_of_many_classes_only_the_hardest_are_shown() -> None:
    labels = list(range(50))
    wrong = predictions(labels, [*range(45), *[0] * 5])
    rows = errors_by_class({"a": wrong}, [str(number) for number in labels])
    assert len(rows) == 1 + SHOWN
    assert [name for name, _ in rows[1:6]] == ["45", "46", "47", "48", "49"]
