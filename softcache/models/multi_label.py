"""How good predictions are where a sample may have any number of labels: F1 and mean average precision."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of predictions of sets of classes, each from 0 to 1.

    A class is taken to apply if its probability is above 1/2.

    Attributes:
        mean_average_precision: mean over the classes that occur of the average precision, sum over n of
            (R_n - R_(n-1)) P_n, with precision P and recall R at each threshold, as scikit-learn computes it.
        micro_f1: 2 TP / (2 TP + FP + FN), counted over all classes together.
        macro_f1: mean of the same over the classes that occur or are predicted.
    """

    mean_average_precision: float
    micro_f1: float
    macro_f1: float

    def __str__(self) -> str:
        return (
            f"mean average precision {self.mean_average_precision:.2%}, micro F1 {self.micro_f1:.2%}, "
            f"macro F1 {self.macro_f1:.2%}"
        )

    def line(self) -> dict[str, float]:
        """The scores as a line of metrics holds them."""
        return asdict(self)


def score(
    sets: npt.NDArray[np.uint8], logits: npt.NDArray[np.float32]
) -> tuple[MultiLabelScores, int]:
    """The scores of logits (N, C), and the number of samples with a class that is taken wrongly.

    Args:
        sets: (N, C), 1 where a class applies.
    """
    applies, predicted = sets > 0, logits > 0
    hits = (applies & predicted).sum(0)  # (C,)
    total = applies.sum(0) + predicted.sum(0)
    f1 = 2 * hits / np.maximum(total, 1)
    occurs = np.flatnonzero(applies.any(0))
    precisions = [average_precision(applies[:, c], logits[:, c]) for c in occurs]
    scores = MultiLabelScores(
        mean_average_precision=float(np.mean(precisions)) if len(occurs) else 0.0,
        micro_f1=float(2 * hits.sum() / max(1, total.sum())),
        macro_f1=float(f1[total > 0].mean()) if total.any() else 0.0,
    )
    return scores, int((applies != predicted).any(1).sum())


def average_precision(applies: npt.NDArray[np.bool_], scores: npt.NDArray[np.float32]) -> float:
    """The average precision of one class; equal scores share a threshold.

    Args:
        applies: (N,), at least one of them true.
        scores: (N,), higher where the class is more likely to apply.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(applies[order])
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last of equal scores
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
