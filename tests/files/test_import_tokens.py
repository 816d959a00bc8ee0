"""`softcache import` of tokens: every layout gives the teacher's rows, and every planted fault is named."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import Cache, Dense, TopK
from softcache.errors import DataError, ModelError, SettingsError, SoftcacheError
from softcache.files.import_labels import import_labels
from tests.cli.app_cases import softcache
from tests.token_files import (
    VOCABULARY,
    K,
    Record,
    Written,
    axolotl,
    distillkit,
    expected_rows,
    plain,
    vllm,
    write_documents,
    write_ids,
    write_jsonl,
    write_parquet,
)

DOCUMENTS = write_documents()
# an entry for the token itself that is less probable than the mean of the tail counts as one of the tail
TOLERANCE = {False: 2e-3, True: 3e-3}
LAYOUTS: dict[str, Callable[[Written], Record]] = {
    "distillkit": distillkit,
    "plain": plain,
    "axolotl": axolotl,
    "vllm": vllm,
}


def imported(source: str | Path, data: str, folder: Path, **options: Any) -> Cache:
    return import_labels(
        str(source), data=data, out=folder / "c.h5", **{"classes": VOCABULARY, **options}
    )


def probabilities(cache: Cache) -> npt.NDArray[np.float32]:
    return np.asarray(np.exp(cache.rows(0, np.arange(cache.header.row_count))))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_ids(tmp_path / "data.jsonl", DOCUMENTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hfds", "arrow"])
def test_each_layout_gives_the_rows_of_the_teacher(
    layout: str, suffix: str, data: str, tmp_path: Path
) -> None:
    records = [LAYOUTS[layout](document) for document in DOCUMENTS]
    source: str | Path
    if suffix == "jsonl":
        source = write_jsonl(tmp_path / "t.jsonl", records)
    elif layout == "vllm":
        pytest.skip("objects by token id are no columns")
    elif suffix == "parquet":
        source = write_parquet(tmp_path / "t.parquet", records)
    elif suffix == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "t"))
        source = f"hfds:{tmp_path / 't'}"
    else:
        source = f"hfds:{write_parquet(tmp_path / 't.parquet', records)}@train"
    cache = imported(source, data, tmp_path)
    assert cache.header.unit == "token"
    assert cache.header.encoding == TopK(K + (layout == "vllm"))
    expected = expected_rows(DOCUMENTS, own=layout == "vllm")
    np.testing.assert_allclose(probabilities(cache), expected, atol=TOLERANCE[layout == "vllm"])
    np.testing.assert_array_equal(
        cache.labels, np.concatenate([document.tokens[1:] for document in DOCUMENTS])
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_itself_may_be_the_data(layout: str, tmp_path: Path) -> None:
    records = [LAYOUTS[layout](document) for document in DOCUMENTS]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    cache = imported(file, f"ids:{file}", tmp_path, embed_inputs=True)
    assert cache.header.embeds_inputs
    expected = expected_rows(DOCUMENTS, own=layout == "vllm")
    np.testing.assert_allclose(probabilities(cache), expected, atol=TOLERANCE[layout == "vllm"])
    if layout != "vllm":
        parquet = write_parquet(tmp_path / "t.parquet", records)
        again = imported(parquet, f"ids:{parquet}", tmp_path, overwrite=True)
        np.testing.assert_array_equal(again.keys, cache.keys)
        np.testing.assert_array_equal(probabilities(again), probabilities(cache))


def test_a_folder_of_parquet_files_may_be_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    folder.mkdir()
    write_parquet(folder / "data_0.parquet", [distillkit(d) for d in DOCUMENTS[:10]])
    write_parquet(folder / "data_1.parquet", [distillkit(d) for d in DOCUMENTS[10:]])
    cache = imported(f"hfds:{folder}", f"ids:{folder}", tmp_path)
    np.testing.assert_allclose(probabilities(cache), expected_rows(DOCUMENTS), atol=2e-3)


def test_short_entries_of_vllm(data: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [vllm(d, short=True) for d in DOCUMENTS])
    cache, expected = imported(file, data, tmp_path), expected_rows(DOCUMENTS, own=True)
    np.testing.assert_allclose(probabilities(cache), expected, atol=TOLERANCE[True])


def test_the_number_of_entries_may_vary(tmp_path: Path, data: str) -> None:
    records = [distillkit(d, k=3 + n % 4) for n, d in enumerate(DOCUMENTS)]
    cache = imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path)
    assert cache.header.encoding == TopK(6)
    expected = np.concatenate([expected_rows([d], 3 + n % 4) for n, d in enumerate(DOCUMENTS)])
    np.testing.assert_allclose(probabilities(cache), expected, atol=2e-3)


def test_all_entries_are_stored_densely(tmp_path: Path, data: str) -> None:
    records = [distillkit(d, k=VOCABULARY) for d in DOCUMENTS]
    cache = imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path)
    assert cache.header.encoding == Dense()
    expected = np.exp(np.concatenate([d.log_probs[:-1] for d in DOCUMENTS]))
    np.testing.assert_allclose(probabilities(cache), expected, atol=2e-3)


def test_only_tokens_that_count_have_rows(tmp_path: Path) -> None:
    records = [axolotl(d, prompt=9) for d in DOCUMENTS]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    cache = imported(file, f"ids:{file}", tmp_path)
    expected = [expected_rows([d])[8:] for d in DOCUMENTS]
    np.testing.assert_allclose(probabilities(cache), np.concatenate(expected), atol=2e-3)
    with pytest.raises(ModelError, match=r"no entries for token 1 of document 0, and .* predicts"):
        imported(file, write_ids(tmp_path / "data.jsonl", DOCUMENTS), tmp_path, overwrite=True)


def test_which_token_a_row_is_about_is_found(
    tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainers that shift the targets themselves want the row at position i about token i."""
    records = []
    for record in map(plain, DOCUMENTS):
        lists = {name: [[], *record[name][:-1]] for name in ("token_ids", "logprobs")}
        records.append(record | lists)
    file = write_jsonl(tmp_path / "t.jsonl", records)
    with caplog.at_level(logging.INFO):
        cache = imported(file, data, tmp_path)
    assert "the row at position i is about token i, by its probabilities" in caplog.text
    np.testing.assert_allclose(probabilities(cache), expected_rows(DOCUMENTS), atol=2e-3)
    cache = imported(f"{file}?rows=same", data, tmp_path, overwrite=True)
    with pytest.raises(
        DataError, match=r"shifted by one: the row at position i gives token i a mean"
    ):
        imported(f"{file}?rows=next", data, tmp_path, overwrite=True)


def test_documents_in_another_order_are_found_by_their_tokens(
    tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [distillkit(document) for document in DOCUMENTS]
    records[3], records[17] = records[17], records[3]
    records.append(distillkit(write_documents(1, seed=9)[0]))
    with caplog.at_level(logging.INFO):
        cache = imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path)
    assert "is not in the order of" in caplog.text
    assert "1 of 25 documents" in caplog.text
    np.testing.assert_allclose(probabilities(cache), expected_rows(DOCUMENTS), atol=2e-3)


def test_left_padding_that_is_marked_is_left_out(tmp_path: Path, data: str) -> None:
    for build, last in ((plain, False), (distillkit, True)):
        records = []
        for record in map(build, DOCUMENTS):
            names = [name for name in record if name != "input_ids"]
            lists = {name: [record[name][0]] * 5 + record[name] for name in names}
            tokens = {"input_ids": [7] * 5 + record["input_ids"]}
            mask = {"attention_mask": [0] * 5 + [1] * len(record["input_ids"])}
            records.append(tokens | mask | lists)
            assert (len(lists[names[0]]) < len(tokens["input_ids"])) == last
        file = write_jsonl(tmp_path / "t.jsonl", records)
        cache = imported(file, data, tmp_path, overwrite=True)
        np.testing.assert_allclose(probabilities(cache), expected_rows(DOCUMENTS), atol=2e-3)
        np.testing.assert_array_equal(
            imported(file, f"ids:{file}", tmp_path, overwrite=True).keys, cache.keys
        )


def moved(record: Record, by: int) -> Record:
    """A document whose lists are moved to a later or an earlier row, in a file of the same shape."""
    lists = {}
    for name in record:
        if name in ("token_ids", "top_values", "logprobs"):
            rows = record[name]
            lists[name] = rows[:1] * by + rows[:-by] if by > 0 else rows[-by:] + rows[by:]
    return record | lists


def served_moved(record: Record, by: int) -> Record:
    rows = record["prompt_logprobs"]
    new = [rows[0], rows[1], *rows[1:-1]] if by > 0 else [rows[0], *rows[2:], rows[-1]]
    return record | {"prompt_logprobs": new}


def without_first_rows(record: Record) -> Record:
    return {name: v if name == "input_ids" else v[1:] for name, v in record.items()}


def shuffled(record: Record, draw: random.Random) -> Record:
    order = list(range(len(record["token_ids"])))
    draw.shuffle(order)
    lists = {name: [record[name][n] for n in order] for name in record if name != "input_ids"}
    return record | lists


def renumbered(record: Record, draw: random.Random) -> Record:
    order = list(range(VOCABULARY))
    random.Random(3).shuffle(order)
    return record | {"token_ids": [[order[i] for i in row] for row in record["token_ids"]]}


FAULTS: dict[str, tuple[Callable[[list[Record]], list[Record]], str]] = {
    "every row one too late": (
        lambda r: [moved(x, 1) for x in r],
        r"rows are shifted by one: the row at position i gives token i a mean.*\?rows=same",
    ),
    "every row one too early": (
        lambda r: [moved(x, -1) for x in r],
        r"rows are shifted by one: the row at position i gives token i \+ 2 .*rows are missing",
    ),
    "one document one too late": (
        lambda r: [*r[:5], moved(r[5], 1), *r[6:]],
        r"tokens of document 5, .*rows promise .*its rows are shifted by 1 \(1 documents",
    ),
    "one document one too early": (
        lambda r: [*r[:5], moved(r[5], -1), *r[6:]],
        r"tokens of document 5, .*rows promise .*its rows are shifted by 1 \(1 documents",
    ),
    "the first row of a document is missing": (
        lambda r: [*r[:5], without_first_rows(r[5]), *r[6:]],
        r"document 5 has \d+ tokens and \d+ rows",
    ),
    "the first row of every document is missing": (
        lambda r: [without_first_rows(x) for x in r],
        r"document 0 has \d+ tokens and \d+ rows; expected as many rows as tokens, or one less",
    ),
    "the rows of two documents are swapped": (
        lambda r: [r[0], swap_rows(r[1], r[2]), swap_rows(r[2], r[1]), *r[3:]],
        r"its rows belong to other tokens",
    ),
    "two tokens are swapped": (
        lambda r: [*r[:4], swap_tokens(r[4], 10), *r[5:]],
        r"no document with the tokens of sample 4 .*document 4 has \d+ at token 10, and the sample \d+",
    ),
    "padding in front": (
        lambda r: [padded(x, 5) for x in r],
        r"document 0 has 5 times token 0 in front of them, which looks like padding; .*attention_mask",
    ),
    "a document is missing": (lambda r: [*r[:6], *r[7:]], r"no document with the tokens of sample 6"),
    "a document is cut": (
        lambda r: [*r[:6], {n: v[:-3] for n, v in r[6].items()}, *r[7:]],
        r"document 6 ends after the first \d+ tokens, of \d+ in the file and \d+ in the data",
    ),
    "another tokenizer": (
        lambda r: [x | {"input_ids": [(t * 7 + 3) % 60 for t in x["input_ids"]]} for x in r],
        r"no document with the tokens of sample 0 .*by the same tokenizer",
    ),
    "ids of another tokenizer": (
        lambda r: [renumbered(x, random.Random(0)) for x in r],
        r"rows are in another order than the tokens, or the ids are those of another tokenizer",
    ),
    "ids beyond the vocabulary": (
        lambda r: change(r, "token_ids", lambda row: [61, *row[1:]]),
        r"document 2, row 3 has token id 61; expected 0 to 59",
    ),
    "rows in another order": (
        lambda r: [shuffled(x, random.Random(n)) for n, x in enumerate(r)],
        r"(rows are in another order than the tokens|mean probability)",
    ),
    "probabilities instead of logarithms": (
        lambda r: [x | {"top_values": np.exp(x["top_values"]).tolist()} for x in r],
        r"document 0, row 0 has log-probability 0\.\d+ .*expected natural logarithms",
    ),
    "not a number": (
        lambda r: change(r, "top_values", lambda row: [float("nan"), *row[1:]]),
        r"document 2, row 3 has log-probability nan",
    ),
    "sums above 1": (
        lambda r: change(r, "top_values", lambda row: [-0.5, -0.6, *row[2:]]),
        r"document 2, row 3 has probabilities that sum to 1\.\d+; expected at most 1",
    ),
    "one value less": (
        lambda r: change(r, "top_values", lambda row: row[1:]),
        r"document 2, row 3 has 8 entries of token_ids and 7 of top_values",
    ),
    "one list less": (
        lambda r: [*r[:2], r[2] | {"top_values": r[2]["top_values"][1:]}, *r[3:]],
        r"document 2 has \d+ lists of token_ids and \d+ of top_values",
    ),
    "an id twice": (
        lambda r: change(r, "token_ids", lambda row: [row[1], *row[1:]]),
        r"document 2, row 3 has token id \d+ twice; expected distinct",
    ),
    "packed documents": (
        lambda r: [x | {"attention_mask": [1] * 20 + [2] * (len(x["input_ids"]) - 20)} for x in r],
        r"document 0 is packed from several documents, which attention_mask numbers 1 to 2",
    ),
}  # fmt: skip


def swap_rows(record: Record, other: Record) -> Record:
    """A document with the rows of another, over and over."""
    length = len(record["token_ids"])
    names = ("token_ids", "top_values")
    return record | {name: (other[name] * 2)[:length] for name in names}


def swap_tokens(record: Record, at: int) -> Record:
    tokens = list(record["input_ids"])
    other = next(n for n in range(at + 1, len(tokens)) if tokens[n] != tokens[at])
    tokens[at], tokens[other] = tokens[other], tokens[at]
    return record | {"input_ids": tokens}


def padded(record: Record, by: int) -> Record:
    lists = {name: record[name][:1] * by + record[name] for name in ("token_ids", "top_values")}
    return {"input_ids": [0] * by + record["input_ids"]} | lists


def change(
    records: list[Record], name: str, edit: Callable[[list[Any]], list[Any]]
) -> list[Record]:
    """Change the list of row 3 of document 2."""
    rows = list(records[2][name])
    rows[3] = edit(rows[3])
    return [*records[:2], records[2] | {name: rows}, *records[3:]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str, data: str, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    file = write_jsonl(tmp_path / "t.jsonl", plant([distillkit(d) for d in DOCUMENTS]))
    with pytest.raises(SoftcacheError, match=message):
        imported(f"{file}?rows=next", data, tmp_path)
    assert not list(tmp_path.glob("c.h5*"))


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (1, r"document 0, row \d+ has no entry for token id .*rows are shifted by 1 \(\d+ of"),
        (-1, r"document 0, row \d+ has no entry for token id .*rows are shifted by 1 \(\d+ of"),
    ],
)
def test_entries_of_vllm_hold_the_token_itself(
    by: int, message: str, data: str, tmp_path: Path
) -> None:
    """Even if nothing is strict, and one row of one document is wrong."""
    records = [served_moved(vllm(d), by) for d in DOCUMENTS]
    with pytest.raises(ModelError, match=message):
        imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path, strict=False)
    records = [vllm(document) for document in DOCUMENTS]
    token = records[7]["prompt_token_ids"][20]
    del records[7]["prompt_logprobs"][20][str(token)]
    with pytest.raises(ModelError, match=rf"document 7, row 20 has no entry for token id {token}"):
        imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path, strict=False)


def test_rows_that_do_not_fit_can_be_accepted(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [renumbered(distillkit(d), random.Random(0)) for d in DOCUMENTS]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    cache = imported(f"{file}?rows=next", data, tmp_path, strict=False)
    assert cache.header.row_count == sum(len(d.tokens) - 1 for d in DOCUMENTS)
    assert "rows promise" in caplog.text


def test_without_evidence_it_has_to_be_stated(tmp_path: Path) -> None:
    documents = write_documents(1, shortest=3)
    data = write_ids(
        tmp_path / "few.jsonl", [Written(d.tokens[:3], d.log_probs[:3]) for d in documents]
    )
    records = [plain(Written(d.tokens[:3], d.log_probs[:3])) for d in documents]
    file = write_jsonl(tmp_path / "t.jsonl", records)
    with pytest.raises(
        SettingsError, match=r"does not state which token .*\?rows=next .*\?rows=same"
    ):
        imported(file, data, tmp_path)
    assert imported(f"{file}?rows=next", data, tmp_path).header.row_count == 2


def test_probabilities_divided_by_their_sum_are_told(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [distillkit(document) for document in DOCUMENTS]
    for record in records:
        values = np.array(record["top_values"])
        values -= np.logaddexp.reduce(values, -1, keepdims=True)
        record["top_values"] = np.minimum(values, 0).tolist()
    with caplog.at_level(logging.INFO):
        imported(write_jsonl(tmp_path / "t.jsonl", records), data, tmp_path)
    assert "the 8 probabilities of every row sum to 1, as if they were divided" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?rows=before", r"rows=before; expected rows=next .* or rows=same"),
        ("?ids=token_ids", r"ids= and log_probs= go together"),
        ("?ids=token_ids&log_probs=logits", r"has no column 'logits'; it has input_ids"),
        ("?size=3", r"unknown option 'size'; expected ids, log_probs, rows, config"),
    ],
)
def test_options_are_checked(options: str, message: str, data: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [distillkit(document) for document in DOCUMENTS])
    with pytest.raises(SettingsError, match=message):
        imported(f"{file}{options}", data, tmp_path)


def test_columns_may_have_other_names(data: str, tmp_path: Path) -> None:
    records = [
        {"input_ids": r["input_ids"], "top": r["token_ids"], "lp": r["top_values"]}
        for r in map(distillkit, DOCUMENTS)
    ]
    file = write_parquet(tmp_path / "t.parquet", records)
    with pytest.raises(
        SettingsError, match=r"has the columns input_ids, top, lp; expected target_tok"
    ):
        imported(file, data, tmp_path)
    for source in (f"{file}?ids=top&log_probs=lp", f"hfds:{file}?ids=top&log_probs=lp&rows=next"):
        cache = imported(source, data, tmp_path, overwrite=True)
        np.testing.assert_allclose(probabilities(cache), expected_rows(DOCUMENTS), atol=2e-3)


def test_the_vocabulary_and_tokens_are_needed(data: str, tmp_path: Path, data_file: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [distillkit(document) for document in DOCUMENTS])
    with pytest.raises(SettingsError, match=r"state the size of the vocabulary with --classes"):
        imported(file, data, tmp_path, classes=None)
    with pytest.raises(
        SettingsError, match=r"has rows of tokens, and the data has one row for each"
    ):
        imported(file, f"npz:{data_file}", tmp_path)
    with pytest.raises(SoftcacheError, match=r"none\.jsonl: no such file"):
        imported(tmp_path / "none.jsonl", data, tmp_path)


def test_the_command_takes_such_files(data: str, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "t.parquet", [distillkit(document) for document in DOCUMENTS])
    out = tmp_path / "c.h5"
    result = softcache(
        "import", file, "--data", data, "--classes", "60", "--embed-inputs", "-o", out
    )
    assert result.exit_code == 0, result.output
    assert "24 samples of" in result.output
    assert "60 classes, topk" in result.output
    result = softcache(
        "import", f"{file}?rows=same", "--data", data, "--classes", "60", "--overwrite", "-o", out
    )
    assert result.exit_code == 1
    assert "state it with ?rows=next" in result.output
