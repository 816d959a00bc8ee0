"""Two commands at once on the same files, with a fixed seed; `python -m tests.bench.races` runs many more."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.races import (
    KINDS,
    Ended,
    again_problems,
    both_problems,
    ending_problems,
    state_problems,
)

ROOT = Path(__file__).parents[2]
PAIRS = (
    "dump+dump",
    "merge+merge",
    "pull+pull",
    "train+train",
    "repair+dump",
    "train-url+train-url",
)

SEED = "433"  # with it, each pair starts 0.07 to 0.24 s apart: the first is at work by then

WORKED = Ended(pid=41, code=0, seconds=1.0, out="", err="")
REFUSED = Ended(pid=42, code=1, seconds=0.5, out="", err="Error: process 41 writes it\n")


def test_two_commands_at_once_end_right() -> None:
    command = [sys.executable, "-m", "tests.bench.races", "--seed", SEED, "--pair", *PAIRS]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rules(problems: list[str]) -> list[str]:
    return [problem.partition(":")[0] for problem in problems]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"code": 0, "err": "warning: rows\n"}, []),
        ({"err": "Error: dump/cache.h5 is already complete\n"}, []),
        ({"code": None}, ["hang"]),
        ({"code": -9}, ["signal"]),
        ({"err": "Traceback\nError: process 41\n"}, ["message"]),
        ({"err": "process 41\n"}, ["message"]),
        ({"err": ""}, ["message"]),
        ({"code": 0}, ["message"]),  # it printed an error
        ({"err": "Error: cannot finish cache.h5\n"}, ["refused"]),
        ({"err": "Error: process 411 writes it\n"}, ["refused"]),
    ],
)
def test_how_a_writer_may_end(changes: dict[str, object], expected: list[str]) -> None:
    ended = replace(REFUSED, **changes)  # type: ignore[arg-type]  # fields of Ended
    assert rules(ending_problems(KINDS["dump+dump"], 1, [WORKED, ended])) == expected


def test_only_a_reader_may_fail_without_a_reason() -> None:
    failed = replace(REFUSED, err="Error: there is no such file\n")
    assert ending_problems(KINDS["dump+verify"], 1, [WORKED, failed]) == []
    assert rules(ending_problems(KINDS["dump+verify"], 0, [failed, WORKED])) == ["failed"]
    assert rules(ending_problems(KINDS["export+overwrite"], 0, [failed, WORKED])) == ["failed"]


def test_other_settings_are_refused_only_after_the_other_has_finished() -> None:
    kind, other = KINDS["dump+other-dump"], replace(REFUSED, err="Error: other temperature\n")
    assert rules(ending_problems(kind, 1, [WORKED, other])) == ["refused"]
    assert ending_problems(kind, 1, [WORKED, replace(other, seconds=1.5)]) == []


def test_both_writers_may_not_do_the_work() -> None:
    kind, complete = (
        KINDS["dump+dump"],
        replace(WORKED, out="it is already complete; nothing to do"),
    )
    assert both_problems(kind, [WORKED, REFUSED], 1) == []
    assert both_problems(kind, [WORKED, complete], 1) == []
    assert rules(both_problems(kind, [WORKED, WORKED], 1)) == ["both"]
    assert rules(both_problems(kind, [WORKED, complete], 2)) == ["both"]


def test_what_lost_must_succeed_later() -> None:
    assert again_problems(["dump"], WORKED, must=True) == []
    assert (
        again_problems(["train"], replace(REFUSED, err="Error: already complete\n"), must=True)
        == []
    )
    assert rules(again_problems(["dump"], REFUSED, must=True)) == ["again"]
    assert again_problems(["dump"], REFUSED, must=False) == []
    assert rules(again_problems(["dump"], replace(REFUSED, code=-9), must=False)) == ["again"]


def test_results_are_compared_with_an_undisturbed_run(tmp_path: Path) -> None:
    kind, stock, here = KINDS["train+train"], tmp_path / "stock", tmp_path / "here"
    reference, run = stock / "run/run", here / "run"
    for folder in (reference, run):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')

    def found(*, early: bool = False) -> list[str]:
        return list(state_problems(kind, stock, here, early=early))

    assert found() == []
    (here / ".run.lock").touch()
    assert found() == ["left: .run.lock"]
    assert found(early=True) == []
    (here / ".run.lock").unlink()
    (run / "checkpoint.safetensors").write_bytes(b"12")
    assert found() == ["left: run checkpoint.safetensors: 2 bytes"]
    (run / "checkpoint.safetensors").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 1}\n{"epoch": 2}\n')
    assert found(early=True) == ["differs: run metrics.jsonl: epochs 1 1 2"]
    (run / "metrics.jsonl").unlink()
    assert found(early=True) == []  # it is not finished
    assert found() == ["differs: run metrics.jsonl: missing"]
    run.rmdir()
    assert rules(found()) == ["differs"]
