"""The loss of many rows in chunks is that of all of them at once, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softcache.chunked_loss import chunked_loss
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
