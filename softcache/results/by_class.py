"""Errors of students class by class: which classes are hard, and for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from softcache.cache.verdict import Predictions

SHOWN = 10  # classes, those with the largest share of errors first

Shares = npt.NDArray[np.float64]


def error_shares(predictions: Predictions, classes: int) -> Shares:
    """The share of errors in each class, (classes,); NaN for a class without samples."""
    wrong = predictions.labels[predictions.labels != predictions.classes]
    errors, samples = (
        np.bincount(values, minlength=classes) for values in (wrong, predictions.labels)
    )
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class without samples
        shares: Shares = errors / samples
    return shares


def errors_by_class(
    students: Mapping[str, Predictions], names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Rows of a table: the balanced error, then the SHOWN hardest classes on average over the students.

    The balanced error is the mean over the classes that occur, each of the same weight; 1 minus it is the
    balanced accuracy.

    Args:
        students: the predictions of each student, by name.
        names: names of the classes.
    """
    shares = np.stack([error_shares(one, len(names)) for one in students.values()])  # (S, C)
    occurs: npt.NDArray[np.bool_] = np.asarray(~np.isnan(shares).any(0))
    mean = np.where(occurs, shares.mean(0), -1.0)
    hardest = [number for number in np.argsort(-mean, kind="stable") if occurs[number]][:SHOWN]
    balanced = [f"{row[occurs].mean():.2%}" for row in shares]
    return [
        ("balanced error", *balanced),
        *((names[number], *(f"{row[number]:.2%}" for row in shares)) for number in hardest),
    ]
