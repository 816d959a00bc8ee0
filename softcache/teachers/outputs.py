"""Check a teacher's outputs and turn them into logits.

A softmax of probabilities taken for logits would be wrong without any error.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from softcache.errors import ModelError

TINY = 1e-38  # replaces a probability of 0, so that its logarithm is finite in float32
TOLERANCE = 0.01  # for a sum of probabilities


def as_logits(values: Tensor, output: str, spec: str) -> Tensor:
    """Turn a teacher's outputs (B, C) into logits at T = 1, (B, C).

    Args:
        output: what the values are, one of OUTPUTS.
        spec: the teacher's specification, for messages.

    Raises:
        ModelError: the values are not what `output` says, or are probabilities declared as logits.
    """
    if output == "logits":
        if _are_probabilities(values):
            raise ModelError(
                f"teacher {spec} returns rows that are nonnegative and sum to 1: probabilities, not logits, "
                "and a softmax of them would flatten every target; add --teacher-output probabilities"
            )
        return values
    sums = values.sum(-1) if output == "probabilities" else values.logsumexp(-1).exp()
    invalid = ~((sums - 1).abs() <= TOLERANCE)
    if output == "probabilities":
        invalid |= (values < 0).any(-1)
    if bool(invalid.any()):
        row = int(invalid.nonzero()[0, 0])
        raise ModelError(
            f"teacher {spec} returns a row that does not hold {output.replace('_', '-')}: its probabilities "
            f"sum to {float(sums[row]):.4g}, its smallest value is {float(values[row].min()):.4g}; say "
            "what the teacher returns with --teacher-output"
        )
    if output == "probabilities":
        return values.clamp(min=TINY).log()
    return values.clamp(min=float(np.log(TINY)))


def _are_probabilities(values: Tensor) -> bool:
    """Whether enough rows are distributions to rule out logits that sum to 1 by coincidence."""
    if len(values) < 8 or values.shape[1] < 2 or bool((values < 0).any()):
        return False
    return bool(((values.sum(-1) - 1).abs() <= 1e-4).all())
