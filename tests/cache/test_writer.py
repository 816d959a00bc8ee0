"""Committing, resuming and finishing a cache, after any stop and any error of the disk."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Header, open_cache
from softcache.cache import writer as writer_module
from softcache.cache.reader import partial_path
from softcache.cache.writer import Writer, mark_missing
from softcache.errors import FormatError, SoftcacheError
from tests.cache.writer_cases import (
    BATCH,
    ROWS_OF_A_BLOCK,
    SAMPLES,
    SUMMARY,
    VIEWS,
    Stopped,
    begin,
    fill,
    part,
    row_values,
    run_dump,
    sample_values,
    stop,
)

Call = tuple[str, int, int]  # name of the function in os; for pwrite, offset and length


def locate(header: Header, view: int | None, block: int) -> list[slice]:
    """The bytes of one block of soft targets, or of labels and keys if `view` is None."""
    axis = "samples" if view is None else "rows"
    first, count = header.block_range(block).start, len(header.block_range(block))
    row = first if view is None else view * header.samples + first
    starts = [(a.offset + row * a.row_bytes, a.row_bytes) for a in header.arrays if a.axis == axis]
    return [slice(start, start + count * row_bytes) for start, row_bytes in starts]


def digest_offset(header: Header, view: int | None, block: int) -> int:
    """Offset of a block's digest, independently of the implementation."""
    if view is None:
        return header.array("sample_digests").offset + 8 * block
    return header.array("digests").offset + 8 * (view * header.blocks + block)


def record(patch: pytest.MonkeyPatch) -> list[Call]:
    """A list to which every later call of pwrite, fdatasync and fsync is appended."""
    calls: list[Call] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(file: int, *arguments: Any) -> int | None:
            offset_and_length = (arguments[1], len(arguments[0])) if name == "pwrite" else (0, 0)
            calls.append((name, *offset_and_length))
            result: int | None = real(file, *arguments)
            return result

        return recorded

    for name in ("pwrite", "fdatasync", "fsync"):
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def fail(
    patch: pytest.MonkeyPatch, name: str, at: int, code: int, *, once: bool = True
) -> list[int]:
    """Make the `at`-th call of os.`name` raise OSError, or all calls from it on; returns their numbers."""
    real, count, failed = getattr(os, name), itertools.count(1), list[int]()

    def failing(*arguments: Any) -> int | None:
        number = next(count)
        if number == at or (number > at and not once):
            failed.append(number)
            raise OSError(code, os.strerror(code))
        result: int | None = real(*arguments)
        return result

    patch.setattr(os, name, failing)
    return failed


def failure(code: int) -> str:
    """A pattern for the message of an error of the disk."""
    advice = "free some space, or give" if code == errno.ENOSPC else "check the disk"
    return (
        rf"cannot (create|write|finish) .*tiny.h5.*: {os.strerror(code)}; {advice}.*, then run the "
        "same command again: it continues where it stopped"
    )


# commit
def unsynced_commits(calls: Iterable[Call], header: Header) -> list[str]:
    """Blocks with a digest that was written before all their bytes had reached the disk."""
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
            places = locate(header, *blocks[offset])
            if not all((state[place] == synced).all() for place in places):
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
    sync = next(i for i, call in enumerate(calls) if call[0] == "fdatasync")
    too_late = [*calls[:sync], calls[sync + 1], calls[sync], *calls[sync + 2 :]]
    assert len(unsynced_commits(too_late, header)) == 1


def test_without_fdatasync_a_file_is_synced_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path)
    with Writer(path) as writer:
        calls = record(monkeypatch)
        monkeypatch.delattr(os, "fdatasync")  # as on macOS
        fill(writer)
        writer.commit()
        assert ("fsync", 0, 0) in calls
        assert unsynced_commits(calls, writer.header) == []
        writer.finish(SUMMARY)


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
    # Linux reports lost pages once and then treats them as clean: a second fdatasync succeeds
    begin(path)
    fail(monkeypatch, "fdatasync", 1, errno.EIO)
    with Writer(path) as writer:
        fill(writer)
        with pytest.raises(SoftcacheError, match=failure(errno.EIO)):
            writer.commit()
    assert open_cache(partial_path(path), unfinished=True).missing_blocks() == 12


# resume
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
        header = writer.header
    with Writer(path) as again:
        missing = again.missing(1)
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
        affected = view or 0  # labels and keys are written with view 0
        np.testing.assert_array_equal(writer.missing(affected), bad)
        assert not writer.missing(1 - affected).any()
        digest = partial_path(path).read_bytes()[digest_offset(header, view, block) :][:8]
        assert digest == bytes(8), "a stop at this point must not leave the bad block committed"
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
    mark_missing(partial_path(path), [(1, 3), (None, 0)])
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


# run_dump() with a limit on the size of files, which acts like a full disk but also sends a signal
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from softcache.errors import SoftcacheError
from tests.cache.writer_cases import run_dump
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
            with pytest.raises(FormatError, match=r"tiny.h5.partial exists"):
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
    text, preamble, initial = 32, 0, header.user_block // 2
    assert steps[steps.index(("pwrite", text)) :] == [
        ("pwrite", text),
        ("fsync", 0),
        ("pwrite", preamble),
        ("fsync", 0),
        ("pwrite", initial),  # the initial header is cleared when nothing points to it any more
        ("fsync", 0),
        ("fsync", 0),  # of the folder, after the file was renamed
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
