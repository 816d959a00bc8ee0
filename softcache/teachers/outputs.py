"""Check a teacher's outputs and turn them into logits.

A softmax of probabilities taken for logits would be wrong without any error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from softcache.errors import ModelError
from softcache.util.log import inform

SURE = 1e-7  # distance of a probability from 0 and 1, at least, so that its log-odds are finite
TINY = 1e-38  # replaces a probability of 0, so that its logarithm is finite in float32
TOLERANCE = 0.0201  # for a sum of probabilities: 2 %, as after rounding to two decimals
ROUNDED = 0.005  # a sum that is further from 1 than float16 would put it
ENOUGH_ROWS = 8  # that all look like probabilities, to rule out a coincidence


def as_logits(
    values: Tensor, output: str, spec: str, say: Callable[[str], object] = inform
) -> Tensor:
    """Turn a teacher's outputs (B, C) into logits at T = 1, (B, C).

    Args:
        output: what the values are, one of OUTPUTS.
        spec: the teacher's specification, for messages.
        say: called with a note where probabilities sum to 1 only roughly.

    Raises:
        ModelError: the values are not what `output` says, or are probabilities declared as logits.
    """
    if output == "logits":
        _refuse_probabilities(values, spec)
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
    if bool(((sums - 1).abs() > ROUNDED).any()):
        say(
            f"teacher {spec} returns probabilities that sum to {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}, as if they were rounded; each row is divided by its sum"
        )
    # the softmax that follows divides by the sum
    if output == "probabilities":
        return values.clamp(min=TINY).log()
    return values.clamp(min=float(np.log(TINY)))


def as_odds(values: Tensor, output: str, spec: str) -> Tensor:
    """Turn a teacher's outputs (B, C), each class on its own, into log-odds at T = 1, (B, C).

    Args:
        output: what the values are, one of OUTPUTS.
        spec: the teacher's specification, for messages.

    Raises:
        ModelError: the values are not what `output` says, or are probabilities declared as logits.
    """
    if output == "logits":
        if len(values) >= ENOUGH_ROWS and _look_like_probabilities(values):
            raise ModelError(
                f"teacher {spec} returns only values between 0 and 1: probabilities, not logits; add "
                "--teacher-output probabilities, or return the values before the sigmoid"
            )
        return values
    probabilities = values.double().exp() if output == "log_probabilities" else values.double()
    invalid = ~((probabilities >= 0) & (probabilities <= 1 + 1e-6))
    if bool(invalid.any()):
        raise ModelError(
            f"teacher {spec} returns {float(values[invalid][0]):.4g}, which is no {output[:-3]}y; say what "
            "the teacher returns with --teacher-output"
        )
    odds: Tensor = torch.special.logit(probabilities, eps=SURE)
    return odds.float()


def two_columns(values: Tensor, output: str, spec: str) -> Tensor:
    """Turn one output for two classes, (B,) or (B, 1), into one for each class, (B, 2).

    A logit z becomes [0, z], since sigmoid(z) = softmax([0, z])[1]; a probability p becomes [1 - p, p].

    Args:
        output: what the values are, one of OUTPUTS.
        spec: the teacher's specification, for messages.

    Raises:
        ModelError: the values are not what `output` says, or are probabilities declared as logits.
    """
    single = values.reshape(-1)
    if output == "logits":
        if len(single) >= ENOUGH_ROWS and _look_like_probabilities(single):
            raise ModelError(
                f"teacher {spec} returns one output per sample, each between 0 and 1: the probability "
                "of class 1, not its logit; add --teacher-output probabilities, or return the logits"
            )
        return torch.stack([torch.zeros_like(single), single], 1)
    probabilities = single.exp() if output == "log_probabilities" else single
    invalid = ~((probabilities >= 0) & (probabilities <= 1 + 1e-6))
    if bool(invalid.any()):
        raise ModelError(
            f"teacher {spec} returns {float(single[invalid][0]):.4g} as the one output of a sample; expected "
            f"{describe_single(output)}, or say what the teacher returns with --teacher-output"
        )
    if output == "log_probabilities":
        other = (-torch.expm1(single.clamp(max=0))).log()  # log(1 - p)
        return torch.stack([other, single], 1)
    return torch.stack([(1 - single).clamp(min=0), single], 1)


def describe_single(output: str) -> str:
    """How one output for two classes is taken, in a phrase."""
    if output == "logits":
        return "the logit of class 1, against 0 for class 0"
    return f"the {'log-' * (output == 'log_probabilities')}probability of class 1"


def _refuse_probabilities(values: Tensor, spec: str) -> None:
    """Raise ModelError for enough rows of probabilities or sigmoids where logits are expected."""
    if len(values) < ENOUGH_ROWS or values.shape[1] < 2 or not _look_like_probabilities(values):
        return
    if bool(((values.sum(-1) - 1).abs() <= TOLERANCE).all()):
        raise ModelError(
            f"teacher {spec} returns rows that are nonnegative and sum to 1: probabilities, not logits, "
            "and a softmax of them would flatten every target; add --teacher-output probabilities"
        )
    raise ModelError(
        f"teacher {spec} returns only values between 0 and 1, in rows that do not sum to 1: outputs of a "
        "sigmoid, not logits; if each sample has one class, return the values before the sigmoid (where rows "
        "sum to 1, add --teacher-output probabilities); if a sample may have several, add --targets sigmoid "
        "--teacher-output probabilities"
    )


def _look_like_probabilities(values: Tensor) -> bool:
    """Whether every value is in [0, 1], and not every value is 0, as in a network's new last layer."""
    return bool(values.amin() >= 0) and 0 < float(values.amax()) <= 1
