"""One teacher, or several whose softened probabilities are averaged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.errors import ModelError, SettingsError
from softcache.targets.encode import as_odds, soften
from softcache.teachers.outputs import SURE
from softcache.teachers.server import Server
from softcache.teachers.teacher import Teacher
from softcache.types import RowIndex


@dataclass(frozen=True)
class Ensemble:
    """One teacher, or several whose softened probabilities are averaged.

    The mean is the weighted arithmetic one of Hinton, Vinyals and Dean (arXiv 1503.02531), section 5.

    Attributes:
        weights: the teachers' shares, which sum to 1.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        """The device that all teachers are on."""
        return self.teachers[0].device

    @property
    def multi_label(self) -> bool:
        """Whether each class applies or not on its own."""
        return self.teachers[0].multi_label

    @property
    def classes(self) -> int:
        """Number of classes, the same for all teachers."""
        return self.teachers[0].classes or 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first teacher's class names, in order; empty if no teacher names its classes."""
        return next((t.class_names for t in self.teachers if t.class_names), ())

    @property
    def provenance(self) -> tuple[dict[str, Any], ...]:
        """What the header records about each teacher, with its weight."""
        return tuple(
            teacher.provenance | {"weight": weight}
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        )

    @property
    def asks_server(self) -> bool:
        """Whether a teacher is behind a server, which may give another answer when it is asked again."""
        return any(isinstance(teacher.model, Server) for teacher in self.teachers)

    @property
    def in_float32(self) -> Ensemble | None:
        """The same ensemble in float32, to measure what the precision costs; None if it is in float32."""
        if all(teacher.precision == "fp32" for teacher in self.teachers):
            return None
        exact = tuple(dataclasses.replace(t, precision="fp32") for t in self.teachers)
        return dataclasses.replace(self, teachers=exact)

    def log_probs(
        self, inputs: Tensor, temperature: float, samples: npt.NDArray[np.int64] | None = None
    ) -> Tensor:
        """Log-probabilities (B, C) float32 at `temperature` of float inputs (B, *shape).

        If each class applies or not on its own, they are log-odds.

        Args:
            samples: (B,) sample ids, for messages and to look up the rows of a matrix; by default
                0 to B - 1.

        Raises:
            ModelError: a teacher raises, or its output is not finite logits (B, C).
        """
        return self._averaged([t.logits(inputs, samples) for t in self.teachers], temperature)

    def row_log_probs(
        self,
        inputs: Tensor,
        rows: RowIndex,
        temperature: float,
        samples: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[Tensor]:
        """The same of some rows of samples that have many: (n, C) for the next few of them at a time.

        Raises:
            ModelError: a teacher raises, or does not return finite logits for each row.
        """
        parts = [teacher.row_logits(inputs, rows, samples) for teacher in self.teachers]
        for logits in zip(*parts, strict=True):
            yield self._averaged(logits, temperature)

    def _averaged(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """The weighted mean of the softened probabilities, (B, C), from the logits of each teacher."""
        if self.multi_label:
            odds = [as_odds(part, temperature) for part in logits]
            if len(odds) == 1:
                return odds[0]
            mean = torch.zeros_like(odds[0], dtype=torch.float64)
            for weight, part in zip(self.weights, odds, strict=True):
                mean += weight * part.double().sigmoid()
            averaged: Tensor = torch.special.logit(mean, eps=SURE)
            return averaged.float()
        log_probs = [soften(part, temperature) for part in logits]
        if len(log_probs) == 1:
            return log_probs[0]
        weighted = [
            part + math.log(weight) for part, weight in zip(log_probs, self.weights, strict=True)
        ]
        return torch.log_softmax(torch.logsumexp(torch.stack(weighted), 0), dim=-1)


def make_ensemble(teachers: Sequence[Teacher], weights: Sequence[float]) -> Ensemble:
    """Combine teachers into one.

    Args:
        weights: relative weights, one for each teacher; empty for equal weights.

    Raises:
        SettingsError: the weights are not one positive finite number for each teacher.
        ModelError: the teachers have different numbers of classes.
    """
    if weights and (
        len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise SettingsError(
            f"{len(weights)} teacher weights {list(weights)} for {len(teachers)} teachers; expected "
            "a positive weight for each, or none"
        )
    counts = [teacher.classes for teacher in teachers]
    if len(set(counts)) > 1:
        named = ", ".join(f"{teacher.spec} {teacher.classes}" for teacher in teachers)
        raise ModelError(
            f"teachers have different numbers of classes: {named}; average only teachers of the same task"
        )
    shares = list(weights) or [1.0] * len(teachers)
    return Ensemble(tuple(teachers), tuple(share / sum(shares) for share in shares))
