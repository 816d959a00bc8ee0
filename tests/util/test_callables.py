"""Callables named by file or by module."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softcache.errors import SettingsError
from softcache.util.callables import import_callable


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path; modules imported from it are removed from sys.modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_callable_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def make():\n    return 42\n")
    assert import_callable(f"{path}:make", what="model")() == 42


def test_a_callable_of_a_module() -> None:
    assert import_callable("json:loads", what="model") is json.loads
    assert import_callable("json.decoder:JSONDecoder", what="model") is json.JSONDecoder


def test_a_path_may_hold_colons(tmp_path: Path) -> None:
    path = tmp_path / "a:b" / "mine.py"
    path.parent.mkdir()
    path.write_text("make = int\n")
    assert import_callable(f"{path}:make", what="model") is int


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for answer in (1, 22):  # different lengths: Python compares size and time with its .pyc
        path.write_text(f"def make():\n    return {answer}\n")
        assert import_callable(f"{path}:make", what="model")() == answer


def test_classes_of_a_file_can_be_pickled(own_modules: Path) -> None:
    # loader workers that are not forked depend on it
    path = own_modules / "mine.py"
    path.write_text("class Model:\n    size = 3\n")
    model = import_callable(f"{path}:Model", what="model")()
    assert pickle.loads(pickle.dumps(model)).size == 3


def test_classes_of_two_files_of_one_name_can_be_pickled(own_modules: Path) -> None:
    models = []
    for folder in ("teacher", "student"):
        path = own_modules / folder / "models.py"
        path.parent.mkdir()
        path.write_text(f"class Model:\n    whose = '{folder}'\n")
        models.append(import_callable(f"{path}:Model", what="model")())
    assert [pickle.loads(pickle.dumps(model)).whose for model in models] == ["teacher", "student"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"no such file: .*gone\.py; expected FILE\.py:CALLABLE"
    ):
        import_callable(f"{tmp_path / 'gone.py'}:make", what="model")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(SettingsError, match=r"no such file: .*folder\.py"):
        import_callable(f"{tmp_path / 'folder.py'}:make", what="model")


@pytest.mark.parametrize(
    ("module", "missing"),
    [("nowhere", "nowhere"), ("nowhere.deep", "nowhere"), ("json.no", "json.no")],
)
def test_a_missing_module_is_named_with_what_to_do(module: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=rf"no module named '{missing}'; install it, or run"):
        import_callable(f"{module}:make", what="model")


@pytest.mark.parametrize("attribute", ["missing", "NUMBER", "", "path.join"])
def test_what_is_not_there_or_no_callable_is_named(own_modules: Path, attribute: str) -> None:
    path = own_modules / "mine.py"
    path.write_text("from os import path\nNUMBER = 3\n")
    for place in (str(path), "mine"):
        with pytest.raises(
            SettingsError,
            match=rf"student \S+: .*mine\S* has no callable '{attribute}'; expected FILE\.py:CALLABLE or",
        ):
            import_callable(f"{place}:{attribute}", what="student")


FAILURES = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "def make(:": "SyntaxError: invalid syntax",
    "import gone_for_good": "ModuleNotFoundError: No module named 'gone_for_good'",
    "from json import nothing": "ImportError: cannot import name 'nothing'",
    "raise OSError('the share is gone')": "OSError: the share is gone",
}


@pytest.mark.parametrize("code", FAILURES)
def test_code_that_fails_on_import_is_named_with_its_error(own_modules: Path, code: str) -> None:
    path = own_modules / "failing.py"
    path.write_text(code)
    for place in (str(path), "failing"):
        with pytest.raises(
            SettingsError, match=rf"data \S+: \S*failing\S* fails on import with {FAILURES[code]}"
        ):
            import_callable(f"{place}:make", what="data")


def test_an_empty_module_name_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"model :make: .*Empty module name"):
        import_callable(":make", what="model")


def test_code_that_exits_on_import_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SettingsError, match="fails on import with SystemExit"):
        import_callable(f"{path}:make", what="model")
