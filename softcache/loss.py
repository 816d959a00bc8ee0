"""Distillation losses: pure functions on tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Loss(NamedTuple):
    """A loss and its two parts, scalars."""

    total: Tensor
    soft: Tensor  # KL(teacher ‖ student) at the temperature, without the factor T²
    hard: Tensor  # cross-entropy with the labels at temperature 1


def distillation_loss(
    logits: Tensor,
    teacher_log_probs: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
) -> Loss:
    """alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy.

    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531),
    section 2; the factor T² keeps the two gradients in proportion when T changes.

    Args:
        logits: (B, C) float, of the student, at temperature 1.
        teacher_log_probs: (B, C) float, log softmax(z_teacher / T); None where alpha is 0.
        labels: (B,) int64; a negative label takes no part in the cross-entropy.
        temperature: T > 0.
        alpha: weight of the soft targets, in [0, 1].
    """
    zero = logits.new_zeros((), dtype=torch.float32)
    soft = zero if teacher_log_probs is None else soft_loss(logits, teacher_log_probs, temperature)
    hard = hard_loss(logits, labels) if alpha < 1 else zero
    return Loss(alpha * temperature**2 * soft + (1 - alpha) * hard, soft, hard)


def soft_loss(logits: Tensor, teacher_log_probs: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of KL(teacher ‖ student) = sum p (log p - log q), 0 where p = q."""
    log_q = functional.log_softmax(logits.float() / temperature, dim=-1)  # (B, C)
    return functional.kl_div(log_q, teacher_log_probs, reduction="batchmean", log_target=True)


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples; 0 where there is none."""
    total = functional.cross_entropy(
        logits.float(), labels.clamp(min=-1), ignore_index=-1, reduction="sum"
    )
    return total / (labels >= 0).sum().clamp(min=1)
