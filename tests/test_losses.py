"""The loss against its closed form in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.losses import Loss, distillation_loss, hard_loss, soft_loss
from softcache.types import MixedLabels

Array = npt.NDArray[np.float64]

BATCH, CLASSES = 6, 5
LABELS = [0, 4, -1, 2, -100, 1]  # two are unlabelled


def log_softmax(logits: Array) -> Array:
    normalized: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


def soft_oracle(student: Array, teacher: Array, temperature: float) -> float:
    """Mean of KL(teacher ‖ student) at the temperature, from the logits of both."""
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def hard_oracle(student: Array, labels: npt.NDArray[np.int64]) -> float:
    labelled = np.flatnonzero(labels >= 0)
    return float(-log_softmax(student)[labelled, labels[labelled]].mean())


def oracle(
    student: Array, teacher: Array, labels: npt.NDArray[np.int64], temperature: float, alpha: float
) -> float:
    soft = soft_oracle(student, teacher, temperature)
    return alpha * temperature**2 * soft + (1 - alpha) * hard_oracle(student, labels)


@pytest.fixture
def student() -> Array:
    return np.random.default_rng(0).normal(0, 3, (BATCH, CLASSES))


@pytest.fixture
def teacher() -> Array:
    return np.random.default_rng(1).normal(0, 3, (BATCH, CLASSES))


def loss_of(
    student: Array | Tensor,
    teacher: Array | None,
    labels: list[int] = LABELS,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
) -> Loss:
    logits = torch.as_tensor(student, dtype=torch.float32)
    log_p = None if teacher is None else torch.tensor(log_softmax(teacher / temperature)).float()
    return distillation_loss(
        logits, log_p, torch.tensor(labels), temperature=temperature, alpha=alpha
    )


def gradient(student: Array, teacher: Array | None, **options: Any) -> Array:
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss_of(logits, teacher, **options).total.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad.double().numpy()


# values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_total_and_parts_are_those_of_the_closed_form(
    student: Array, teacher: Array, temperature: float, alpha: float
) -> None:
    labels = np.array(LABELS)
    loss = loss_of(student, teacher, temperature=temperature, alpha=alpha)
    expected = oracle(student, teacher, labels, temperature, alpha)
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    assert float(loss.soft) == pytest.approx(soft_oracle(student, teacher, temperature), rel=1e-4)
    expected_hard = hard_oracle(student, labels) if alpha < 1 else 0
    assert float(loss.hard) == pytest.approx(expected_hard, rel=1e-5)


def test_the_soft_loss_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2
    log_p = torch.tensor([[0.75, 0.25]]).log()
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert float(soft_loss(torch.zeros(1, 2), log_p, 1.0)) == pytest.approx(expected, rel=1e-6)
    # not the other way round, which is 1/2 log 2/3 + 1/2 log 2
    assert expected != pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2), rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_soft_loss_of_equal_distributions_is_zero(temperature: float, scale: float) -> None:
    # the cross-entropy of p with itself, which is sometimes called KL, is the entropy, not 0
    logits = scale * np.random.default_rng(0).normal(size=(BATCH, CLASSES))
    moved = logits + np.arange(BATCH)[:, None]  # a constant added to the logits changes nothing
    assert float(loss_of(moved, logits, temperature=temperature).soft) == pytest.approx(0, abs=1e-6)
    assert np.abs(gradient(moved, logits, temperature=temperature, alpha=1.0)).max() < 1e-6


def test_the_soft_loss_is_not_negative_and_grows_with_the_distance(teacher: Array) -> None:
    away = np.random.default_rng(2).normal(size=teacher.shape)
    losses = [float(loss_of(teacher + step * away, teacher).soft) for step in (0, 0.1, 1, 10)]
    assert losses == sorted(losses)
    assert losses[0] < 1e-7 < losses[1]


def test_it_is_a_mean_over_the_batch(student: Array, teacher: Array) -> None:
    once = loss_of(student, teacher)
    twice = loss_of(np.tile(student, (2, 1)), np.tile(teacher, (2, 1)), LABELS * 2)
    for part, same in zip(once, twice, strict=True):
        assert float(part) == pytest.approx(float(same), rel=1e-5)


def test_classes_that_the_teacher_gives_nothing_add_nothing() -> None:
    # as a cache stores them: the lowest float16 represents a probability of 0
    log_p = torch.tensor([[0.0, -65504.0, -65504.0]])
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    loss = soft_loss(logits, log_p, 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(
        hard_oracle(np.array([[1.0, 2, 3]]), np.array([0])), rel=1e-6
    )
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_logits_far_apart_give_no_infinity() -> None:
    logits = np.array([[300.0, -300.0, 0.0]])
    loss = loss_of(logits, -logits, [1], temperature=1.0, alpha=0.5)
    assert float(loss.soft) == pytest.approx(600)
    assert float(loss.hard) == pytest.approx(600)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(
    student: Array, teacher: Array, dtype: torch.dtype
) -> None:
    half = torch.tensor(student).to(dtype)
    log_p = torch.tensor(log_softmax(teacher)).float()
    loss = distillation_loss(half, log_p, torch.tensor(LABELS), temperature=1.0, alpha=0.5)
    assert all(part.dtype == torch.float32 for part in loss)
    rounded = half.double().numpy()
    assert float(loss.total) == pytest.approx(
        oracle(rounded, teacher, np.array(LABELS), 1.0, 0.5), rel=1e-4
    )


# gradients


def finite_differences(function: Any, point: Array, step: float = 1e-5) -> Array:  # noqa: ANN401
    differences = np.empty_like(point)
    for index in np.ndindex(point.shape):
        move = np.zeros_like(point)
        move[index] = step
        differences[index] = (function(point + move) - function(point - move)) / (2 * step)
    return differences


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_finite_differences(
    student: Array, teacher: Array, temperature: float, alpha: float
) -> None:
    expected = finite_differences(
        lambda z: oracle(z, teacher, np.array(LABELS), temperature, alpha), student
    )
    grad = gradient(student, teacher, temperature=temperature, alpha=alpha)
    np.testing.assert_allclose(grad, expected, atol=1e-6, rtol=1e-4)
    assert np.abs(expected).max() > 0.01


def test_finite_differences_tell_one_temperature_from_another(
    student: Array, teacher: Array
) -> None:
    expected = finite_differences(lambda z: oracle(z, teacher, np.array(LABELS), 4.0, 0.9), student)
    grad = gradient(student, teacher, temperature=3.9, alpha=0.9)
    assert not np.allclose(grad, expected, atol=1e-6, rtol=1e-4)


def test_the_factor_of_the_squared_temperature(student: Array, teacher: Array) -> None:
    for temperature in (1.0, 2.0, 8.0):
        loss = loss_of(student, teacher, temperature=temperature, alpha=1.0)
        assert float(loss.total) == pytest.approx(temperature**2 * float(loss.soft), rel=1e-6)


def test_the_gradient_keeps_its_size_as_the_temperature_grows(
    student: Array, teacher: Array
) -> None:
    # Hinton et al. (arXiv 1503.02531), equation 4: for large T the soft gradient is (z - v) / (N T²) for
    # logits z and v with a mean of 0; our factor T² cancels the 1 / T²
    centred = [logits - logits.mean(-1, keepdims=True) for logits in (student, teacher)]
    expected = (centred[0] - centred[1]) / (CLASSES * BATCH)
    for temperature in (100.0, 400.0):
        grad = gradient(student, teacher, temperature=temperature, alpha=1.0)
        np.testing.assert_allclose(grad, expected, atol=0.05 * np.abs(expected).max())


def test_no_gradient_goes_to_the_teacher(student: Array, teacher: Array) -> None:
    log_p = torch.tensor(log_softmax(teacher)).float()
    logits = torch.tensor(student).float().requires_grad_()
    loss = distillation_loss(logits, log_p, torch.tensor(LABELS), temperature=1.0, alpha=0.5)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is None


# labels


def test_unlabelled_samples_take_no_part_in_the_hard_loss(student: Array, teacher: Array) -> None:
    labels = np.array(LABELS)
    labelled = torch.tensor(student[labels >= 0]).float()
    alone = hard_loss(labelled, torch.tensor(labels[labels >= 0]))
    assert float(loss_of(student, teacher).hard) == pytest.approx(float(alone), rel=1e-6)
    grad = gradient(student, teacher, alpha=0.0)
    assert not grad[labels < 0].any()
    assert (grad[labels >= 0] != 0).all()


def test_unlabelled_samples_take_part_in_the_soft_loss(student: Array, teacher: Array) -> None:
    labelled, unlabelled = (
        loss_of(student, teacher, [0] * BATCH),
        loss_of(student, teacher, [-1] * BATCH),
    )
    assert float(labelled.soft) == float(unlabelled.soft)
    assert (gradient(student, teacher, labels=[-1] * BATCH) != 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_batch_without_labels_has_a_hard_loss_of_zero_and_no_nan(
    student: Array, teacher: Array, alpha: float
) -> None:
    labels = [-1] * BATCH
    loss = loss_of(student, teacher, labels, alpha=alpha)
    assert float(loss.hard) == 0
    assert float(loss.total) == pytest.approx(alpha * 16 * soft_oracle(student, teacher, 4.0))
    assert np.isfinite(gradient(student, teacher, labels=labels, alpha=alpha)).all()


def test_torchs_own_mean_would_be_nan_there(student: Array) -> None:
    # shows that the test above can fail
    mean = torch.nn.functional.cross_entropy(
        torch.tensor(student), torch.full((BATCH,), -1), ignore_index=-1
    )
    assert mean.isnan()


# alpha


def test_alpha_one_listens_to_the_teacher_alone(student: Array, teacher: Array) -> None:
    loss = loss_of(student, teacher, alpha=1.0)
    assert float(loss.hard) == 0
    for labels in (LABELS, [0] * BATCH):
        grad = gradient(student, teacher, labels=labels, alpha=1.0)
        assert np.array_equal(grad, gradient(student, teacher, labels=[-1] * BATCH, alpha=1.0))


def test_alpha_zero_listens_to_the_labels_alone(student: Array, teacher: Array) -> None:
    without = loss_of(student, None, alpha=0.0)
    assert float(without.soft) == 0
    assert (
        float(without.total)
        == float(without.hard)
        == float(loss_of(student, teacher, alpha=0.0).total)
    )
    assert np.array_equal(gradient(student, None, alpha=0.0), gradient(student, teacher, alpha=0.0))


def test_at_temperature_one_a_certain_teacher_is_the_label(student: Array) -> None:
    labels = [0, 1, 2, 3, 4, 0]
    certain = np.where(np.eye(CLASSES)[labels] > 0, 0.0, -1e4)
    losses = [
        float(loss_of(student, certain, labels, temperature=1.0, alpha=alpha).total)
        for alpha in (0.0, 0.5, 1.0)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# labels of mixed samples

PARTNERS = [3, 4, 0, -1, -100, 0]  # with LABELS, samples 0, 1 and 5 have both labels
WEIGHTS = [0.25, 0.9, 0.5, 0.5, 0.5, 0.0]  # partner weights, 1 - lambda


def mixed(
    own: list[int] = LABELS, partners: list[int] = PARTNERS, weights: list[float] = WEIGHTS
) -> MixedLabels:
    return MixedLabels(torch.tensor(own), torch.tensor(partners), torch.tensor(weights))


def mixed_oracle(student: Array, labels: MixedLabels) -> float:
    """Mean cross-entropy with 1 - weight of one class and weight of another, where both are known."""
    log_q, losses = log_softmax(student), []
    for row, own, partner, weight in zip(log_q, *(part.tolist() for part in labels), strict=True):
        if own >= 0 and partner >= 0:
            target = np.zeros(CLASSES)
            target[own] += 1 - weight
            target[partner] += weight
            losses.append(-(target * row).sum())
    return float(np.mean(losses))


def hard_of(student: Array, labels: MixedLabels | Tensor) -> float:
    return float(hard_loss(torch.tensor(student, dtype=torch.float32), labels))


def test_mixed_labels_are_those_of_the_closed_form(student: Array) -> None:
    assert hard_of(student, mixed()) == pytest.approx(mixed_oracle(student, mixed()), rel=1e-5)


def test_exchanged_weights_would_be_noticed(student: Array) -> None:
    exchanged = mixed(PARTNERS, LABELS)
    assert mixed_oracle(student, exchanged) != pytest.approx(
        mixed_oracle(student, mixed()), rel=0.1
    )


def test_the_mixed_loss_by_hand() -> None:
    # probabilities (1/2, 1/4, 1/4); 3/4 of class 0 and 1/4 of class 2
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    expected = 0.75 * np.log(2) + 0.25 * np.log(4)
    assert float(hard_loss(logits, mixed([0], [2], [0.25]))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("weight", "labels"), [(0.0, LABELS), (1.0, PARTNERS)])
def test_a_weight_of_zero_or_one_leaves_one_label(
    student: Array, weight: float, labels: list[int]
) -> None:
    labelled = [0, 1, 5]
    loss = hard_of(student, mixed(weights=[weight] * BATCH))
    expected = hard_oracle(student[labelled], np.array(labels)[labelled])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_sample_mixed_with_one_of_its_class_is_of_that_class(student: Array) -> None:
    loss = hard_of(student, mixed(LABELS, LABELS))
    assert loss == pytest.approx(hard_of(student, torch.tensor(LABELS)), rel=1e-5)


def test_mixed_samples_without_both_labels_give_zero_and_a_gradient_without_nan(
    student: Array,
) -> None:
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = hard_loss(logits, mixed([-1] * BATCH, LABELS))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_unlabelled_partner_keeps_its_sample_out_of_the_mean_and_the_gradient(
    student: Array,
) -> None:
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    hard_loss(logits, mixed()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.any(1).tolist() == [True, True, False, False, False, True]


def test_the_gradient_of_mixed_labels_is_that_of_finite_differences(student: Array) -> None:
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    hard_loss(logits, mixed()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    expected = finite_differences(lambda z: mixed_oracle(z, mixed()), student)
    np.testing.assert_allclose(logits.grad.double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_mixed_labels_are_weighed_against_the_teacher_as_plain_ones_are(
    student: Array, teacher: Array, alpha: float
) -> None:
    logits = torch.tensor(student, dtype=torch.float32)
    log_p = torch.tensor(log_softmax(teacher / 4.0)).float()
    loss = distillation_loss(logits, log_p, mixed(), temperature=4.0, alpha=alpha)
    soft, hard = soft_oracle(student, teacher, 4.0), mixed_oracle(student, mixed())
    expected = alpha * 16 * soft + (1 - alpha) * hard
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.0},
            r"temperature is 0\.0 and alpha is 0\.7; expected a temperature above 0",
        ),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"alpha": 2.0}, r"alpha is 2\.0; expected .* alpha from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    options: dict[str, float], message: str, student: Array
) -> None:
    with pytest.raises(SettingsError, match=message):
        distillation_loss(
            torch.tensor(student), None, torch.zeros(BATCH, dtype=torch.int64),
            **({"temperature": 4.0, "alpha": 0.7} | options),  # type: ignore[arg-type]
        )  # fmt: skip


def test_different_shapes_are_refused(student: Array, teacher: Array) -> None:
    with pytest.raises(
        SettingsError, match=r"targets have shape \(6, 4\) and logits \(6, 5\); expected th"
    ):
        loss_of(student, teacher[:, :4])
