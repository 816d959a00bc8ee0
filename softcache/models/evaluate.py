"""Test errors of a model on labelled data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from softcache.data.keys import sample_keys
from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source, check_labels
from softcache.errors import DataError, ModelError
from softcache.util.tensors import to_float

BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """How many of `samples` a model got wrong."""

    errors: int
    samples: int

    @cached_property
    def accuracy(self) -> float:
        return 1 - self.errors / self.samples


def evaluate(
    model: Callable[[Tensor], Tensor],
    source: Source,
    classes: int,
    device: torch.device,
    workers: int = 0,
) -> Evaluation:
    """Errors of `model`, which is in eval mode, on all of `source`.

    Raises:
        DataError: a sample has no label, or one out of range.
        ModelError: the model raises.
    """
    errors = 0
    with torch.inference_mode():
        for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
            if bool((batch.labels < 0).any()):
                at = int(batch.source_indices[batch.labels < 0][0])
                raise DataError(f"{source.name}: sample {at} has no label; errors need labels")
            check_labels(batch.labels.numpy(), batch.source_indices.numpy(), classes, source)
            inputs = to_float(batch.inputs.to(device))
            try:
                logits = model(inputs)  # (B, C)
            except ModelError:
                raise
            except Exception as error:  # a user's model may fail in any way
                raise ModelError(
                    f"the model raised {type(error).__name__} on inputs {tuple(inputs.shape)} of "
                    f"{source.name}: {' '.join(str(error).split())}; evaluation data need the shape "
                    "of the training data"
                ) from error
            errors += int((logits.argmax(-1).cpu() != batch.labels).sum())
    return Evaluation(errors, len(source))


def data_digest(source: Source, workers: int = 0) -> str:
    """A short name for the content of a data set: xxh3 over its keys and labels, in order."""
    digest = xxhash.xxh3_64()
    for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
        digest.update(sample_keys(batch.inputs).astype("<u8").tobytes())
        digest.update(batch.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
