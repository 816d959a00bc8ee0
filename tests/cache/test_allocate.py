"""Allocating and filling a cache: what is on disk after each step."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from softcache.cache import allocate as cache_allocate
from softcache.cache import open_cache
from softcache.cache.allocate import block_rows, create
from softcache.cache.header import MAX_BLOCKS
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.cache.writer import Writer
from softcache.errors import DataError, FormatError, SoftcacheError
from tests.cache.writer_cases import (
    CLASS_NAMES,
    CLASSES,
    ROWS_OF_A_BLOCK,
    SAMPLES,
    SUMMARY,
    VIEWS,
    begin,
    draft,
    fill,
    part,
    row_values,
    run_dump,
    sample_values,
    shared_values,
)


# allocate
@pytest.mark.parametrize(
    ("views", "samples", "row_bytes", "rows"),
    [
        (1, 6_000_000, 20, 52_428),
        (9, 6_000_000, 20, 52_428),
        (1, 60_000, 20, 1024),  # so that processes can share out a small file
        (1, 128_000, 20, 2000),
        (1, 100, 20, 100),
        (1, 60_000, 1 << 20, 1),
        (1, 60_000, 1 << 30, 1),
    ],
)
def test_a_block_is_about_a_mebibyte_one_row_at_least(
    views: int, samples: int, row_bytes: int, rows: int
) -> None:
    assert block_rows(views, samples, row_bytes) == rows


@pytest.mark.parametrize(
    ("input_bytes", "rows"), [(784, 7710), (3 * 32 * 32, 2730), (3 * 224 * 224, 55), (1 << 30, 10)]
)
def test_a_block_holds_no_more_inputs_than_a_pull_can_hold(input_bytes: int, rows: int) -> None:
    assert block_rows(16, 1_281_167, 136, input_bytes=input_bytes) == rows


@pytest.mark.parametrize(
    ("batch", "rows"),
    [(1, 1024), (256, 1024), (100, 1000), (1000, 1000), (3000, 1500), (1031, 1031)],
)
def test_blocks_and_batches_do_not_straddle(batch: int, rows: int) -> None:
    assert block_rows(1, 60_000, 20, batch) == rows
    assert rows % batch == 0 or batch % rows == 0


@pytest.mark.parametrize(
    ("views", "samples"),
    [(1, 1 << 22), (1, (1 << 22) + 1), (300, 60_000), (90, 1_281_167), (7, 1 << 40), (1 << 20, 3)],
)
def test_of_large_rows_there_are_more_in_a_block_than_make_too_many_blocks(
    views: int, samples: int
) -> None:
    rows = block_rows(views, samples, 1 << 20)
    assert views * -(-samples // rows) <= MAX_BLOCKS
    assert rows > 1  # though a row has 1 MiB
    assert views * samples >= rows * MAX_BLOCKS // 4  # and not larger than necessary


def test_an_allocated_file_has_all_its_bytes_and_no_row(path: Path) -> None:
    begin(path)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.h5.partial"]
    cache = open_cache(partial_path(path), unfinished=True)
    status = partial_path(path).stat()
    assert status.st_size == cache.header.file_bytes
    assert status.st_blocks * 512 >= status.st_size, (
        "a full disk must show now, not in the middle of a dump"
    )
    assert cache.missing_blocks() == cache.header.blocks * (VIEWS + 1) == 12
    assert cache.class_names == list(CLASS_NAMES)


@pytest.mark.parametrize("length", [1, 3, 13, 64])
def test_every_array_begins_at_a_cache_line_whatever_lies_before_it(
    path: Path, length: int
) -> None:
    names = np.array([b"x" * length] * CLASSES)  # an array of any number of bytes
    create(path, draft(), shared_values() | {"class_names": names})
    header = open_cache(partial_path(path), unfinished=True).header
    assert {array.offset % 64 for array in header.arrays} == {0}


def test_an_array_that_lies_astride_is_refused_as_the_file_is_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_allocate, "ALIGNMENT", 1)
    names = np.array([b"xyz"] * CLASSES)
    with pytest.raises(FormatError, match=r"array \w+ begins at [\d,]+; expected a multiple of 8"):
        create(path, draft(), shared_values() | {"class_names": names})
    assert list(path.parent.iterdir()) == []


def test_an_unfinished_file_is_not_opened_by_either_name(path: Path) -> None:
    begin(path)
    with pytest.raises(FormatError, match="unfinished: it has 0 of 12 blocks; run the same"):
        open_cache(partial_path(path))
    with pytest.raises(FormatError, match=r"has not completed \(tiny.h5.partial exists\)"):
        open_cache(path)


def test_class_names_of_another_count_leave_no_file(path: Path) -> None:
    four = shared_values() | {"class_names": np.array([b"a", b"b", b"c", b"d"])}
    with pytest.raises(ValueError, match=r"class_names has shape \(4,\); expected \(5,\)"):
        create(path, draft(), four)
    assert not list(path.parent.iterdir())


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(SoftcacheError, match=r"cannot create .*tiny.h5.partial: .*No such file"):
        begin(tmp_path / "nowhere" / "tiny.h5")


def test_what_the_disk_says_while_the_file_is_allocated_is_told_in_one_short_line(
    tmp_path: Path,
) -> None:
    with pytest.raises(SoftcacheError, match="cannot create") as caught:
        begin(tmp_path / "nowhere" / "tiny.h5")
    assert "errno" not in str(caught.value)
    assert "o_flags" not in str(caught.value)


def test_a_writer_needs_an_unfinished_file(path: Path) -> None:
    with pytest.raises(FormatError, match=r"tiny.h5.partial: No such file or directory; expected"):
        Writer(path)


# then fill
@pytest.mark.parametrize("batch", [1, 7, 30])
@pytest.mark.parametrize("rows_of_a_block", [1, 3, 8, 10, 1000])
def test_any_batches_fill_blocks_of_any_size(path: Path, rows_of_a_block: int, batch: int) -> None:
    begin(path, rows_of_a_block=rows_of_a_block)
    with Writer(path) as writer:
        fill(writer, batch)
        writer.finish(SUMMARY)
    cache = open_cache(path)
    assert cache.header.blocks == -(-SAMPLES // rows_of_a_block)
    for view in range(VIEWS):
        np.testing.assert_array_equal(
            cache.arrays["log_probs"][view], row_values(view)["log_probs"]
        )
    np.testing.assert_array_equal(cache.labels, sample_values()["labels"])
    np.testing.assert_array_equal(cache.keys, sample_values()["keys"])
    assert find_damage(cache) == []


def test_rows_of_several_positions(path: Path) -> None:
    begin(path, positions=(3,))
    with Writer(path) as writer:
        fill(writer, positions=(3,))
        writer.finish(SUMMARY)
    cache = open_cache(path)
    assert cache.header.block_rows == ROWS_OF_A_BLOCK
    stored = row_values(1, (3,))["log_probs"]
    np.testing.assert_array_equal(cache.arrays["log_probs"][1], stored)
    assert cache.rows(1, np.arange(4)).shape == (4, 3, CLASSES)
    assert find_damage(cache) == []


def test_plain_h5py_reads_the_same_values(reference: bytes, path: Path) -> None:
    path.write_bytes(reference)
    cache = open_cache(path)
    with h5py.File(path) as file:
        assert set(file) == set(cache.arrays)
        for name, array in cache.arrays.items():
            assert file[name].dtype == array.dtype
            np.testing.assert_array_equal(file[name][()], array)
        np.testing.assert_array_equal(file["log_probs"][1], row_values(1)["log_probs"])


def test_the_same_dump_gives_the_same_bytes(reference: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert run_dump(tmp_path / "elsewhere" / "another name.h5") == reference


def test_a_write_that_takes_few_bytes_at_a_time_is_repeated(
    path: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, raw, offset: real(file, raw[:7], offset))
    assert run_dump(path) == reference


def test_samples_that_change_between_views_are_refused(path: Path) -> None:
    begin(path)
    samples = sample_values()
    changed = samples | {"labels": samples["labels"].copy()}
    changed["labels"][17] = 77
    stored = samples["labels"][17]
    with Writer(path) as writer:
        writer.write(0, 0, row_values(0), samples)
        with pytest.raises(DataError, match=f"sample 17: its labels are 77, but were {stored} in"):
            writer.write(1, 0, row_values(1), changed)


def test_a_row_given_twice_does_not_stand_in_for_one_never_given(path: Path) -> None:
    begin(path)
    half = ROWS_OF_A_BLOCK // 2
    with Writer(path) as writer:
        for _ in range(2):
            writer.write(0, 0, part(row_values(0), 0, half), part(sample_values(), 0, half))
        rest = writer.missing(0)
        assert not rest[:half].any()
        assert rest[half:].all()
    with Writer(path) as writer:  # what waits for its block is not kept
        assert writer.missing(0).all()
