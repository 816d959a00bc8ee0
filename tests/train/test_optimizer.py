"""The learning rate, the optimizer and early stopping of a student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.data.source import ArraySource
from softcache.errors import SettingsError
from softcache.losses import distillation_loss, hard_loss
from softcache.models.evaluate import Evaluation
from softcache.train.config import LEARNING_RATES, WEIGHT_DECAYS, StudentConfig
from softcache.train.optimizer import learning_rate_factor, make_optimizer
from softcache.train.run_folder import make_run_folder
from softcache.train.student import Student
from softcache.types import MixedLabels, SparseTargets
from tests.train.test_student import STEPS, WARMUP, make_batch, make_test_student, parameters

ANY_SOURCE = ArraySource("any", np.zeros((1, 8), np.float32), np.zeros(1, np.int64))


# the learning rate


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_rises_in_a_line_to_its_highest(schedule: str) -> None:
    warmup = round(WARMUP * STEPS)
    rates = [learning_rate_factor(schedule, step, STEPS, WARMUP) for step in range(warmup + 1)]
    assert rates == pytest.approx([(step + 1) / warmup for step in range(warmup)] + [1.0])


def test_the_rate_falls_along_half_a_cosine() -> None:
    warmup = round(WARMUP * STEPS)
    rates = [
        learning_rate_factor("cosine", step, STEPS, WARMUP) for step in range(warmup, STEPS + 1)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[len(rates) // 2] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0)
    assert 0 < rates[-2] < 1e-3


def test_a_constant_rate_stays() -> None:
    assert {learning_rate_factor("constant", step, STEPS, WARMUP) for step in range(10, STEPS)} == {
        1.0
    }


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 21])
def test_a_run_of_few_steps_has_a_rate_at_each(schedule: str, steps: int) -> None:
    rates = [learning_rate_factor(schedule, step, steps, WARMUP) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[0] == 1.0
    # the scheduler also computes a rate after the last step
    assert 0 <= learning_rate_factor(schedule, steps, steps, WARMUP) <= 1


def test_the_optimizer_follows_the_schedule(tmp_path: Path) -> None:
    student, (inputs, labels, targets) = make_test_student(tmp_path, steps=40), make_batch()
    rates = []
    for _ in range(40):
        rates.append(student.optimizer.param_groups[0]["lr"])
        student.step(inputs, labels, targets)
    assert rates == pytest.approx(
        [0.01 * learning_rate_factor("cosine", n, 40, WARMUP) for n in range(40)]
    )


def test_biases_and_norms_are_not_decayed(tmp_path: Path) -> None:
    student = make_test_student(tmp_path, nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)))
    decays = {
        tuple(p.shape): group["weight_decay"]
        for group in student.optimizer.param_groups
        for p in group["params"]
    }
    assert decays == {(5, 8): 0.1, (5,): 0.0}


# the optimizer


def steps(folder: Path, count: int = 6, model: nn.Module | None = None, **settings: Any) -> Student:
    """A student after `count` steps on the same batch."""
    torch.manual_seed(0)
    student = make_test_student(folder, model or nn.Linear(8, 5), **settings)
    for _ in range(count):
        student.step(*make_batch())
    return student


def test_sgd_is_nesterovs_with_the_same_groups(tmp_path: Path) -> None:
    student = steps(tmp_path, optimizer="sgd", momentum=0.8)
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    inputs, labels, targets = make_batch()
    groups = [
        {"params": [model.weight], "weight_decay": 0.1},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.8, nesterov=True)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * learning_rate_factor("cosine", step, STEPS, WARMUP)
        loss = distillation_loss(model(inputs), targets, labels, temperature=1.0, alpha=0.5).total
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(parameters(student), parameters_of(model))


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_settings_left_out_are_the_optimizers_own(optimizer: str) -> None:
    config = StudentConfig(student="mlp:1", optimizer=optimizer)
    group = make_optimizer(nn.Linear(2, 2), config).param_groups[0]
    assert group["lr"] == LEARNING_RATES[optimizer]
    assert group["weight_decay"] == WEIGHT_DECAYS[optimizer]


def test_frozen_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, StudentConfig(student="mlp:1"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_batch_in_parts_is_the_whole_batch(tmp_path: Path) -> None:
    whole = steps(tmp_path)
    for count in (2, 5, 100):  # of 12 samples, with at least 2 in each
        split = steps(tmp_path, micro_batches=count)
        torch.testing.assert_close(parameters(split), parameters(whole))
        torch.testing.assert_close(split.losses, whole.losses)


def test_sparse_targets_and_mixed_labels_come_in_parts_too(tmp_path: Path) -> None:
    inputs, labels, targets = make_batch()
    log_probs, ids = targets.topk(2, dim=-1)
    rest = torch.log((1 - log_probs.exp().sum(-1)) / 3)
    sparse = SparseTargets(ids, log_probs, rest, 5)
    mixed = MixedLabels(labels, labels.flip(0), torch.full((12,), 0.25))
    results = []
    for count in (1, 3):
        torch.manual_seed(0)
        student = make_test_student(tmp_path, nn.Linear(8, 5), micro_batches=count)
        student.step(inputs, mixed, sparse)
        results.append(parameters(student))
    torch.testing.assert_close(*results)


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    norms = []
    for max_grad_norm in (None, 0.01):
        student = make_test_student(
            tmp_path, nn.Linear(8, 5), optimizer="sgd", max_grad_norm=max_grad_norm
        )
        student.step(*make_batch())
        grads = [p.grad for p in student.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-4)


def test_the_average_follows_the_weights_and_is_what_counts(tmp_path: Path) -> None:
    student = make_test_student(
        tmp_path, nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), ema=0.9
    )
    expected: dict[str, Tensor] = {}
    for step in range(30):
        student.step(*make_batch())
        keep = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for name, tensor in student.model.state_dict().items():
            if tensor.is_floating_point():
                before = expected.get(name, torch.zeros_like(tensor))
                expected[name] = keep * before + (1 - keep) * tensor
    for name, tensor in expected.items():
        torch.testing.assert_close(student.final_model.state_dict()[name], tensor)
    assert student.final_model.state_dict()["1.num_batches_tracked"] == 30
    assert student.final_model is not student.model


def test_smoothed_labels_are_part_of_a_uniform_one(tmp_path: Path) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator())
    labels = torch.tensor([0, 1, -1, 4])
    plain, uniform = hard_loss(logits, labels), -torch.log_softmax(logits, -1)[labels >= 0].mean()
    smoothed = hard_loss(logits, labels, 0.2)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * uniform)


# early stopping


def counted(student: Student, errors: list[int], patience: int) -> list[float]:
    """Train epochs that end with the given errors; one weight after each epoch."""
    weights = []
    for epoch, count in enumerate(errors):
        if student.stopped:
            break
        student.step(*make_batch())
        with patch(
            "softcache.train.student.evaluate_student",
            lambda *_, count=count: Evaluation(count, 100),
        ):
            student.finish_epoch(epoch, ANY_SOURCE, 0, patience)
        weights.append(float(parameters(student)[0]))
    return weights


def test_a_patient_run_stops_and_goes_back_to_its_best(tmp_path: Path) -> None:
    student = make_test_student(tmp_path, nn.Linear(8, 5))
    make_run_folder(tmp_path, [])
    weights = counted(student, [50, 30, 40, 30, 35, 10], patience=3)
    assert len(weights) == 5
    assert student.stopped == "no fewer errors in 3 epoch(s)"
    student.restore_best()
    assert float(parameters(student)[0]) == weights[1]
    assert student.evaluation == Evaluation(30, 100)


def test_a_run_that_gets_better_goes_on(tmp_path: Path) -> None:
    student = make_test_student(tmp_path, nn.Linear(8, 5))
    make_run_folder(tmp_path, [])
    weights = counted(student, [50, 49, 49, 48, 48, 47], patience=2)
    assert len(weights) == 6
    assert student.stopped is None
    student.restore_best()
    assert float(parameters(student)[0]) == weights[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is lion; expected one of adamw, sgd"),
        ({"loss": "l1"}, "loss 'l1' is unknown"),
        ({"momentum": 1.0}, r"momentum is 1\.0; expected a number from 0 to below 1"),
        ({"ema": -0.1}, r"ema is -0\.1; expected"),
        ({"label_smoothing": 1.0}, r"label-smoothing is 1\.0; expected"),
        ({"warmup": 2.0}, r"warmup is 2\.0; expected"),
        ({"max_grad_norm": 0.0}, r"max-grad-norm is 0\.0; expected a number above 0"),
        ({"max_grad_norm": math.nan}, "max-grad-norm is nan; expected a number above 0"),
        ({"micro_batches": 0}, "micro-batches is 0; expected 1 or more"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        StudentConfig(student="mlp:1", **settings)
