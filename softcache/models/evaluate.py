"""What a model predicts for labelled data, its errors, and a digest that identifies the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from softcache.cache.verdict import Predictions, judge
from softcache.data.keys import keys_of
from softcache.data.label_sets import batch_sets, check_batch_labels
from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source, check_kind_of_labels
from softcache.data.workers import is_worker_failure
from softcache.errors import DataError, ModelError
from softcache.models.multi_label import score
from softcache.models.outputs import logits_of
from softcache.models.scores import Scores
from softcache.util.tensors import to_float

BATCH = 1000


Classes = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """How many samples of a data set a model got wrong, and what it predicted for each.

    The predictions are None where only the counts are known, as in a cache's header or a checkpoint.

    Attributes:
        errors: number of samples whose largest logit is not that of their label.
        samples: number of all samples.
        labels: (n,) int32, the classes that the samples have.
        predictions: (n,) int32, the classes of the largest logits.
        confidence: (n,) float32, the softmax probabilities of the predictions at temperature 1.
        scores: of samples with any number of labels, whose error is any class that is taken wrongly, or with
            many rows, each of which counts as a sample; None for samples with one label.
    """

    errors: int
    samples: int
    labels: Classes | None = field(default=None, repr=False, compare=False)
    predictions: Classes | None = field(default=None, repr=False, compare=False)
    confidence: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    scores: Scores | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> float:
        """Share of the samples that the model got right."""
        return 1 - self.errors / self.samples

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the accuracies of the classes that occur; None if only the counts are known."""
        if self.labels is None or not len(self.labels):
            return None
        errors, samples = self.errors_by_class(int(self.labels.max()) + 1)
        occurs = samples > 0
        return float(np.mean(1 - errors[occurs] / samples[occurs]))

    def errors_by_class(self, classes: int) -> tuple[Counts, Counts]:
        """Errors and samples of each class, (classes,) each.

        Raises:
            DataError: only the counts are known, or a label is not below `classes`.
        """
        if self.labels is None or self.predictions is None:
            raise DataError(
                f"the evaluation on {self.samples:,} samples has no predictions, so its {self.errors:,} "
                "errors cannot be counted by class; evaluate the model again"
            )
        highest = int(self.labels.max(initial=-1))
        if highest >= classes:
            raise DataError(f"the evaluation has label {highest}; expected 0 to {classes - 1}")
        wrong = self.labels[self.labels != self.predictions]
        return np.bincount(wrong, minlength=classes), np.bincount(self.labels, minlength=classes)


def evaluate(
    model: Callable[[Tensor], object],
    source: Source,
    classes: int,
    device: torch.device,
    workers: int = 0,
    *,
    multi_label: bool = False,
) -> Evaluation:
    """Evaluate `model`, already in eval mode, on every sample of `source`.

    Args:
        model: takes inputs (B, *shape) float32 on `device` and returns logits or log-probabilities (B, C),
            or an object with such `.logits`.
        classes: number of classes C; labels must be below it.
        workers: number of data loader processes.
        multi_label: whether each class applies or not on its own, if the logit is above 0.

    Raises:
        DataError: a sample has no label, or one out of range.
        ModelError: the model raises, or returns something else.
    """
    labels, predictions = np.empty((2, len(source)), np.int32)
    confidence = np.empty(len(source), np.float32)
    all_sets, all_logits = [], []  # of samples with any number of labels
    with torch.inference_mode():
        for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
            if bool((batch.labels < 0).any()):
                source_index = int(batch.source_indices[batch.labels < 0][0])
                raise DataError(
                    f"{source.name}: sample {source_index} has no label; evaluation needs labels"
                )
            if len(batch.sets) and not multi_label:
                check_kind_of_labels(source, multi_label=False)
            check_batch_labels(batch, classes, source)
            inputs = to_float(batch.inputs.to(device))
            try:
                logits = logits_of(model(inputs))  # (B, C)
            except ModelError:
                raise
            except Exception as error:  # a user's model may fail in any way
                if is_worker_failure(error):
                    raise
                raise ModelError(
                    f"the model raised {type(error).__name__} on inputs {tuple(inputs.shape)} of "
                    f"{source.name}: {' '.join(str(error).split())}; evaluation inputs need the "
                    "same shape as training inputs"
                ) from error
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ModelError(
                    f"the model returned {shape} for a batch of {len(inputs)} of {source.name}; expected "
                    f"logits of shape ({len(inputs)}, {classes})"
                )
            if multi_label:
                all_sets.append(batch_sets(batch, classes))
                all_logits.append(logits.float().cpu().numpy())
                continue
            rows = batch.source_indices.numpy()
            labels[rows] = batch.labels.numpy()
            predictions[rows] = logits.argmax(-1).cpu().numpy()
            # log_softmax leaves log-probabilities as they are
            confidence[rows] = logits.float().log_softmax(-1).amax(-1).exp().cpu().numpy()
    if multi_label:
        scores, wrong = score(np.concatenate(all_sets), np.concatenate(all_logits))
        return Evaluation(wrong, len(source), scores=scores)
    errors = int((labels != predictions).sum())
    return Evaluation(errors, len(source), labels, predictions, confidence)


def data_digest(source: Source, workers: int = 0) -> str:
    """Hash the content of a data set, 16 hex digits: xxh3 over its sample keys and labels, in order."""
    digest = xxhash.xxh3_64()
    for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
        digest.update(keys_of(batch.inputs, source).astype("<u8").tobytes())
        digest.update(batch.labels.numpy().astype("<i8").tobytes())
        digest.update(batch.sets.numpy().astype(np.uint8).tobytes())
    return digest.hexdigest()


def as_predictions(evaluation: Evaluation) -> Predictions | None:
    """An evaluation in the form that judge() takes; None if only its counts are known."""
    if evaluation.labels is None or evaluation.predictions is None or evaluation.confidence is None:
        return None
    return Predictions(
        evaluation.labels.astype(np.int64),
        evaluation.predictions.astype(np.int64),
        evaluation.confidence.astype(np.float64),
    )


def judge_evaluation(who: str, evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    """Warnings about predictions that do not fit the labels; see judge().

    Args:
        who: whose predictions these are, for messages.
        names: names of the classes; empty for their numbers.
    """
    predictions = as_predictions(evaluation)
    if predictions is None or not len(predictions.labels):
        return []
    classes = 1 + int(max(predictions.labels.max(), predictions.classes.max()))
    return judge(who, predictions, names or [str(number) for number in range(classes)])
