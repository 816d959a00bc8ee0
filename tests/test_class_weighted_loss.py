"""The hard loss with weights of the classes, and the loss of a batch that comes in parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from softcache.losses import (
    Loss,
    distillation_loss,
    hard_loss,
    label_weights,
    reduce_losses,
    row_losses,
)
from softcache.types import Labels, MixedLabels

BATCH, CLASSES = 12, 5
WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0])


def make_logits(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, CLASSES, generator=generator).to(dtype)


def partly_labelled() -> Tensor:
    """Labels (B,), most of which are in the first half."""
    return torch.tensor([0, 1, 2, 3, 4, 1, -1, -1, -1, 4, -1, -1])


def mixed() -> MixedLabels:
    partner_weights = torch.linspace(0, 1, BATCH)
    return MixedLabels(partly_labelled(), partly_labelled().roll(3), partner_weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_weighted_mean_is_torchs(smoothing: float, dtype: torch.dtype) -> None:
    logits, labels = make_logits(dtype=dtype), partly_labelled()
    wide = logits if dtype == torch.float64 else logits.float()
    expected = functional.cross_entropy(
        wide,
        labels,
        weight=WEIGHTS.to(wide),
        ignore_index=-1,
        label_smoothing=smoothing,
    )
    loss = hard_loss(logits, labels, smoothing, WEIGHTS)
    assert loss.dtype == wide.dtype
    torch.testing.assert_close(loss, expected)


def test_the_weighted_mean_by_hand() -> None:
    logits = make_logits()
    log_probs = logits.log_softmax(-1)
    labels = torch.tensor([1, 4, *[-1] * (BATCH - 2)])
    expected = -(3 * log_probs[0, 1] + 2 * log_probs[1, 4]) / 5
    torch.testing.assert_close(hard_loss(logits, labels, class_weights=WEIGHTS), expected)


def test_equal_weights_are_no_weights() -> None:
    logits = make_logits()
    for labels in (partly_labelled(), mixed()):
        weighted = hard_loss(logits, labels, 0.1, torch.full((CLASSES,), 7.0))
        torch.testing.assert_close(weighted, hard_loss(logits, labels, 0.1))


def test_each_label_of_a_mixture_has_its_own_weight() -> None:
    logits = make_logits()
    losses = -logits.log_softmax(-1)
    labels = MixedLabels(
        torch.tensor([0, 1, *[-1] * 10]),
        torch.tensor([1, 4, *[-1] * 10]),
        torch.tensor([0.25, 0.5, *[0.5] * 10]),
    )
    weights = [0.75 * 0.5, 0.25 * 3, 0.5 * 3, 0.5 * 2]
    parts = [losses[0, 0], losses[0, 1], losses[1, 1], losses[1, 4]]
    expected = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
    torch.testing.assert_close(hard_loss(logits, labels, class_weights=WEIGHTS), expected)
    torch.testing.assert_close(
        label_weights(labels, WEIGHTS)[:3], torch.tensor([0.75 * 0.5 + 0.25 * 3, 2.5, 0.0])
    )


def test_a_mixture_with_itself_is_the_sample() -> None:
    logits, labels = make_logits(), partly_labelled()
    both = MixedLabels(labels, labels, torch.full((BATCH,), 0.3))
    torch.testing.assert_close(
        hard_loss(logits, both, 0.1, WEIGHTS), hard_loss(logits, labels, 0.1, WEIGHTS)
    )


@pytest.mark.parametrize("labels", [torch.full((BATCH,), -1), torch.full((BATCH,), 3)])
def test_a_batch_without_weight_has_a_loss_of_zero_and_no_nan(labels: Tensor) -> None:
    logits = make_logits().requires_grad_()
    loss = hard_loss(logits, labels, class_weights=WEIGHTS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# a batch in parts


def taken(labels: Labels, rows: slice) -> Labels:
    if isinstance(labels, MixedLabels):
        return MixedLabels(*(tensor[rows] for tensor in labels))
    return labels[rows]


def loss_in_parts(
    edges: list[int], labels: Labels, class_weights: Tensor | None, *, by_part: bool = False
) -> tuple[Loss, Tensor]:
    """The loss of a batch cut at `edges`, and its gradient; `by_part` averages each part on its own."""
    logits = make_logits().requires_grad_()
    targets = make_logits(1).log_softmax(-1)
    mean_weight = label_weights(labels, class_weights).mean()
    sums = torch.zeros(3)
    for start, stop in itertools.pairwise(edges):
        rows = slice(start, stop)
        losses = row_losses(
            logits[rows],
            targets[rows],
            taken(labels, rows),
            temperature=2.0,
            alpha=0.3,
            label_smoothing=0.1,
            class_weights=class_weights,
        )
        loss = reduce_losses(
            losses, temperature=2.0, alpha=0.3, mean_weight=None if by_part else mean_weight
        )
        share = (stop - start) / BATCH
        (loss.total * share).backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([*loss]).detach() * share
    assert logits.grad is not None
    return Loss(*sums), logits.grad


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("labels", [partly_labelled(), mixed(), torch.full((BATCH,), -1)])
@pytest.mark.parametrize("edges", [[0, 6, 12], [0, 3, 6, 9, 12], [0, 1, 2, 7, 12], [0, 9, 12]])
def test_the_parts_of_a_batch_add_up_to_its_loss(
    edges: list[int], labels: Labels, class_weights: Tensor | None
) -> None:
    whole, gradient = loss_in_parts([0, BATCH], labels, class_weights)
    parts, sum_of_gradients = loss_in_parts(edges, labels, class_weights)
    torch.testing.assert_close([*parts], [*whole], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sum_of_gradients, gradient, atol=1e-6, rtol=1e-6)


def test_means_of_parts_would_not_add_up() -> None:
    whole, _ = loss_in_parts([0, BATCH], partly_labelled(), None)
    parts, _ = loss_in_parts([0, 6, 9, 12], partly_labelled(), None, by_part=True)
    torch.testing.assert_close(parts.soft, whole.soft)
    assert abs(float(parts.hard - whole.hard)) > 0.1


def test_the_whole_batch_in_one_part_is_the_distillation_loss_to_the_bit() -> None:
    logits, targets, labels = make_logits(), make_logits(1).log_softmax(-1), partly_labelled()
    rows = row_losses(logits, targets, labels, temperature=3.0, alpha=0.9)
    mean_weight = label_weights(labels).mean()
    loss = reduce_losses(rows, temperature=3.0, alpha=0.9, mean_weight=mean_weight)
    expected = distillation_loss(logits, targets, labels, temperature=3.0, alpha=0.9)
    assert torch.equal(torch.stack([*loss]), torch.stack([*expected]))
    assert torch.equal(expected.hard, hard_loss(logits, labels))
