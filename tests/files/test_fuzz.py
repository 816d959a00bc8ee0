"""Mutated caches, runs and checkpoints: a part of `python -m tests.bench.fuzz` with a fixed seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from softcache.cache import open_cache
from tests.bench.fuzz import Attacker, Result, bad_output, self_check
from tests.bench.fuzz_inputs import KINDS, array_in, wrong_rows

INPUTS = 40
SLOW = ("report", "export")  # commands that are left to the benchmark


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacker]:
    with Attacker(tmp_path_factory.mktemp("fuzz"), seed=0, encodings=("topk",)) as made:
        yield made


def test_no_input_breaks_a_rule(attacker: Attacker) -> None:
    reports = [attacker.attack(index, without=SLOW) for index in range(INPUTS)]
    assert [report for report in reports if report.problems] == []
    assert {report.outcome for report in reports} == {"accepted", "refused"}


def test_every_broken_rule_is_noticed(attacker: Attacker) -> None:
    self_check(attacker)


def test_an_input_depends_on_its_number_alone(attacker: Attacker) -> None:
    inputs = [attacker.make(index) for index in range(INPUTS)]
    assert [attacker.make(index) for index in range(INPUTS)] == inputs
    assert {made.kind for made in inputs} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("labels", -2, "labels out of range"),
        ("labels", 12, "labels out of range"),
        ("log_probs", np.nan, "log_probs not finite"),
        ("tails", np.inf, "tails not finite"),
        ("ids", 3, "class ids repeated in a row"),
        ("ids", 12, "class ids out of range"),
    ],
)
def test_wrong_rows_are_known(attacker: Attacker, name: str, value: float, reason: str) -> None:
    seed = next(seed for seed in attacker.seeds.caches if seed.header.encoding.name == "topk")
    arrays = {array.name: array_in(bytearray(seed.raw), array) for array in seed.header.arrays}
    assert wrong_rows(seed.header, arrays) is None
    arrays[name][-1] = value
    assert wrong_rows(seed.header, arrays) == reason


def test_rows_that_do_not_sum_to_1_are_known(attacker: Attacker) -> None:
    seed = next(seed for seed in attacker.seeds.caches if seed.header.encoding.name == "dense")
    cache = open_cache(seed.path)
    arrays = {name: np.array(array) for name, array in cache.arrays.items()}
    arrays["log_probs"][0, 0, 0] = 0.0
    assert wrong_rows(cache.header, arrays) == "rows do not sum to 1"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"err": "Error: two\nlines\n"}, "2 lines of error output"),
        ({"err": ""}, "1 lines of error output"),
        ({"err": "Error: \x1b[31mred\n"}, "a control character on stderr"),
        ({"out": "\x07", "code": 0}, "a control character on stdout"),
        ({"err": f"Error: {'x' * 2000}\n"}, "an error of 2,007 characters"),
    ],
)
def test_bad_output_is_noticed(change: dict[str, Any], problem: str) -> None:
    good = Result(1, "", "Error: a reason\n", 0.0, 0, None)
    assert [*bad_output(good)] == []
    (found,) = bad_output(dataclasses.replace(good, **change))
    assert found.startswith(problem)
