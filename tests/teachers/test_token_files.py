"""Files of the entries of each token: what is no such file is refused, with document and row named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.errors import ModelError, SettingsError, SoftcacheError
from softcache.teachers.align_tokens import check_alignment, find_ahead
from softcache.teachers.spec import parse_teacher
from softcache.teachers.token_files import TokenFile, read_token_file
from tests.token_files import (
    Record,
    axolotl,
    plain,
    vllm,
    write_documents,
    write_jsonl,
    write_parquet,
)

DOCUMENTS = write_documents(3)
TOP: dict[str, Any] = {"token_ids": [[1, 2], [3]], "logprobs": [[-1.0, -2.0], [-0.5]]}


def opened(path: Path, options: str = "") -> TokenFile:
    return read_token_file(parse_teacher(f"{path}{options}"))


def test_rows_and_entries_of_a_file(tmp_path: Path) -> None:
    records: list[Record] = [
        {"input_ids": [4, 5, 6]} | TOP,
        {"input_ids": [7]} | {name: [] for name in TOP},
    ]
    for file in (
        write_jsonl(tmp_path / "t.jsonl", records),
        write_parquet(tmp_path / "t.parquet", records),
    ):
        read = opened(file)
        assert (read.documents, read.largest, read.ahead) == (2, 2, None)
        assert read.document(1).tolist() == [7]
        assert read.counts.tolist() == [2, 1]
        assert read.ids.tolist() == [1, 2, 3]
        assert read.log_probs.tolist() == [-1.0, -2.0, -0.5]
        assert read.where(1) == f"teacher {file}: document 0, row 1"


def test_entries_that_do_not_count_are_left_out(tmp_path: Path) -> None:
    record = {"input_ids": [4, 5, 6]} | TOP
    record["logprobs"] = [[-1.0, float("-inf")], [-0.5]]
    assert opened(write_jsonl(tmp_path / "t.jsonl", [record])).counts.tolist() == [1, 1]
    read = opened(write_jsonl(tmp_path / "t.jsonl", [axolotl(d, prompt=9) for d in DOCUMENTS]))
    assert read.counts[:9].tolist() == [0] * 8 + [8]
    assert (read.log_probs > -100).all()


def test_lists_may_be_null(tmp_path: Path) -> None:
    record = {"input_ids": [4, 5], "token_ids": [None, [1]], "logprobs": [None, [-0.5]]}
    for file in (
        write_jsonl(tmp_path / "t.jsonl", [record]),
        write_parquet(tmp_path / "t.parquet", [record]),
    ):
        assert opened(file).counts.tolist() == [0, 1]


def test_rows_of_vllm_say_themselves_which_token_they_are_about(tmp_path: Path) -> None:
    records = [vllm(document) for document in DOCUMENTS]
    assert opened(write_jsonl(tmp_path / "t.jsonl", records)).ahead == 0
    for record in records:
        del record["prompt_logprobs"][0]
    assert opened(write_jsonl(tmp_path / "t.jsonl", records)).ahead == 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_is_stated_is_compared_with_the_evidence(ahead: int, tmp_path: Path) -> None:
    documents = write_documents(12)
    records = [plain(document) for document in documents]
    if not ahead:
        records = [r | {n: [[], *r[n][:-1]] for n in ("token_ids", "logprobs")} for r in records]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    for options in ("", "?rows=next" if ahead else "?rows=same"):
        read = opened(file, options)
        assert find_ahead(read, strict=True) == ahead
        check_alignment(read, ahead, strict=True)
    with pytest.raises(SoftcacheError, match=r"shifted by one"):
        find_ahead(opened(file, "?rows=same" if ahead else "?rows=next"), strict=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"ids": [1]}, r"has no input_ids or prompt_token_ids, by which .*; it has ids"),
        ({"input_ids": [1, 2]}, r"has the columns input_ids; expected target_token_ids and target_log"),
        ({"input_ids": [1, 2], "token_ids": [[1]], "logprobs": None}, r"document 0 has no logprobs"),
        ({"input_ids": [1, 2], "token_ids": [1], "logprobs": [[-1.0]]}, r"token_ids is no list of lists"),
        ({"input_ids": [1, 2], "token_ids": [[1.5]], "logprobs": [[-1.0]]}, r"token_ids holds float64; exp"),
        ({"input_ids": [1, 2], "token_ids": [["a"]], "logprobs": [[-1.0]]}, r"token_ids holds <U1; expected"),
        ({"input_ids": [1, 2], "token_ids": [[1]], "logprobs": [[None]]}, r"logprobs holds object; expected"),
        ({"input_ids": [1, 2], "prompt_logprobs": {}}, r"prompt_logprobs is dict; expected a list"),
        ({"input_ids": [1, 2], "prompt_logprobs": [None, [1]]}, r"row 1: prompt_logprobs has list; expected"),
        ({"input_ids": [1, 2], "prompt_logprobs": [None, {"the": -1.0}]}, r"row 1: .* has 'the': -1\.0; exp"),
        ({"input_ids": [1, 2], "prompt_logprobs": [None, {"1": {}}]}, r"row 1: .* has '1': \{\}; exp"),
        ({"input_ids": [1, 2], "attention_mask": [1]} | TOP, r"2 token ids and 1 of attention_mask"),
        ({"input_ids": [1, 2, 3, 4]} | TOP, r"document 0 has 4 tokens and 2 rows; expected as many rows"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SoftcacheError, match=message):
        opened(write_jsonl(tmp_path / "t.jsonl", [record]))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": \n')
    with pytest.raises(ModelError, match=r"teacher .*t\.jsonl: line 2 is not JSON"):
        opened(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text("")
    with pytest.raises(SoftcacheError, match=r"t\.jsonl has the columns"):
        opened(tmp_path / "t.jsonl")
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(ModelError, match=r"t\.parquet cannot be read"):
        opened(tmp_path / "t.parquet")
    with pytest.raises(SettingsError, match=r"gone\.jsonl: no such file"):
        opened(tmp_path / "gone.jsonl")


def test_entries_are_checked(tmp_path: Path) -> None:
    read = opened(write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [4, 5, 6]} | TOP]))
    read.check(4)
    with pytest.raises(ModelError, match=r"document 0, row 1 has token id 3; expected 0 to 2"):
        read.check(3)
    np.testing.assert_array_equal(read.rows().offsets, [0, 2])
