"""What a trained model costs and how good it is: MACs, latency, accuracy, ECE, distance from the teacher."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from softcache.cache.verdict import Predictions
from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source, check_labels
from softcache.errors import DataError
from softcache.join.joined_data import JoinedData
from softcache.losses import hard_loss, soft_loss
from softcache.models.calibration import BINS, Calibration, calibration_of
from softcache.models.evaluate_rows import row_model
from softcache.train.teacher_figures import teacher_figures
from softcache.util.tensors import to_float

BATCH = 500
RUNS = 20  # timed runs of a latency, after WARM_UP runs that are not timed
WARM_UP = 3
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 10**-1.5, 10**1.5  # that best_temperature() considers

CPU = torch.device("cpu")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """How good a model is on labelled data.

    Attributes:
        predictions: the labels, and the model's top classes with their probabilities.
        calibration: confidence against accuracy.
    """

    predictions: Predictions
    calibration: Calibration

    @property
    def error(self) -> float:
        """Share of the samples whose top class is not their label."""
        return float((self.predictions.labels != self.predictions.classes).mean())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.predictions.labels)


def calibration(log_probs: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """Compare confidence, the largest probability of each row, with accuracy.

    Args:
        log_probs: (N, C) log-probabilities.
        labels: (N,), none of them negative.
        bins: number of bins of equal width that [0, 1] is divided into.
    """
    top = log_probs.max(-1)
    confidence = top.values.double().exp().numpy()
    return calibration_of(confidence, (top.indices == labels).double().numpy(), bins)


def best_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature at which the labels are most likely (Guo et al., section 4.2).

    The likelihood has a single maximum in 1 / temperature, so golden-section search finds it.

    Args:
        log_probs: (N, C) logits or log-probabilities at temperature 1.
        labels: (N,), none of them negative.
    """

    def negative_log_likelihood(log_temperature: float) -> float:
        rows = torch.log_softmax(log_probs / math.exp(log_temperature), -1)
        return float(-rows.gather(1, labels[:, None]).mean())

    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = negative_log_likelihood(left), negative_log_likelihood(right)
    while high - low > 0.01:  # 1 % of the temperature
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = negative_log_likelihood(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = negative_log_likelihood(right)
    return math.exp((low + high) / 2)


def measure_quality(model: nn.Module, source: Source, classes: int) -> Quality:
    """Accuracy and calibration of a model in eval mode; only one batch of outputs is held at once.

    Raises:
        DataError: a sample has no label, or one out of range.
    """
    # allocated before the loop, or else these small arrays fragment the memory of the large ones
    confidence = np.zeros(len(source))
    labels, top_classes = np.zeros((2, len(source)), np.int64)
    start = 0
    for log_probs, batch_labels in _labelled_outputs(model, source, classes):
        part = slice(start, start + len(batch_labels))
        top = log_probs.max(-1)
        confidence[part] = top.values.double().exp().numpy()
        labels[part], top_classes[part] = batch_labels.numpy(), top.indices.numpy()
        start = part.stop
    correct = (labels == top_classes).astype(np.float64)
    return Quality(
        Predictions(labels, top_classes, confidence), calibration_of(confidence, correct)
    )


def _labelled_outputs(
    model: nn.Module, source: Source, classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of log-probabilities (B, C) float32 and labels (B,)."""
    with torch.inference_mode():
        for batch in loader(source, sequential_batches(len(source), BATCH)):
            if bool((batch.labels < 0).any()):
                raise DataError(f"{source.name} has samples without a label; errors need labels")
            check_labels(batch.labels.numpy(), batch.source_indices.numpy(), classes, source)
            logits = model(to_float(batch.inputs))
            yield torch.log_softmax(logits.float(), -1), batch.labels


def divergence_from_teacher(
    model: nn.Module, part: JoinedData, temperature: float, most: int = 10_000
) -> float:
    """Mean KL(teacher ‖ model) in nats on the first view of up to `most` samples of a cache.

    NaN for tokens of which the cache has draws.
    """
    if part.layout is not None:
        of_rows = row_model(model, part.classes)
        return teacher_figures(of_rows, part, temperature, CPU).get("teacher_kl", math.nan)
    total, count = 0.0, min(most, len(part))
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            rows = np.arange(start, min(start + BATCH, count))
            (batch,) = loader(part.source, [part.request(rows, 0)], augmentation=part.augmentation)
            inputs, _, targets, _ = part.training_batch(batch, 0, CPU)
            kind = "bernoulli" if part.multi_label else "kl"
            chosen: Any = targets[temperature]
            loss = soft_loss(model(inputs), chosen, temperature, kind)
            total += float(loss) * len(rows)
    return total / count


def count_macs(model: nn.Module, sample: Tensor) -> int:
    """Multiply-accumulate operations (MACs) for one sample (1, *shape), of matrix products and
    convolutions."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(sample)
    return int(counter.get_total_flops()) // 2


def latencies(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Median seconds that each model takes for its batch (B, *shape) on the CPU."""
    return {name: statistics.median(times) for name, times in time_runs(models, inputs).items()}


def time_runs(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """Seconds of RUNS runs of each model on its batch (B, *shape) on the CPU.

    The models take turns, so that all of them meet the same state of the machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(WARM_UP + RUNS):
            for name, model in models.items():
                start = time.perf_counter()
                model(inputs[name])
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def gradient_similarity(
    model: nn.Module, part: JoinedData, temperature: float, batches: int = 16, size: int = 64
) -> dict[str, float]:
    """Mean cosine similarity between the gradients of different batches: "soft" and "hard" targets.

    A soft target carries more information than a label, so the gradient of one batch says more about the
    others: Hinton et al. (arXiv 1503.02531), section 1. Both kinds of targets see the same batches.
    """
    sums: dict[str, Tensor] = {}  # of the gradients scaled to length 1
    counts = {"soft": 0, "hard": 0}
    order = np.random.default_rng(0).permutation(len(part))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for number in range(min(batches, len(part) // size)):
        rows = order[number * size : (number + 1) * size]
        (batch,) = loader(part.source, [part.request(rows, 0)], augmentation=part.augmentation)
        inputs, labels, targets, _ = part.training_batch(batch, 0, CPU)
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "soft": lambda logits, t=targets: soft_loss(logits, t[temperature], temperature),  # type: ignore[misc]
            "hard": lambda logits, y=labels: hard_loss(logits, y),  # type: ignore[misc]
        }
        for name, loss in losses.items():
            value = loss(model(inputs))
            if not value.requires_grad:  # no sample of the batch has a label
                continue
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            flat = torch.cat([g.flatten() for g in gradients if g is not None])
            flat /= flat.norm().clamp(min=1e-20)
            sums[name] = flat if name not in sums else sums[name].add_(flat)
            counts[name] += 1
    return {name: _mean_cosine(sums[name], counts[name]) for name in sums if counts[name] > 1}


def _mean_cosine(sum_of_units: Tensor, count: int) -> float:
    """The mean over all pairs of different vectors, from the sum of `count` unit vectors."""
    return (float(sum_of_units.square().sum()) - count) / (count * (count - 1))
