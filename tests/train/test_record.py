"""The table at the end of a training run."""

from __future__ import annotations

from softcache.models.evaluate import Evaluation
from softcache.train.record import Row, models_table


def cells(table: str) -> list[list[str]]:
    """The cells of each line except the ruler; columns are two or more spaces apart."""
    lines = [line for line in table.splitlines() if set(line) - set("- ")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_the_table_shows_what_each_model_costs_and_how_often_it_errs() -> None:
    table = models_table(
        [
            Row("teacher", 1_234_567, Evaluation(38, 10_000)),
            Row("distilled", 12_345, Evaluation(1_051, 10_000)),
            Row("hard labels", 12_345, None),
        ]
    )
    assert cells(table) == [
        ["model", "parameters", "share of teacher's", "test errors", "accuracy"],
        ["teacher", "1,234,567", "100.0%", "38 of 10,000", "99.62%"],
        ["distilled", "12,345", "1.0%", "1,051 of 10,000", "89.49%"],
        ["hard labels", "12,345", "1.0%", "-", "-"],
    ]


def test_shares_are_of_the_first_model_whatever_its_name() -> None:
    table = models_table([Row("student", 200, None)])
    assert cells(table)[0][2] == "share of student's"
    assert cells(table)[1][:3] == ["student", "200", "100.0%"]


def test_columns_are_aligned() -> None:
    table = models_table([Row("teacher", 1_000_000, Evaluation(1, 10)), Row("s", 1, None)])
    assert len({len(line) for line in table.splitlines()}) == 1


def test_a_perfect_and_a_useless_model() -> None:
    table = models_table([Row("a", 1, Evaluation(0, 10)), Row("b", 1, Evaluation(10, 10))])
    assert [line[3:] for line in cells(table)[1:]] == [
        ["0 of 10", "100.00%"],
        ["10 of 10", "0.00%"],
    ]


def test_a_teacher_without_parameters_has_a_table_too() -> None:
    # a rule-based teacher, or an exported program with constant weights; the format allows 0
    table = models_table([Row("teacher", 0, None), Row("distilled", 12, None)])
    assert cells(table)[2] == ["distilled", "12", "-", "-", "-"]
