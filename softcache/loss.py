"""Distillation losses: pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOWEST = -1e5  # a log-probability whose exp is 0, and which is finite


@dataclass(frozen=True)
class SparseTargets:
    """Log-probabilities of a few classes, and one that all the other classes share.

    An id may stand several times in a row, if all but one of its log-probabilities are -inf.
    """

    ids: Tensor  # (B, k) int64
    log_probs: Tensor  # (B, k) float32
    rest: Tensor  # (B,) float32, log-probability of each class that is not among the ids
    classes: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.ids), self.classes))


class MixedLabels(NamedTuple):
    """Labels of samples into which others are mixed."""

    own: Tensor  # (B,) int64
    partners: Tensor  # (B,) int64
    shares: Tensor  # (B,) float32, of the partners


Labels = Tensor | MixedLabels  # a tensor: (B,) int64, negative where unlabelled
Targets = Tensor | SparseTargets  # a tensor: (B, C) float32 log-probabilities


class Loss(NamedTuple):
    """A loss and its two parts, scalars."""

    total: Tensor
    soft: Tensor  # KL(teacher ‖ student) at the temperature, without the factor T²
    hard: Tensor  # cross-entropy with the labels at temperature 1


def distillation_loss(
    logits: Tensor,
    targets: Targets | None,
    labels: Labels,
    *,
    temperature: float,
    alpha: float,
) -> Loss:
    """alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy.

    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531),
    section 2; the factor T² keeps the two gradients in proportion when T changes.

    Args:
        logits: (B, C) float, of the student, at temperature 1.
        targets: log softmax(z_teacher / T), (B, C) or sparse; None where alpha is 0.
        labels: (B,) int64; a negative label takes no part in the cross-entropy.
        temperature: T > 0.
        alpha: weight of the soft targets, in [0, 1].
    """
    zero = logits.new_zeros((), dtype=torch.float32)
    soft = zero if targets is None else soft_loss(logits, targets, temperature)
    hard = hard_loss(logits, labels) if alpha < 1 else zero
    return Loss(alpha * temperature**2 * soft + (1 - alpha) * hard, soft, hard)


def soft_loss(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """Mean over the batch of KL(teacher ‖ student) = sum p (log p - log q), 0 where p = q."""
    log_q = functional.log_softmax(logits.float() / temperature, dim=-1)  # (B, C)
    if isinstance(targets, SparseTargets):
        return _sparse_kl(log_q, targets).mean()
    return functional.kl_div(log_q, targets, reduction="batchmean", log_target=True)


def _sparse_kl(log_q: Tensor, targets: SparseTargets) -> Tensor:
    """KL per row, (B,): the sum over the classes not named needs only the sum of all log q."""
    head_q = log_q.gather(1, targets.ids)  # (B, k)
    # a class of probability 0 adds 0, and not 0 · -inf
    head = targets.log_probs.exp() * (targets.log_probs.clamp(min=LOWEST) - head_q)
    named = (targets.log_probs > -torch.inf).sum(1)  # (B,)
    rest_q = log_q.sum(1) - head_q.masked_fill(torch.isneginf(targets.log_probs), 0).sum(1)
    rest = targets.rest.exp() * (
        (targets.classes - named) * targets.rest.clamp(min=LOWEST) - rest_q
    )
    return head.sum(1) + rest


def hard_loss(logits: Tensor, labels: Labels) -> Tensor:
    """Mean cross-entropy over the labelled samples; 0 where there is none.

    Of mixed samples, the cross-entropies with both labels by their shares: Zhang et al., "mixup"
    (arXiv 1710.09412), section 2; they need both labels.
    """
    if isinstance(labels, MixedLabels):
        both = (labels.own >= 0) & (labels.partners >= 0)
        own = _cross_entropy(logits, labels.own) * (1 - labels.shares)
        losses = own + _cross_entropy(logits, labels.partners) * labels.shares
        return (losses * both).sum() / both.sum().clamp(min=1)
    return _cross_entropy(logits, labels).sum() / (labels >= 0).sum().clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each sample, (B,); 0 where the label is negative."""
    return functional.cross_entropy(
        logits.float(), labels.clamp(min=-1), ignore_index=-1, reduction="none"
    )
