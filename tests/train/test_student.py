"""One student in training: its random state, its steps and epochs, its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from softcache.data.source import ArraySource
from softcache.errors import ModelError, SettingsError, SoftcacheError
from softcache.train.accelerator import make_accelerator
from softcache.train.config import StudentConfig
from softcache.train.prepare import make_student
from softcache.train.run_folder import UNFINISHED_METRICS, check_folder, make_run_folder
from softcache.train.student import Student
from softcache.util.files import replace_file

STEPS = 200
WARMUP = 0.05


def make_test_student(
    folder: Path,
    model: nn.Module | None = None,
    steps: int = STEPS,
    temperature: float = 1.0,
    **settings: Any,
) -> Student:
    """A student of inputs (B, 8) and 5 classes, always with the same initial weights."""
    torch.manual_seed(0)
    return make_student(
        model or nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 5)),
        make_accelerator("cpu", "no"),
        StudentConfig(student="mlp:16", learning_rate=0.01, weight_decay=0.1, **settings),
        name="distilled",
        folder=folder,
        alpha=0.5,
        temperature=temperature,
        classes=5,
        steps=steps,
    )


def make_batch(samples: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (B, 8), labels (B,) and targets (B, 5)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = torch.randn(samples, 5, generator=generator).log_softmax(-1)
    return inputs, targets.argmax(-1), targets


def parameters(student: Student) -> Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters()])


# the random state


def trained(folder: Path, others: int, draws_outside: bool = False) -> Tensor:
    """Parameters of a student with dropout after ten steps, each followed by a step of the others."""
    students = [make_test_student(folder) for _ in range(1 + others)]
    inputs, labels, targets = make_batch()
    for _ in range(10):
        for student in students:
            student.step(inputs, labels, targets)
        if draws_outside:
            torch.rand(3)
    return parameters(students[0])


def test_dropout_draws_as_if_the_student_were_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(tmp_path, others=0)
    assert torch.equal(trained(tmp_path, others=2), alone)
    assert torch.equal(trained(tmp_path, others=0, draws_outside=True), alone)
    # with one generator for all, other students would make a difference
    monkeypatch.setattr(Student, "_own_random_state", lambda self: nullcontext())
    shared = trained(tmp_path, others=0)
    assert not torch.equal(trained(tmp_path, others=2), shared)
    assert not torch.equal(trained(tmp_path, others=0, draws_outside=True), shared)


def test_a_step_leaves_the_randomness_of_others_as_it_was(tmp_path: Path) -> None:
    student, (inputs, labels, targets) = make_test_student(tmp_path), make_batch()
    before = torch.get_rng_state()
    student.step(inputs, labels, targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(student.random[0], before)  # its own state has advanced


# steps and epochs


def test_a_step_moves_the_student_toward_the_teacher(tmp_path: Path) -> None:
    student = make_test_student(tmp_path, nn.Linear(8, 5), temperature=2.0)
    inputs, labels, targets = make_batch()
    for _ in range(100):
        student.step(inputs, labels, targets)
    first, last = student.losses[0], student.losses[-1]
    assert (last < 0.6 * first).all()
    assert last[0].item() == pytest.approx(0.5 * 4 * last[1].item() + 0.5 * last[2].item())


def test_a_student_at_alpha_0_does_not_look_at_the_targets(tmp_path: Path) -> None:
    inputs, labels, targets = make_batch()
    results = []
    for given_targets in (targets, targets.flip(-1), None):
        student = make_test_student(tmp_path)
        student.alpha = 0.0
        student.step(inputs, labels, given_targets)
        results.append(parameters(student))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def fail(_: Tensor) -> Tensor:
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (fail, r"student raised ValueError on inputs \(12, 8\) of torch\.float32: no more"),
        (lambda x: (x, x), r"student returned tuple for a batch of 12; expected .*\(12, classes\)"),
        (lambda x: x[0], r"student returned \(8,\) for a batch of 12; expected .*\(12, classes\)"),
        (lambda x: x[None], r"student returned \(1, 12, 8\) for a batch of 12; expected"),
        (lambda x: x[:6], r"student returned \(6, 8\) for a batch of 12; expected"),
        (lambda x: x, r"student returned 8 outputs for 5 classes; expected one for each class of "),
    ],
)
def test_a_wrong_output_is_told_by_its_shape(
    forward: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, inputs: Tensor) -> Tensor:
            return forward(inputs * self.weight)

    inputs, labels, targets = make_batch()
    with pytest.raises(ModelError, match=message):
        make_test_student(tmp_path, Model()).step(inputs, labels, targets)


def test_an_epoch_is_a_line_of_means(tmp_path: Path) -> None:
    student, (inputs, labels, targets) = make_test_student(tmp_path), make_batch()
    for epoch in range(2):
        for _ in range(3):
            student.step(inputs, labels, targets)
        mean = torch.stack(student.losses).double().mean(0).tolist()
        student.finish_epoch(epoch, None, 0)
    text = (tmp_path / UNFINISHED_METRICS).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert [lines[1][part] for part in ("total", "soft", "hard")] == pytest.approx(mean)


def test_errors_are_counted_in_eval_mode_and_steps_taken_in_train_mode(tmp_path: Path) -> None:
    modes = []

    class Model(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(inputs)

    student, (inputs, labels, targets) = make_test_student(tmp_path, Model(8, 5)), make_batch()
    source = ArraySource("data", inputs.numpy(), labels.numpy())
    for epoch in range(2):
        student.step(inputs, labels, targets)
        student.finish_epoch(epoch, source, 0)
    assert modes == [True, False, True, False]
    assert student.evaluation is not None
    with torch.no_grad():
        wrong = student.model(inputs).argmax(-1) != labels
    assert (student.evaluation.errors, student.evaluation.samples) == (int(wrong.sum()), 12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told_with_its_step(value: float, tmp_path: Path) -> None:
    student = make_test_student(tmp_path)
    student.losses += [torch.tensor([1.0, 1.0, 1.0])] * 2
    student.finish_epoch(0, None, 0)
    student.losses += [torch.tensor([loss, 1.0, 1.0]) for loss in (1.0, value, value)]
    with pytest.raises(
        ModelError, match=rf"distilled: the loss is {value} at step 4 \(epoch 2\); lower --lr"
    ):
        student.finish_epoch(1, None, 0)
    assert len((tmp_path / UNFINISHED_METRICS).read_text().splitlines()) == 1


# the folder


def test_what_is_saved_are_the_weights_and_the_facts(tmp_path: Path) -> None:
    student = make_test_student(tmp_path)
    make_run_folder(tmp_path, [])
    student.losses.append(torch.ones(3))
    student.finish_epoch(0, None, 0)
    metrics = (tmp_path / UNFINISHED_METRICS).read_text()
    student.save({"classes": 5})
    saved = load_file(tmp_path / "student.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "0.weight": (16, 8),
        "0.bias": (16,),
        "2.weight": (5, 16),
        "2.bias": (5,),
    }
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts == {"classes": 5, "name": "distilled", "alpha": 0.5, "parameters": 229}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "student.safetensors",
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    seen = []

    def write(unfinished: Path) -> None:
        unfinished.write_text("ne")
        seen.append((path.read_text(), unfinished.parent))
        unfinished.write_text("new")

    replace_file(path, write)
    assert seen == [
        ("old", tmp_path)
    ]  # in the same folder, so that it is renamed rather than copied
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".config.json.{ended.pid}.partial"
    others = [
        tmp_path / f".config.json.{os.getppid()}.partial",
        tmp_path / ".config.json.x.partial",
    ]
    for path in (left, *others):
        path.write_text("half")
    replace_file(tmp_path / "config.json", lambda path: path.write_text("new"))
    assert (tmp_path / "config.json").read_text() == "new"
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_file_stays_as_it_was_if_its_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def write(unfinished: Path) -> None:
        unfinished.write_text("half of the ne")
        raise OSError("disk full")

    message = r"disk full; free some space \(.* bytes are free there\) or choose another path"
    with pytest.raises(SoftcacheError, match=message):
        replace_file(path, write)
    assert path.read_text() == "old"


def test_a_folder_is_made_with_those_on_its_way(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_folder(folder, overwrite=False)
    assert not list(tmp_path.iterdir())  # the check creates nothing
    make_run_folder(folder, [])
    assert {path.name: path.read_text() for path in folder.iterdir()} == {UNFINISHED_METRICS: ""}


def test_a_folder_of_a_stopped_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED_METRICS).write_text('{"epoch": 1}\n')
    check_folder(tmp_path, overwrite=False)
    assert (tmp_path / UNFINISHED_METRICS).read_text() == '{"epoch": 1}\n'
    make_run_folder(tmp_path, [])
    assert (tmp_path / UNFINISHED_METRICS).read_text() == ""


def test_a_folder_of_a_finished_run_is_kept_unless_overwritten(tmp_path: Path) -> None:
    names = ("student.safetensors", "config.json", "metrics.jsonl")
    for name in (*names, "notes.txt"):
        (tmp_path / name).write_text("old")
    with pytest.raises(
        SettingsError,
        match=r"holds a finished run \(student\.safetensors\); give another --out, or",
    ):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)
    assert {(tmp_path / name).read_text() for name in names} == {"old"}
    make_run_folder(tmp_path, [])  # the finished run stays until the new one is saved
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        **dict.fromkeys((*names, "notes.txt"), "old"),
        UNFINISHED_METRICS: "",
    }


@pytest.mark.parametrize("inside", ["", "run", "run/deeper"])
def test_a_folder_that_cannot_be_written_is_refused(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / inside
    with pytest.raises(
        SettingsError, match=r"cannot write in .*file.*: .*file is a file; give another --out"
    ):
        check_folder(folder, overwrite=False)
    # also if the file appeared after the check
    with pytest.raises(SettingsError, match=r"cannot write in .*file.* \(.*\); give another --out"):
        make_run_folder(folder, [])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(
        SettingsError, match=r"device cuda: torch cannot use it here .*; use --device auto"
    ):
        make_accelerator("cuda", "fp32")
