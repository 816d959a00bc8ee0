"""What moves a student: its optimizer, its learning rate over time, the average of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from softcache.train.config import StudentConfig


def make_optimizer(model: nn.Module, config: StudentConfig) -> Optimizer:
    """AdamW, or SGD with Nesterov's momentum; biases and norms are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim > 1],
            "weight_decay": config.effective_weight_decay,
        },
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(
            groups, lr=config.peak_learning_rate, momentum=momentum, nesterov=momentum > 0
        )
    return torch.optim.AdamW(groups, lr=config.peak_learning_rate)


def make_schedule(optimizer: Optimizer, config: StudentConfig, steps: int) -> LambdaLR:
    """The learning rate of each of `steps` steps."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(config.schedule, step, steps, config.warmup),
    )


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then constant or half a cosine to 0 (Loshchilov and Hutter, 1608.03983)."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers (Polyak and Juditsky, 1992).

    At its beginning the decay is lower, (1 + n) / (10 + n) after n steps, so that the first weights are
    soon forgotten.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        done = int(updates)
        keep = min(decay, (1 + done) / (10 + done))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.device), 1 - keep)
            else:
                average.copy_(value)  # counters

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
