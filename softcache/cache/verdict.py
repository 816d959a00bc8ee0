"""Numbers that cannot be right, with the likely cause: a run that ends well is not always a good one.

A model that knows its classes agrees with the labels about as often as it is confident. Where it agrees
far less, the likely causes differ in what the confusion matrix looks like: classes in another order,
labels shifted by one, rows in another order, inputs that the model was not trained on. Label noise and
weak models leave other traces, and are no reason to warn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

FEWEST_ROWS = 8  # of fewer labelled rows nothing is said
FEW_ROWS = 20  # of fewer, only another order of the classes is told from chance
SIGMAS = 5.0  # standard deviations that chance may explain
LEAST_GAP = 0.3  # share of the rows of some classes that another order of classes must win
EXPLAINED = 0.5  # share of the missing agreement that another order of classes must bring back
LEAST_SKEW = 0.25  # total variation between labels and predictions
UNIFORM = 0.995  # of log C: entropy of a teacher that knows nothing
CERTAIN = 1e-6  # nats: entropy of a teacher that is never in doubt
SHOWN = 5  # classes named in a message


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for labelled rows, one entry for each.

    Attributes:
        labels: (n,) the classes that the rows have.
        classes: (n,) the classes that the model finds most probable.
        confidence: (n,) their probabilities at temperature 1.
    """

    labels: Integers
    classes: Integers
    confidence: npt.NDArray[np.float64]

    def only(self, rows: npt.NDArray[np.bool_]) -> Predictions:
        """The predictions of some rows, given as a mask (n,)."""
        return Predictions(self.labels[rows], self.classes[rows], self.confidence[rows])

    @property
    def agreement(self) -> float:
        """Share of the rows whose most probable class is the label."""
        return float((self.labels == self.classes).mean())

    @property
    def mean_confidence(self) -> float:
        """Mean probability of the most probable class, at temperature 1."""
        return float(self.confidence.mean())


def judge(
    who: str,
    predictions: Predictions,
    names: Sequence[str],
    *,
    repeats: int = 1,
    by_row: bool = False,
    inputs: str | None = None,
) -> list[str]:
    """Warnings about predictions that do not fit the labels; empty if nothing is wrong.

    Args:
        who: whose predictions these are, such as `the teacher`.
        names: names of the classes, for messages.
        repeats: how many rows are views of one sample, which say little more than one row.
        by_row: whether the predictions came as a matrix, whose rows may be in another order.
        inputs: mean and standard deviation of what the model got, for messages.
    """
    rows = len(predictions.labels)
    count = rows // repeats
    if count < FEWEST_ROWS:
        return []
    agreement, confidence = predictions.agreement, predictions.mean_confidence
    if not math.isfinite(confidence):
        return []  # the rows cannot be re-tempered
    doubt = math.sqrt(max(confidence * (1 - confidence), 1e-4) / count)
    if agreement >= confidence - SIGMAS * doubt:
        return []
    facts = f"{who} agrees with {agreement:.1%} of the labels, but its mean confidence is {confidence:.1%}"
    order = other_order(predictions, len(names), repeats)
    gained = agreement
    if order:
        gained = float((mapped(predictions.classes, order) == predictions.labels).mean())
    if gained - agreement > EXPLAINED * (confidence - agreement):
        return [f"{facts}: {describe_order(order, names)} it would agree with {gained:.1%}"]
    if count < FEW_ROWS:
        return []
    labels, guesses = (
        np.bincount(values, minlength=len(names)) / rows
        for values in (predictions.labels, predictions.classes)
    )
    chance = float(labels @ guesses)
    skew = float(np.abs(labels - guesses).sum()) / 2
    near_chance = min(
        chance + 3 * math.sqrt(chance * (1 - chance) / count), (chance + confidence) / 2
    )
    at_chance = agreement <= near_chance
    if not (at_chance and confidence > chance + LEAST_GAP) and not (
        skew > LEAST_SKEW and confidence - agreement > LEAST_GAP
    ):
        return []
    level = f", which is chance ({chance:.1%})" if at_chance else ""
    causes = []
    if by_row and skew <= LEAST_SKEW:
        causes.append("the rows of the matrix are in another order than the data")
    else:
        got = f" (they have {inputs})" if inputs else ""
        causes.append(f"the inputs are not normalized as the model expects{got}")
        causes.append("the labels belong to other samples")
    absent = int((labels == 0).sum())
    if absent:
        causes.append(f"{absent:,} of {len(names):,} classes have no sample")
    return [f"{facts}{level}. Likely causes: {'; '.join(causes)}"]


def other_order(predictions: Predictions, classes: int, repeats: int = 1) -> dict[int, int]:
    """The order of classes in which the model would agree: label by predicted class, where they differ.

    Empty unless an order that is fitted to half of the rows wins LEAST_GAP of the other half's rows that
    it moves, beyond chance: with few rows in each class, chance alone makes an order that fits.
    """
    order = fitted_order(predictions, classes)
    if not order:
        return {}
    tested = predictions.only(np.isin(predictions.labels, list(order.values())))
    right = tested.labels == tested.classes
    agrees = np.zeros(len(right), np.bool_)
    half = np.zeros(len(right), np.bool_)
    half[np.argsort(tested.labels, kind="stable")[::2]] = True  # half of each class
    for part in (half, ~half):
        fitted = fitted_order(tested.only(~part), classes)
        agrees[part] = mapped(tested.classes[part], fitted) == tested.labels[part]
    gain = float(agrees.mean() - right.mean())
    beyond_chance = gain > SIGMAS * math.sqrt(0.25 * repeats / len(right))
    return order if gain > LEAST_GAP and beyond_chance else {}


def fitted_order(predictions: Predictions, classes: int) -> dict[int, int]:
    """Each label's most frequent prediction, where it is another class and that of no other label."""
    pairs, counts = np.unique(
        predictions.labels * classes + predictions.classes, return_counts=True
    )
    labels, guesses = np.divmod(pairs, classes)
    by_count = np.lexsort((-counts, labels))
    first = np.unique(labels[by_count], return_index=True)[1]
    best = by_count[first]  # of each label that occurs, its most frequent prediction
    # two labels that are both taken for one class are not an order of classes
    taken, times = np.unique(guesses[best], return_counts=True)
    unique = set(taken[times == 1].tolist())
    moved = best[labels[best] != guesses[best]].tolist()
    return {int(guesses[at]): int(labels[at]) for at in moved if int(guesses[at]) in unique}


def mapped(classes: Integers, order: dict[int, int]) -> Integers:
    """Predicted classes under another order."""
    table = np.arange(max([int(classes.max(initial=0)), *order]) + 1)
    table[list(order)] = list(order.values())
    return np.asarray(table[classes])


def describe_order(order: dict[int, int], names: Sequence[str]) -> str:
    """`with classes in the order …`, or that the labels are shifted."""
    shifts = {label - guess for guess, label in order.items()}
    wrapped = {shift % len(names) for shift in shifts}
    if len(order) > 2 and wrapped in ({1}, {len(names) - 1}):
        step = "+1" if wrapped == {1} else "-1"
        return f"the labels look shifted by one ({step}); otherwise"
    pairs = [f"{name(guess, names)} is {name(label, names)}" for guess, label in order.items()]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    listed = ", ".join(pairs[:SHOWN]) + more
    return f"the classes look to be in another order. If its class {listed},"


def name(number: int, names: Sequence[str]) -> str:
    """A class by name and number."""
    known = names[number] if number < len(names) else ""
    return f"{number} ({known})" if known and known != str(number) else str(number)


def judge_entropy(who: str, entropy: float, classes: int, agreement: float | None) -> list[str]:
    """Warnings about the mean entropy in nats at temperature 1 of all rows of a teacher."""
    most = math.log(classes)
    if entropy > UNIFORM * most:
        return [
            f"{who} is almost uniform at temperature 1 (mean entropy {entropy:.3f} of at most {most:.3f} "
            "nats). Likely causes: probabilities or sigmoid outputs taken for logits, logits divided by a "
            "temperature already, or a teacher without its weights"
        ]
    if entropy < CERTAIN and not (agreement is not None and agreement > 0.98):
        return [
            f"{who} is never in doubt at temperature 1 (mean entropy {entropy:.1e} nats). Likely causes: "
            "hard labels, outputs on a scale of 0 to 255, or logits on a wrong scale"
        ]
    return []
