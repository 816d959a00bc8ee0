"""The loss of a student of samples with many rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from softcache.chunked_loss import chunked_loss
from softcache.losses import Loss
from softcache.models.language import TokenModel, flat_logits
from softcache.types import RowIndex, StoredTargets, Targets


def loss_of_rows(
    call: Callable[..., Any],
    inner: Any,  # noqa: ANN401  # the student's module
    accelerator: Accelerator,
    inputs: Tensor,
    rows: RowIndex,
    labels: Tensor,
    soft: Targets | StoredTargets | None,
    check: Callable[[Tensor], None],
    *,
    tokens: bool,
    **settings: Any,
) -> Loss:
    """The mean loss of the rows of a batch.

    Args:
        call: runs the student on inputs, and on the numbers of rows if only their states are wanted.
        inner: the student's module, whose head runs alone if it can.
        inputs: (B, *shape).
        labels: (R,), negative where unlabelled.
        soft: the teacher's soft targets of the rows; None for labels alone.
        check: raises ModelError for logits of another width than the number of classes.
        tokens: whether the inputs are token ids, of which not all need to have rows.
        settings: those of chunked_loss().
    """
    split = isinstance(inner, TokenModel) and inner.splits(inputs)
    if split:
        states = call(inputs, rows.flat(inputs.shape[1]))  # (R, H)
    else:
        last = int(rows.positions.max()) if len(rows.positions) else 0
        expected = inputs.shape[1] if tokens else last + 1
        states = flat_logits(call(inputs), inputs, rows, "student", expected)  # (R, C)

    def head(part: Tensor) -> Tensor:
        if not split:
            return part
        with accelerator.autocast():
            logits: Tensor = inner.head(part)
        return logits.float()

    if len(states):
        check(head(states[:1].detach()))
    parameters = inner.head_parameters() if split else []
    return chunked_loss(states, head, parameters, labels, soft, **settings)
