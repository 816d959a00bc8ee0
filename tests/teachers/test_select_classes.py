"""Some classes of a wider teacher: --teacher-classes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softcache.errors import MissingFileError, SettingsError
from softcache.teachers.ensemble import make_ensemble
from softcache.teachers.load import load_teacher
from softcache.teachers.select_classes import SelectedClasses, parse_classes, select_classes
from softcache.teachers.teacher import Teacher
from softcache.types import RowIndex
from tests.tokens import make_language_model

NAMES = ("tench", "sand, light brown", "azure", "crane", "T-shirt", "crane", "0-1", "Coral")
INPUTS = torch.rand(16, 10, generator=torch.Generator().manual_seed(0))
Z = 20 * INPUTS

CODE = """
from torch import nn

class Model(nn.Module):
    def __init__(self, output, names=()):
        super().__init__()
        self.output, self.class_names = output, names

    def forward(self, x):
        z = 20 * x
        return z if self.output == "logits" else getattr(z, self.output)(1)

def teacher(): return Model("logits")
def named(): return Model("logits", [f"class {n}" for n in range(10)])
def softmax(): return Model("softmax")
def log_softmax(): return Model("log_softmax")
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "m.py").write_text(CODE)
    return str(tmp_path / "m.py")


def load(
    spec: str, select: str, classes: int | None = 3, output: str = "logits", inputs: int = 10
) -> Teacher:
    return load_teacher(
        spec, None, sample=INPUTS[:1, :inputs], classes=classes, device=torch.device("cpu"),
        precision="fp32", output=output, select=select,
    )  # fmt: skip


# lists


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("0,5,7", [0, 5, 7]),
        ("7, 5 ,0", [7, 5, 0]),
        ("0-3", [0, 1, 2, 3]),
        ("6-7,1", [6, 7, 1]),
        ("azure,tench", [2, 0]),
        ("sand, light brown,azure", [1, 2]),
        ("azure,sand, light brown", [2, 1]),
        ("T-shirt,0", [4, 0]),
        ("'azure',\"Coral\"", [2, 7]),
        ("0-1,azure", [6, 2]),  # a name that looks like a range
    ],
)
def test_a_list_has_numbers_ranges_and_names(text: str, columns: list[int]) -> None:
    assert parse_classes(text, NAMES, 8) == columns


def test_a_file_has_one_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(
        "\ufeff# chosen by hand\nazure\n\n7   # Coral\nsand, light brown\n3-4\n", "utf-8"
    )
    assert parse_classes(str(path), NAMES, 8) == [2, 7, 1, 3, 4]
    path.write_text("C#\nC\n")
    assert parse_classes(str(path), ("C", "C#"), 2) == [1, 0]


def test_a_name_that_is_a_number_needs_quotes() -> None:
    names = ("0", "1", "10", "2")
    with pytest.raises(
        SettingsError,
        match=r"2 is the number of one class and the name of class 3; write 2-2 for the number",
    ):
        parse_classes("0,2", names, 4)
    assert parse_classes('0,"2"', names, 4) == [0, 3]
    assert parse_classes("0,2-2", names, 4) == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,8", r"^--teacher-classes 0,8: there is no class 8; the teacher has 8 classes, 0 to 7$"),
        ("5-9", r"there is no class 9; the teacher has 8 classes"),
        ("3-1", r"the range 3-1 is empty; expected 1-3"),
        ("0,5,0", r"class 0 \('tench'\) is listed twice; list each class once"),
        ("0-3,azure", r"class 2 \('azure'\) is listed twice"),
        ("0,,1", r"an empty entry; expected a number, a range or a name between the commas"),
        ("azure,coral", r"the teacher has no class 'coral'; did you mean 'Coral'\?"),
        (
            "azure,light brown",
            r"the teacher has no class 'light brown'; did you mean 'sand, light brown'\?",
        ),
        ("azure,tensh", r"the teacher has no class 'tensh'; did you mean 'tench'\?"),
        (
            "azure,zebra",
            r"the teacher has no class 'zebra'; its classes are 'tench', .* and 3 more",
        ),
        ("azure,crane", r"'crane' is the name of classes 3 and 5; give the number"),
        ("azure", r"'azure' lists 1 class; expected at least 2"),
    ],
)
def test_errors_in_a_list_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_classes(text, NAMES, 8)


def test_errors_in_a_file_have_their_line(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("# a comment\nazure\nazur\n")
    with pytest.raises(
        SettingsError, match=r"c\.txt, line 3: the teacher has no class 'azur'; did you"
    ):
        parse_classes(str(tmp_path / "c.txt"), NAMES, 8)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"c\.txt cannot be read as text"):
        parse_classes(str(tmp_path / "c.txt"), NAMES, 8)
    with pytest.raises(MissingFileError, match=r"--teacher-classes .*gone\.txt: no such file"):
        parse_classes(str(tmp_path / "gone.txt"), NAMES, 8)


def test_a_teacher_without_names_takes_numbers_only() -> None:
    with pytest.raises(
        SettingsError, match=r"'azure' is not a number, and the teacher does not name .*from 0 to 7"
    ):
        parse_classes("azure,1", (), 8)


def test_a_long_list_is_no_file() -> None:
    assert parse_classes(",".join(map(str, range(2000))), (), 2000) == list(range(2000))


# teachers


@pytest.mark.parametrize(
    ("name", "output"),
    [("teacher", "logits"), ("softmax", "probabilities"), ("log_softmax", "log_probabilities")],
)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_chosen_columns_are_renormalised(
    name: str, output: str, temperature: float, code: str
) -> None:
    teacher = load(f"{code}:{name}", "7,0,2", output=output)
    assert isinstance(teacher, SelectedClasses)
    assert (teacher.classes, teacher.output_width) == (3, 10)
    ensemble = make_ensemble([teacher], [])
    expected = torch.log_softmax(Z[:, [7, 0, 2]] / temperature, 1)
    torch.testing.assert_close(
        ensemble.log_probs(INPUTS, temperature), expected, atol=1e-4, rtol=1e-4
    )


def test_probabilities_of_the_chosen_are_divided_by_their_sum(code: str) -> None:
    wide = Z.softmax(1)[:, [7, 0, 2]]
    probabilities = (
        load(f"{code}:softmax", "7,0,2", output="probabilities").logits(INPUTS).softmax(1)
    )
    torch.testing.assert_close(probabilities, wide / wide.sum(1, keepdim=True))


def test_the_names_are_those_of_the_chosen(code: str) -> None:
    assert load(f"{code}:named", "class 7,0-1").class_names == ("class 7", "class 0", "class 1")
    assert load(f"{code}:teacher", "7,0,1").class_names == ()


def test_the_header_says_which_were_chosen(code: str) -> None:
    first, second = (load(f"{code}:teacher", text) for text in ("7,0,1", "0,1,7"))
    digest = hashlib.sha256(b"7,0,1").hexdigest()
    assert first.provenance["selected"] == {"classes": 3, "of": 10, "sha256": digest}
    assert second.provenance["selected"]["sha256"] != digest
    plain = load_teacher(
        f"{code}:teacher", None, sample=INPUTS[:1], classes=10, device=torch.device("cpu"), precision="fp32"
    )  # fmt: skip
    assert "selected" not in plain.provenance


def test_as_many_as_the_data_has(code: str) -> None:
    with pytest.raises(
        SettingsError,
        match=r"lists 4 classes of teacher .*m\.py:teacher, the data has 3; list one for",
    ):
        load(f"{code}:teacher", "0-3")
    assert load(f"{code}:teacher", "0-3", classes=None).classes == 4


def test_another_precision_keeps_the_choice(code: str) -> None:
    teacher = load(f"{code}:teacher", "7,0,2")
    exact = make_ensemble([replace(teacher, precision="bf16")], []).in_float32
    assert exact is not None
    torch.testing.assert_close(exact.teachers[0].logits(INPUTS), Z[:, [7, 0, 2]])


def test_classes_that_the_teacher_never_predicts_are_told_once(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = torch.zeros(16, 10)
    inputs[:, 9] = 1
    teacher = load(f"{code}:teacher", "0-2")
    for _ in range(2):
        teacher.logits(inputs)
    assert (
        capsys.readouterr().err.count("the chosen classes have only 0.0% of its probability") == 1
    )
    load(f"{code}:teacher", "0,9", classes=2).logits(inputs)
    assert "probability" not in capsys.readouterr().err


def test_rows_of_samples_that_have_many(tmp_path: Path) -> None:
    make_language_model(tmp_path / "model", vocabulary=300)
    teacher = load_teacher(
        f"hf:{tmp_path / 'model'}",
        None,
        sample=torch.tensor([[1, 2, 3]]),
        classes=None,
        device=torch.device("cpu"),
        precision="fp32",
        unit="token",
    )
    rows = RowIndex(torch.tensor([0, 0]), torch.tensor([0, 2]))
    wide = torch.cat([*teacher.row_logits(torch.tensor([[1, 2, 3]]), rows)])
    chosen = select_classes(teacher, [7, 0, 2]).row_logits(torch.tensor([[1, 2, 3]]), rows)
    torch.testing.assert_close(torch.cat([*chosen]), wide[:, [7, 0, 2]])


def test_a_matrix_too(tmp_path: Path) -> None:
    torch.save(Z, tmp_path / "z.pt")
    logits = load(str(tmp_path / "z.pt"), "7,0,2").logits(INPUTS)
    torch.testing.assert_close(logits, Z[:, [7, 0, 2]])


def test_top_classes_of_rows_cannot_be_chosen_from() -> None:
    with pytest.raises(
        SettingsError, match=r"has only the top classes of each row, .* leave --teacher-cl"
    ):
        load("hfds:x?ids=a&log_probs=b@train", "0,1,2")
