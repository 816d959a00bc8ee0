"""The optimizer of a student, its learning rate schedule, and the moving average of its weights."""

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
    """AdamW, or SGD with Nesterov momentum, without weight decay on biases and norm parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim > 1],
            "weight_decay": config.effective_weight_decay,
        },
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(
            groups, lr=config.peak_learning_rate, momentum=momentum, nesterov=momentum > 0
        )
    return torch.optim.AdamW(groups, lr=config.peak_learning_rate)


def make_schedule(optimizer: Optimizer, config: StudentConfig, steps: int) -> LambdaLR:
    """A learning rate schedule of `steps` steps."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(config.schedule, step, steps, config.warmup),
    )


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of the peak learning rate.

    Linear warm-up, then either constant or cosine decay to 0 (Loshchilov and Hutter, "SGDR: Stochastic
    gradient descent with warm restarts", arXiv 1608.03983, without restarts).

    Args:
        schedule: cosine or constant.
        step: counted from 0.
        steps: steps of the whole run.
        warmup: share of the steps spent on warm-up, in [0, 1).
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    decay_steps = max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers (Polyak and Juditsky, 1992).

    The decay is at most (1 + n) / (10 + n) after n steps, so that the initial weights are forgotten soon.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        done = int(updates)
        keep = min(decay, (1 + done) / (10 + done))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.device), 1 - keep)
            else:
                average.copy_(value)  # a counter of a norm layer

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
