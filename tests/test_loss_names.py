"""Losses by name: each against its closed form in float64, dense and sparse, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.losses import LOSSES, parse_loss, soft_loss
from softcache.targets.decode import to_dense
from softcache.types import MixedLabels, SparseTargets

Array = npt.NDArray[np.float64]

BATCH, CLASSES = 6, 7
LABELS = torch.tensor([0, 6, 3, 2, 2, 1])
SPARSE = [name for name in LOSSES if name not in ("mse", "bernoulli")]


def log_softmax(logits: Array) -> Array:
    normalized: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


def kl(p: Array, q: Array) -> Array:
    divergence: Array = (p * (np.log(p) - np.log(q))).sum(-1)
    return divergence


def decoupled(p: Array, q: Array, beta: float) -> Array:
    """Equation 7 of Zhao et al., written out in probabilities."""
    rows = np.arange(BATCH)
    p_label, q_label = p[rows, LABELS], q[rows, LABELS]
    target = kl(np.stack([p_label, 1 - p_label], -1), np.stack([q_label, 1 - q_label], -1))
    others = np.array([[c for c in range(CLASSES) if c != label] for label in LABELS])
    p_others = np.take_along_axis(p, others, 1) / (1 - p_label)[:, None]
    q_others = np.take_along_axis(q, others, 1) / (1 - q_label)[:, None]
    loss: Array = target + beta * kl(p_others, q_others)
    return loss


def squared(log_p: Array, log_q: Array) -> Array:
    centred = [x - x.mean(-1, keepdims=True) for x in (log_p, log_q)]
    loss: Array = ((centred[0] - centred[1]) ** 2).mean(-1) / 2
    return loss


ORACLES: dict[str, Callable[[Array, Array], Array]] = {
    "kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "mse": lambda p, q: squared(np.log(p), np.log(q)),
    "correlation": lambda p, q: np.array(
        [1 - np.corrcoef(*pair)[0, 1] for pair in zip(p, q, strict=True)]
    ),
    "dkd": lambda p, q: decoupled(p, q, 8.0),
    "dkd:0.5": lambda p, q: decoupled(p, q, 0.5),
}


def logits(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 2, (BATCH, CLASSES))


def sparse_targets(k: int = 3) -> SparseTargets:
    """The largest k of each row, with the rest spread; the first row has one id twice."""
    log_p = torch.tensor(log_softmax(logits(1)))
    head, ids = log_p.topk(k, dim=-1)
    rest = torch.log((1 - head.exp().sum(-1)) / (CLASSES - k))
    ids, head = ids.clone(), head.clone()
    rest[0] = torch.log((1 - head[0, : k - 1].exp().sum()) / (CLASSES - k + 1))
    ids[0, k - 1], head[0, k - 1] = ids[0, 0], -math.inf
    return SparseTargets(ids, head, rest, CLASSES)


def test_every_loss_has_its_closed_form_here() -> None:
    elsewhere = {"bernoulli"}  # of log-odds: tests/test_multi_label.py
    assert {name.partition(":")[0] for name in ORACLES} | elsewhere == set(LOSSES)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("loss", ORACLES)
def test_a_loss_is_its_closed_form(loss: str, temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    value = soft_loss(torch.tensor(student), torch.tensor(log_p), temperature, loss, LABELS)
    assert float(value) == pytest.approx(ORACLES[loss](np.exp(log_p), np.exp(log_q)).mean())


@pytest.mark.parametrize("loss", SPARSE)
def test_of_sparse_targets_it_is_that_of_the_dense_ones(loss: str) -> None:
    student, sparse = torch.tensor(logits(0)), sparse_targets()
    dense = to_dense(sparse)
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(BATCH, dtype=torch.float64))
    value = soft_loss(student, sparse, 1.0, loss, LABELS)
    torch.testing.assert_close(value, soft_loss(student, dense, 1.0, loss, LABELS))


def test_a_lost_tail_would_be_noticed() -> None:
    student, sparse = torch.tensor(logits(0)), sparse_targets()
    cut = SparseTargets(sparse.ids, sparse.log_probs, sparse.rest - 1, CLASSES)
    for loss in SPARSE:
        whole, without_tail = (
            soft_loss(student, targets, 1.0, loss, LABELS) for targets in (sparse, cut)
        )
        assert abs(float(whole - without_tail)) > 1e-3, loss


@pytest.mark.parametrize("loss", ORACLES)
def test_it_is_zero_where_both_are_equal_and_above_elsewhere(loss: str) -> None:
    same = torch.tensor(logits(0)).float()
    targets = torch.log_softmax(same / 2, -1)
    assert float(soft_loss(same, targets, 2.0, loss, LABELS)) == pytest.approx(0, abs=1e-6)
    assert float(soft_loss(same + 5, targets, 2.0, loss, LABELS)) == pytest.approx(0, abs=1e-5)
    for seed in range(2, 12):
        other = torch.tensor(logits(seed)).float()
        assert float(soft_loss(other, targets, 2.0, loss, LABELS)) > 0.01


@pytest.mark.parametrize("loss", ORACLES)
def test_its_gradient_is_that_of_finite_differences(loss: str) -> None:
    targets: list[Tensor | SparseTargets] = [torch.tensor(log_softmax(logits(1) / 2))]
    if loss != "mse":
        targets.append(sparse_targets())
    for target in targets:

        def value(student: Tensor, target: Tensor | SparseTargets = target) -> Tensor:
            return soft_loss(student, target, 2.0, loss, LABELS)

        assert torch.autograd.gradcheck(value, torch.tensor(logits(0), requires_grad=True))


@pytest.mark.parametrize("loss", ORACLES)
def test_certain_teachers_and_far_logits_give_finite_losses_and_gradients(loss: str) -> None:
    student = (30 * torch.tensor(logits(0)).float()).requires_grad_()
    certain = torch.full((BATCH, CLASSES), -1e5)
    certain[torch.arange(BATCH), LABELS] = 0.0
    value = soft_loss(student, certain, 1.0, loss, LABELS)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_squared_error_is_the_limit_of_kl_as_the_temperature_grows() -> None:
    """Hinton et al., section 2.1."""
    student, teacher, temperature = logits(0), logits(1), 1e4
    log_p = torch.tensor(log_softmax(teacher / temperature))
    by_name = {
        loss: temperature**2 * float(soft_loss(torch.tensor(student), log_p, temperature, loss))
        for loss in ("kl", "mse", "reverse_kl")
    }
    assert by_name["kl"] == pytest.approx(by_name["mse"], rel=1e-3)
    assert by_name["reverse_kl"] == pytest.approx(by_name["mse"], rel=1e-3)


def test_decoupled_with_the_mass_of_the_others_is_kl() -> None:
    """Zhao et al., equation 6: KL = TCKD + (1 - p) NCKD."""
    for row in range(BATCH):
        student = torch.tensor(logits(0)[row : row + 1])
        log_p = torch.tensor(log_softmax(logits(1)[row : row + 1]))
        label = LABELS[row : row + 1]
        beta = 1 - float(log_p[0, label].exp())
        value = soft_loss(student, log_p, 1.0, f"dkd:{beta!r}", label)
        assert float(value) == pytest.approx(float(soft_loss(student, log_p, 1.0)))


def test_the_jensen_shannon_divergence_is_symmetric_and_at_most_log_2() -> None:
    p, q = (torch.tensor(log_softmax(20 * logits(seed))) for seed in (0, 1))
    forward, backward = soft_loss(p, q, 1.0, "js"), soft_loss(q, p, 1.0, "js")
    torch.testing.assert_close(forward, backward)
    assert 0.3 < float(forward) <= math.log(2)


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        ("dkd", None, "loss dkd needs the label of every sample"),
        ("dkd", torch.tensor([0, 1, 2, 3, 4, -1]), "or samples without a label; use kl"),
        ("dkd", MixedLabels(LABELS, LABELS, torch.zeros(BATCH)), "this batch has mixed samples"),
    ],
)
def test_decoupled_without_plain_labels_is_refused(
    loss: str, labels: Tensor | None, message: str
) -> None:
    student = torch.tensor(logits(0))
    with pytest.raises(SettingsError, match=message):
        soft_loss(student, torch.log_softmax(student, -1), 1.0, loss, labels)


def test_the_squared_error_of_a_few_classes_is_refused() -> None:
    with pytest.raises(SettingsError, match="mse compares the logits of all classes, but topk and"):
        soft_loss(torch.tensor(logits(0)), sparse_targets(), 1.0, "mse")


@pytest.mark.parametrize("spec", ["", "KL", "kl:2", "dkd:", "dkd:-1", "dkd:nan", "dkd:1e9", "l2"])
def test_a_loss_that_is_not_known_is_refused(spec: str) -> None:
    with pytest.raises(SettingsError, match=rf"loss '{spec}' is unknown; expected one of kl, reve"):
        parse_loss(spec)


def test_a_loss_may_have_its_parameter() -> None:
    assert parse_loss("dkd") == ("dkd", 8.0)
    assert parse_loss("dkd:0.5") == ("dkd", 0.5)
