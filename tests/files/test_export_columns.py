"""`softcache export-labels --columns`: what other trainers read, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from softcache.cache import Cache, TopK, open_cache
from softcache.cli.files import TRAINERS
from softcache.errors import SettingsError
from softcache.files.export_columns import FORMATS, NO_ENTRY, export_columns
from softcache.files.import_labels import import_labels
from tests.cli.app_cases import softcache
from tests.token_files import (
    VOCABULARY,
    K,
    axolotl,
    distillkit,
    vllm,
    write_documents,
    write_ids,
    write_jsonl,
)

DOCUMENTS = write_documents(20)


def make_cache(folder: Path, *, embed: bool = True, encoding: str | None = None) -> Cache:
    file = write_jsonl(folder / "t.jsonl", [vllm(document) for document in DOCUMENTS])
    return import_labels(
        str(file),
        data=f"ids:{file}",
        classes=VOCABULARY,
        out=folder / "cache.h5",
        encoding=encoding,
        embed_inputs=embed,
    )


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("encoding", [None, "dense"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("columns", FORMATS)
def test_there_and_back_are_the_same_rows(
    columns: str, suffix: str, encoding: str | None, tmp_path: Path
) -> None:
    cache, out = make_cache(tmp_path, encoding=encoding), tmp_path / f"columns.{suffix}"
    top = None if encoding is None else VOCABULARY
    export_columns(cache.path, out, columns=columns, top=top)
    back = import_labels(
        str(out), data=f"ids:{out}", classes=VOCABULARY, out=tmp_path / "b.h5", encoding=encoding
    )
    assert back.header.encoding == cache.header.encoding
    rows = np.arange(cache.header.row_count)
    np.testing.assert_array_equal(back.keys, cache.keys)
    np.testing.assert_array_equal(back.labels, cache.labels)
    stored, again = cache.rows(0, rows), back.rows(0, rows)
    np.testing.assert_allclose(np.exp(again), np.exp(stored), atol=1e-3)
    likely = stored > -8
    np.testing.assert_allclose(again[likely], stored[likely], atol=0.01)


def test_columns_of_axolotl(tmp_path: Path) -> None:
    """The list at position i is about token i + 1; the last one is padding, and so is that of the prompt."""
    file = write_jsonl(tmp_path / "t.jsonl", [axolotl(d, prompt=9) for d in DOCUMENTS])
    cache = import_labels(
        str(file), data=f"ids:{file}", classes=VOCABULARY, out=tmp_path / "c.h5", embed_inputs=True
    )
    export_columns(cache.path, tmp_path / "out.jsonl", columns="axolotl")
    written = read(tmp_path / "out.jsonl")
    assert len(written) == len(DOCUMENTS)
    for own, given, document in zip(written, read(file), DOCUMENTS, strict=True):
        for name in ("input_ids", "attention_mask", "labels", "target_mask"):
            assert own[name] == given[name], name
        length = len(document.tokens)
        assert {len(row) for name in own for row in own[name] if name.startswith("target")} == {K}
        assert own["target_mask"][length - 1] == own["target_mask"][7] == [0] * K
        assert own["target_logprobs"][7] == [NO_ENTRY] * K
        assert own["target_token_ids"][8:-1] == given["target_token_ids"][8:-1]
        np.testing.assert_allclose(
            own["target_logprobs"][8:-1], given["target_logprobs"][8:-1], atol=5e-3
        )
    with pytest.raises(
        SettingsError, match=r"document 0 of .* has soft targets for \d+ of \d+ tokens"
    ):
        export_columns(cache.path, tmp_path / "d.jsonl", columns="distillkit")
    assert not (tmp_path / "d.jsonl").exists()


def test_columns_of_distillkit(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    export_columns(cache.path, tmp_path / "out.parquet", columns="distillkit", top=3)
    for own, document in zip(read(tmp_path / "out.parquet"), DOCUMENTS, strict=True):
        given = distillkit(document, 3)
        assert own["input_ids"] == given["input_ids"]
        assert own["token_ids"] == given["token_ids"]
        np.testing.assert_allclose(own["top_values"], given["top_values"], atol=5e-3)


def test_documents_that_the_cache_does_not_store(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, embed=False)
    with pytest.raises(SettingsError, match=r"holds only soft targets; give its samples"):
        export_columns(cache.path, tmp_path / "a.jsonl", columns="axolotl")
    # in another order than in the cache, in which they are written
    data = write_ids(tmp_path / "data.jsonl", DOCUMENTS[::-1])
    export_columns(cache.path, tmp_path / "a.jsonl", columns="axolotl", data=data)
    assert [own["input_ids"] for own in read(tmp_path / "a.jsonl")] == [d.tokens for d in DOCUMENTS]


def test_another_temperature(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, encoding="dense")
    export_columns(cache.path, tmp_path / "a.jsonl", columns="distillkit", top=2, temperature=2.0)
    values = np.concatenate([own["top_values"] for own in read(tmp_path / "a.jsonl")])
    rows = cache.rows(0, np.arange(cache.header.row_count), 2.0)
    np.testing.assert_allclose(values, -np.sort(-rows, -1)[:, :2], atol=1e-4)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a.npy", {}, r"expected a name that ends in \.jsonl or \.parquet"),
        ("a.jsonl", {"columns": "trl"}, r"--columns trl; expected axolotl or distillkit"),
        ("a.jsonl", {"top": 61}, r"--top 61; expected 1 to 60, the vocabulary"),
        ("a.jsonl", {"view": 1}, r"view 1 of .*; expected 0 to 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    out: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    with pytest.raises(SettingsError, match=message):
        export_columns(cache.path, tmp_path / out, **{"columns": "axolotl", **options})


def test_rows_of_samples_are_no_columns(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has rows of samples, and only those of tokens"):
        export_columns(cache.path, tmp_path / "a.jsonl", columns="axolotl")


def test_the_command(tmp_path: Path) -> None:
    assert TRAINERS == FORMATS
    cache, out = make_cache(tmp_path), tmp_path / "a.parquet"
    result = softcache("export-labels", cache.path, "-o", out, "--columns", "axolotl", "--top", "4")
    assert result.exit_code == 0, result.output
    assert "4 log-probabilities of" in result.output
    assert "in 20 documents, as axolotl reads them, at temperature 1" in result.output
    result = softcache(
        "import", out, "--data", f"ids:{out}", "--classes", "60", "-o", tmp_path / "b.h5"
    )
    assert result.exit_code == 0, result.output
    assert open_cache(tmp_path / "b.h5").header.encoding == TopK(4)
    result = softcache("export-labels", cache.path, "-o", out, "--top", "4")
    assert "--top goes with --columns; add it" in result.output
    result = softcache("export-labels", cache.path, "-o", out, "--columns", "axolotl",
                       "--log-probabilities")  # fmt: skip
    assert "--columns always writes log-probabilities" in result.output
