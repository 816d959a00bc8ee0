"""`softcache verify` and `softcache repair`: damage, content ids, and blocks that are dumped again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softcache.cache import Cache, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as cache_writer
from softcache.cache.reader import partial_path
from softcache.cache.verify import check_damage
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError
from softcache.files.verify import repair_cache, verify_cache


@pytest.fixture
def two_views(dump_config: DumpConfig) -> DumpConfig:
    return replace(dump_config, views=2, augment="flip")


@pytest.fixture
def blocks(two_views: DumpConfig, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache of 2 views in blocks of 20 samples."""
    monkeypatch.setattr(cache_allocate, "block_rows", lambda *layout: 20)
    return dump(two_views)


def flip(path: Path, *offsets: int) -> None:
    raw = bytearray(path.read_bytes())
    for offset in offsets:
        raw[offset] ^= 0x10
    path.write_bytes(raw)


def row_offset(cache: Cache, view: int, sample: int) -> int:
    """The offset in the file of a sample's soft targets."""
    array = cache.header.array("log_probs")
    return array.offset + (view * cache.header.samples + sample) * array.row_bytes


def test_an_intact_cache_is_reported_with_its_content_id(cache: Cache) -> None:
    assert verify_cache(cache.path) == f"{cache.path}: intact, content id {cache.content_id()}"


def test_the_expected_content_id_ignores_case_and_spaces(cache: Cache) -> None:
    content_id = cache.content_id()
    for spelling in (content_id, content_id.upper(), f" {content_id}\n"):
        assert verify_cache(cache.path, spelling).endswith(content_id)


def test_another_cache_than_expected_is_refused(cache: Cache) -> None:
    with pytest.raises(
        FormatError,
        match=rf"tiny\.h5 is intact, but it is another cache: .* is {cache.content_id()}, expected 0f",
    ):
        verify_cache(cache.path, "0f" * 32)


def test_caches_that_differ_have_other_content_ids(cache: Cache, dump_config: DumpConfig) -> None:
    same = dump(replace(dump_config, out=dump_config.out.with_name("same.h5")))
    other = dump(replace(dump_config, out=dump_config.out.with_name("other.h5"), temperature=3.0))
    assert same.content_id() == cache.content_id()
    assert other.content_id() != cache.content_id()
    assert re.fullmatch("[0-9a-f]{64}", cache.content_id())


@pytest.mark.parametrize(
    ("view", "sample", "place"),
    [
        (0, 0, "samples 0 to 19 in view 0"),
        (0, 299, "samples 280 to 299 in view 0"),
        (1, 0, "samples 0 to 19 in view 1"),
        (1, 120, "samples 120 to 139 in view 1"),
    ],
)
def test_damaged_rows_are_named(view: int, sample: int, place: str, blocks: Cache) -> None:
    flip(blocks.path, row_offset(blocks, view, sample))
    with pytest.raises(
        FormatError, match=rf"h5 is damaged: soft targets of {place}; softcache repair marks"
    ):
        verify_cache(blocks.path)


@pytest.mark.parametrize("array", ["labels", "keys"])
def test_damaged_labels_and_keys_are_named(array: str, blocks: Cache) -> None:
    flip(blocks.path, blocks.header.array(array).offset + 8 * 45)
    with pytest.raises(
        FormatError,
        match=r"h5 is damaged: labels and keys of samples 40 to 59; softcache repair marks",
    ):
        verify_cache(blocks.path)


def test_damage_outside_the_rows_is_named(cache: Cache) -> None:
    offsets = {
        "the user block behind the header": cache.header.user_block - 1,
        "the HDF5 structure": cache.header.user_block + 20,
        "the arrays shared by all rows": cache.header.array("class_names").offset,
    }
    for what, offset in offsets.items():
        flip(cache.path, offset)
        with pytest.raises(FormatError, match=rf"tiny\.h5 is damaged: {what}; get it again"):
            verify_cache(cache.path)
        flip(cache.path, offset)
    verify_cache(cache.path)


def test_much_damage_is_summarised_in_one_line(blocks: Cache) -> None:
    flip(blocks.path, *(row_offset(blocks, 0, sample) for sample in range(0, 140, 20)))
    with pytest.raises(
        FormatError, match=r"samples 80 to 99 in view 0, and 2 more; softcache repair"
    ):
        verify_cache(blocks.path)


def test_damage_is_reported_before_the_content_id_is_compared(cache: Cache) -> None:
    # the content id covers the digests, which a damaged row does not change
    flip(cache.path, row_offset(cache, 0, 3))
    with pytest.raises(FormatError, match="is damaged"):
        verify_cache(cache.path, cache.content_id())


def test_an_unfinished_cache_is_refused(cache: Cache) -> None:
    partial = partial_path(cache.path)
    cache.path.rename(partial)
    with pytest.raises(
        FormatError, match=r"tiny\.h5: its dump has not completed \(tiny\.h5\.partial"
    ):
        verify_cache(cache.path)


def test_a_file_that_is_not_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"nowhere\.h5: No such file or directory; expected a cache"
    ):
        verify_cache(tmp_path / "nowhere.h5")
    (tmp_path / "file.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(
        FormatError, match=r"file\.h5: an HDF5 file, but not a softcache cache; make"
    ):
        verify_cache(tmp_path / "file.h5")


def test_a_check_counts_every_byte_of_the_rows(
    blocks: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # in a log, the last line of progress says how far the check got
    monkeypatch.setattr("softcache.util.progress.LOG_SECONDS", 0.0)
    check_damage(open_cache(blocks.path))
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("verify: 6,000 of 6,000 bytes (100%), ")
    )


def test_only_repaired_blocks_are_dumped_again(
    blocks: Cache, two_views: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact_bytes = blocks.path.read_bytes()
    flip(blocks.path, row_offset(blocks, 1, 130), blocks.header.array("labels").offset)
    partial = partial_path(blocks.path)
    assert repair_cache(blocks.path) == (
        f"{partial}: 2 of 45 blocks marked as missing (labels and keys of samples 0 to 19; soft "
        "targets of samples 120 to 139 in view 1); the softcache dump that made it fills them again"
    )
    assert not blocks.path.exists()
    digests = open_cache(partial, unfinished=True).arrays
    assert [*map(tuple, (digests["digests"] == 0).nonzero())] == [(1,), (6,)]
    assert (digests["sample_digests"] == 0).nonzero()[0].tolist() == [0]
    written = []
    write_block = cache_writer.Writer._write_block

    def counted(self: cache_writer.Writer, view: int | None, block: int, *rest: Any) -> None:
        written.append((view, block))
        write_block(self, view, block, *rest)

    monkeypatch.setattr(cache_writer.Writer, "_write_block", counted)
    dump(two_views)
    assert written == [(None, 0), (1, 6)]
    assert blocks.path.read_bytes() == intact_bytes


def test_an_intact_cache_needs_no_repair(cache: Cache) -> None:
    before = cache.path.read_bytes()
    assert repair_cache(cache.path) == f"{cache.path}: nothing to repair"
    assert cache.path.read_bytes() == before


def test_damage_that_no_dump_can_fill_is_not_repaired(cache: Cache) -> None:
    flip(cache.path, cache.header.array("class_names").offset)
    with pytest.raises(
        FormatError,
        match=r"tiny\.h5 cannot be repaired, .* damaged: the arrays shared by all rows; get the file again",
    ):
        repair_cache(cache.path)
    assert cache.path.exists()


def test_a_repair_does_not_replace_an_unfinished_dump(cache: Cache) -> None:
    flip(cache.path, row_offset(cache, 0, 3))
    partial_path(cache.path).write_text("unfinished")
    with pytest.raises(
        FormatError, match=r"tiny\.h5\.partial is in the way: another dump has started it; "
    ):
        repair_cache(cache.path)
    assert cache.path.exists()
    assert partial_path(cache.path).read_text() == "unfinished"
