"""The loss of many rows, a few at a time: the logits of all tokens of a batch would not fit into memory.

Forward pass and gradient of a chunk are computed together, as Wijmans et al. do for the cross-entropy, "Cut
your losses in large-vocabulary language models" (arXiv 2411.09009), section 4; here for any loss of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.losses import Loss, label_weights, row_losses
from softcache.types import StoredTargets, Targets

CHUNK_VALUES = 1 << 23  # logits of a chunk: 32 MB in float32


def chunked_loss(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    labels: Tensor,
    targets: Targets | StoredTargets | None,
    *,
    classes: int,
    temperature: float,
    alpha: float,
    loss: str = "kl",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    mean_weight: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Loss:
    """The mean loss of some rows; reduce_losses(row_losses(...)) without all logits in memory.

    Args:
        states: (R, H), from which `head` makes the logits of rows; or logits, with a head that returns them.
        head: (n, H) to (n, C).
        parameters: what the head depends on besides the states, and gets gradients.
        labels: (R,) int64, negative where unlabelled.
        targets: the teacher's log-probabilities at the temperature; None for a soft loss of 0.
        classes: C.
        temperature, alpha, loss, label_smoothing, class_weights, mean_weight: see losses.row_losses() and
            losses.reduce_losses().
        chunk_rows: rows of a chunk; by default as many as fit into CHUNK_VALUES logits.

    Returns:
        The total, from which gradients flow to the states and the parameters, and its two parts. Without any
        rows all are 0.
    """
    count = max(1, len(states))
    weight = label_weights(labels, class_weights).sum()
    divisor = torch.where(weight > 0, weight, 1)
    factor = torch.ones_like(weight)
    if mean_weight is not None:
        factor = weight / count / torch.where(mean_weight > 0, mean_weight, 1)
    # of a row, so that gradients in float16 do not vanish before they are scaled
    weights = alpha * temperature**2, float((1 - alpha) * factor / divisor * count)

    def sums(part: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        chosen = None if targets is None else _rows_of(targets, rows)
        losses = row_losses(
            head(part),
            chosen,
            labels[rows],
            temperature=temperature,
            alpha=alpha,
            loss=loss,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        return losses.soft.sum(), losses.hard.sum()

    size = chunk_rows or max(1, CHUNK_VALUES // classes)
    total, soft, hard = _ChunkedSums.apply(  # type: ignore[no-untyped-call]
        states, sums, size, weights, torch.is_grad_enabled(), *parameters
    )
    return Loss(total / count, soft / count, hard * factor / divisor)


def _rows_of(targets: Targets | StoredTargets, rows: slice) -> Targets:
    """Some rows of the targets, decoded."""
    if isinstance(targets, StoredTargets):
        return targets.rows(rows).decoded()
    if isinstance(targets, Tensor):
        return targets[rows]
    ids, log_probs, rest = (t[rows] for t in (targets.ids, targets.log_probs, targets.rest))
    return replace(targets, ids=ids, log_probs=log_probs, rest=rest)


class _ChunkedSums(torch.autograd.Function):
    """The weighted sum of two losses of rows, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch's context
        states: Tensor,
        sums: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        size: int,
        weights: tuple[float, float],
        with_gradients: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        soft, hard = (torch.zeros((), device=states.device) for _ in range(2))
        ctx.gradients = None
        if not with_gradients:
            for start in range(0, len(states), size):
                rows = slice(start, min(start + size, len(states)))
                part_soft, part_hard = sums(states[rows], rows)
                soft, hard = soft + part_soft, hard + part_hard
            return weights[0] * soft + weights[1] * hard, soft, hard
        states_gradient = torch.zeros_like(states)
        gradients: list[Tensor | None] = [None] * len(parameters)
        needed = [n for n, p in enumerate(parameters) if p.requires_grad]
        for start in range(0, len(states), size):
            rows = slice(start, min(start + size, len(states)))
            with torch.enable_grad():
                part = states[rows].detach().requires_grad_(True)
                part_soft, part_hard = sums(part, rows)
                value = weights[0] * part_soft + weights[1] * part_hard
            found = torch.autograd.grad(
                value, [part, *(parameters[n] for n in needed)], allow_unused=True
            )
            if found[0] is not None:
                states_gradient[rows] = found[0]
            for number, gradient in zip(needed, found[1:], strict=True):
                known = gradients[number]
                if gradient is not None:
                    gradients[number] = gradient if known is None else known.add_(gradient)
            soft, hard = soft + part_soft.detach(), hard + part_hard.detach()
        ctx.gradients = (states_gradient, gradients)
        ctx.mark_non_differentiable(soft, hard)
        return weights[0] * soft + weights[1] * hard, soft, hard

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scale = outputs[0]
        if ctx.gradients is None:
            raise SettingsError(
                "a second backward pass through the same loss, whose gradients are gone after the first; "
                "compute the loss again"
            )
        (states_gradient, gradients), ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(scale) for g in gradients)
        return (states_gradient.mul_(scale), None, None, None, None, *scaled)
