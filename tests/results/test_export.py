"""Exported students return the same logits as the student, or are not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.cache import Cache
from softcache.errors import ModelError, SettingsError
from softcache.results.export import check_exported, export_student
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.run_folder import open_run
from tests.conftest import Run

CODE = """
import torch
from torch import nn

class BranchesOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x):
        return self.linear(x.flatten(1)) * (2.0 if x.sum().item() > 0 else 1.0)

def branching():
    return BranchesOnValues()
"""


@pytest.fixture
def folder(cache: Cache, data_file: Path, tmp_path: Path) -> Path:
    config = make_train_config(
        student="cnn:4x2", cache=cache.path, data=f"npz:{data_file}", out=tmp_path / "run",
        eval_data=f"npz:{data_file}@test", epochs=1, device="cpu", alpha=0.5, temperature=1.0, ema=0.9,
    )  # fmt: skip
    train(config)
    return config.out


def test_onnx_gives_the_students_logits(folder: Path, run: Run) -> None:
    runtime = pytest.importorskip("onnxruntime")
    output = run("export", folder, "--onnx", check=True).stdout
    assert "student.onnx: " in output
    session = runtime.InferenceSession(folder / "student.onnx")
    inputs = torch.rand(9, 1, 8, 8)
    (logits,) = session.run(None, {"inputs": inputs.numpy()})
    with torch.no_grad():
        expected = open_run(folder).model()(inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_program_gives_the_students_logits(folder: Path) -> None:
    (path,) = export_student(folder, onnx=False, pt2=True)
    assert path.name == "student.pt2"
    program = torch.export.load(path).module()
    inputs = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(inputs), open_run(folder).model()(inputs))


def test_what_gives_other_logits_is_not_written(folder: Path) -> None:
    model, examples = open_run(folder).model(), [torch.rand(size, 1, 8, 8) for size in (1, 2, 7)]

    def shifted(inputs: Tensor) -> Tensor:
        return Tensor(model(inputs).detach() + 0.01)

    def fixed_batch(inputs: Tensor) -> Tensor:
        return Tensor(model(inputs).detach()[:2])

    with pytest.raises(ModelError, match=r"x\.onnx: logits differ by up to 0\.01 from the stud"):
        check_exported(shifted, model, examples, "x.onnx")
    with pytest.raises(
        ModelError, match=r"returns shape \(2, 5\) for a batch of 7; expected \(7, 5\), as the stud"
    ):
        check_exported(fixed_batch, model, examples, "x.onnx")


def test_a_student_that_cannot_be_exported_is_told(
    cache: Cache, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "branching.py").write_text(CODE)
    config = make_train_config(
        student=f"{tmp_path / 'branching.py'}:branching", cache=cache.path, data=f"npz:{data_file}",
        out=tmp_path / "run", epochs=1, device="cpu",
    )  # fmt: skip
    train(config)
    with pytest.raises(
        ModelError, match=r"the student cannot be exported as a torch\.export program: "
    ):
        export_student(config.out, onnx=False, pt2=True, student=[config.students[0].student])
    assert not list(config.out.glob("*pt2*"))


def test_a_format_must_be_named(folder: Path) -> None:
    with pytest.raises(SettingsError, match="no format to export to; give --onnx, --pt2 or --hf"):
        export_student(folder, onnx=False, pt2=False)


def test_without_the_extra_it_is_named(folder: Path, without: Callable[[str], None]) -> None:
    without("onnxruntime")
    with pytest.raises(SettingsError, match=r"--onnx needs onnxruntime .*'softcache\[onnx\]'"):
        export_student(folder, onnx=True, pt2=False)


# the model card


def test_the_card_says_what_it_is(folder: Path, cache: Cache) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    facts = json.loads((folder / "config.json").read_text())
    for line in (
        "# cnn:4x2, distilled from models.py:teacher",
        f"- soft targets: tiny.h5, content id `{cache.content_id()}`",
        "- loss: 0.5 of kl at temperature 1, 0.5 of cross-entropy with the labels",
        f"{facts['errors']} of 100",
        "79 of 100",
    ):
        assert line in card, line
    assert str(folder.parent) not in card


def test_the_cards_commands_are_true(folder: Path, data_file: Path, run: Run) -> None:
    """Its command trains with the same settings, and its code loads the weights."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    command = next(line for line in card.splitlines() if line.startswith("    softcache train"))
    words = command.split()[1:]
    (folder.parent / "tiny.npz").write_bytes(data_file.read_bytes())
    words[words.index("--out") + 1] = "again"
    run(
        *[word.replace("npz:tiny.npz", f"npz:{data_file}") for word in words],
        "--device",
        "cpu",
        check=True,
    )
    original, repeated = (
        json.loads((path / "config.json").read_text())["settings"]
        for path in (folder, folder.parent / "again")
    )
    may_differ = {"out", "device"}
    for name in original:
        assert name in may_differ or original[name] == repeated[name], name
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {"inputs": torch.rand(2, 1, 8, 8)}
    exec(code.replace("student.safetensors", str(folder / "student.safetensors")), names)
    assert isinstance(names["model"], nn.Module)
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], open_run(folder).model()(names["inputs"]))


def test_a_card_of_labels_alone_has_no_teacher(data_file: Path, tmp_path: Path) -> None:
    train(
        make_train_config(student="mlp:4", data=f"npz:{data_file}", out=tmp_path / "run", epochs=1)
    )
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "# mlp:4\n" in card
    assert "cross-entropy with the labels" in card
    assert "teacher" not in card
