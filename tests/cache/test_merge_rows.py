"""Parts of a dump of samples with many rows become one file with the rows of a whole dump."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Cache, open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.merge import merge
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, SettingsError
from softcache.files.pull import pull
from tests.cache.test_merge import check_same, stop_after
from tests.token_caches import forged, frame_config, small_blocks, token_config, write_inputs


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DumpConfig:
    """A dump of documents in small blocks, which are committed at once."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    return token_config(tmp_path)


def part(config: DumpConfig, name: str, **changes: Any) -> Cache:
    return dump(replace(config, out=config.out.with_name(f"{name}.h5"), **changes))


def shards(config: DumpConfig, count: int, **changes: Any) -> list[Cache]:
    return [
        part(config, f"{count}-{number}", shard=(number, count), **changes)
        for number in range(count)
    ]


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("encoding", ["dense", "topk:3", "sampled:5", "quantized"])
def test_shards_are_the_whole(
    config: DumpConfig, tmp_path: Path, encoding: str, embed: bool
) -> None:
    changes = {"encoding": encoding, "embed_inputs": embed}
    whole = part(config, "whole", **changes)
    merged = merge(shards(config, 3, **changes), tmp_path / "merged.h5")
    check_same(merged, whole)
    assert merged.header.rows == whole.header.rows
    assert merged.layout is not None
    assert merged.layout.flaw(whole.header.row_count) is None
    assert merged.header.block_rows == whole.header.block_rows


def test_a_basis_is_merged_with_like(config: DumpConfig, tmp_path: Path) -> None:
    first = part(config, "0", encoding="basis:6,2", shard=(0, 2))
    second = part(config, "1", encoding="basis:6,2", shard=(1, 2), like=first.path)
    check_same(
        merge([first, second], tmp_path / "merged.h5"), part(config, "w", encoding="basis:6,2")
    )


def test_the_order_of_the_parts_does_not_show(config: DumpConfig, tmp_path: Path) -> None:
    parts = shards(config, 3)
    files = {
        merge(list(order), tmp_path / f"{number}.h5").path.read_bytes()
        for number, order in enumerate(itertools.permutations(parts))
    }
    assert len(files) == 1


def test_views_and_shards_of_views(config: DumpConfig, tmp_path: Path) -> None:
    frames = frame_config(tmp_path, views=3)
    whole = part(frames, "whole")
    views = [part(frames, f"view{n}", first_view=n, views=1) for n in range(3)]
    check_same(merge(views[::-1], tmp_path / "views.h5"), whole)
    both = [
        part(frames, f"{v}-{s}", first_view=v, views=1 + v, shard=(s, 2))
        for v in (0, 1)
        for s in (0, 1)
    ]
    check_same(merge(both, tmp_path / "both.h5"), whole)


def test_a_stopped_merge_goes_on(
    config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = shards(config, 3)
    expected = merge(parts, tmp_path / "expected.h5").path.read_bytes()
    for writes in (1, 7, 20):
        out = tmp_path / f"{writes}.h5"
        with monkeypatch.context() as patch:
            stop_after(patch, writes=writes)
            with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
                merge(parts, out)
        assert merge(parts, out).path.read_bytes() == expected
        assert merge(parts, out).path.read_bytes() == expected, "nothing left to do"


def test_a_shard_is_a_cache_of_its_own_samples(config: DumpConfig) -> None:
    whole, layout = part(config, "whole"), part(config, "whole").layout
    assert layout is not None
    row = 0
    for shard in shards(config, 4):
        header, own = shard.header, shard.layout
        assert own is not None
        rows = slice(row, row + header.row_count)
        np.testing.assert_array_equal(
            shard.arrays["log_probs"][0], whole.arrays["log_probs"][0, rows]
        )
        np.testing.assert_array_equal(shard.labels, whole.labels[rows])
        ids = np.arange(header.first_sample, header.first_sample + header.samples)
        np.testing.assert_array_equal(own.offsets, layout.take(ids).offsets)
        np.testing.assert_array_equal(shard.keys, whole.keys[ids])
        assert (header.rows or {})["tokens"] == len(shard.arrays["inputs"])
        row += header.row_count
    assert row == whole.header.row_count


def test_a_shard_and_a_pulled_part_are_merged(config: DumpConfig, tmp_path: Path) -> None:
    whole = part(config, "whole", embed_inputs=False)
    first = part(config, "first", embed_inputs=False, shard=(0, 2))
    second = pull(str(whole.path), tmp_path / "second.h5", samples=(20, 20))
    merged = merge([first, second], tmp_path / "merged.h5")
    check_same(merged, whole)
    assert "tokens" in (first.header.rows or {})
    assert "tokens" not in (merged.header.rows or {}), "nobody knows those of the second"


# refusals
def test_a_gap_and_other_documents_are_refused(config: DumpConfig, tmp_path: Path) -> None:
    parts = shards(config, 3)
    with pytest.raises(SettingsError, match="samples 13 to 25 are missing; the parts must meet"):
        merge([parts[0], parts[2]], tmp_path / "merged.h5")
    one_row = part(
        token_config(tmp_path), "words", data=f"ids:{tmp_path / 'ids.jsonl'}?length=8", shard=(1, 3)
    )
    with pytest.raises(SettingsError, match="only parts of one dump can be merged"):
        merge([parts[0], one_row, parts[2]], tmp_path / "merged.h5")
    assert not list(tmp_path.glob("merged*"))


def test_views_of_other_samples_are_refused(config: DumpConfig, tmp_path: Path) -> None:
    frames = frame_config(tmp_path)
    first = part(frames, "first", views=1)
    with np.load(tmp_path / "images.npz") as stored:
        images = stored["x"].copy()
    images[7, 0, 0, 0] ^= 255
    np.savez(tmp_path / "images.npz", x=images)
    second = part(frames, "second", first_view=1, views=1)
    with pytest.raises(
        SettingsError, match="differ in the keys of sample 7; they were dumped from"
    ):
        merge([first, second], tmp_path / "merged.h5")


def test_a_forged_part_is_refused(config: DumpConfig, tmp_path: Path) -> None:
    write_inputs(tmp_path)

    def far(values: np.ndarray) -> None:
        values[2] = 1 << 62

    for name, what in (
        ("offsets", "offsets that"),
        ("run_rows", "runs of"),
        ("input_offsets", "offset"),
    ):
        parts = shards(config, 2)
        parts[1] = forged(parts[1].path, {name: far})
        with pytest.raises(
            FormatError, match=rf"2-1\.h5 has {what}.*: the file is damaged or forged"
        ):
            merge(parts, tmp_path / "merged.h5")
        assert not list(tmp_path.glob("merged*"))
        parts[1].path.unlink()


def test_a_damaged_block_is_named_by_its_rows(config: DumpConfig, tmp_path: Path) -> None:
    first, second = shards(config, 2)
    array, raw = second.header.array("log_probs"), bytearray(second.path.read_bytes())
    raw[array.offset + 20 * array.row_bytes] ^= 1
    second.path.write_bytes(raw)
    message = r"2-1\.h5 is damaged: soft targets of rows 16 to 23 in view 0; softcache verify"
    with pytest.raises(FormatError, match=message):
        merge([first, open_cache(second.path)], tmp_path / "merged.h5")
