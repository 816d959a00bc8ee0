"""What a model predicts for samples with many rows: tokens, words, frames or pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.label_sets import check_batch_labels
from softcache.data.loader import loader, sequential_batches
from softcache.data.rows import (
    PIXEL,
    TOKEN,
    has_tokens,
    layout_of_source,
    longest_sample,
    unit_of,
)
from softcache.data.source import Source
from softcache.errors import DataError
from softcache.models.calibration import calibration_of
from softcache.models.evaluate import Evaluation
from softcache.models.language import TokenModel, flat_logits
from softcache.models.scores import RowScores
from softcache.types import RowIndex
from softcache.util.tensors import to_float

BATCH_TOKENS = 1 << 14  # tokens of a batch, with padding
BATCH_VALUES = 1 << 24  # logits of a batch of other samples
CHUNK_VALUES = 1 << 24  # logits of tokens that are in memory at a time

# log-probabilities at T = 1 of rows of a batch, in parts: inputs, rows -> (n, C) each
RowModel = Callable[[Tensor, RowIndex], Iterator[Tensor]]


def row_model(model: nn.Module, classes: int) -> RowModel:
    """A model, in eval mode, as a function that returns the log-probabilities of rows in parts."""

    def log_probs(inputs: Tensor, rows: RowIndex) -> Iterator[Tensor]:
        split = isinstance(model, TokenModel) and model.splits(inputs)
        if split:
            states = model(inputs, rows.flat(inputs.shape[1]))  # (R, H)
        else:
            states = flat_logits(model(inputs), inputs, rows, "the model")
        size = max(1, CHUNK_VALUES // classes)
        for start in range(0, len(states), size):
            part = states[start : start + size]
            logits = model.head(part) if split and isinstance(model, TokenModel) else part
            yield torch.log_softmax(logits.float(), -1)

    return log_probs


def batch_size_of(source: Source, classes: int) -> int:
    """How many samples of a source are evaluated at a time."""
    longest = longest_sample(source)
    if has_tokens(source):
        return max(1, BATCH_TOKENS // longest)
    return max(1, min(256, BATCH_VALUES // (longest * classes)))


def evaluate_rows(
    model: RowModel, source: Source, classes: int, device: torch.device, workers: int = 0
) -> Evaluation:
    """Evaluate a model on every labelled row of a source.

    Raises:
        DataError: no row has a label, or one is out of range.
        ModelError: the model raises, or returns something else.
    """
    layout, unit = layout_of_source(source), unit_of(source)
    rows_in_all = layout.rows if layout else 0
    labels, predictions = np.full((2, rows_in_all), -1, np.int32)
    confidence = np.zeros(rows_in_all, np.float32)
    loss, start = 0.0, 0
    batches = sequential_batches(len(source), batch_size_of(source, classes))
    with torch.inference_mode():
        for batch in loader(source, batches, workers=workers):
            check_batch_labels(batch, classes, source)
            inputs = to_float(batch.inputs.to(device))
            rows = RowIndex(batch.row_samples.to(device), batch.row_positions.to(device))
            labels[start : start + len(batch.labels)] = batch.labels.numpy()
            for log_probs in model(inputs, rows) if len(batch.labels) else ():
                stop = start + len(log_probs)
                top = log_probs.max(-1)
                predictions[start:stop] = top.indices.cpu().numpy()
                confidence[start:stop] = top.values.exp().cpu().numpy()
                given = torch.from_numpy(labels[start:stop].astype(np.int64)).to(device)
                own = log_probs.gather(1, given.clamp(min=0)[:, None])[:, 0]
                loss -= float(own[given >= 0].double().sum())
                start = stop
    known = labels >= 0
    if not known.any():
        raise DataError(f"{source.name}: no {unit} has a label; evaluation needs labels")
    labels, predictions, confidence = labels[known], predictions[known], confidence[known]
    correct = labels == predictions
    size = getattr(source, "facts", {}).get("bytes")
    scores = RowScores(
        ece=calibration_of(confidence.astype(np.float64), correct.astype(np.float64)).error,
        perplexity=math.exp(min(loss / len(labels), 700)) if unit == TOKEN else None,
        nats_per_byte=loss / size if unit == TOKEN and size else None,
        mean_iou=mean_iou(labels, predictions) if unit == PIXEL else None,
    )
    errors = int((~correct).sum())
    return Evaluation(errors, len(labels), labels, predictions, confidence, scores)


def mean_iou(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    """The mean over the classes that occur of intersection over union of labels (n,) and predictions (n,)."""
    classes = int(max(labels.max(), predictions.max())) + 1
    hits = np.bincount(labels[labels == predictions], minlength=classes)
    union = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    union -= hits
    return float(np.mean(hits[union > 0] / union[union > 0]))
