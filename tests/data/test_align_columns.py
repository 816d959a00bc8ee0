"""Columns of two tables matched by name, and the statistics of columns."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.data import tables
from softcache.data.class_names import MappedSource
from softcache.data.open import open_source
from softcache.data.source import ArraySource
from softcache.data.subset import SubsetSource
from softcache.data.tables import TableSource, align_columns, column_statistics, columns_of
from softcache.errors import DataError

TRAIN = "age,pay,kind,label\n1,10,cat,0\n2,20,ant,1\n3,30,dog,0\n"


def table(tmp_path: Path, name: str, text: str, query: str = "") -> TableSource:
    (tmp_path / f"{name}.csv").write_text(text)
    source = open_source(f"csv:{tmp_path / name}.csv{query}")
    assert isinstance(source, TableSource)
    return source


@pytest.fixture
def train(tmp_path: Path) -> TableSource:
    return table(tmp_path, "train", TRAIN)


def aligned(source: TableSource, reference: TableSource) -> TableSource:
    result = align_columns(source, columns_of(reference))
    assert isinstance(result, TableSource)
    return result


def test_columns_in_another_order_are_matched_by_name(
    tmp_path: Path, train: TableSource, capsys: pytest.CaptureFixture[str]
) -> None:
    test = table(tmp_path, "test", "kind,label,pay,age\ndog,1,40,4\ncat,0,50,5\n")
    result = aligned(test, train)
    assert result.columns == ("age", "pay", "kind")
    assert result.inputs.tolist() == [[4, 40, 2], [5, 50, 1]]  # words have the numbers of train.csv
    assert result.categories == train.categories
    assert result.labels.tolist() == [1, 0]
    assert result.name == test.name
    assert test.inputs.tolist() == [[1, 40, 4], [0, 50, 5]]  # the source itself is as it was
    told = capsys.readouterr().out
    assert (
        "the columns of csv:test.csv are in another order than those of csv:train.csv; matched by "
        "name, as 'age', 'pay', 'kind'" in told
    )


def test_columns_of_the_same_names_stay(
    tmp_path: Path, train: TableSource, capsys: pytest.CaptureFixture[str]
) -> None:
    test = table(tmp_path, "test", TRAIN)
    capsys.readouterr()
    assert align_columns(test, columns_of(train)) is test
    assert capsys.readouterr().out == ""


def test_words_are_numbered_as_in_the_reference(tmp_path: Path, train: TableSource) -> None:
    test = table(
        tmp_path, "test", "age,pay,kind,label\n1,2,dog,0\n1,2,,0\n1,2,dog,0\n", "?missing=nan"
    )
    assert test.inputs[:, 2].tolist()[::2] == [0, 0]
    kinds = aligned(test, train).inputs[:, 2]
    assert kinds[::2].tolist() == [2, 2]
    assert math.isnan(kinds[1])


def test_more_columns_are_left_out(
    tmp_path: Path, train: TableSource, capsys: pytest.CaptureFixture[str]
) -> None:
    test = table(tmp_path, "test", "zip,age,pay,kind,label\n8000,4,40,cat,1\n")
    result = aligned(test, train)
    assert result.inputs.tolist() == [[4, 40, 1]]
    told = capsys.readouterr().out
    assert "csv:train.csv does not have, which are left out: 'zip'" in told
    assert "another order" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "age,zip,kind,label\n1,8000,cat,0\n",
            "^csv:test.csv has no column 'pay', which csv:train.csv has, but has 'zip'; expected the "
            "columns 'age', 'pay', 'kind': give both",
        ),
        ("age,label\n1,0\n", "has no column 'pay', 'kind', which csv:train.csv has; expected"),
        (
            "age,pay,kind,label\n1,2,elk,0\n",
            "csv:test.csv: column 'kind' has 'elk', which csv:train.csv does not have; expected 'ant',",
        ),
        (
            "age,pay,kind,label\n1,2,3,0\n",
            "'kind' holds numbers in csv:test.csv and words in csv:train.csv; expected the same",
        ),
        (
            "age,pay,kind,label\nold,2,cat,0\n",
            "'age' holds words in csv:test.csv and numbers in csv:train.csv",
        ),
    ],
)
def test_other_columns_and_words_are_named(
    tmp_path: Path, train: TableSource, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        align_columns(table(tmp_path, "test", text), columns_of(train))


def test_without_names_nothing_is_compared(tmp_path: Path, train: TableSource) -> None:
    plain = ArraySource("npz:x.npz", np.zeros((2, 9), np.float32), np.zeros(2, np.int64))
    assert align_columns(train, columns_of(plain)) is train
    assert align_columns(plain, columns_of(train)) is plain


def test_tables_with_other_class_numbers_are_matched_as_well(
    tmp_path: Path, train: TableSource
) -> None:
    test = table(tmp_path, "test", "pay,age,kind,label\n40,4,cat,no\n50,5,ant,yes\n")
    mapped = MappedSource(test, (1, 0), ("yes", "no"))
    result = align_columns(mapped, columns_of(MappedSource(train, (0, 1), ("a", "b"))))
    inputs, labels = result.fetch([0, 1])
    assert inputs.tolist() == [[4, 40, 1], [5, 50, 0]]
    assert labels.tolist() == [1, 0]
    assert result.class_names == ("yes", "no")
    part = align_columns(
        SubsetSource(test, np.array([1])), columns_of(SubsetSource(train, np.array([2])))
    )
    assert part.fetch([0])[0].tolist() == [[5, 50, 0]]


def test_a_table_goes_to_another_process(train: TableSource) -> None:
    copy = pickle.loads(pickle.dumps(train))
    assert (copy.columns, copy.categories) == (train.columns, train.categories)
    assert torch.equal(copy.fetch([1])[0], train.fetch([1])[0])


# statistics


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_statistics_are_those_of_all_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    random = np.random.default_rng(0)
    inputs = random.normal([0, 1e4, -3], [1, 2, 0.01], (50, 3)).astype(np.float32)
    labels = random.integers(-1, 2, 50)  # -1: unlabelled rows count too
    mean, std = column_statistics(TableSource("t", inputs, labels))
    np.testing.assert_allclose(mean.numpy(), inputs.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), inputs.std(0, np.float64), rtol=1e-6)
    assert mean.dtype == std.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_nan_is_left_out_and_a_constant_has_deviation_one(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    nan = math.nan
    rows = [[1, 0.1, nan, nan], [nan, 0.1, nan, nan], [3, 0.1, nan, 7], [5, 0.1, nan, nan]]
    inputs = np.array(rows, np.float32)
    mean, std = column_statistics(TableSource("t", inputs, np.zeros(4, np.int64)))
    np.testing.assert_allclose(mean.numpy(), [3, 0.1, 0, 7], rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), [float(np.std([1, 3, 5])), 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("header", ["a,b,label", "b,label,a"])
def test_empty_cells_are_filled_with_the_means_of_the_reference(
    tmp_path: Path, header: str
) -> None:
    (tmp_path / "train.csv").write_text("a,b,label\n1,10,0\n3,30,1\n,20,1\n")
    values = {"a": ["5", "", "9"], "b": ["1", "2", ""], "label": ["0", "1", "0"]}
    rows = [",".join(values[name][row] for name in header.split(",")) for row in range(3)]
    (tmp_path / "test.csv").write_text("\n".join([header, *rows]) + "\n")
    train = open_source(f"csv:{tmp_path / 'train.csv'}?missing=mean")
    test = open_source(f"csv:{tmp_path / 'test.csv'}?missing=mean")
    aligned = align_columns(test, columns_of(train))
    assert aligned.fetch(range(3))[0].tolist() == [[5, 1], [2, 2], [9, 20]]
    # a part of the table keeps which cells were empty
    part = open_source(f"csv:{tmp_path / 'test.csv'}?missing=mean&samples=2")
    assert align_columns(part, columns_of(train)).fetch(range(2))[0].tolist() == [[5, 1], [2, 2]]
    assert align_columns(train, columns_of(train)) is train
