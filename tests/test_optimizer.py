"""What moves a student: its rate, its optimizer, the average of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from softcache.optimizer import learning_rate_factor
from tests.test_learner import STEPS, WARMUP, a_batch, a_learner

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
    assert (
        0 <= learning_rate_factor(schedule, steps, steps, WARMUP) <= 1
    )  # asked for after the last step


def test_the_optimizer_follows_the_schedule(tmp_path: Path) -> None:
    learner, (inputs, labels, targets) = a_learner(tmp_path, steps=40), a_batch()
    used = []
    for _ in range(40):
        used.append(learner.optimizer.param_groups[0]["lr"])
        learner.step(inputs, labels, targets)
    assert used == pytest.approx(
        [0.01 * learning_rate_factor("cosine", n, 40, WARMUP) for n in range(40)]
    )


def test_biases_and_norms_are_not_decayed(tmp_path: Path) -> None:
    learner = a_learner(tmp_path, nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)))
    decays = {
        tuple(p.shape): group["weight_decay"]
        for group in learner.optimizer.param_groups
        for p in group["params"]
    }
    assert decays == {(5, 8): 0.1, (5,): 0.0}
