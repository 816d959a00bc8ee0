"""Allocate, then fill: what is on disk after each step, after any stop, and when the disk fails."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import Dense, Header, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as writer_module
from softcache.cache.allocate import block_rows, create
from softcache.cache.header import MAX_BLOCKS
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.cache.writer import Writer, forget
from softcache.errors import DataError, FormatError, SoftcacheError

VIEWS, SAMPLES, CLASSES = 2, 30, 5
ROWS_OF_A_BLOCK = 8  # four blocks a view, the last of 6 rows
BATCH = 12  # straddles the blocks
SUMMARY = {"entropy": 1.25, "agreement": 0.5, "rows": VIEWS * SAMPLES}
CLASS_NAMES = ("zero", "one", "two", "three", "quatre à cinq")

Values = dict[str, npt.NDArray[Any]]
Call = tuple[str, int, int]  # name of the function in os; for pwrite also offset and length


def draft(positions: tuple[int, ...] = ()) -> Header:
    """The header of a tiny cache, but for its layout."""
    return Header(
        views=VIEWS,
        samples=SAMPLES,
        positions=positions,
        classes=CLASSES,
        temperature=4.0,
        encoding=Dense(),
        seed=3,
        augment="shift:2",
        first_view=0,
        first_sample=0,
        data_samples=SAMPLES,
        precision="fp32",
        data="npz:tiny.npz@train",
        choice=None,
        teachers=(
            {"name": "mlp:8", "weights": None, "parameters": 77, "sha256": "0f", "weight": 1.0},
        ),
        evaluation={"data": "npz:tiny.npz@test", "digest": "0a", "errors": 3, "samples": 10},
        software={"softcache": "0.1.0", "numpy": "2.0.0"},
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )


def shared_values() -> Values:
    return {
        "class_names": np.array([name.encode() for name in CLASS_NAMES]),
        "fingerprinted": np.array([0, 14, 29]),
        "fingerprints": np.random.default_rng(7).random((VIEWS, 3, 8)).astype("<f4"),
    }


def row_values(view: int, positions: tuple[int, ...] = ()) -> Values:
    """What is stored of all rows of a view: always the same."""
    random = np.random.default_rng(view)
    probabilities = random.dirichlet(np.ones(CLASSES), (SAMPLES, *positions))
    return {"log_probs": np.log(probabilities).astype("<f2")}


def sample_values(positions: tuple[int, ...] = ()) -> Values:
    random = np.random.default_rng(99)
    return {
        "labels": random.integers(-1, CLASSES, (SAMPLES, *positions)),
        "keys": random.integers(0, 1 << 64, SAMPLES, np.uint64),
    }


def part(values: Values, start: int, stop: int) -> Values:
    return {name: array[start:stop] for name, array in values.items()}


def begin(
    path: Path, positions: tuple[int, ...] = (), rows_of_a_block: int = ROWS_OF_A_BLOCK
) -> None:
    """Allocate a tiny unfinished cache of several blocks."""
    row_bytes = 2 * CLASSES * int(np.prod(positions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_allocate, "BLOCK_BYTES", rows_of_a_block * row_bytes)
        create(path, draft(positions), shared_values())


def fill(
    writer: Writer, batch: int = BATCH, positions: tuple[int, ...] = (), batches: int | None = None
) -> None:
    """Write the batches in which rows are missing, as a dump does; at most `batches` of them."""
    samples = sample_values(positions)
    missing = [writer.missing(view) for view in range(VIEWS)]
    grid = [
        (view, start, min(start + batch, SAMPLES))
        for view in range(VIEWS)
        for start in range(0, SAMPLES, batch)
    ]
    wanted = [(v, start, stop) for v, start, stop in grid if missing[v][start:stop].any()]
    for view, start, stop in wanted[:batches]:
        rows = part(row_values(view, positions), start, stop)
        writer.write(view, start, rows, part(samples, start, stop))


def run_dump(path: Path) -> bytes:
    """Begin or go on, fill, finish: the bytes of the finished file."""
    if not path.exists():
        if not partial_path(path).exists():
            begin(path)
        with Writer(path) as writer:
            fill(writer)
            writer.finish(SUMMARY)
    return path.read_bytes()


def locate(header: Header, view: int | None, block: int) -> list[slice]:
    """Where the bytes of one block lie: of soft targets, or of labels and keys if view is None."""
    axis = "samples" if view is None else "rows"
    first, count = header.block_range(block).start, len(header.block_range(block))
    row = first if view is None else view * header.samples + first
    starts = [(a.offset + row * a.row_bytes, a.row_bytes) for a in header.arrays if a.axis == axis]
    return [slice(start, start + count * each) for start, each in starts]


def digest_offset(header: Header, view: int | None, block: int) -> int:
    if view is None:
        return header.array("sample_digests").offset + 8 * block
    return header.array("digests").offset + 8 * (view * header.blocks + block)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The finished file of a dump that nothing disturbed."""
    return run_dump(tmp_path_factory.mktemp("reference") / "tiny.h5")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits come of what was written, not of how long it took."""
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", float("inf"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.h5"


def record(patch: pytest.MonkeyPatch) -> list[Call]:
    """The list that all further calls of pwrite, fdatasync and fsync go into."""
    calls: list[Call] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(file: int, *arguments: Any) -> int | None:
            where = (arguments[1], len(arguments[0])) if name == "pwrite" else (0, 0)
            calls.append((name, *where))
            done: int | None = real(file, *arguments)
            return done

        return recorded

    for name in ("pwrite", "fdatasync", "fsync"):
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def fail(
    patch: pytest.MonkeyPatch, name: str, at: int, code: int, *, once: bool = True
) -> list[int]:
    """Let the `at`-th call of os.`name` raise OSError, or all from it on; returns those that did."""
    real, count, failed = getattr(os, name), itertools.count(1), list[int]()

    def failing(*arguments: Any) -> int | None:
        number = next(count)
        if number == at or (number > at and not once):
            failed.append(number)
            raise OSError(code, os.strerror(code))
        done: int | None = real(*arguments)
        return done

    patch.setattr(os, name, failing)
    return failed


def failure(code: int) -> str:
    """The message that an error of the disk is told with."""
    advice = "free some space, or give" if code == errno.ENOSPC else "see to the disk"
    return (
        rf"cannot (create|write|finish) .*tiny.h5.*: {os.strerror(code)}; {advice}.*, then run the "
        "same command: it goes on where it stopped"
    )


# allocate


@pytest.mark.parametrize(
    ("views", "samples", "row_bytes", "rows"),
    [
        (1, 6_000_000, 20, 52_428),
        (9, 6_000_000, 20, 52_428),
        (1, 60_000, 20, 1024),  # so that several processes can share a small file out
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
    assert rows > 1  # of 1 MiB each
    assert views * samples >= rows * MAX_BLOCKS // 4  # and no more than need be


def test_an_allocated_file_has_all_its_bytes_and_no_row(path: Path) -> None:
    begin(path)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.h5.partial"]
    cache = open_cache(partial_path(path), unfinished=True)
    status = partial_path(path).stat()
    assert status.st_size == cache.header.file_bytes
    assert status.st_blocks * 512 >= status.st_size, "a full disk must show now, not in mid-dump"
    assert cache.missing_blocks() == cache.header.blocks * (VIEWS + 1) == 12
    assert cache.class_names == list(CLASS_NAMES)


@pytest.mark.parametrize("length", [1, 3, 13, 64])
def test_every_array_begins_at_a_cache_line_whatever_lies_before_it(
    path: Path, length: int
) -> None:
    names = np.array([b"x" * length] * CLASSES)  # of any number of bytes
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
    with pytest.raises(FormatError, match="unfinished: 0 of 12 blocks are there; run the same"):
        open_cache(partial_path(path))
    with pytest.raises(FormatError, match=r"has not completed \(tiny.h5.partial is there\)"):
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
    was = samples["labels"][17]
    with Writer(path) as writer:
        writer.write(0, 0, row_values(0), samples)
        with pytest.raises(DataError, match=f"sample 17: its labels are 77 now and were {was} in"):
            writer.write(1, 0, row_values(1), changed)


def test_a_row_given_twice_does_not_stand_in_for_one_never_given(path: Path) -> None:
    begin(path)
    half = ROWS_OF_A_BLOCK // 2
    with Writer(path) as writer:
        for _ in range(2):
            writer.write(0, 0, part(row_values(0), 0, half), part(sample_values(), 0, half))
        assert writer.missing(0).all()


# commit


def unsynced_commits(calls: Iterable[Call], header: Header) -> list[str]:
    """Blocks whose digest was written while bytes of theirs had not reached the disk."""
    never, written, synced = 0, 1, 2
    state = np.full(header.file_bytes, never, np.uint8)
    blocks = {
        digest_offset(header, view, block): (view, block)
        for view in (None, *range(header.views))
        for block in range(header.blocks)
    }
    early = []
    for name, offset, length in calls:
        if name != "pwrite":
            state[state == written] = synced
            continue
        state[offset : offset + length] = written
        if offset in blocks:
            where = locate(header, *blocks[offset])
            if not all((state[place] == synced).all() for place in where):
                early.append(f"view, block {blocks[offset]}")
    return early


def recorded_fill(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Call], Header]:
    begin(path)
    with Writer(path) as writer:
        calls = record(monkeypatch)
        fill(writer)
        writer.finish(SUMMARY)
        return calls, writer.header


@pytest.mark.parametrize("commit_bytes", [1, 100, 1 << 26])
def test_a_digest_is_written_only_after_its_data_are_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch, commit_bytes: int
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", commit_bytes)
    calls, header = recorded_fill(path, monkeypatch)
    assert unsynced_commits(calls, header) == []
    digests = [call for call in calls if call[0] == "pwrite" and call[2] == 8]
    assert len(digests) == header.blocks * (VIEWS + 1)


def test_that_check_notices_a_sync_left_out_and_one_too_late(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, header = recorded_fill(path, monkeypatch)
    left_out = [call for call in calls if call[0] != "fdatasync"]
    assert len(unsynced_commits(left_out, header)) == header.blocks * (VIEWS + 1)
    at = next(i for i, call in enumerate(calls) if call[0] == "fdatasync")
    too_late = [*calls[:at], calls[at + 1], calls[at], *calls[at + 2 :]]
    assert len(unsynced_commits(too_late, header)) == 1


def test_a_commit_makes_whole_blocks_count_and_no_other(path: Path) -> None:
    begin(path)
    with Writer(path) as writer:
        writer.write(0, 0, part(row_values(0), 0, BATCH), part(sample_values(), 0, BATCH))
        writer.commit()
        digests = open_cache(partial_path(path), unfinished=True).arrays["digests"]
        assert (digests != 0).tolist() == [[True, False, False, False], [False] * 4]
        assert writer.missing(1).all()
    assert open_cache(partial_path(path), unfinished=True).missing_blocks() == 10


def test_blocks_whose_sync_failed_are_not_committed_after_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux reports lost pages once and then takes them for clean: a second fdatasync succeeds
    begin(path)
    fail(monkeypatch, "fdatasync", 1, errno.EIO)
    with Writer(path) as writer:
        fill(writer)
        with pytest.raises(SoftcacheError, match=failure(errno.EIO)):
            writer.commit()
    assert open_cache(partial_path(path), unfinished=True).missing_blocks() == 12


# go on


@pytest.mark.parametrize("batches", range(7))
def test_a_dump_that_stopped_between_batches_goes_on_to_the_same_bytes(
    path: Path, reference: bytes, batches: int
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=batches)
    assert run_dump(path) == reference


def test_going_on_writes_no_committed_row_again(
    path: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=4)
        header, missing = writer.header, writer.missing(1)
    assert missing.tolist() == [False] * ROWS_OF_A_BLOCK + [True] * (SAMPLES - ROWS_OF_A_BLOCK)
    calls = record(monkeypatch)
    assert run_dump(path) == reference
    written = np.zeros(header.file_bytes, bool)
    for name, offset, length in calls:
        written[offset : offset + length] |= name == "pwrite"
    committed = [
        *((0, block) for block in range(4)),
        *((None, block) for block in range(4)),
        (1, 0),
    ]
    for view, block in committed:
        assert not any(written[place].any() for place in locate(header, view, block))
    for block in (1, 2, 3):
        assert all(written[place].all() for place in locate(header, 1, block))


@pytest.mark.parametrize(("view", "block"), [(0, 0), (1, 2), (1, 3), (None, 1)])
def test_a_committed_block_that_went_bad_is_filled_again(
    path: Path, reference: bytes, view: int | None, block: int
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer)
        header = writer.header
    place = locate(header, view, block)[-1]
    with partial_path(path).open("r+b") as file:
        file.seek(place.stop - 1)
        last = file.read(1)[0]
        file.seek(place.stop - 1)
        file.write(bytes([last ^ 0x10]))
    with Writer(path) as writer:
        bad = np.isin(np.arange(SAMPLES), header.block_range(block))
        wanted = view or 0  # labels and keys come again with view 0
        np.testing.assert_array_equal(writer.missing(wanted), bad)
        assert not writer.missing(1 - wanted).any()
        digest = partial_path(path).read_bytes()[digest_offset(header, view, block) :][:8]
        assert digest == bytes(8), "a stop right now must not leave the bad block committed"
    assert run_dump(path) == reference


def test_a_committed_digest_that_went_bad_has_its_block_filled_again(
    path: Path, reference: bytes
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer)
        offset = digest_offset(writer.header, 1, 1)
    with partial_path(path).open("r+b") as file:
        file.seek(offset)
        file.write(b"notright")
    with Writer(path) as writer:
        assert np.flatnonzero(writer.missing(1)).tolist() == list(range(8, 16))
    assert run_dump(path) == reference


def test_blocks_that_are_forgotten_are_missing_and_filled_again(
    path: Path, reference: bytes
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer)
    forget(partial_path(path), [(1, 3), (None, 0)])
    assert open_cache(partial_path(path), unfinished=True).missing_blocks() == 2
    with Writer(path) as writer:
        assert np.flatnonzero(writer.missing(0)).tolist() == list(range(8))
        assert np.flatnonzero(writer.missing(1)).tolist() == list(range(24, 30))
    assert run_dump(path) == reference


# the disk fails


@pytest.mark.parametrize(
    ("function", "code", "once", "least"),
    [
        ("pwrite", errno.EIO, True, 30),
        ("pwrite", errno.ENOSPC, False, 30),
        ("fdatasync", errno.EIO, True, 5),
        ("fsync", errno.EIO, True, 6),
        ("fsync", errno.EIO, False, 6),
    ],
)
def test_an_error_of_the_disk_at_any_call_is_told_and_the_next_run_completes(
    tmp_path: Path,
    reference: bytes,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    code: int,
    once: bool,
    least: int,
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)  # a commit with every batch
    with monkeypatch.context() as patch:
        calls = record(patch)
        run_dump(tmp_path / "tiny.h5")
    count = [name for name, *_ in calls].count(function)
    assert count >= least
    for at in range(1, count + 1):
        path = tmp_path / str(at) / "tiny.h5"
        path.parent.mkdir()
        with monkeypatch.context() as patch:
            fail(patch, function, at, code, once=once)
            with pytest.raises(SoftcacheError, match=failure(code)):
                run_dump(path)
        assert not path.exists() or path.read_bytes() == reference
        assert run_dump(path) == reference
        assert [file.name for file in path.parent.iterdir()] == ["tiny.h5"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_while_the_file_is_created_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail(monkeypatch, "posix_fallocate", 1, code)
    with pytest.raises(SoftcacheError, match=failure(code)):
        begin(path)
    assert not list(path.parent.iterdir())


def test_an_error_while_a_bad_block_is_marked_missing_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer)
        place = locate(writer.header, 0, 0)[0]
    with partial_path(path).open("r+b") as file:
        file.seek(place.start)
        file.write(b"not what was there")
    fail(monkeypatch, "pwrite", 1, errno.EIO)
    with pytest.raises(SoftcacheError, match=failure(errno.EIO)):
        Writer(path)


# run_dump() where no file may grow beyond a limit: what a full disk does, and a signal besides
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from softcache.errors import SoftcacheError
from tests.cache.test_writer import run_dump
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    run_dump(Path(sys.argv[1]))
except SoftcacheError as error:
    sys.exit(str(error))
"""


def dump_on_a_full_disk(path: Path, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(path), str(limit)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_disk_too_small_for_the_file_is_told_before_the_first_row(
    path: Path, reference: bytes
) -> None:
    done = dump_on_a_full_disk(path, len(reference) - 10)
    assert done.returncode == 1
    assert "cannot create" in done.stderr
    assert "free some space" in done.stderr
    assert not list(path.parent.iterdir())


def test_a_disk_that_is_full_in_mid_dump_is_told_and_the_next_run_completes(
    path: Path, reference: bytes
) -> None:
    begin(path)
    header = open_cache(partial_path(path), unfinished=True).header
    limit = locate(header, 1, 1)[0].start + 3  # in the middle of a block's data
    done = dump_on_a_full_disk(path, limit)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot write {path}: File too large; free some space")
    assert run_dump(path) == reference


def test_a_disk_that_has_room_gives_no_error(path: Path, reference: bytes) -> None:
    done = dump_on_a_full_disk(path, len(reference))
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes() == reference


# finish


class Stopped(BaseException):
    """The process dies here: nothing catches it."""


def stop(patch: pytest.MonkeyPatch, at: int, *, torn: bool) -> list[str]:
    """Stop after the `at`-th call, or in the middle of it; no call after that does anything."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any) -> int | None:
            calls.append(name)
            if len(calls) > at:
                raise Stopped
            if len(calls) == at and torn and name == "pwrite" and arguments[2]:
                # all but the preamble, which lies in one sector, may be written by half
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            elif not (len(calls) == at and torn):
                real(*arguments)
            if len(calls) == at:
                raise Stopped
            return len(arguments[1]) if name == "pwrite" else None

        return stopping

    for name in ("pwrite", "fdatasync", "fsync"):
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("torn", [False, True], ids=["after", "within"])
def test_a_finish_that_stops_anywhere_is_finished_by_the_next_run(
    tmp_path: Path, reference: bytes, torn: bool
) -> None:
    for at in itertools.count(1):
        path = tmp_path / str(at) / "tiny.h5"
        path.parent.mkdir()
        begin(path)
        stopped = False
        with pytest.MonkeyPatch.context() as patch:
            try:
                with Writer(path) as writer:
                    fill(writer)
                    calls = stop(patch, at, torn=torn)
                    writer.finish(SUMMARY)
            except Stopped:
                stopped = True
        assert stopped == (len(calls) >= at)
        if path.exists():
            assert path.read_bytes() == reference
        else:
            with pytest.raises(FormatError, match=r"tiny.h5.partial is there"):
                open_cache(path)
        assert run_dump(path) == reference
        if not stopped:
            break
    assert at > 15, "finish() has fewer steps than it should"


def test_the_preamble_points_at_the_final_header_only_when_that_is_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, header = recorded_fill(path, monkeypatch)
    steps = [(name, offset) for name, offset, _ in calls]
    text, preamble, old = 32, 0, header.user_block // 2
    assert steps[steps.index(("pwrite", text)) :] == [
        ("pwrite", text),
        ("fsync", 0),
        ("pwrite", preamble),
        ("fsync", 0),
        ("pwrite", old),  # the old header becomes zeros when nothing points at it any more
        ("fsync", 0),
        ("fsync", 0),  # of the folder, after the file got its name
    ]


def test_a_finished_file_has_its_name_and_nothing_is_beside_it(path: Path) -> None:
    run_dump(path)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.h5"]
    assert open_cache(path).header.summary == SUMMARY


@pytest.mark.parametrize("batches", [0, 1, 5])
def test_a_file_with_missing_blocks_gets_neither_summary_nor_name(path: Path, batches: int) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=batches)
        with pytest.raises(SoftcacheError, match=r"cannot finish .*missing"):
            writer.finish(SUMMARY)
    assert not path.exists()
    assert open_cache(partial_path(path), unfinished=True).header.summary is None


def test_a_summary_that_has_no_room_is_refused(path: Path, reference: bytes) -> None:
    begin(path)
    with Writer(path) as writer:
        fill(writer)
        with pytest.raises(SoftcacheError, match=r"header of 33,\d+ bytes; .* room for 32,768"):
            writer.finish(SUMMARY | {"note": "x" * 32_000})
    assert run_dump(path) == reference
