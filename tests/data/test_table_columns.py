"""The columns of a table as a cache keeps them: other tables are joined to it by the names of columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.cache import open_cache
from softcache.cache.merge import merge
from softcache.cache.provenance import summary
from softcache.data.open import open_source
from softcache.data.table_columns import (
    MAX_JSON,
    TableColumns,
    columns_field,
    columns_from_json,
    columns_of_cache,
)
from softcache.data.tables import columns_of
from softcache.errors import FormatError
from softcache.join.match import match_samples
from softcache.join.samples import open_samples
from tests.cli.app_cases import softcache

TEACHER = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x[:, 0], x[:, 2]], 1)
def make(): return Model()
"""
ROWS = [
    ("ant", "1", "5", "0"),
    ("cat", "", "7", "1"),
    ("bee", "4", "6", "1"),
    ("ant", "2", "", "0"),
]
NAMES = ["kind", "age", "pay", "label"]


def write_table(path: Path, names: list[str], rows: list[int]) -> str:
    lines = [",".join(ROWS[row][NAMES.index(name)] for name in names) for row in rows]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")
    return f"csv:{path}?missing=mean"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_table(tmp_path / "train.csv", NAMES, [0, 1, 2, 3])


def dumped(tmp_path: Path, data: str, name: str = "c.h5", *options: str) -> Path:
    (tmp_path / "t.py").write_text(TEACHER)
    path = tmp_path / name
    result = softcache(
        "dump", "--teacher", f"{tmp_path / 't.py'}:make", "--data", data, "-o", str(path), *options
    )
    assert result.exit_code == 0, result.output
    return path


def test_a_cache_keeps_names_words_and_means(tmp_path: Path, data: str) -> None:
    cache = open_cache(dumped(tmp_path, data))
    assert (cache.header.summary or {})["columns"] == [
        {"name": "kind", "words": ["ant", "bee", "cat"]},
        {"name": "age", "mean": pytest.approx(7 / 3)},
        {"name": "pay", "mean": 6.0},
    ]
    kept, own = columns_of_cache(cache), columns_of(open_source(data))
    assert kept is not None
    assert own is not None
    assert (kept.names, kept.words, kept.means) == (own.names, own.words, own.means)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1, 0], [1, 2, 3]])
def test_any_part_in_any_order_of_rows_and_columns_is_joined(
    tmp_path: Path, data: str, rows: list[int]
) -> None:
    cache = open_cache(dumped(tmp_path, data))
    # words have other numbers in a part of the table, and columns other means
    part = write_table(tmp_path / "part.csv", ["pay", "label", "kind", "age"], rows)
    match = match_samples(open_samples(cache, part), cache)
    assert dict(zip(match.cache_rows.tolist(), match.source_indices.tolist(), strict=True)) == {
        row: position for position, row in enumerate(rows)
    }


def test_shards_and_their_merged_file_keep_them(tmp_path: Path, data: str) -> None:
    parts = [dumped(tmp_path, data, f"{n}.h5", "--shard", f"{n}/2") for n in range(2)]
    whole = dumped(tmp_path, data)
    merged = merge([open_cache(part) for part in parts], tmp_path / "m.h5")
    for path in (*parts, merged.path):
        assert columns_of_cache(open_cache(path)).names == ("kind", "age", "pay")  # type: ignore[union-attr]
    assert (tmp_path / "m.h5").read_bytes()[:64] == whole.read_bytes()[:64]


def test_what_cannot_be_kept_is_left_out() -> None:
    assert columns_field(None) == {}
    assert columns_field(TableColumns("t", ("a\nb",))) == {}
    assert columns_field(TableColumns("t", ("a",), {"a": ("x" * 4097,)})) == {}
    words = tuple(f"word {n}" for n in range(MAX_JSON // 8))
    assert columns_field(TableColumns("t", ("a",), {"a": words})) == {}
    assert columns_field(TableColumns("t", ("a",))) == {"columns": [{"name": "a"}]}
    assert columns_from_json([], "t") is None


@pytest.mark.parametrize(
    "columns",
    [
        {"name": "a"}, ["a"], [{}], [{"name": 1}], [{"name": "a\n"}], [{"name": "a", "x": 1}],
        [{"name": "a", "words": "b"}], [{"name": "a", "words": [1]}], [{"name": "a", "mean": "1"}],
    ],
)  # fmt: skip
def test_other_descriptions_are_refused(columns: object) -> None:
    fields = {"entropy": 0.5, "agreement": None, "rows": 3}
    assert summary(fields | {"columns": [{"name": "a", "mean": 1.5}]})
    with pytest.raises(FormatError, match=r"summary has columns .*; expected objects with name"):
        summary(fields | {"columns": columns})


def test_missing_values_are_passed_on_and_are_the_same_in_two_readings(tmp_path: Path) -> None:
    teacher = TEACHER.replace(
        "def forward(self, x):", "def forward(self, x):\n        x = x.nan_to_num()"
    )
    (tmp_path / "t.py").write_text(teacher)
    train = write_table(tmp_path / "train.csv", NAMES, [0, 1, 2, 3]).replace("mean", "nan")
    out = tmp_path / "c.h5"
    arguments = ["--teacher", f"{tmp_path / 't.py'}:make", "--data", train, "-o", str(out)]
    result = softcache("dump", *arguments)
    assert result.exit_code == 0, result.output
    match = match_samples(open_samples(open_cache(out), train), open_cache(out))
    assert match.cache_rows.tolist() == [0, 1, 2, 3]


def test_a_class_name_may_hold_any_space(tmp_path: Path) -> None:
    names = ("Rome", "New\u00a0York")
    rows = "".join(f"{n},{names[n % 2]}\n" for n in range(40))
    (tmp_path / "d.csv").write_text(f"x,label\n{rows}")
    data, run = f"csv:{tmp_path / 'd.csv'}", str(tmp_path / "run")
    options = ["--data", data, "--eval-data", data, "--epochs", "1", "-o", run]
    trained = softcache("train", "--student", "mlp:4", *options)
    assert trained.exit_code == 0, trained.output
    compared = softcache("compare", run, "--eval-data", data)
    assert compared.exit_code == 0, compared.output
    assert "New\\xa0York" in compared.stdout
