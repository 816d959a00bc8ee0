"""pull, push, verify, repair, info and export-labels of caches of samples with many rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Cache, open_cache
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.data.embedded import source_of_cache
from softcache.dump.loop import dump
from softcache.errors import FormatError, Interrupted, SettingsError
from softcache.files import remote
from softcache.files.export_labels import export_labels
from softcache.files.pull import Arrays, pull
from softcache.files.push import push
from softcache.files.verify import repair_cache, verify_cache
from tests.conftest import Run
from tests.servers import Served, http_server
from tests.token_caches import (
    BLOCK_ROWS,
    DOCUMENTS,
    forged,
    frame_config,
    small_blocks,
    token_cache,
    token_config,
    write_inputs,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setattr(remote, "FIRST_READ", 1024)  # so that even a small file is read in parts
    monkeypatch.setattr(remote, "PART", 4096)
    monkeypatch.setattr("softcache.files.pull.PART", 1500)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A finished cache of documents."""
    (tmp_path / "served").mkdir()
    path = tmp_path / "served" / "cache.h5"
    path.write_bytes(token_cache())
    return open_cache(path)


@pytest.fixture
def url(cache: Cache) -> Iterator[str]:
    with http_server(cache.path.parent) as served:
        yield address(served)


def address(served: Served) -> str:
    return f"{served.url}/cache.h5"


# pull
def test_a_whole_pull_is_the_same_file_to_the_byte(url: str, tmp_path: Path) -> None:
    assert pull(url, tmp_path / "copy.h5").path.read_bytes() == token_cache()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 40), (3, 3), (5, 20), (30, 10), (39, 1)])
def test_some_samples_are_a_valid_cache_of_them(
    url: str, cache: Cache, tmp_path: Path, first: int, count: int
) -> None:
    part, layout = pull(url, tmp_path / "part.h5", samples=(first, count)), cache.layout
    assert layout is not None
    samples = np.arange(first, first + count)
    rows = layout.rows_of(samples)
    header = part.header
    assert (header.first_sample, header.samples, header.data_samples) == (first, count, DOCUMENTS)
    assert header.row_count == len(rows)
    assert find_damage(part) == []
    assert part.layout is not None
    for name, values in layout.take(samples).arrays().items():
        np.testing.assert_array_equal(part.arrays[name], values)
    np.testing.assert_array_equal(part.labels, cache.labels[rows])
    np.testing.assert_array_equal(part.arrays["log_probs"][0], cache.arrays["log_probs"][0, rows])
    np.testing.assert_array_equal(part.keys, cache.keys[samples])
    documents, own = source_of_cache(cache), source_of_cache(part)
    for sample in range(count):
        expected = documents.fetch([first + sample])
        for one, other in zip(own.fetch([sample]), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert (header.rows or {})["tokens"] == len(part.arrays["inputs"])


def test_some_views_and_samples_of_frames(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    whole = dump(frame_config(tmp_path, views=3))
    part = pull(str(whole.path), tmp_path / "part.h5", views=(1, 2), samples=(2, 7))
    assert find_damage(part) == []
    assert (part.header.first_view, part.header.views, part.header.row_count) == (1, 2, 42)
    rows = slice(2 * 6, 9 * 6)
    np.testing.assert_array_equal(part.arrays["log_probs"], whole.arrays["log_probs"][1:, rows])


def test_the_command_fetches_a_part(url: str, tmp_path: Path, run: Run) -> None:
    output = run("pull", url, "--samples", "5:25", "--out", "part.h5", check=True).stdout
    part = open_cache(tmp_path / "part.h5")
    assert output.startswith(f"part.h5: 20 samples of {part.header.row_count} tokens x 1 view(s), ")
    assert "intact" in run("verify", "part.h5", check=True).stdout


def test_samples_without_rows_cannot_be_pulled_alone(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    lines = ['{"input_ids": [1, 2, 3]}', '{"input_ids": [4]}', '{"input_ids": [5, 6]}']
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    cache = dump(token_config(tmp_path))
    assert cache.layout is not None
    assert cache.layout.counts(np.arange(3)).tolist() == [2, 0, 1]
    with pytest.raises(SettingsError, match=r"the samples asked for of .* have no tokens; request"):
        pull(str(cache.path), tmp_path / "part.h5", samples=(1, 1))
    assert pull(str(cache.path), tmp_path / "part.h5", samples=(1, 2)).header.row_count == 1


def test_a_stopped_pull_goes_on(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softcache.files import pull as module

    real, calls = module.fetch_piece, []

    def stopping(*arguments: Any) -> tuple[Arrays, Arrays]:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "fetch_piece", stopping)
    with pytest.raises(Interrupted, match=r"stopped; .*part.h5.partial is kept"):
        pull(url, tmp_path / "part.h5", samples=(3, 30))
    monkeypatch.setattr(module, "fetch_piece", real)
    part = pull(url, tmp_path / "part.h5", samples=(3, 30))
    assert (
        part.path.read_bytes()
        == pull(url, tmp_path / "again.h5", samples=(3, 30)).path.read_bytes()
    )


def test_wrong_rows_of_a_server_are_named(cache: Cache, tmp_path: Path) -> None:
    raw = bytearray(token_cache())
    array = cache.header.array("log_probs")
    raw[array.offset + 20 * array.row_bytes] ^= 1
    cache.path.write_bytes(raw)
    with pytest.raises(
        FormatError, match="the soft targets in view 0 of rows 16 to 23 do not match"
    ):
        pull(str(cache.path), tmp_path / "copy.h5")
    raw = bytearray(token_cache())
    array = cache.header.array("labels")
    raw[array.offset + 20 * array.row_bytes] ^= 1
    cache.path.write_bytes(raw)
    with pytest.raises(FormatError, match="the labels of rows 16 to 23 do not match"):
        pull(str(cache.path), tmp_path / "copy.h5")


@pytest.mark.parametrize("name", ["offsets", "run_rows", "run_positions", "input_offsets"])
def test_a_forged_layout_is_not_pulled_in_part(cache: Cache, tmp_path: Path, name: str) -> None:
    def far(values: np.ndarray) -> None:
        values[2] = 1 << 62

    forged(cache.path, {name: far})
    with pytest.raises(
        FormatError, match=r"cache.h5 has .*: the file is damaged or forged, get it"
    ):
        pull(str(cache.path), tmp_path / "part.h5", samples=(0, 10))
    assert not list(tmp_path.glob("part*"))
    copy = pull(str(cache.path), tmp_path / "copy.h5")  # byte by byte, as it is there
    assert len(find_damage(copy)) == 1


# push
def test_what_is_pushed_can_be_pulled(cache: Cache, tmp_path: Path) -> None:
    message = push(cache.path, f"{tmp_path / 'shared'}/")
    assert cache.content_id() in message
    assert (tmp_path / "shared" / "cache.h5").read_bytes() == token_cache()
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"{cache.header.row_count:,}" in card


# verify and repair
def test_an_intact_cache_is_intact(cache: Cache) -> None:
    assert f"intact, content id {cache.content_id()}" in verify_cache(cache.path)


def test_damaged_blocks_are_named_repaired_and_filled_again(tmp_path: Path) -> None:
    config = token_config(tmp_path)
    path = dump(config).path
    expected = path.read_bytes()
    header, raw = open_cache(path).header, bytearray(expected)
    targets, labels = header.array("log_probs"), header.array("labels")
    raw[targets.offset + 20 * targets.row_bytes] ^= 1
    raw[targets.offset + 45 * targets.row_bytes] ^= 1
    raw[labels.offset + 3 * labels.row_bytes] ^= 1
    path.write_bytes(raw)
    message = (
        "is damaged: labels of rows 0 to 7; soft targets of rows 16 to 23 in view 0; soft targets of "
        "rows 40 to 47 in view 0; softcache repair marks these blocks"
    )
    with pytest.raises(FormatError, match=message):
        verify_cache(path)
    assert f"3 of {2 * header.blocks} blocks marked as missing" in repair_cache(path)
    unfinished = open_cache(partial_path(path), unfinished=True)
    assert unfinished.missing_blocks() == 3
    assert dump(config).path.read_bytes() == expected


@pytest.mark.parametrize("name", ["keys", "offsets", "run_positions", "inputs", "input_offsets"])
def test_damage_to_what_describes_the_samples_is_not_repaired(cache: Cache, name: str) -> None:
    raw = bytearray(token_cache())
    raw[cache.header.array(name).offset] ^= 1
    cache.path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"cannot be repaired, .*: the arrays shared by all rows"):
        repair_cache(cache.path)


# info
def test_info_counts_samples_and_rows(cache: Cache, run: Run) -> None:
    output = run("info", cache.path, check=True).stdout
    count, tokens = cache.header.row_count, len(cache.arrays["inputs"])
    assert "format 1.3" in output
    assert f"samples      {DOCUMENTS} of ids:ids.jsonl, 1 view(s)" in output
    assert f"tokens       {count:,}, {count / DOCUMENTS:.1f} of a sample; " in output
    assert f"{count / tokens:.1%} of {tokens} tokens are predicted" in output
    assert "perplexity" in output


def test_info_as_json(cache: Cache, run: Run) -> None:
    facts = json.loads(run("info", "--json", cache.path, check=True).stdout)
    tokens = len(cache.arrays["inputs"])
    assert facts["rows"] == {"count": cache.header.row_count, "tokens": tokens, "unit": "token"} | {
        name: facts["rows"][name] for name in ("length", "stride") if name in facts["rows"]
    }
    assert facts["complete"]
    assert facts["block_rows"] == BLOCK_ROWS


# export-labels
def test_exported_rows_are_those_of_the_cache(cache: Cache, tmp_path: Path, run: Run) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    count, layout = cache.header.row_count, cache.layout
    assert layout is not None
    rows = np.arange(count)
    log_probs = cache.rows(0, rows)
    output = run("export-labels", cache.path, "-o", "p.npy", check=True).stdout
    assert f"probabilities of {count} tokens, 24 classes, at temperature 1" in output
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), np.exp(log_probs), rtol=1e-6)
    export_labels(cache.path, tmp_path / "p.parquet", log_probabilities=True)
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert list(table) == ["sample", "position", "label", "key", "log_probabilities"]
    assert table["sample"] == layout.samples_of(rows).tolist()
    assert table["position"] == layout.positions_of(rows).tolist()
    assert table["label"] == cache.labels.tolist()
    assert table["key"] == cache.keys[layout.samples_of(rows)].tolist()
    np.testing.assert_allclose(table["log_probabilities"], log_probs, rtol=1e-6)


def test_a_shard_is_exported_with_the_numbers_of_its_samples(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    shard = dump(token_config(tmp_path, shard=(1, 2)))
    export_labels(shard.path, tmp_path / "p.parquet")
    samples = parquet.read_table(tmp_path / "p.parquet")["sample"].to_pylist()
    assert (samples[0], samples[-1]) == (20, 39)
