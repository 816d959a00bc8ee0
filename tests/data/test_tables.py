"""CSV and Parquet tables: inputs, labels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from softcache.data.open import open_source
from softcache.errors import DataError, SettingsError

TEXT = "age,income,member,kind\n30,1.5,true,cat\n41,-2,false,dog\n5,0,true,ant\n"


@pytest.fixture(params=["csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The specification of the same table in each format, without options."""
    file = tmp_path / f"t.{request.param}"
    (tmp_path / "t.csv").write_text(TEXT)
    if request.param == "parquet":
        pyarrow.parquet.write_table(pyarrow.csv.read_csv(tmp_path / "t.csv"), file)
    return f"{request.param}:{file}"


def csv(tmp_path: Path, text: str) -> str:
    (tmp_path / "x.csv").write_text(text)
    return f"csv:{tmp_path / 'x.csv'}"


def test_numbers_become_inputs_and_words_labels(table: str) -> None:
    source = open_source(f"{table}?label=kind")
    inputs, labels = source.fetch(range(3))
    np.testing.assert_array_equal(inputs.numpy(), [[30, 1.5, 1], [41, -2, 0], [5, 0, 1]])
    assert inputs.numpy().dtype == np.float32
    assert labels.tolist() == [1, 2, 0]
    assert source.class_names == ("ant", "cat", "dog")
    assert "/" not in source.name


def test_columns_and_the_order_of_classes_are_chosen(table: str) -> None:
    source = open_source(f"{table}?label=kind&inputs=income,age&classes=dog,cat,ant,elk")
    inputs, labels = source.fetch([0])
    assert inputs.tolist() == [[1.5, 30.0]]
    assert labels.tolist() == [1]
    assert source.class_names == ("dog", "cat", "ant", "elk")


def test_an_empty_label_means_none(table: str) -> None:
    assert open_source(f"{table}?label=&inputs=age").fetch([0, 1])[1].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("2,0,1", [2, 0, 1]),
        ("2.0,0.0,1.0", [2, 0, 1]),
        ("true,false,true", [1, 0, 1]),
        ("2,,1", [2, -1, 1]),
    ],
)
def test_labels_are_numbers_of_any_kind(tmp_path: Path, column: str, labels: list[int]) -> None:
    rows = "\n".join(f"{n},{label}" for n, label in enumerate(column.split(",")))
    assert open_source(csv(tmp_path, f"x,label\n{rows}\n")).fetch(range(3))[1].tolist() == labels


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("", SettingsError, r"has columns age, .*; name the label with \?label=COLUMN"),
        ("?label=kin", SettingsError, "has no column 'kin'; it has age, income, member, kind"),
        ("?label=kind&inputs=old", SettingsError, "has no column 'old'"),
        (
            "?label=age",
            DataError,
            "column 'kind' holds string; expected numbers: choose the columns",
        ),
        ("?label=income", DataError, "column 'kind' holds string"),
        (
            "?label=income&inputs=age",
            DataError,
            r"column 'income' has 1\.5, which is not a class number",
        ),
        (
            "?label=kind&classes=cat,dog",
            DataError,
            "column 'kind' has 'ant'; expected one of cat, dog",
        ),
        ("?labels=kind", SettingsError, "unknown option 'labels'; expected label, inputs, classes"),
        ("?label=kind@test", SettingsError, "a table has no splits; use one file per split"),
    ],
)
def test_what_does_not_fit_is_named(
    table: str, query: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_source(f"{table}{query}")


def test_a_missing_value_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="column 'x' has no value in row 1; expected a number in every row"
    ):
        open_source(csv(tmp_path, "x,label\n1,0\n,1\n"))


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"csv:.*gone\.csv: no such file"):
        open_source(f"csv:{tmp_path / 'gone.csv'}")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as a table \("):
        open_source(f"parquet:{tmp_path / 'x.parquet'}")


def test_a_missing_extra_is_named(table: str, without: Callable[[str], None]) -> None:
    kind = table.partition(":")[0]
    without(f"pyarrow.{kind}")
    with pytest.raises(SettingsError, match=r"pip install 'softcache\[data\]'"):
        open_source(f"{table}?label=kind")
