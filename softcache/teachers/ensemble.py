"""One teacher, or several whose softened probabilities are averaged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.errors import ModelError, SettingsError
from softcache.targets.encode import soften
from softcache.teachers.teacher import Teacher


@dataclass(frozen=True)
class Ensemble:
    """One teacher, or several whose softened probabilities are averaged.

    The weighted arithmetic mean of Hinton, Vinyals and Dean (arXiv 1503.02531), section 5.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]  # they sum to 1

    @property
    def device(self) -> torch.device:
        return self.teachers[0].device

    @property
    def classes(self) -> int:
        return self.teachers[0].classes or 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the teachers call their classes; empty if they only number them."""
        return next((t.class_names for t in self.teachers if t.class_names), ())

    @property
    def provenance(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            teacher.provenance | {"weight": weight}
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        )

    @property
    def in_float32(self) -> Ensemble | None:
        """The same in full precision, to compare; None if it is."""
        if all(teacher.precision == "fp32" for teacher in self.teachers):
            return None
        exact = tuple(dataclasses.replace(t, precision="fp32") for t in self.teachers)
        return dataclasses.replace(self, teachers=exact)

    def log_probs(
        self, inputs: Tensor, temperature: float, samples: npt.NDArray[np.int64] | None = None
    ) -> Tensor:
        """Log-probabilities (B, C) float32 at `temperature` of float inputs (B, *shape).

        Args:
            samples: (B,) the numbers of the samples, for messages.

        Raises:
            ModelError: a teacher raises, or its output is not finite logits (B, C).
        """
        said = [soften(t.logits(inputs, samples), temperature) for t in self.teachers]
        if len(said) == 1:
            return said[0]
        weighted = [s + math.log(w) for s, w in zip(said, self.weights, strict=True)]
        return torch.log_softmax(torch.logsumexp(torch.stack(weighted), 0), dim=-1)


def make_ensemble(teachers: Sequence[Teacher], weights: Sequence[float]) -> Ensemble:
    """Several teachers as one; no weights mean equal ones.

    Raises:
        SettingsError: weights that do not fit.
        ModelError: the teachers have different numbers of classes.
    """
    if weights and (
        len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise SettingsError(
            f"{len(weights)} teacher weights {list(weights)} for {len(teachers)} teachers; expected "
            "one above 0 for each, or none"
        )
    counts = [teacher.classes for teacher in teachers]
    if len(set(counts)) > 1:
        named = ", ".join(f"{teacher.spec} {teacher.classes}" for teacher in teachers)
        raise ModelError(
            f"teachers have different numbers of classes: {named}; average only teachers of one task"
        )
    shares = list(weights) or [1.0] * len(teachers)
    return Ensemble(tuple(teachers), tuple(share / sum(shares) for share in shares))
