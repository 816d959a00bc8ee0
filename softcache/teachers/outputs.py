"""What a teacher gives, as logits: checked, for softmax of probabilities would be silently wrong."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from softcache.errors import ModelError

TINY = 1e-38  # what a probability of 0 counts as: its logarithm is finite in float32

FLAGS = "--teacher-output (of softcache import: --holds)"

TOLERANCE = 0.01  # of a sum of probabilities


def _are_probabilities(said: Tensor) -> bool:
    """Whether so many rows are distributions that they cannot be logits which happen to look so."""
    if len(said) < 8 or said.shape[1] < 2 or bool((said < 0).any()):
        return False
    return bool(((said.sum(-1) - 1).abs() <= 1e-4).all())


def as_logits(said: Tensor, output: str, who: str) -> Tensor:
    """What a teacher gives, (B, C), as logits at T = 1.

    Raises:
        ModelError: it is not what `output` says, or probabilities under the name of logits.
    """
    if output == "logits":
        if _are_probabilities(said):
            raise ModelError(
                f"teacher {who} gives rows that are not negative and sum to 1: probabilities, not logits, "
                f"and a softmax of them would flatten every target; say {FLAGS} probabilities"
            )
        return said
    sums = said.sum(-1) if output == "probabilities" else said.logsumexp(-1).exp()
    wrong = ~((sums - 1).abs() <= TOLERANCE)
    if output == "probabilities":
        wrong |= (said < 0).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ModelError(
            f"teacher {who} gives a row that is no {output.replace('_', '-')}: its sum is "
            f"{float(sums[row]):.4g}, its least value {float(said[row].min()):.4g}; "
            f"say what it gives with {FLAGS}"
        )
    if output == "probabilities":
        return said.clamp(min=TINY).log()
    return said.clamp(min=float(np.log(TINY)))
