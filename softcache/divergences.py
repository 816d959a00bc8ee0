"""Divergences of a student from its teacher: pure functions that return the loss of each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softcache.errors import SettingsError
from softcache.types import Labels, SparseTargets, Targets

DKD_BETA = 8.0  # the value that Zhao et al. use for CIFAR-100
TINY = 1e-20  # a variance to divide by in the place of 0
LOWEST = -1e5  # a finite log-probability with an exp of 0, used instead of -inf


def parse_loss(spec: str) -> tuple[str, float]:
    """Split a loss such as `kl`, `dkd` or `dkd:8` into its name and its parameter.

    Returns:
        The name, and the parameter: the given one, the default, or 0 if the loss takes none.

    Raises:
        SettingsError: the loss is unknown, or its parameter is invalid.
    """
    name, colon, number = spec.partition(":")
    default = LOSSES[name].parameter if name in LOSSES else None
    try:
        parameter = float(number) if colon else default or 0.0
    except ValueError:
        parameter = -1.0
    if name not in LOSSES or (colon and default is None) or not 0 <= parameter < 1e6:
        forms = ", ".join(kind.form for kind in LOSSES.values())
        raise SettingsError(f"loss {spec!r} is unknown; expected one of {forms}")
    return name, parameter


def kl(log_q: Tensor, targets: Targets) -> Tensor:
    """KL(teacher ‖ student) = sum p (log p - log q) of each row, in nats; Hinton et al.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: the teacher's log-probabilities, (B, C) or sparse.

    Returns:
        (B,) in nats.
    """
    if not isinstance(targets, SparseTargets):
        return functional.kl_div(log_q, targets, reduction="none", log_target=True).sum(-1)
    if targets.bucket:
        return _kl_of_bucket(log_q, targets)
    # the sum over the classes without an id needs only the sum of all log q
    head_q, named = log_q.gather(1, targets.ids), _named(targets)
    # a class of probability 0 must add 0, not 0 · -inf
    head = targets.log_probs.exp() * (targets.log_probs.clamp(min=LOWEST) - head_q)
    rest_q = log_q.sum(1) - head_q.masked_fill(~named, 0).sum(1)
    rest = targets.rest.exp() * (
        (targets.classes - named.sum(1)) * targets.rest.clamp(min=LOWEST) - rest_q
    )
    return head.sum(1) + rest


def _kl_of_bucket(log_q: Tensor, targets: SparseTargets) -> Tensor:
    """KL of K + 1 categories: the classes with an id, and all others together.

    How a teacher shares its tail out is not known; spread evenly, it would pull the student to the uniform.
    By the log sum inequality it is at most the KL of all classes, and never below 0.
    """
    named = _named(targets)
    head_q = log_q.gather(1, targets.ids)
    others = log_q.scatter(1, targets.ids, -torch.inf)
    tail_q = others.logsumexp(1).clamp(min=LOWEST)  # (B,), log of their mass
    tail_p = targets.rest + (targets.classes - named.sum(1)).to(log_q.dtype).log()
    head = targets.log_probs.exp() * (targets.log_probs.clamp(min=LOWEST) - head_q)
    return head.sum(1) + tail_p.exp() * (tail_p.clamp(min=LOWEST) - tail_q)


def reverse_kl(log_q: Tensor, targets: Targets) -> Tensor:
    """KL(student ‖ teacher) = sum q (log q - log p) of each row.

    It is mode-seeking where KL is mode-covering: Gu et al., "MiniLLM" (arXiv 2306.08543), section 2.1.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: the teacher's log-probabilities, (B, C) or sparse.

    Returns:
        (B,) in nats.
    """
    if not isinstance(targets, SparseTargets):
        return (log_q.exp() * (log_q - targets.clamp(min=LOWEST))).sum(-1)
    head_q = log_q.gather(1, targets.ids).exp().masked_fill(~_named(targets), 0)
    cross = (head_q * targets.log_probs.clamp(min=LOWEST)).sum(1)
    cross = cross + (1 - head_q.sum(1)) * targets.rest.clamp(min=LOWEST)
    return (log_q.exp() * log_q).sum(1) - cross


def jensen_shannon(log_q: Tensor, targets: Targets) -> Tensor:
    """KL(p ‖ m) / 2 + KL(q ‖ m) / 2 with m = (p + q) / 2 of each row.

    Lin, "Divergence measures based on the Shannon entropy" (IEEE Trans. Inf. Theory 37, 1991),
    section IV, with equal weights.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: the teacher's log-probabilities, (B, C) or sparse.

    Returns:
        (B,) in nats, at most log 2.
    """
    if not isinstance(targets, SparseTargets):
        return _jensen_shannon_terms(targets, log_q).sum(-1)
    head_q, named = log_q.gather(1, targets.ids), _named(targets)
    rest = targets.rest[:, None]
    # every class counts as one of the rest at first, then the named ones are corrected
    head = _jensen_shannon_terms(targets.log_probs, head_q)
    correction = head - _jensen_shannon_terms(rest, head_q)  # (B, k)
    return _jensen_shannon_terms(rest, log_q).sum(1) + correction.masked_fill(~named, 0).sum(1)


def _jensen_shannon_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p = log_p.clamp(min=LOWEST)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2


def mean_squared_error(log_q: Tensor, targets: Targets) -> Tensor:
    """Half the mean over the classes of (log q - log p)², both centred, of each row.

    Multiplied by T², it equals the same error of the centred logits at T = 1, which is the limit of T² KL
    as T grows: Hinton et al., section 2.1; Kim et al. (arXiv 2105.08919), section 3.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: (B, C), the teacher's log-probabilities.

    Returns:
        (B,).

    Raises:
        SettingsError: the targets are sparse.
    """
    if isinstance(targets, SparseTargets):
        raise SettingsError(
            "loss mse compares the logits of all classes, but topk and sampled keep only a few; use kl, or "
            "a dense, quantized or basis cache"
        )
    difference = log_q - targets.clamp(min=LOWEST)
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1) / 2


def decoupled(log_q: Tensor, targets: Targets, labels: Labels | None, beta: float) -> Tensor:
    """TCKD + beta NCKD of each row: the KL of the label against all other classes, and the KL among those.

    Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), equation 7 with alpha = 1.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: the teacher's log-probabilities, (B, C) or sparse.
        labels: (B,) int64, all of them known.
        beta: weight of the second term.

    Returns:
        (B,) in nats.

    Raises:
        SettingsError: a label is missing, or the labels are mixed.
    """
    if not isinstance(labels, Tensor) or bool((labels < 0).any()):
        raise SettingsError(
            "loss dkd needs the label of every sample, but this batch has mixed samples or samples without "
            "a label; use kl"
        )
    label = labels[:, None]  # (B, 1)
    others_q = log_q.scatter(1, label, -torch.inf).logsumexp(1)  # (B,)
    label_q = log_q.gather(1, label)[:, 0]
    if isinstance(targets, SparseTargets):
        is_label, named = targets.ids == label, _named(targets)
        label_head = is_label & named
        label_p = torch.where(
            label_head.any(1),
            targets.log_probs.masked_fill(~label_head, -torch.inf).amax(1),
            targets.rest,
        )
        named = named & ~is_label
        head = targets.log_probs.masked_fill(~named, -torch.inf)  # (B, k)
        head_q = log_q.gather(1, targets.ids).masked_fill(~named, 0)
        # the number of classes, other than the label, that share `rest`
        rest_count = targets.classes - 1 - named.sum(1)
        rest_mass = targets.rest + rest_count.to(log_q.dtype).log()
        others_p = torch.logaddexp(head.logsumexp(1), rest_mass).clamp(min=LOWEST)
        rest_q = log_q.sum(1) - label_q - head_q.sum(1)
        given_p = head - others_p[:, None]  # (B, k), given that the class is not the label
        divergence = given_p.clamp(min=LOWEST) - head_q + others_q[:, None]
        non_target = (given_p.exp() * divergence).sum(1)
        rest = (targets.rest - others_p).clamp(min=LOWEST)
        non_target = non_target + rest.exp() * (rest_count * (rest + others_q) - rest_q)
    else:
        label_p = targets.gather(1, label)[:, 0]
        others = targets.scatter(1, label, -torch.inf)
        others_p = others.logsumexp(1).clamp(min=LOWEST)
        given_p = others - others_p[:, None]  # (B, C), given that the class is not the label
        given_q = (log_q - others_q[:, None]).scatter(1, label, 0.0)
        non_target = (given_p.exp() * (given_p.clamp(min=LOWEST) - given_q)).sum(1)
    label_p = label_p.clamp(min=LOWEST)
    target = label_p.exp() * (label_p - label_q) + others_p.exp() * (others_p - others_q)
    return target + beta * non_target


def correlation(log_q: Tensor, targets: Targets) -> Tensor:
    """1 - Pearson's correlation of the probabilities of teacher and student over the classes, of each row.

    The relation between classes of Huang et al., "Knowledge distillation from a stronger teacher" (arXiv
    2205.10536), equation 9; their relation within classes compares the samples of a whole batch. It does not
    depend on how sure the student is, only on how it shares its certainty out.

    Args:
        log_q: (B, C), the student's log-probabilities.
        targets: the teacher's log-probabilities, (B, C) or sparse.

    Returns:
        (B,), from 0 to 2.
    """
    q = log_q.exp()
    even = 1 / log_q.shape[1]  # the mean of both, since they sum to 1
    if isinstance(targets, SparseTargets):
        named = _named(targets)
        head, rest = targets.log_probs.exp(), targets.rest.exp()  # (B, k), (B,)
        head_q = q.gather(1, targets.ids).masked_fill(~named, 0)
        products = (head * head_q).sum(1) + rest * (1 - head_q.sum(1))
        squares = head.square().sum(1) + rest.square() * (targets.classes - named.sum(1))
    else:
        p = targets.exp()
        products, squares = (p * q).sum(1), p.square().sum(1)
    variances = (squares - even) * (q.square().sum(1) - even)
    return 1 - (products - even) / variances.clamp(min=TINY).sqrt()


def bernoulli(odds_q: Tensor, targets: Targets) -> Tensor:
    """KL(teacher ‖ student) of each row, summed over classes that apply or not on their own.

    With p = sigmoid(a) and q = sigmoid(b), KL(p ‖ q) = p (a - b) + softplus(b) - softplus(a).

    Args:
        odds_q: (B, C), the student's log-odds.
        targets: (B, C), the teacher's log-odds.

    Returns:
        (B,) in nats.

    Raises:
        SettingsError: the targets are sparse.
    """
    if isinstance(targets, SparseTargets):
        raise SettingsError("loss bernoulli needs the log-odds of all classes; use kl")
    softplus = functional.softplus
    difference = targets.sigmoid() * (targets - odds_q) + softplus(odds_q) - softplus(targets)
    return difference.sum(-1)


@dataclass(frozen=True)
class LossKind:
    """An entry in the table of losses.

    Attributes:
        form: how the loss is written on the command line.
        meaning: what it computes, in a phrase.
        rows: the loss of each row (B,), from the student's log-probabilities at the temperature (B, C),
            the targets, the labels and the parameter.
        parameter: the default of the number after the colon; None if the loss takes no number.
        multi_label: whether it compares log-odds of classes that apply or not on their own; `rows` then gets
            the student's logits divided by the temperature.
    """

    form: str
    meaning: str
    rows: Callable[[Tensor, Targets, Labels | None, float], Tensor]
    parameter: float | None = None
    multi_label: bool = False


LOSSES = {
    "kl": LossKind(
        "kl", "KL(teacher ‖ student); the default", lambda log_q, targets, *_: kl(log_q, targets)
    ),
    "reverse_kl": LossKind(
        "reverse_kl",
        "KL(student ‖ teacher)",
        lambda log_q, targets, *_: reverse_kl(log_q, targets),
    ),
    "js": LossKind(
        "js", "Jensen-Shannon divergence", lambda log_q, targets, *_: jensen_shannon(log_q, targets)
    ),
    "mse": LossKind(
        "mse",
        "half the mean squared error of the centred logits",
        lambda log_q, targets, *_: mean_squared_error(log_q, targets),
    ),
    "correlation": LossKind(
        "correlation",
        "1 - the correlation of both over the classes; learns fast, and is not calibrated",
        lambda log_q, targets, *_: correlation(log_q, targets),
    ),
    "dkd": LossKind(
        "dkd:BETA",
        "decoupled KD: KL of label against the rest + BETA times KL among the rest",
        lambda *arguments: decoupled(*arguments),
        DKD_BETA,
    ),
    "bernoulli": LossKind(
        "bernoulli",
        "KL(teacher ‖ student) of each class on its own; only and always for --targets sigmoid",
        lambda odds_q, targets, *_: bernoulli(odds_q, targets),
        multi_label=True,
    ),
}


def _named(targets: SparseTargets) -> Tensor:
    """Which ids count, (B, k) bool: an id with a log-probability of -inf is a placeholder."""
    return targets.log_probs > -torch.inf
