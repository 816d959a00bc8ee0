"""A hint at soft targets that are hardly more than the labels: those of trees on their training samples."""

from __future__ import annotations

from softcache.cache.summary import RowStatistics
from softcache.teachers.ensemble import Ensemble

FEWEST_ROWS = 50  # labelled rows, below which full agreement may be chance
MEMORIZED = 0.999  # agreement with the labels, from which on trees have probably seen them


def memorized_labels(teacher: Ensemble, statistics: RowStatistics) -> str | None:
    """What to do where a teacher of trees agrees with nearly all labels; None if it does not.

    Trees that are grown to the end give the samples that they were trained on their own labels.
    """
    trees = [member.spec for member in teacher.teachers if member.is_tree]
    predictions = statistics.predictions
    if not trees or len(predictions.labels) < FEWEST_ROWS or predictions.agreement < MEMORIZED:
        return None
    return (
        f"{trees[0]} is made of trees and agrees with {predictions.agreement:.1%} of the labels: if it was "
        "trained on these samples, its soft targets say hardly more than the labels. Out-of-fold predictions "
        "say more: numpy.save('oof.npy', cross_val_predict(model, X, y, method='predict_proba')), then "
        "softcache import oof.npy --teacher-output probabilities"
    )
