"""The structure of the package: its folders, the direction of imports, and the length of files."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softcache

ROOT = Path(__file__).parent.parent
PACKAGE = Path(softcache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = {
    "util", "cache", "data", "models", "teachers", "targets", "join", "dump", "train", "files",
    "results", "cli", "guide",
}  # fmt: skip


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of pyproject.toml for the package in `folder`."""
    program = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{program}; lint_imports_command()", "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package in which a test can break a contract."""
    shutil.copytree(PACKAGE, tmp_path / "softcache", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_one_way_and_training_reaches_no_teacher(copy: Path) -> None:
    result = lint_imports(copy)
    assert "3 kept, 0 broken" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "code", "contract"),
    [
        ("train/loop.py", "from softcache.teachers.load import load_teacher", "reaches no teacher"),
        ("cache/reader.py", "import torch", "read without torch"),
        ("util/files.py", "from softcache.cache import Cache", "point one way"),
        ("dump/loop.py", "def late():\n    from softcache.train import loop", "point one way"),
    ],
)
def test_a_contract_that_is_broken_is_noticed(
    copy: Path, module: str, code: str, contract: str
) -> None:
    with (copy / "softcache" / module).open("a") as file:
        file.write(f"\n{code}\n")
    result = lint_imports(copy)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert any(contract in line and "BROKEN" in line for line in lines), result.stdout


def test_every_folder_is_known_and_states_its_purpose() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders <= FOLDERS
    for init in PACKAGE.glob("*/__init__.py"):
        purpose = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert purpose, init
        assert len(purpose.splitlines()) <= 2, init


def test_only_the_command_line_prints() -> None:
    printing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert not {path for path in printing if not path.startswith("cli/")}


def test_no_module_is_too_long_to_read() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path.name: lines for path, lines in lengths.items() if lines > 450} == {}


def test_no_file_of_tests_is_too_long_to_read() -> None:
    tests = Path(__file__).parent
    files = [path for path in tests.rglob("test_*.py") if "bench" not in path.parts]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path.name: lines for path, lines in lengths.items() if lines > 600} == {}


def test_the_interface_stays_what_it_is_whatever_is_imported() -> None:
    program = (
        "import softcache, softcache.dump.config, softcache.train.config;"
        "print(softcache.dump.__module__, softcache.train.__module__, *dir(softcache))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules, names = result.stdout.split()[:2], result.stdout.split()[2:]
    assert modules == ["softcache.api", "softcache.api"]
    assert {"dump", "train", "open", "SoftLabelDataset", "distillation_loss"} <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'softcache' has no attribute 'dumb'"):
        getattr(softcache, "dumb")  # noqa: B009
