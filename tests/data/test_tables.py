"""CSV and Parquet tables: inputs, labels, empty cells, words, and what is refused."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from softcache.data.keys import sample_keys
from softcache.data.open import open_source
from softcache.data.tables import TableSource
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


def parquet(tmp_path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    return f"parquet:{tmp_path / 'x.parquet'}"


def opened(spec: str) -> TableSource:
    source = open_source(spec)
    assert isinstance(source, TableSource)
    return source


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
        ("true,,false", [1, -1, 0]),
        ("1.0,,0.0", [1, -1, 0]),  # as pandas writes whole numbers with gaps
        (",,", [-1, -1, -1]),
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
            "?label=income&inputs=age",
            DataError,
            r"column 'income' has 1\.5, which is not a class number",
        ),
        (
            "?label=kind&classes=cat,dog",
            DataError,
            "column 'kind' has 'ant'; expected one of cat, dog",
        ),
        (
            "?labels=kind",
            SettingsError,
            r"unknown option 'labels'; expected label, inputs, .*missing",
        ),
        (
            "?label=kind&missing=zero",
            SettingsError,
            "missing 'zero'; expected missing=nan or missing=mean",
        ),
        ("?label=kind@test", SettingsError, "a table has no splits; use one file per split"),
    ],
)
def test_what_does_not_fit_is_named(
    table: str, query: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_source(f"{table}{query}")


# labels


def test_an_empty_label_among_words_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(csv(tmp_path, 'x,label\n1,cat\n2,\n3,ant\n4,""\n'))
    assert source.class_names == ("ant", "cat")
    assert source.fetch(range(4))[1].tolist() == [1, -1, 0, -1]
    assert "2 of 4 rows have no 'label' and are unlabelled" in capsys.readouterr().out


def test_na_is_an_empty_cell_in_csv(tmp_path: Path) -> None:
    # as R and pandas write it, among words as among numbers
    spec = csv(tmp_path, "x,kind,label\n1,a,cat\nNA,NA,NA\n")
    source = opened(f"{spec}?missing=nan")
    assert (source.class_names, source.labels.tolist()) == (("cat",), [0, -1])
    assert np.isnan(source.inputs[1]).all()


def test_an_empty_label_in_parquet_is_none(tmp_path: Path) -> None:
    source = open_source(parquet(tmp_path, x=[1, 2, 3, 4], label=["b", "", None, "a"]))
    assert source.class_names == ("a", "b")
    assert source.fetch(range(4))[1].tolist() == [1, -1, -1, 0]
    source = open_source(parquet(tmp_path, x=[1, 2, 3], label=[1.0, math.nan, 0.0]))
    assert source.fetch(range(3))[1].tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([math.inf, 0.0], "column 'label' has inf, which is not a class number"),
        ([2.0**60, 0.0], "which is not a class number; expected whole numbers from 0"),
        ([datetime.date(2024, 1, 1)] * 2, r"'label' holds date32\[day\]; expected class numbers"),
        ([[1], [2]], "column 'label' holds list<.*>; expected class numbers from 0, or the names"),
        (pyarrow.array([2**63, 0], pyarrow.uint64()), "expected class numbers from 0"),
    ],
)
def test_what_cannot_be_a_label_is_named(tmp_path: Path, labels: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(parquet(tmp_path, x=[1, 2], label=labels))


# empty cells


def test_a_missing_value_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"column 'x' has no value in row 1; expected a number in every row: add \?missing=mean",
    ):
        open_source(csv(tmp_path, "x,label\n1,0\n,1\n"))


def test_missing_values_are_passed_on_as_nan(tmp_path: Path) -> None:
    spec = csv(tmp_path, "x,member,kind,label\n1,true,b,0\n,,,1\n3,false,a,0\n")
    source = opened(f"{spec}?missing=nan")
    expected = [[1, 1, 1], [math.nan] * 3, [3, 0, 0]]
    np.testing.assert_array_equal(source.inputs, np.array(expected, np.float32))
    assert source.categories == {"kind": ("a", "b")}


def test_missing_values_are_filled_with_the_mean_of_their_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = csv(tmp_path, "x,y,label\n1,5,0\n,6,1\n4,7,0\n,8,1\n")
    source = opened(f"{spec}?missing=mean")
    assert source.inputs.tolist() == [[1, 5], [2.5, 6], [4, 7], [2.5, 8]]
    told = capsys.readouterr().out
    assert "filled with the mean of their column: 'x' (2 rows, mean 2.5)" in told
    assert "'y'" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,label\nant,0\n,1\n", "column 'x' has no value in row 1, and words have no mean"),
        ("x,label\n,0\n,1\n", "column 'x' has no value in row 0, and no row has one; use .miss"),
    ],
)
def test_what_has_no_mean_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(f"{csv(tmp_path, text)}?missing=mean")


def test_nan_is_named_with_its_row(tmp_path: Path) -> None:
    spec = parquet(tmp_path, a=[1.0, 2.0], b=[0.5, math.nan], label=[0, 1])
    with pytest.raises(DataError, match="column 'b' has NaN in row 1; expected a number in every"):
        open_source(spec)
    assert math.isnan(opened(f"{spec}?missing=nan").inputs[1, 1])
    assert opened(f"{spec}?missing=mean").inputs[1, 1] == 0.5


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("missing", ["", "?missing=mean", "?missing=nan"])
def test_infinity_is_named_with_its_row(tmp_path: Path, value: float, missing: str) -> None:
    spec = parquet(tmp_path, a=[1.0, 2.0, 3.0], b=[0.5, 1, value], label=[0, 1, 0])
    message = re.escape(f"column 'b' has {value} in row 2; expected finite numbers")
    with pytest.raises(DataError, match=message):
        open_source(f"{spec}{missing}")
    (tmp_path / "x.csv").write_text("a,label\n1,0\ninf,1\n")
    with pytest.raises(DataError, match="column 'a' has inf in row 1"):
        open_source(f"csv:{tmp_path / 'x.csv'}")


# words and other values


def test_words_become_numbers_in_sorted_order(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = opened(f"{table}?label=age&inputs=kind,income")
    assert source.inputs.tolist() == [[1, 1.5], [2, -2], [0, 0]]
    assert source.columns == ("kind", "income")
    assert source.categories == {"kind": ("ant", "cat", "dog")}
    told = capsys.readouterr().out
    assert "numbered in sorted order: 'kind' ('ant', 'cat', 'dog' = 0 to 2)" in told


def test_a_dictionary_of_words_is_words(tmp_path: Path) -> None:
    words = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    views = pyarrow.array(["b", "a", "b"], pyarrow.string_view())
    for column in (words, views):
        source = opened(parquet(tmp_path, kind=column, label=[0, 1, 0]))
        assert source.inputs[:, 0].tolist() == [1, 0, 1]
        labels = opened(f"{parquet(tmp_path, x=[1, 2, 3], kind=column)}?label=kind").labels
        assert labels.tolist() == [1, 0, 1]


def test_numbers_in_other_types_are_numbers(tmp_path: Path) -> None:
    spec = parquet(
        tmp_path,
        price=[Decimal("1.50"), Decimal("2.25")],
        text=["10", " 9.5"],
        wide=pyarrow.array([2**63, 1], pyarrow.uint64()),
        label=[0, 1],
    )
    source = opened(spec)
    assert source.inputs.tolist() == [[1.5, 10, 2.0**63], [2.25, 9.5, 1]]
    assert source.categories == {}


def test_a_word_among_numbers_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column 'age' holds numbers, but has '\?' in row 2; expected a number"
    ):
        open_source(csv(tmp_path, "age,label\n30,0\n41,1\n?,0\n"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            [datetime.date(2024, 1, 1)],
            r"'day' holds date32\[day\]; .* write it as a number, such as",
        ),
        ([datetime.datetime(2024, 1, 1)], r"'day' holds timestamp.*\?inputs=A,B"),
        ([b"\xff"], "'day' holds binary; expected numbers or words: save the file as UTF-8"),
        ([[1.0, 2.0]], "'day' holds list<.*; expected numbers or words: use hfds: for lists"),
    ],
)
def test_other_values_are_refused_by_name(tmp_path: Path, column: object, message: str) -> None:
    spec = parquet(tmp_path, x=[1], day=column, label=[0])
    with pytest.raises(DataError, match=f"column {message}"):
        open_source(spec)
    assert opened(f"{spec}?inputs=x").columns == ("x",)


def test_columns_that_are_no_features_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{n + 7},name {n},{n % 3},{n % 2}" for n in range(40)]
    open_source(csv(tmp_path, "\n".join(["id,name,x,label", *rows])))
    told = capsys.readouterr()
    told_all = told.out + told.err
    assert "column 'id' only numbers the rows; leave it out with ?inputs=A,B" in told_all
    assert "column 'name' has 40 different words in 40 rows" in told_all
    assert "column 'x'" not in told_all


def test_keys_of_tables_stay_as_they_are(tmp_path: Path) -> None:
    source = opened(csv(tmp_path, "x,y,label\n1,2.5,0\n3,-4,1\n"))
    rows = np.array([[1, 2.5], [3, -4]], np.float32)
    np.testing.assert_array_equal(source.inputs, rows)
    keys = [8877381516518057629, 2067186551299017002]
    assert sample_keys(source.fetch([0, 1])[0]).tolist() == keys


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"csv:.*gone\.csv: no such file"):
        open_source(f"csv:{tmp_path / 'gone.csv'}")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as a table \("):
        open_source(f"parquet:{tmp_path / 'x.parquet'}")


def test_a_missing_extra_is_named(table: str, without: Callable[[str], None]) -> None:
    kind = table.partition(":")[0]
    without(f"pyarrow.{kind}")
    with pytest.raises(
        SettingsError,
        match=r"pip install 'softcache\[data\]' \(or, in a clone, pip install -e '\.\[data\]'\)",
    ):
        open_source(f"{table}?label=kind")
