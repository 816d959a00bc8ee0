"""The loss of a step is that of the whole batch, however many processes and micro-batches it is cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from softcache.train.accelerator import make_accelerator
from softcache.train.config import StudentConfig
from softcache.train.prepare import make_student
from softcache.train.student import Student
from softcache.types import Labels, MixedLabels
from tests.commands import softcache
from tests.train.loop_cases import metrics

BATCH, CLASSES = 16, 5
# most labelled samples are in the first quarter, the third has none
LABELS = torch.tensor([0, 1, 2, 3, 4, -1, -1, 1, -1, -1, -1, -1, -1, 0, -1, -1])
WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0])


def mixed() -> MixedLabels:
    return MixedLabels(LABELS, LABELS.roll(1), torch.linspace(0, 0.5, BATCH))


def step(
    labels: Labels, class_weights: Tensor | None, alpha: float = 0.3, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The losses (3,) of one step, and the gradients of all parameters."""
    torch.manual_seed(0)
    student = make_student(
        nn.Linear(8, CLASSES),
        make_accelerator("cpu", "fp32"),
        StudentConfig(student="mlp:1", **settings),
        name="student",
        folder=Path(),
        alpha=alpha,
        temperature=2.0,
        classes=CLASSES,
        steps=10,
        class_weights=class_weights,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, 8, generator=generator)
    targets = torch.randn(BATCH, CLASSES, generator=generator).log_softmax(-1)
    student.step(inputs, labels, targets)
    gradients = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return student.losses[0], torch.cat(gradients)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("labels", [LABELS, mixed(), torch.full((BATCH,), -1)])
def test_micro_batches_come_to_the_loss_and_gradients_of_the_batch(
    labels: Labels, class_weights: Tensor | None, label_smoothing: float
) -> None:
    whole = step(labels, class_weights, label_smoothing=label_smoothing)
    for count in (2, 3, 4, 8):
        parts = step(labels, class_weights, label_smoothing=label_smoothing, micro_batches=count)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_a_mean_of_each_micro_batch_would_be_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step(LABELS, None)
    monkeypatch.setattr(Student, "_mean_label_weight", lambda *_: None)
    torch.testing.assert_close(step(LABELS, None), whole)
    apart = step(LABELS, None, micro_batches=4)
    assert abs(float(apart[0][2] - whole[0][2])) > 0.1
    assert float((apart[1] - whole[1]).norm()) > 0.01


def test_the_hard_loss_is_the_mean_over_the_labelled_samples() -> None:
    labels = torch.tensor([0, 1, 2, 0, *[-1] * 12])
    losses, _ = step(labels, None, alpha=0.0, micro_batches=4)
    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES)
    inputs = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.cross_entropy(model(inputs[:4]), labels[:4])
    assert losses[2].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-6)


# several processes

MODELS = """
import torch
from torch import nn

def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
"""
TRAIN = (
    "train --data npz:data.npz --classes 5 --student models.py:student --epochs 2 --batch-size 32 "
    "--device cpu --class-weights balanced --label-smoothing 0.1 --augment mixup --micro-batches 2 --lr 0.05 "
)


def test_two_processes_train_on_partly_labelled_data_as_one_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.choice(5, 80, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    labels[random.random(80) < 0.6] = -1
    images = random.integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    (tmp_path / "models.py").write_text(MODELS)
    for processes in (1, 2):
        arguments = [*TRAIN.split(), "--out", f"run{processes}"]
        result = softcache(arguments, tmp_path, processes=processes, threads=1)
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "run1", tmp_path / "run2"
    for name in ("total", "hard"):
        losses = [[line[name] for line in metrics(folder)] for folder in (one, two)]
        assert min(losses[0]) > 0.1
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    weights = [load_file(folder / "student.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)
