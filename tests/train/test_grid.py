"""Several students from one command: names, types, combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softcache.errors import SettingsError
from softcache.train.grid import make_variants, parse_grid, read_toml
from softcache.train.options import make_train_config


def names(tmp_path: Path, variants: list[dict[str, Any]]) -> list[str]:
    config = make_train_config(data="d", out=tmp_path, cache=Path("c"), students=variants)
    return config.names()


def test_one_student_is_itself(tmp_path: Path) -> None:
    variants = make_variants(["mlp:4"], [], [])
    assert variants == [{"student": "mlp:4"}]
    assert names(tmp_path, variants) == [""]


def test_each_student_is_combined_with_all_of_the_grid(tmp_path: Path) -> None:
    variants = make_variants(["mlp:4", "my/models.py:small"], ["lr=1e-3,2e-3"], [])
    assert [(v["student"], v["learning_rate"]) for v in variants] == [
        ("mlp:4", 1e-3), ("mlp:4", 2e-3), ("my/models.py:small", 1e-3), ("my/models.py:small", 2e-3),
    ]  # fmt: skip
    assert names(tmp_path, variants) == [
        "mlp-4-lr=0.001", "mlp-4-lr=0.002",
        "models.py-small-lr=0.001", "models.py-small-lr=0.002",
    ]  # fmt: skip


@pytest.mark.parametrize("grid", [["lr=1e-3,0.1,alpha=0,0.5,1"], ["lr=1e-3,0.1", "alpha=0,0.5,1"]])
def test_a_grid_is_written_in_one_piece_or_several(grid: list[str], tmp_path: Path) -> None:
    assert parse_grid(grid) == {"learning_rate": [1e-3, 0.1], "alpha": [0.0, 0.5, 1.0]}
    variants = make_variants(["mlp:4"], grid, [])
    assert len(variants) == 6
    assert len(set(names(tmp_path, variants))) == 6


def test_values_have_the_type_of_their_setting() -> None:
    values = parse_grid(["seed=1,2", "loss=kl,dkd:4", "init=a.safetensors", "weight-decay=0"])
    assert values == {
        "seed": [1, 2], "loss": ["kl", "dkd:4"], "init": [Path("a.safetensors")], "weight_decay": [0.0],
    }  # fmt: skip


def test_tables_have_students_of_their_own_or_stand_for_all(tmp_path: Path) -> None:
    tables: list[dict[str, Any]] = [{"student": "mlp:9", "lr": 0.1}, {"alpha": 1}]
    variants = make_variants(["mlp:4", "mlp:5"], [], tables)
    assert variants == [
        {"student": "mlp:9", "learning_rate": 0.1},
        {"student": "mlp:4", "alpha": 1.0},
        {"student": "mlp:5", "alpha": 1.0},
    ]
    assert len(set(names(tmp_path, variants))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "no student; name one with --student"),
        (
            (["a"], ["rate=1"], []),
            "'rate' is not a setting of a student; expected one of student, init, al",
        ),
        ((["a"], ["epochs=1,2"], []), "'epochs' is not a setting of a student"),
        ((["a"], ["lr=fast"], []), "learning rate is 'fast'; expected a number"),
        ((["a"], ["seed=1.5"], []), "seed is '1.5'; expected a whole number"),
        ((["a"], ["lr"], []), "--grid lr: expected NAME=VALUE,VALUE, such as lr=1e-3,2e-3"),
        ((["a"], ["lr="], []), "--grid lr=: expected NAME=VALUE"),
        ((["a"], ["0.1,lr=1"], []), "expected NAME=VALUE"),
        ((["a"], ["lr=1,lr=2"], []), "lr is given twice"),
        ((["a"], ["student=mlp:4"], []), "--grid student=mlp:4: repeat --student instead"),
        (([], [], [{"student": 3}]), "student is 3; expected a"),
        (([], [], [{"student": "a", "lr": True}]), "learning rate is True; expected a number"),
        (([], [], [{"student": "a", "lr": [1, 2]}]), "expected a number"),
        (([], [], [{"student": "a", "sed": 1}]), "'sed' is not a setting of a student"),
    ],
)
def test_what_is_no_setting_is_named(
    arguments: tuple[list[str], list[str], list[dict[str, Any]]], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_variants(*arguments)


def test_two_students_that_do_not_differ_are_refused(tmp_path: Path) -> None:
    for grid in (["alpha=1,1.0"], ["alpha=0.3,0.30"]):
        variants = make_variants(["mlp:4"], grid, [])
        with pytest.raises(SettingsError, match="two students would be called the same; give each"):
            names(tmp_path, variants)


def test_a_file_has_options_and_students(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'epochs = 3\nbatch-size = 64\n\n[[student]]\nstudent = "mlp:4"\n\n[[student]]\nlr = 0.1\n'
    )
    options, tables = read_toml(path)
    assert options == {"epochs": 3, "batch_size": 64}
    assert tables == [{"student": "mlp:4"}, {"lr": 0.1}]


@pytest.mark.parametrize("text", ['student = "mlp:4"', 'student = ["mlp:4"]'])
def test_students_may_be_named_as_the_option_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    options, tables = read_toml(tmp_path / "run.toml")
    assert tables == []
    assert options["student"] in ("mlp:4", ["mlp:4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", "cannot be read"),
        ("student = 3", r"expected \[\[student\]\] tables, one for each"),
    ],
)
def test_a_file_that_is_not_understood_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=rf"--config .*run\.toml.*{message}"):
        read_toml(path)
