"""What a trained model costs, and how good it is: multiply-adds, latency, calibration, distance."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source, check_labels
from softcache.errors import DataError
from softcache.join.joined_data import JoinedData
from softcache.losses import hard_loss, soft_loss
from softcache.util.tensors import to_float

BATCH = 500

BINS = 15  # of confidence

RUNS = 20  # of a latency that count, after a few that do not

CPU = torch.device("cpu")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Accuracy by confidence: of each bin its mean confidence, its accuracy and its samples, (BINS,)."""

    confidence: Floats
    accuracy: Floats
    samples: Floats

    @property
    def error(self) -> float:
        """The expected calibration error: mean of |accuracy - confidence| over the samples.

        Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599), equation 3.
        """
        share = self.samples / max(1.0, self.samples.sum())
        return float((share * np.abs(self.accuracy - self.confidence)).sum())


def calibration(log_probs: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """Confidence is the largest probability of a row; rows (N, C), labels (N,), none negative."""
    confidence, top = log_probs.double().exp().max(-1)
    right = (top == labels).double().numpy()
    values = confidence.numpy()
    place = np.clip((values * bins).astype(np.int64), 0, bins - 1)
    samples = np.bincount(place, minlength=bins).astype(np.float64)
    several = np.maximum(samples, 1)
    return Calibration(
        np.bincount(place, values, bins) / several,
        np.bincount(place, right, bins) / several,
        samples,
    )


def best_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature at which the labels are likeliest (Guo et al., section 4.2), by a fine grid."""
    grid = torch.logspace(-1.5, 1.5, 121, base=10.0).tolist()

    def unlikelihood(temperature: float) -> float:
        rows = torch.log_softmax(log_probs / temperature, -1)
        return float(-rows.gather(1, labels[:, None]).mean())

    return float(min(grid, key=unlikelihood))


def outputs(model: nn.Module, source: Source, classes: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) float32 of a model, which is in eval mode, and labels (N,).

    Raises:
        DataError: a sample has no label, or one out of range.
    """
    rows, labels = [], []
    with torch.inference_mode():
        for batch in loader(source, sequential_batches(len(source), BATCH)):
            if bool((batch.labels < 0).any()):
                raise DataError(f"{source.name} has samples without a label; errors need labels")
            check_labels(batch.labels.numpy(), batch.source_indices.numpy(), classes, source)
            rows.append(torch.log_softmax(model(to_float(batch.inputs)).float(), -1))
            labels.append(batch.labels)
    return torch.cat(rows), torch.cat(labels)


def divergence_from_teacher(
    model: nn.Module, part: JoinedData, temperature: float, most: int = 10_000
) -> float:
    """Mean KL(teacher ‖ model) in nats on the first view of up to `most` samples of a cache."""
    total, count = 0.0, min(most, len(part))
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            at = np.arange(start, min(start + BATCH, count))
            (batch,) = loader(part.source, [part.request(at, 0)], augmentation=part.augmentation)
            found = part.training_batch(batch, 0, CPU)
            loss = soft_loss(model(found.inputs), found.targets[temperature], temperature)
            total += float(loss) * len(at)
    return total / count


def count_macs(model: nn.Module, sample: Tensor) -> int:
    """Of one sample (1, *shape), in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(sample)
    return int(counter.get_total_flops()) // 2


def latencies(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Median seconds of a batch (B, *shape) on the CPU; the models take turns, so that all see the same
    machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(RUNS + 3):
            for name, model in models.items():
                start = time.perf_counter()
                model(inputs[name])
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def gradient_similarity(
    model: nn.Module, part: JoinedData, temperature: float, batches: int = 16, size: int = 64
) -> dict[str, float]:
    """Mean cosine similarity between the gradients of batches, under soft and under hard targets.

    A soft target says more of a sample than its label, so that one batch tells what another would:
    Hinton et al. (arXiv 1503.02531), section 1. The batches are the same for both.
    """
    found: dict[str, list[Tensor]] = {"soft": [], "hard": []}
    order = np.random.default_rng(0).permutation(len(part))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for number in range(min(batches, len(part) // size)):
        at = order[number * size : (number + 1) * size]
        (batch,) = loader(part.source, [part.request(at, 0)], augmentation=part.augmentation)
        inputs, labels, targets = part.training_batch(batch, 0, CPU)
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "soft": lambda logits, t=targets: soft_loss(logits, t[temperature], temperature),  # type: ignore[misc]
            "hard": lambda logits, y=labels: hard_loss(logits, y),  # type: ignore[misc]
        }
        for name, loss in losses.items():
            value = loss(model(inputs))
            if not value.requires_grad:  # no label
                continue
            gradient = torch.autograd.grad(value, parameters, allow_unused=True)
            flat = torch.cat([g.flatten() for g in gradient if g is not None])
            found[name].append(flat / flat.norm().clamp(min=1e-20))
    return {name: _mean_cosine(units) for name, units in found.items() if len(units) > 1}


def _mean_cosine(units: Sequence[Tensor]) -> float:
    """Over all pairs of different unit vectors."""
    count = len(units)
    total = float(torch.stack(list(units)).sum(0).square().sum())
    return (total - count) / (count * (count - 1))
