"""Weights of the classes in the hard loss, from the class counts or from a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softcache.errors import MissingFileError, SettingsError
from softcache.util.files import refuse_special_file

BALANCED = "balanced"
OPTION = "--class-weights"

Weights = npt.NDArray[np.float32]


def class_weights(spec: str, labels: npt.NDArray[np.int64], classes: int) -> Weights:
    """The weight of each class (C,), as `--class-weights` says.

    Args:
        spec: `balanced`, or a file with one number per line.
        labels: (N,) labels of the training samples, negative where unlabelled.
        classes: number of classes C.

    Raises:
        SettingsError: no sample is labelled, or the file does not hold one weight for each class.
    """
    if spec == BALANCED:
        return balanced_weights(labels, classes)
    weights = read_weights(Path(spec))
    if len(weights) != classes:
        raise SettingsError(
            f"{OPTION} {spec} has {len(weights):,} numbers; expected {classes:,}, one for each class in order"
        )
    return weights


def balanced_weights(labels: npt.NDArray[np.int64], classes: int) -> Weights:
    """n / (C n_c) of each class: every class that occurs has the same sum of weights.

    The same as scikit-learn's `class_weight="balanced"`, after King and Zeng, "Logistic regression in rare
    events data" (Political Analysis 9, 2001). A class without samples has the weight 0.

    Raises:
        SettingsError: no sample is labelled.
    """
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    if not counts.any():
        raise SettingsError(
            f"{OPTION} {BALANCED} needs labels, but no training sample has one; leave it out, or give "
            "labelled data"
        )
    weights = counts.sum() / (classes * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)


def read_weights(path: Path) -> Weights:
    """The numbers in a file, one per line; empty lines are skipped.

    Raises:
        MissingFileError: there is no such file.
        SettingsError: a line is not a number of 0 or more, or all are 0.
    """
    refuse_special_file(path, SettingsError)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{OPTION} {path}: no such file; expected {BALANCED}, or a file with one number per line"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{OPTION} {path} cannot be read ({error}); expected a text file with one number per line"
        ) from error
    weights = [
        _weight(line.strip(), f"{OPTION} {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not any(weights):
        raise SettingsError(f"{OPTION} {path} has no weight above 0; expected one for each class")
    return np.array(weights, np.float32)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise SettingsError(f"{where} is {text[:40]!r}; expected a number of 0 or more")
    return weight
