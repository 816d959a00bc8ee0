"""The table at the end of a training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from softcache.models.evaluate import Evaluation
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.record import Row, is_imbalanced, models_table
from tests.conftest import make_arrays


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


# balanced accuracy


def test_balanced_accuracies_are_a_column_if_any_model_has_one() -> None:
    rows = [
        Row("teacher", 100, Evaluation(1, 10)),
        Row("distilled", 10, Evaluation(2, 10), 0.625),
    ]
    assert [line[-1] for line in cells(models_table(rows))] == ["balanced accuracy", "-", "62.50%"]


@pytest.mark.parametrize(
    ("labels", "imbalanced"),
    [
        ([0] * 15 + [1] * 10, True),
        ([0] * 14 + [1] * 10, False),
        ([0] * 10 + [7] * 20, True),  # only the classes that occur count
        ([3] * 5, False),
        ([], False),
        (None, False),
    ],
)
def test_classes_of_very_different_size_are_imbalanced(
    labels: list[int] | None, imbalanced: bool
) -> None:
    assert is_imbalanced(None if labels is None else np.array(labels, np.int32)) == imbalanced


def table_of(folder: Path, test_labels: list[int], caplog: pytest.LogCaptureFixture) -> str:
    images, labels = make_arrays(60)
    x_test, _ = make_arrays(len(test_labels), seed=1)
    arrays = {"x_train": images, "y_train": labels, "x_test": x_test}
    arrays["y_test"] = np.array(test_labels)
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    data = f"npz:{folder}/data.npz"
    train(
        make_train_config(
            student="mlp:4", data=data, eval_data=f"{data}@test", out=folder / "run", epochs=1,
            device="cpu", classes=5, overwrite=True,
        )
    )  # fmt: skip
    return next(r.getMessage() for r in caplog.records if "test errors" in r.getMessage())


def test_the_final_table_has_them_only_for_imbalanced_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "softcache")
    assert "balanced accuracy" not in table_of(tmp_path, [0, 1, 2, 3, 4] * 4, caplog)
    caplog.clear()
    table = table_of(tmp_path, [0] * 15 + [1] * 10, caplog)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert cells(table)[0][-1] == "balanced accuracy"
    assert cells(table)[1][-1] == f"{line['balanced_accuracy']:.2%}"
