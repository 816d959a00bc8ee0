"""Functions of numpy arrays or texts as teachers, and scikit-learn's kind of estimators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.text import decode
from softcache.util.log import warn

# attributes of fitted trees and of ensembles of them, in scikit-learn, XGBoost, LightGBM and CatBoost
TREES = (
    "tree_", "estimators_", "n_trees_per_iteration_", "get_booster", "booster_", "tree_count_",
)  # fmt: skip


class NumpyTeacher(nn.Module):
    """Wraps a function of numpy arrays, or of texts, as a module.

    Args:
        function: from inputs (B, *shape) float32, or from B texts, to outputs (B, C).
        text: whether the inputs are code points, from which the function gets a list of texts.
        output: what the function returns, one of OUTPUTS, if that is known.
        class_names: names of the classes, in order; empty if they are only numbered.
        feature_names: names of the input columns, in order; empty if they are not known.
        is_tree: whether the outputs are those of trees, which remember what they were trained on.
    """

    def __init__(
        self,
        function: Callable[[Any], object],
        *,
        text: bool = False,
        output: str | None = None,
        class_names: Sequence[str] = (),
        feature_names: Sequence[str] = (),
        is_tree: bool = False,
    ) -> None:
        super().__init__()
        self.function, self.text, self.output, self.is_tree = function, text, output, is_tree
        self.class_names, self.feature_names = tuple(class_names), tuple(feature_names)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (B, *shape) to the function's outputs (B, C), on the same device.

        Integers stay integers, since they are rarely what a teacher should return.
        """
        batch = decode(inputs) if self.text else inputs.float().cpu().numpy()
        outputs = np.asarray(self.function(batch))
        if outputs.dtype.kind == "b" or outputs.dtype == np.uint8:
            return torch.tensor(outputs).to(inputs.device)
        dtype = np.int64 if outputs.dtype.kind in "iu" else np.float32
        return torch.as_tensor(outputs.astype(dtype, copy=False)).to(inputs.device)


def is_estimator(value: object) -> bool:
    """Whether a value is a classifier with scikit-learn's methods, not just the class of one."""
    return not isinstance(value, type) and (
        hasattr(value, "predict_proba") or hasattr(value, "decision_function")
    )


def estimator_teacher(
    estimator: Any,  # noqa: ANN401  # of any library
    spec: str,
    *,
    text: bool = False,
) -> NumpyTeacher:
    """A teacher from a fitted estimator: its predict_proba(), or else its decision_function().

    Args:
        estimator: a classifier of scikit-learn, XGBoost, LightGBM or CatBoost, or a pipeline of one.
        spec: the teacher's specification, for messages.
        text: whether it takes a list of texts; otherwise it takes one row of features per sample,
            (B, features) float32.
    """
    method = "predict_proba" if hasattr(estimator, "predict_proba") else "decision_function"
    classes = _classes_of(estimator)
    if classes is not None and classes.dtype.kind in "iuf" and _renumbered(classes):
        warn(
            f"teacher {spec}: its classes are numbered {_first(classes)}, and not from 0 on; its first "
            "column is taken for class 0. Train it on labels that count from 0 without gaps"
        )

    def outputs(batch: Any) -> object:  # noqa: ANN401  # list[str] or an array
        if not text:
            batch = batch.reshape(len(batch), -1)
        with warnings.catch_warnings():
            # columns are checked by those who know the names of the data's columns
            warnings.filterwarnings("ignore", "X does not have valid feature names")
            values = getattr(estimator, method)(batch)
        _check_outputs(values, classes, method)
        return values

    return NumpyTeacher(
        outputs,
        text=text,
        output="probabilities" if method == "predict_proba" else None,
        class_names=_words(classes),
        feature_names=[str(name) for name in getattr(estimator, "feature_names_in_", ())],
        is_tree=is_tree(estimator),
    )


def is_tree(estimator: object) -> bool:
    """Whether an estimator, or the last one of a pipeline or a search, is made of decision trees."""
    while True:
        steps = getattr(estimator, "steps", None)
        inner = getattr(estimator, "best_estimator_", None)
        if isinstance(steps, list) and steps:
            estimator = steps[-1][-1]
        elif inner is not None:
            estimator = inner
        else:
            return any(hasattr(estimator, name) for name in TREES)


def _classes_of(estimator: object) -> npt.NDArray[Any] | None:
    """The labels that the columns stand for; None if the estimator does not tell."""
    classes = getattr(estimator, "classes_", None)
    if classes is None or any(
        np.ndim(label) for label in classes
    ):  # several labels have lists of arrays
        return None
    return np.asarray(classes)


def _words(classes: npt.NDArray[Any] | None) -> tuple[str, ...]:
    """The classes as names, if they are words and not numbers."""
    if classes is None or not all(isinstance(label, str) for label in classes.tolist()):
        return ()
    return tuple(map(str, classes))


def _renumbered(classes: npt.NDArray[Any]) -> bool:
    """Whether the labels of the columns are not 0, 1, 2, ..., so that a column is not its label."""
    return not np.array_equal(classes, np.arange(len(classes)))


def _first(classes: npt.NDArray[Any]) -> str:
    return ", ".join(map(str, classes[:5].tolist())) + ", ..." * (len(classes) > 5)


def _check_outputs(values: Any, classes: npt.NDArray[Any] | None, method: str) -> None:  # noqa: ANN401
    """Raise ValueError if the outputs do not have one column for each of the estimator's classes."""
    if isinstance(values, list) and values and np.ndim(values[0]) == 2:
        raise ValueError(
            f"{method} returns {len(values)} arrays, one for each label; several labels per sample are not "
            "supported yet, so give one estimator with one label"
        )
    if classes is None:
        return
    if len(classes) < 2:
        raise ValueError(
            f"the estimator knows only the class {', '.join(map(str, classes))}; expected at least 2 classes"
        )
    shape = np.shape(values)
    width = shape[1] if len(shape) == 2 else 1
    if width != len(classes) and not (width == 1 and len(classes) == 2):
        raise ValueError(
            f"{method} returns {width} columns for {len(classes)} classes; expected one for each class, as "
            "with decision_function_shape='ovr'"
        )
