"""Distillation losses: pure functions on tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softcache.divergences import LOSSES, LOWEST, parse_loss
from softcache.errors import SettingsError
from softcache.types import Labels, LabelSets, MixedLabels, StoredTargets, Targets

__all__ = [
    "LOSSES",
    "LOWEST",
    "Loss",
    "RowLosses",
    "distillation_loss",
    "hard_loss",
    "label_weights",
    "parse_loss",
    "reduce_losses",
    "row_losses",
    "soft_loss",
]


class Loss(NamedTuple):
    """A loss and its two parts, scalars."""

    total: Tensor
    soft: Tensor  # divergence from the soft targets at the temperature, without the factor T²
    hard: Tensor  # cross-entropy with the labels at temperature 1


class RowLosses(NamedTuple):
    """The two parts of a loss for each row, before they are averaged."""

    soft: Tensor  # (B,) divergence from the soft targets, without the factor T²
    hard: Tensor  # (B,) weighted cross-entropy with the label; 0 where unlabelled
    weights: Tensor  # (B,) weight of each row in the mean of `hard`; 0 where unlabelled


def distillation_loss(
    logits: Tensor,
    targets: Targets | StoredTargets | None,
    labels: Labels,
    *,
    temperature: float,
    alpha: float,
    loss: str = "kl",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Loss:
    """alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy.

    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531),
    section 2; the factor T² keeps the two gradients in proportion when T changes.

    Args:
        logits: (B, C) float, the student's logits at temperature 1.
        targets: log softmax(z_teacher / T), (B, C) or sparse; may be None if alpha is 0. With the loss
            `bernoulli`, z_teacher / T.
        labels: (B,) int64, or mixed labels; negative labels are left out of the cross-entropy. For samples
            with any number of labels (B, C), 1 where a class applies, a row of -1 without labels.
        temperature: T > 0.
        alpha: weight of the soft targets, in [0, 1].
        loss: the loss to use instead of KL: a name in LOSSES, with a parameter if it takes one (`dkd:8`).
        label_smoothing: probability mass spread from the label over all classes, in [0, 1).
        mask: for tokens, words, frames or pixels: (B, P) bool, which positions have soft targets. Logits are
            then (B, P, C), labels (B, P), and targets (R, C) those of the R positions, in order, as
            SoftCache.row_targets() returns them. The mean is over these; without any it is 0. The loss is
            computed a few rows at a time, together with its gradient, so that backward() can run once.

    Returns:
        The total and its two parts, scalars, computed in float32 (float64 for float64 logits).

    Raises:
        SettingsError: a number is out of range, the shapes differ, or the loss is not defined for these
            targets or labels.
    """
    if not 0 < temperature < math.inf or not 0 <= alpha <= 1:
        raise SettingsError(
            f"temperature is {temperature} and alpha is {alpha}; expected a temperature above 0 and an "
            "alpha from 0 to 1"
        )
    if mask is not None:
        logits, labels = _masked(logits, labels, mask)
    _check_shapes(logits, targets, labels)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "alpha": alpha,
        "loss": loss,
        "label_smoothing": label_smoothing,
    }
    if mask is not None and isinstance(labels, Tensor):
        # imported late, since it is made of the functions of this module
        from softcache.chunked_loss import chunked_loss

        classes = logits.shape[-1]
        return chunked_loss(logits, _same, [], labels, targets, classes=classes, **settings)
    if isinstance(targets, StoredTargets):
        targets = targets.decoded()
    rows = row_losses(logits, targets, labels, **settings)
    return reduce_losses(rows, temperature=temperature, alpha=alpha)


def _same(logits: Tensor) -> Tensor:
    return logits


def _masked(logits: Tensor, labels: Labels, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (R, C) and labels (R,) of the positions that a mask (B, P) selects.

    Raises:
        SettingsError: the shapes differ.
    """
    shape = tuple(mask.shape)
    if not isinstance(labels, Tensor) or logits.shape[:-1] != shape or labels.shape != shape:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise SettingsError(
            f"logits have shape {tuple(logits.shape)}, labels {found} and the mask {shape}; expected "
            "(B, P, C), (B, P) and (B, P)"
        )
    chosen = mask.to(logits.device).bool()
    return logits[chosen], labels.to(logits.device)[chosen].clamp(min=-1)


def _check_shapes(logits: Tensor, targets: Targets | StoredTargets | None, labels: Labels) -> None:
    """Raise SettingsError if logits, targets and labels are not those of the same rows and classes."""
    shape = tuple(logits.shape)
    if len(shape) != 2:
        raise SettingsError(
            f"logits have shape {shape}; expected (samples, classes). For tokens, words, frames or pixels, "
            "give mask=cache_rows >= 0"
        )
    count, classes = shape
    if targets is not None and tuple(targets.shape) != shape:
        found, known = tuple(targets.shape), targets.shape[1]
        problem = f"targets have shape {found} and logits {shape}; expected the same shape (rows, classes)"
        if found[0] != count:
            raise SettingsError(
                f"{problem}: with a mask, the targets are those of the {count} positions where it is true"
            )
        if known < classes:
            raise SettingsError(
                f"{problem}. If the last {classes - known} logits pad a vocabulary of {known}, cut them: "
                f"logits[..., :{known}]"
            )
        raise SettingsError(problem)
    given = labels.own if isinstance(labels, MixedLabels) else labels
    given = given.applies if isinstance(given, LabelSets) else given
    if tuple(given.shape) not in ((count,), shape):
        raise SettingsError(
            f"labels have shape {tuple(given.shape)} and logits {shape}; expected a label for each of the "
            f"{count} rows"
        )


def row_losses(
    logits: Tensor,
    targets: Targets | None,
    labels: Labels,
    *,
    temperature: float,
    alpha: float,
    loss: str = "kl",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> RowLosses:
    """The soft and the hard loss of each row; reduce_losses() makes a loss of them.

    Args:
        logits: (B, C) float, the student's logits at temperature 1.
        targets: log softmax(z_teacher / T), (B, C) or sparse; None for a soft loss of 0.
        labels: (B,) int64, or mixed labels; negative labels are left out of the cross-entropy.
        temperature: T > 0.
        alpha: weight of the soft targets; at 1 the hard loss is not computed, and is 0.
        loss: a name in LOSSES, with a parameter if it takes one (`dkd:8`).
        label_smoothing: probability mass spread from the label over all classes, in [0, 1).
        class_weights: (C,) weights of the classes in the hard loss; None for 1 each.

    Raises:
        SettingsError: the loss is unknown, or not defined for these targets or labels.
    """
    if isinstance(labels, Tensor) and labels.ndim == 2:
        labels = LabelSets(labels.clamp(min=0).float(), labels[:, 0] >= 0)
    zeros = logits.new_zeros(len(logits), dtype=torch.float32)
    soft, hard, weights = zeros, zeros, zeros
    if targets is not None:
        soft = _soft_rows(logits, targets, temperature, loss, labels)
    if alpha < 1:
        hard, weights = _hard_rows(logits, labels, label_smoothing, class_weights)
    return RowLosses(soft, hard, weights)


def reduce_losses(
    rows: RowLosses, *, temperature: float, alpha: float, mean_weight: Tensor | None = None
) -> Loss:
    """The mean loss of some rows, as a part of the mean loss of a batch that they belong to.

    Weighted by their numbers of rows, the losses of all parts add up to the loss of the batch, whichever
    part the labelled samples are in: the sum of their cross-entropies divided by the sum of all weights.

    Args:
        rows: losses of some rows of the batch, or of all.
        temperature: T > 0.
        alpha: weight of the soft targets, in [0, 1].
        mean_weight: scalar, mean of label_weights() over the whole batch; None if the rows are the batch.

    Returns:
        alpha T² soft + (1 - alpha) hard, and its two parts; the hard part is 0 if no sample is labelled.
    """
    count, weight = max(1, len(rows.soft)), rows.weights.sum()
    soft = rows.soft.sum() / count
    hard = rows.hard.sum() / _positive(weight)
    if mean_weight is not None:
        hard = hard * (weight / count / _positive(mean_weight))
    return Loss(alpha * temperature**2 * soft + (1 - alpha) * hard, soft, hard)


def _positive(total: Tensor) -> Tensor:
    """A sum of weights to divide by; 1 if it is 0."""
    return torch.where(total > 0, total, 1)


def soft_loss(
    logits: Tensor,
    targets: Targets,
    temperature: float,
    loss: str = "kl",
    labels: Labels | None = None,
) -> Tensor:
    """Mean over the batch of a loss between teacher and student; 0 where they are equal.

    Args:
        logits: (B, C) float, the student's logits at temperature 1.
        targets: the teacher's log-probabilities at the temperature, (B, C) or sparse.
        temperature: T > 0, applied to the student's logits.
        loss: a name in LOSSES, with a parameter if it takes one (`dkd:8`).
        labels: (B,) int64; needed only by losses that treat the label separately.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        SettingsError: the loss is unknown, or not defined for these targets or labels.
    """
    return _soft_rows(logits, targets, temperature, loss, labels).mean()


def _soft_rows(
    logits: Tensor, targets: Targets, temperature: float, loss: str, labels: Labels | None
) -> Tensor:
    """The soft loss of each row, (B,)."""
    name, parameter = parse_loss(loss)
    if LOSSES[name].multi_label:
        return LOSSES[name].rows(_wide(logits) / temperature, targets, labels, parameter)
    log_q = functional.log_softmax(_wide(logits) / temperature, dim=-1)  # (B, C)
    return LOSSES[name].rows(log_q, targets, labels, parameter)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def hard_loss(
    logits: Tensor,
    labels: Labels,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the labelled samples, weighted by class; 0 if there are none.

    A mixed sample has the cross-entropies with both labels, weighted as in the mixture, and counts only if
    both are known: Zhang et al., "mixup" (arXiv 1710.09412), section 2. Label smoothing: Szegedy et al.,
    "Rethinking the Inception architecture" (arXiv 1512.00567), section 7.

    Args:
        logits: (B, C) float, at temperature 1.
        labels: (B,) int64, negative where unlabelled; or mixed labels.
        smoothing: probability mass spread from the label over all classes, in [0, 1).
        class_weights: (C,) weights of the classes; None for 1 each. The mean is that of
            torch.nn.functional.cross_entropy(weight=class_weights): the sum of the weighted losses, divided
            by the sum of the weights of the labels.

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    losses, weights = _hard_rows(logits, labels, smoothing, class_weights)
    return losses.sum() / _positive(weights.sum())


def label_weights(labels: Labels, class_weights: Tensor | None = None) -> Tensor:
    """The weight of each sample in the mean of the hard loss; 0 for a sample without a label.

    Args:
        labels: (B,) int64, negative where unlabelled; or mixed labels, which count if both are known, each
            with the weight of its class and its share in the mixture.
        class_weights: (C,) weights of the classes; None for 1 each.

    Returns:
        (B,) float32, or the dtype of the class weights.
    """
    if isinstance(labels, LabelSets):
        return labels.known.float()
    own = labels.own if isinstance(labels, MixedLabels) else labels
    labelled = own >= 0
    if isinstance(labels, MixedLabels):
        labelled = labelled & (labels.partners >= 0)
    if class_weights is None:
        return labelled.float()
    weights = class_weights[own.clamp(min=0)]
    if isinstance(labels, MixedLabels):
        partner_weights = class_weights[labels.partners.clamp(min=0)]
        weights = weights.lerp(partner_weights, labels.partner_weights.to(weights.dtype))
    return weights * labelled


def _hard_rows(
    logits: Tensor, labels: Labels, smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy of each sample (B,), 0 where unlabelled, and its weight (B,)."""
    logits = _wide(logits)
    if class_weights is not None:
        class_weights = class_weights.to(logits)
    weights = label_weights(labels, class_weights)
    if isinstance(labels, LabelSets):
        return _binary_cross_entropy(logits, labels, smoothing), weights
    if not isinstance(labels, MixedLabels):
        return _cross_entropy(logits, labels, smoothing, class_weights), weights
    own = _cross_entropy(logits, labels.own, smoothing, class_weights)
    losses = own * (1 - labels.partner_weights)
    partners = _cross_entropy(logits, labels.partners, smoothing, class_weights)
    losses = losses + partners * labels.partner_weights
    return losses * ((labels.own >= 0) & (labels.partners >= 0)), weights


def _binary_cross_entropy(logits: Tensor, labels: LabelSets, smoothing: float) -> Tensor:
    """The cross-entropies of all classes of each sample, summed, (B,); 0 where unlabelled."""
    applies = labels.applies * (1 - smoothing) + smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(
        logits, applies.to(logits), reduction="none"
    )
    return losses.sum(-1) * labels.known


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None
) -> Tensor:
    """The weighted cross-entropy of each sample, (B,); 0 where the label is negative."""
    return functional.cross_entropy(
        logits,
        labels.clamp(min=-1),
        weight=class_weights,
        ignore_index=-1,
        reduction="none",
        label_smoothing=smoothing,
    )
