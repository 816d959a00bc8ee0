"""The one command for a machine with a GPU, on the CPU: every section runs, and its table says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench.gpu import ENCODINGS, SECTIONS, Bench, main, run_section


def test_every_section_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--out", str(tmp_path), "--tests", "copies_to_the_host"]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    main()
    assert "no GPU is used" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["sections"]) == set(SECTIONS)
    rows = [row for section in results["sections"].values() for row in section]
    assert not [row for row in rows if {"failed", "not run"} & set(row)]
    assert results["sections"]["tests"][0]["result"] == "passed"
    assert len(results["sections"]["encode"]) == len(ENCODINGS)
    assert results["machine"]["device"] == "CPU"
    table = (tmp_path / "results.md").read_text()
    assert all(f"## {name}" in table for name in SECTIONS)


def bench(tmp_path: Path, deadline: float) -> Bench:
    return Bench("cpu", True, deadline, tmp_path, tmp_path, None)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    run_section(bench(tmp_path, 0.0), "dump")
    assert json.loads((tmp_path / "results.json").read_text())["sections"] == {
        "dump": [{"not run": "out of time"}]
    }


def test_a_section_that_fails_does_not_cost_the_others(tmp_path: Path) -> None:
    raising = bench(tmp_path, float("inf"))
    raising.device = "no such device"
    run_section(raising, "encode")
    (row,) = json.loads((tmp_path / "results.json").read_text())["sections"]["encode"]
    assert row["failed"].startswith("RuntimeError: ")
