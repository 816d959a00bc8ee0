"""Classification errors of a model on labelled data, and a digest that identifies the data."""

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
    """How many samples of a data set a model got wrong.

    Attributes:
        errors: number of samples whose largest logit is not that of their label.
        samples: number of all samples.
    """

    errors: int
    samples: int

    @cached_property
    def accuracy(self) -> float:
        """Share of the samples that the model got right."""
        return 1 - self.errors / self.samples


def evaluate(
    model: Callable[[Tensor], Tensor],
    source: Source,
    classes: int,
    device: torch.device,
    workers: int = 0,
) -> Evaluation:
    """Count the errors of `model`, already in eval mode, on every sample of `source`.

    Args:
        model: takes inputs (B, *shape) float32 on `device` and returns logits (B, C).
        classes: number of classes C; labels must be below it.
        workers: number of data loader processes.

    Raises:
        DataError: a sample has no label, or one out of range.
        ModelError: the model raises.
    """
    errors = 0
    with torch.inference_mode():
        for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
            if bool((batch.labels < 0).any()):
                source_index = int(batch.source_indices[batch.labels < 0][0])
                raise DataError(
                    f"{source.name}: sample {source_index} has no label; evaluation needs labels"
                )
            check_labels(batch.labels.numpy(), batch.source_indices.numpy(), classes, source)
            inputs = to_float(batch.inputs.to(device))
            try:
                logits = model(inputs)  # (B, C)
            except ModelError:
                raise
            except Exception as error:  # a user's model may fail in any way
                raise ModelError(
                    f"the model raised {type(error).__name__} on inputs {tuple(inputs.shape)} of "
                    f"{source.name}: {' '.join(str(error).split())}; evaluation inputs need the "
                    "same shape as training inputs"
                ) from error
            errors += int((logits.argmax(-1).cpu() != batch.labels).sum())
    return Evaluation(errors, len(source))


def data_digest(source: Source, workers: int = 0) -> str:
    """Hash the content of a data set, 16 hex digits: xxh3 over its sample keys and labels, in order."""
    digest = xxhash.xxh3_64()
    for batch in loader(source, sequential_batches(len(source), BATCH), workers=workers):
        digest.update(sample_keys(batch.inputs).astype("<u8").tobytes())
        digest.update(batch.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
