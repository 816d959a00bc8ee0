"""The loss of many rows in chunks is that of all of them at once, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softcache.chunked_loss import chunked_loss
from softcache.divergences import kl
from softcache.losses import Loss, label_weights, reduce_losses, row_losses
from softcache.types import SparseTargets, StoredTargets, Targets

ROWS, WIDTH, CLASSES = 23, 5, 11


@pytest.fixture
def states() -> Tensor:
    """Hidden states of rows, (R, H)."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, CLASSES)


def labels(unlabelled: int) -> Tensor:
    given = torch.arange(ROWS) * 7 % CLASSES
    given[:unlabelled] = -1
    return given


def dense() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.log_softmax(3 * torch.randn(ROWS, CLASSES, generator=generator), -1)


def sparse() -> SparseTargets:
    log_probs, ids = dense().topk(3)
    rest = torch.log1p(-log_probs.exp().sum(-1)) - torch.tensor(CLASSES - 3.0).log()
    return SparseTargets(ids, log_probs, rest, CLASSES)


def stored() -> StoredTargets:
    return StoredTargets({"rows": dense()}, lambda arrays: arrays["rows"], ROWS, CLASSES)


def gradients(loss: Loss, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, tensors))


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
@pytest.mark.parametrize("targets", [dense, sparse, stored, lambda: None])
@pytest.mark.parametrize("unlabelled", [0, 5, ROWS])
def test_chunks_equal_the_whole(
    states: Tensor, head: nn.Linear, chunk: int, targets: object, unlabelled: int
) -> None:
    given = targets()  # type: ignore[operator]
    weights = torch.linspace(0.5, 2, CLASSES)
    states.requires_grad_()
    mean_weight = label_weights(labels(3), weights).mean()  # of a batch that the rows are a part of
    whole = reduce_losses(
        row_losses(
            head(states),
            given.decoded() if isinstance(given, StoredTargets) else given,
            labels(unlabelled),
            class_weights=weights,
            temperature=2.0,
            alpha=0.3,
            label_smoothing=0.1,
        ),
        temperature=2.0,
        alpha=0.3,
        mean_weight=mean_weight,
    )
    chunked = chunked_loss(
        states,
        head,
        list(head.parameters()),
        labels(unlabelled),
        given,
        classes=CLASSES,
        class_weights=weights,
        mean_weight=mean_weight,
        chunk_rows=chunk,
        temperature=2.0,
        alpha=0.3,
        label_smoothing=0.1,
    )
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one, other)
    if given is None and unlabelled == ROWS:
        assert float(chunked.total) == 0
        return
    tensors = states, *head.parameters()
    for one, other in zip(gradients(chunked, *tensors), gradients(whole, *tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_without_rows_the_loss_is_zero_and_has_gradients(head: nn.Linear) -> None:
    nothing = torch.zeros(0, WIDTH, requires_grad=True)
    loss = chunked_loss(
        nothing,
        head,
        list(head.parameters()),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, CLASSES),
        classes=CLASSES,
        temperature=1.0,
        alpha=0.5,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert [float(part) for part in loss] == [0, 0, 0]
    assert nothing.grad is not None


def test_of_few_rows_at_a_time_only_these_have_logits(states: Tensor, head: nn.Linear) -> None:
    seen: list[int] = []

    def counted(part: Tensor) -> Tensor:
        seen.append(len(part))
        logits: Tensor = head(part)
        return logits

    targets: Targets = dense()
    chunked_loss(
        states.requires_grad_(),
        counted,
        list(head.parameters()),
        labels(0),
        targets,
        classes=CLASSES,
        temperature=1.0,
        alpha=1.0,
        chunk_rows=6,
    )
    assert seen == [6, 6, 6, 5]


def bucketed(head: Tensor, ids: Tensor, tail: float, classes: int) -> SparseTargets:
    """Targets of one row whose tail has this mass."""
    rest = torch.tensor([tail / (classes - len(ids))]).log()
    return SparseTargets(ids[None], head.log()[None], rest, classes, bucket=True)


def test_a_tail_is_one_category() -> None:
    targets = bucketed(torch.tensor([0.5, 0.2]), torch.tensor([0, 1]), 0.3, 5)
    student = torch.tensor([[0.6, 0.3, 0.05, 0.03, 0.02]]).log()
    assert float(kl(student, targets)) == pytest.approx(0.1573, abs=1e-4)
    # however the student shares its tail out, and 0 where the masses agree
    other = torch.tensor([[0.6, 0.3, 0.0999, 5e-5, 5e-5]]).log()
    assert float(kl(other, targets)) == pytest.approx(0.1573, abs=1e-4)
    equal = torch.tensor([[0.5, 0.2, 0.29, 0.005, 0.005]]).log()
    assert float(kl(equal, targets)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_a_tail_is_never_negative_and_at_most_that_of_all_classes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.log_softmax(4 * torch.randn(50, 30, generator=generator), -1)
    student = torch.log_softmax(4 * torch.randn(50, 30, generator=generator), -1)
    top, ids = teacher.topk(4)
    mass = torch.log1p(-top.exp().sum(-1))
    targets = SparseTargets(ids, top, mass - torch.tensor(26.0).log(), 30, bucket=True)
    bucket, whole = kl(student, targets), kl(student, teacher)
    assert (bucket >= -1e-6).all()
    assert (bucket <= whole + 1e-5).all()


def test_a_tail_of_nothing_is_finite() -> None:
    ids, log_probs = torch.tensor([[0, 1]]), torch.tensor([[0.0, -torch.inf]])
    targets = SparseTargets(ids, log_probs, torch.tensor([-torch.inf]), 4, bucket=True)
    logits = torch.tensor([[90.0, 0.0, -50.0, -80.0]], requires_grad=True)
    loss = kl(torch.log_softmax(logits, -1), targets).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
