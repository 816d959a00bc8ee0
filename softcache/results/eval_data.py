"""Evaluation data in the form that a finished run was trained on: its classes, its columns, its inputs."""

from __future__ import annotations

from softcache.cache.verdict import Predictions, judge
from softcache.data.class_names import align_classes
from softcache.data.source import Source
from softcache.data.tables import align_columns
from softcache.errors import DataError
from softcache.train.run_folder import Run


def eval_data_for(run: Run, source: Source, *, same_classes: bool = False) -> Source:
    """Evaluation data with the classes and columns of a run, matched by name.

    Args:
        same_classes: the classes are the same in the same order, whatever they are called.

    Raises:
        DataError: the classes, the columns or the shape of the samples are others than the run's.
    """
    aligned = align_columns(source, run.columns)
    names = run.class_names if len(run.class_names) == run.classes else ()
    aligned = align_classes(aligned, names, str(run.folder), same_classes=same_classes)
    sample = aligned.fetch([0])[0][0]
    expects_text = run.facts.get("input_dtype", "float32").startswith("int")
    if tuple(sample.shape) != run.input_shape and not expects_text:
        raise DataError(
            f"{source.name} has samples of shape {tuple(sample.shape)}, and {run.folder} was trained on "
            f"{run.input_shape}; give evaluation data of the same kind, such as with ?size= for images"
        )
    return aligned


def judge_predictions(run: Run, predictions: Predictions) -> list[str]:
    """Warnings about a student whose predictions do not fit the labels; see judge()."""
    names = run.class_names if len(run.class_names) == run.classes else range(run.classes)
    return judge(f"the student in {run.folder}", predictions, [str(name) for name in names])
