"""One student in training: its rate, its own randomness, its folder."""

from __future__ import annotations

import json
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
from softcache.train.config import StudentConfig
from softcache.train.prepare import make_accelerator
from softcache.train.run_folder import UNFINISHED_METRICS, check_folder, make_run_folder
from softcache.train.student import Student, make_student
from softcache.util.files import replace_file

STEPS = 200
WARMUP = 0.05


def a_learner(
    folder: Path,
    model: nn.Module | None = None,
    steps: int = STEPS,
    temperature: float = 1.0,
    **settings: Any,
) -> Student:
    """A student of inputs (B, 8) and 5 classes, always with the same weights."""
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


def a_batch(samples: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (B, 8), labels (B,) and targets (B, 5)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = torch.randn(samples, 5, generator=generator).log_softmax(-1)
    return inputs, targets.argmax(-1), targets


def parameters(learner: Student) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


# randomness of its own


def trained(folder: Path, company: int, draws_outside: bool = False) -> Tensor:
    """Parameters of the first of several learners with dropout after ten steps in turn."""
    learners = [a_learner(folder) for _ in range(1 + company)]
    inputs, labels, targets = a_batch()
    for _ in range(10):
        for learner in learners:
            learner.step(inputs, labels, targets)
        if draws_outside:
            torch.rand(3)
    return parameters(learners[0])


def test_dropout_draws_as_if_the_student_were_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(tmp_path, company=0)
    assert torch.equal(trained(tmp_path, company=2), alone)
    assert torch.equal(trained(tmp_path, company=0, draws_outside=True), alone)
    # with one generator for all, company would show
    monkeypatch.setattr(Student, "_own_randomness", lambda self: nullcontext())
    shared = trained(tmp_path, company=0)
    assert not torch.equal(trained(tmp_path, company=2), shared)
    assert not torch.equal(trained(tmp_path, company=0, draws_outside=True), shared)


def test_a_step_leaves_the_randomness_of_others_as_it_was(tmp_path: Path) -> None:
    learner, (inputs, labels, targets) = a_learner(tmp_path), a_batch()
    before = torch.get_rng_state()
    learner.step(inputs, labels, targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(learner.random[0], before)  # its own has moved on


# steps and epochs


def test_a_step_moves_the_student_toward_the_teacher(tmp_path: Path) -> None:
    learner = a_learner(tmp_path, nn.Linear(8, 5), temperature=2.0)
    inputs, labels, targets = a_batch()
    for _ in range(100):
        learner.step(inputs, labels, targets)
    first, last = learner.losses[0], learner.losses[-1]
    assert (last < 0.6 * first).all()
    assert last[0].item() == pytest.approx(0.5 * 4 * last[1].item() + 0.5 * last[2].item())


def test_a_student_at_alpha_0_does_not_look_at_the_targets(tmp_path: Path) -> None:
    inputs, labels, targets = a_batch()
    found = []
    for seen in (targets, targets.flip(-1), None):
        learner = a_learner(tmp_path)
        learner.alpha = 0.0
        learner.step(inputs, labels, seen)
        found.append(parameters(learner))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def fail(_: Tensor) -> Tensor:
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fail, r"student raised ValueError on inputs \(12, 8\) of torch\.float32: no more"),
        (lambda x: (x, x), r"student gives tuple for a batch of 12; expected .*\(12, classes\)"),
        (lambda x: x[0], r"student gives \(8,\) for a batch of 12; expected .*\(12, classes\)"),
        (lambda x: x[None], r"student gives \(1, 12, 8\) for a batch of 12; expected"),
        (lambda x: x[:6], r"student gives \(6, 8\) for a batch of 12; expected"),
        (lambda x: x, r"student gives 8 outputs for 5 classes; it needs one for each class of "),
    ],
)
def test_a_wrong_output_is_told_by_its_shape(
    answer: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, inputs: Tensor) -> Tensor:
            return answer(inputs * self.weight)

    inputs, labels, targets = a_batch()
    with pytest.raises(ModelError, match=message):
        a_learner(tmp_path, Model()).step(inputs, labels, targets)


def test_an_epoch_is_a_line_of_means(tmp_path: Path) -> None:
    learner, (inputs, labels, targets) = a_learner(tmp_path), a_batch()
    for epoch in range(2):
        for _ in range(3):
            learner.step(inputs, labels, targets)
        mean = torch.stack(learner.losses).double().mean(0).tolist()
        learner.finish_epoch(epoch, None, 0)
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

    learner, (inputs, labels, targets) = a_learner(tmp_path, Model(8, 5)), a_batch()
    source = ArraySource("data", inputs.numpy(), labels.numpy())
    for epoch in range(2):
        learner.step(inputs, labels, targets)
        learner.finish_epoch(epoch, source, 0)
    assert modes == [True, False, True, False]
    assert learner.evaluation is not None
    with torch.no_grad():
        wrong = learner.model(inputs).argmax(-1) != labels
    assert (learner.evaluation.errors, learner.evaluation.samples) == (int(wrong.sum()), 12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told_with_its_step(value: float, tmp_path: Path) -> None:
    learner = a_learner(tmp_path)
    learner.losses += [torch.tensor([1.0, 1.0, 1.0])] * 2
    learner.finish_epoch(0, None, 0)
    learner.losses += [torch.tensor([loss, 1.0, 1.0]) for loss in (1.0, value, value)]
    with pytest.raises(
        ModelError, match=rf"distilled: the loss is {value} at step 4 \(epoch 2\); lower --lr"
    ):
        learner.finish_epoch(1, None, 0)
    assert len((tmp_path / UNFINISHED_METRICS).read_text().splitlines()) == 1


# the folder


def test_what_is_saved_are_the_weights_and_the_facts(tmp_path: Path) -> None:
    learner = a_learner(tmp_path)
    make_run_folder(tmp_path, [])
    learner.losses.append(torch.ones(3))
    learner.finish_epoch(0, None, 0)
    metrics = (tmp_path / UNFINISHED_METRICS).read_text()
    learner.save({"classes": 5})
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
    assert seen == [("old", tmp_path)]  # in the same folder, so that it is renamed and not copied
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_stays_as_it_was_if_its_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def write(unfinished: Path) -> None:
        unfinished.write_text("half of the ne")
        raise OSError("disk full")

    with pytest.raises(SoftcacheError, match="disk full; make room there or give another place"):
        replace_file(path, write)
    assert path.read_text() == "old"


def test_a_folder_is_made_with_those_on_its_way(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_folder(folder, overwrite=False)
    assert not list(tmp_path.iterdir())  # a check makes nothing
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
    make_run_folder(tmp_path, [])  # what was finished stays until the new run is
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
    # and still when the file came after the check
    with pytest.raises(SettingsError, match=r"cannot write in .*file.* \(.*\); give another --out"):
        make_run_folder(folder, [])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(
        SettingsError, match=r"device cuda: torch cannot use it here .*; use --device auto"
    ):
        make_accelerator("cuda", "fp32")
