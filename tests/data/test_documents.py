"""Texts, chats, words and token ids as samples of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.data.open import open_source
from softcache.data.rows import PADDING, TokenSource
from softcache.data.token_dicts import source_of_dicts
from softcache.errors import DataError, SettingsError
from tests.tokens import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, chat=True)
    return folder


def opened(spec: str, **defaults: str) -> TokenSource:
    source = open_source(spec, defaults=defaults)
    assert isinstance(source, TokenSource)
    return source


def rows_of(source: TokenSource, sample: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a sample, the positions of its rows, and their labels."""
    inputs, labels = source.fetch([sample])
    ids = inputs[0][inputs[0] != PADDING].tolist()
    positions = source.layout.positions_of(source.layout.rows_of(np.array([sample])))
    return ids, positions.tolist(), labels.tolist()


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_each_row_predicts_the_next_token(tmp_path: Path) -> None:
    file = written(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    source = opened(f"ids:{file}")
    assert rows_of(source, 0) == ([5, 6, 7], [0, 1], [6, 7])
    assert rows_of(source, 1) == ([8, 9], [0], [9])
    inputs, labels = source.fetch([1, 0])
    assert inputs.tolist() == [[8, 9, PADDING], [5, 6, 7]]
    assert labels.tolist() == [9, 6, 7]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"loss_mask": [0, 0, 1, 1]}, ([5, 6, 7, 8], [1, 2], [7, 8])),
        ({"labels": [-100, 6, -100, 8]}, ([5, 6, 7, 8], [0, 2], [6, 8])),
        ({"attention_mask": [1, 1, 1, 0]}, ([5, 6, 7], [0, 1], [6, 7])),
        ({"loss_mask": [1, 1, 0, 1], "attention_mask": [0, 1, 1, 1]}, ([6, 7, 8], [1], [8])),
        ({"loss_mask": [1, 0, 0, 0]}, ([5, 6, 7, 8], [], [])),  # nothing predicts the first token
    ],
)
def test_masks_say_which_tokens_count(
    tmp_path: Path, record: dict[str, Any], expected: tuple[list[int], ...]
) -> None:
    records = [{"input_ids": [5, 6, 7, 8], **record}, {"input_ids": [1, 2]}]
    assert rows_of(opened(f"ids:{written(tmp_path / 'ids.jsonl', records)}"), 0) == expected


def test_ids_in_npy_and_parquet(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(10, dtype=np.uint16))
    stream = opened(f"ids:{tmp_path / 'stream.npy'}?length=4")
    assert [rows_of(stream, n) for n in range(3)] == [
        ([0, 1, 2, 3], [0, 1, 2], [1, 2, 3]),
        ([4, 5, 6, 7], [0, 1, 2], [5, 6, 7]),
        ([8, 9], [0], [9]),
    ]
    np.save(tmp_path / "rows.npy", np.arange(6).reshape(2, 3))
    assert len(opened(f"ids:{tmp_path / 'rows.npy'}")) == 2
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"input_ids": [[1, 2, 3], [4, 5]]}), tmp_path / "ids.parquet")
    assert rows_of(opened(f"ids:{tmp_path / 'ids.parquet'}"), 0) == ([1, 2, 3], [0, 1], [2, 3])


def test_overlapping_samples_predict_each_token_once(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(11))
    source = opened(f"ids:{tmp_path / 'stream.npy'}?length=6&stride=2")
    every = [rows_of(source, n) for n in range(len(source))]
    assert every[0] == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert every[1] == ([2, 3, 4, 5, 6, 7], [3, 4], [6, 7])
    assert sorted(label for _, _, labels in every for label in labels) == list(range(1, 11))


def test_texts_of_files_and_lines(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\nsat on\n")
    (tmp_path / "b.txt").write_text("a dog")
    whole = opened(f"text:{tmp_path}", tokenizer=str(tokenizer))
    lines = opened(f"text:{tmp_path / 'a.txt'}?documents=lines&tokenizer={tokenizer}")
    assert len(whole) == 2
    assert len(lines) == 2
    assert whole.facts["bytes"] == 21
    assert whole.facts["tokenizer"] == lines.facts["tokenizer"]
    assert whole.facts["vocabulary"] == 300


def test_a_subset_keeps_the_rows_of_its_samples(tmp_path: Path) -> None:
    records = [{"input_ids": [n, n + 1, n + 2]} for n in range(0, 50, 5)]
    file = written(tmp_path / "ids.jsonl", records)
    whole, part = opened(f"ids:{file}"), opened(f"ids:{file}?shuffle=3&samples=4")
    order = np.random.default_rng(3).permutation(10)[:4]
    assert [rows_of(part, n) for n in range(4)] == [rows_of(whole, n) for n in order.tolist()]
    assert part.facts["tokens"] == 12


def test_words_have_rows_at_their_first_tokens(tokenizer: Path, tmp_path: Path) -> None:
    records = [
        {"w": ["cat", "unfamiliar", "mat"], "t": ["O", "B", "O"]},
        {"w": ["dog"], "t": ["B"]},
    ]
    file = written(tmp_path / "words.jsonl", records)
    source = opened(f"jsonl:{file}?words=w&tags=t", tokenizer=str(tokenizer))
    ids, positions, labels = rows_of(source, 0)
    assert source.class_names == ("B", "O")
    assert labels == [1, 0, 1]
    assert len(positions) == 3 < len(ids)
    assert positions[0] == 0


@pytest.mark.parametrize(
    ("records", "unit", "expected"),
    [
        ([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], "token", ([5, 6, 7], [0, 1], [6, 7])),
        ([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], "token", ([5, 6, 7], [1], [7])),
        ([{"input_ids": [5, 6, 7], "labels": [-100, 2, 0]}], "word", ([5, 6, 7], [1, 2], [2, 0])),
        ([{"input_ids": np.array([5, 6])}], "token", ([5, 6], [0], [6])),
    ],
)
def test_dicts_as_trainers_take_them(
    records: list[dict[str, Any]], unit: str, expected: tuple[list[int], ...]
) -> None:
    source = source_of_dicts("mine", records)
    assert source.unit == unit
    assert rows_of(source, 0) == expected


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"ids": [1, 2]}], "sample 0 has no input_ids; it has ids"),
        (
            [{"input_ids": [1, 2]}, {"input_ids": [1, -2]}],
            "sample 1: input_ids are from -2 to 1; expected",
        ),
        ([{"input_ids": [1.5, 2]}], "input_ids are float64 of shape"),
        ([{"input_ids": ["1", "2"]}], "input_ids are <U1"),
        ([{"input_ids": [1, 2], "loss_mask": [1]}], "has 2 input_ids and 1 of loss_mask"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "has 2 input_ids and 1 of attention_mask"),
        ([{"input_ids": [1]}], "no token is to be predicted in 1 samples"),
        ([{"input_ids": [1, 2], "loss_mask": [1, 0]}], "no token is to be predicted"),
    ],
)
def test_ids_that_are_none_are_refused(
    tmp_path: Path, records: list[dict[str, Any]], message: str
) -> None:
    file = written(tmp_path / "ids.jsonl", records)
    with pytest.raises(DataError, match=message):
        open_source(f"ids:{file}")


@pytest.mark.parametrize(
    ("spec", "content", "error", "message"),
    [
        ("jsonl:{}", "{}", SettingsError, r"does not say which field .* \?text=FIELD"),
        ("jsonl:{}?text=t&messages=m", "{}", SettingsError, "has text, messages; expected text="),
        ("jsonl:{}?words=w", "{}", SettingsError, "has words; expected"),
        ("jsonl:{}?text=t", '{"x": 1}', DataError, "sample 0 has no t; it has x"),
        ("jsonl:{}?text=t", '{"t": 1}', DataError, "sample 0 is int; expected a text"),
        ("jsonl:{}?text=t", "[1]", DataError, "line 1 is list; expected an object"),
        ("jsonl:{}?text=t", "{oops", DataError, "line 1 is not JSON"),
        (
            "jsonl:{}?text=t&loss_on=assistant",
            '{"t": "a cat"}',
            SettingsError,
            "which have no turns",
        ),
        ("jsonl:{}?messages=m", '{"m": "hi"}', DataError, "sample 0 is no chat"),
        (
            "jsonl:{}?messages=m&loss_on=some",
            '{"m": []}',
            SettingsError,
            "loss_on=some; expected all",
        ),
        (
            "jsonl:{}?messages=m",
            '{"m": [{"role": "user", "content": "a"}]}',
            DataError,
            "turn of the ass",
        ),
        (
            "jsonl:{}?words=w&tags=t",
            '{"w": ["a", "b"], "t": [1]}',
            DataError,
            "sample 0 has 2 words and 1 tags",
        ),
        (
            "jsonl:{}?words=w&tags=t",
            '{"w": ["a", "b"], "t": [1, "B"]}',
            DataError,
            "of several types",
        ),
        (
            "text:{}?length=1",
            "a cat",
            SettingsError,
            "length=1 and stride=1; expected a length of 2",
        ),
        ("text:{}?length=4&stride=5", "a cat", SettingsError, "tokens would be left out"),
        ("text:{}?length=x", "a cat", SettingsError, "length=x; expected a number of tokens"),
        (
            "text:{}?documents=pages",
            "a cat",
            SettingsError,
            "documents=pages; expected files or lines",
        ),
        ("text:{}", "", DataError, "no token is to be predicted"),
        (
            "ids:{}",
            "1 2 3",
            SettingsError,
            r"expected a file ending in \.npy, \.jsonl or \.parquet",
        ),
        ("text:{}?label=x", "a", SettingsError, "unknown option 'label'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tokenizer: Path, tmp_path: Path, spec: str, content: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "file.data"
    file.write_text(content)
    with pytest.raises(error, match=message):
        open_source(spec.format(file), defaults={"tokenizer": str(tokenizer)})


def test_a_missing_file_and_other_bytes_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read \(No such file"):
        open_source(f"text:{tmp_path / 'nowhere.txt'}?tokenizer={tokenizer}")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        open_source(f"text:{tmp_path / 'latin.txt'}?tokenizer={tokenizer}")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"the folder has no \.txt files"):
        open_source(f"text:{tmp_path / 'none'}?tokenizer={tokenizer}")


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(
        SettingsError, match=r"tokenizer .*empty cannot be loaded .*; expected a folder"
    ):
        open_source(f"text:{tmp_path / 'a.txt'}?tokenizer={tmp_path / 'empty'}")
