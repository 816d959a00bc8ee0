"""Opening, reading rows, and finding every kind of damage."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from softcache.cache import Header, open_cache
from softcache.cache.allocate import create
from softcache.cache.reader import digest_of, gaps, open_trainable, partial_path
from softcache.cache.verify import Damage, find_damage
from softcache.cache.writer import Writer, mark_missing
from softcache.errors import FormatError, SettingsError
from tests.cache.header_cases import Place, tiny_cache, with_values
from tests.cache.test_header import with_preamble
from tests.cache.test_writer import digest_offset, locate
from tests.cache.writer_cases import (
    CLASS_NAMES,
    CLASSES,
    SAMPLES,
    VIEWS,
    begin,
    draft,
    fill,
    row_values,
    run_dump,
    sample_values,
    shared_values,
)

USER_BLOCK, STRUCTURE = "the user block behind the header", "the HDF5 structure"
SHARED = "the arrays shared by all rows"
SPANS = ("0 to 7", "8 to 15", "16 to 23", "24 to 29")  # cache_rows of the blocks
# a part of the file: what it is, and for a block its view and cache_rows
Part = tuple[str, int | None, range | None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.h5"
    path.write_bytes(tiny_cache())
    return path


def retempered(log_probs: npt.NDArray[np.float16], ratio: float) -> npt.NDArray[np.float64]:
    """The reference: log softmax(log p · T / T') in float64."""
    logits = log_probs.astype(np.float64) * ratio
    logits -= logits.max(-1, keepdims=True)
    normalized: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


# rows


@pytest.mark.parametrize("samples", [[0], [29, 0, 29], list(range(SAMPLES)), []], ids=len)
@pytest.mark.parametrize("view", range(VIEWS))
def test_rows_of_any_samples_in_any_order(path: Path, view: int, samples: list[int]) -> None:
    rows = open_cache(path).rows(view, np.array(samples, np.int64))
    assert rows.shape == (len(samples), CLASSES)
    assert rows.dtype == np.float32
    expected = retempered(row_values(view)["log_probs"][samples], 1.0)
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0, 100.0])
def test_rows_at_another_temperature_follow_exactly(path: Path, temperature: float) -> None:
    rows = open_cache(path).rows(1, np.arange(SAMPLES), temperature)
    expected = retempered(row_values(1)["log_probs"], 4.0 / temperature)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_labels_keys_and_class_names(path: Path) -> None:
    cache = open_cache(path)
    np.testing.assert_array_equal(cache.labels, sample_values()["labels"])
    np.testing.assert_array_equal(cache.keys, sample_values()["keys"])
    assert cache.class_names == list(CLASS_NAMES)


def test_a_cache_cannot_be_written_to(path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        open_cache(path).arrays["labels"][0] = 1


def test_a_sample_past_the_end(path: Path) -> None:
    with pytest.raises(IndexError, match="30 is out of bounds"):
        open_cache(path).rows(0, np.array([SAMPLES]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan])
def test_rows_at_no_temperature(path: Path, temperature: float) -> None:
    with pytest.raises(SettingsError, match=f"temperature is {temperature}; expected a number"):
        open_cache(path).rows(0, np.arange(3), temperature)


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (b"\x1b[2J", r"'\x1b[2J'"),
        (b"two\nlines", r"'two\nlines'"),
        ("\u202e".encode(), r"'\u202e'"),
        (b"caf\xe9", "caf\ufffd"),
        ("café".encode(), "café"),
    ],
)
def test_class_names_are_shown_as_a_terminal_can_take_them(
    tmp_path: Path, stored: bytes, shown: str
) -> None:
    names = [stored, b"one", b"two", b"three", b"four"]
    path = tmp_path / "tiny.h5"
    create(path, draft(), shared_values() | {"class_names": np.array(names)})
    class_names = open_cache(partial_path(path), unfinished=True).class_names
    assert class_names == [shown, "one", "two", "three", "four"]
    assert all(name.isprintable() for name in class_names)


# content id


def test_the_content_id_is_the_sha256_of_header_and_digests(path: Path) -> None:
    cache = open_cache(path)
    digest = hashlib.sha256(cache.header_bytes)
    digest.update(cache.arrays["sample_digests"].tobytes())
    digest.update(cache.arrays["digests"].tobytes())
    assert cache.content_id() == digest.hexdigest()


def test_the_content_id_is_the_same_wherever_the_file_lies(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    run_dump(tmp_path / "other" / "name.h5")
    assert open_cache(tmp_path / "other" / "name.h5").content_id() == open_cache(path).content_id()


def test_the_content_id_differs_with_any_field_and_any_row(path: Path) -> None:
    cache = open_cache(path)
    original, ids = cache.content_id(), set()
    changed = with_values(tiny_cache(), {("data",): "npz:other.npz@train"})
    for offset in (digest_offset(cache.header, 1, 2), digest_offset(cache.header, None, 0)):
        raw = bytearray(tiny_cache())
        raw[offset] ^= 1
        path.write_bytes(raw)
        ids.add(open_cache(path).content_id())
    path.write_bytes(changed)
    ids.add(open_cache(path).content_id())
    assert len(ids | {original}) == 4


# unfinished files


def test_an_unfinished_cache_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "tiny.h5"
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=1)  # 12 rows: a block of rows and a block of samples
    partial = partial_path(path)
    with pytest.raises(FormatError, match=r"is unfinished: it has 2 of 12 blocks; run the same"):
        open_cache(partial)
    cache = open_cache(partial, unfinished=True)
    assert not cache.complete
    np.testing.assert_array_equal(cache.arrays["log_probs"][0, :8], row_values(0)["log_probs"][:8])


@pytest.mark.parametrize(("batches", "views"), [(3, 1), (4, 1), (5, 1), (6, 2)])
def test_the_first_complete_views_of_an_unfinished_cache_train(
    batches: int, views: int, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.h5"
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=batches)  # a view has three
    cache = open_trainable(partial_path(path))
    assert (cache.header.views, cache.complete) == (views, False)
    cache_rows = np.arange(SAMPLES)
    for view in range(views):
        stored = row_values(view)["log_probs"].astype(np.float64)
        np.testing.assert_allclose(cache.rows(view, cache_rows), stored, atol=1e-2)
    assert find_damage(cache) == []  # blocks missing from other views are not damage to these


@pytest.mark.parametrize(("batches", "there"), [(0, 0), (1, 2), (2, 6)])
def test_an_unfinished_cache_without_a_complete_view_does_not_train(
    batches: int, there: int, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.h5"
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=batches)
    with pytest.raises(
        FormatError,
        match=r"\.partial is unfinished, and training needs at least its first view complete; run",
    ):
        open_trainable(partial_path(path))


def test_a_view_that_is_complete_behind_one_that_is_not_does_not_train(tmp_path: Path) -> None:
    path = tmp_path / "tiny.h5"
    begin(path)
    with Writer(path) as writer:
        fill(writer)
        header = writer.header
    mark_missing(partial_path(path), [(1, 2)])
    assert open_trainable(partial_path(path)).header.views == 1
    mark_missing(partial_path(path), [(0, 3)])
    assert header.blocks == 4
    with pytest.raises(
        FormatError, match="is unfinished, and training needs at least its first view complete; run"
    ):
        open_trainable(partial_path(path))


def test_a_complete_cache_trains_with_all_its_views(path: Path) -> None:
    cache = open_trainable(path)
    assert (cache.header.views, cache.complete) == (VIEWS, True)


@pytest.mark.parametrize("block", [(1, 2), (None, 2)])
def test_a_finished_cache_that_lost_a_digest_does_not_train(
    block: tuple[int | None, int], path: Path
) -> None:
    # even if its first view is complete: a finished file with a missing block is damaged
    mark_missing(path, [block])
    with pytest.raises(FormatError, match="is damaged: 1 of its 12 digests are missing"):
        open_trainable(path)


def test_what_is_missing_is_told_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "tiny.h5"
    begin(path)
    with Writer(path) as writer:
        fill(writer, batches=4)
    damage = find_damage(open_cache(partial_path(path), unfinished=True))
    assert damage == [Damage("missing: the block", 1, range(8, 30), missing=True)]
    assert str(damage[0]) == "missing: the block of samples 8 to 29 in view 1"


GONE = "missing: the block of samples"


@pytest.mark.parametrize(
    ("missing", "wrong", "expected"),
    [
        ([(0, 1)], [], [f"{GONE} 8 to 15 in view 0"]),
        ([(0, 0), (0, 1)], [], [f"{GONE} 0 to 15 in view 0"]),
        ([(1, 2), (1, 3)], [], [f"{GONE} 16 to 29 in view 1"]),
        ([(None, 1), (None, 2)], [], [f"{GONE} 8 to 23"]),
        ([(0, 0), (0, 2)], [], [f"{GONE} 0 to 7 in view 0", f"{GONE} 16 to 23 in view 0"]),
        # views are reported separately, though one ends where the other begins
        ([(0, 1), (1, 2)], [], [f"{GONE} 8 to 15 in view 0", f"{GONE} 16 to 23 in view 1"]),
        ([(None, 0), (0, 1)], [], [f"{GONE} 0 to 7", f"{GONE} 8 to 15 in view 0"]),
        # and so is damage, after everything that is missing from its view
        (
            [(0, 0), (0, 2)],
            [(0, 1)],
            [
                f"{GONE} 0 to 7 in view 0",
                f"{GONE} 16 to 23 in view 0",
                "soft targets of samples 8 to 15 in view 0",
            ],
        ),
        # one view after the other
        (
            [(1, 0)],
            [(0, 1)],
            ["soft targets of samples 8 to 15 in view 0", f"{GONE} 0 to 7 in view 1"],
        ),
        ([], [(1, 0), (1, 1)], [f"soft targets of samples {r} in view 1" for r in SPANS[:2]]),
        ([], [(None, 2), (None, 3)], [f"labels and keys of samples {r}" for r in SPANS[2:]]),
    ],
)
def test_missing_neighbours_are_told_as_one(
    path: Path,
    missing: list[tuple[int | None, int]],
    wrong: list[tuple[int | None, int]],
    expected: list[str],
) -> None:
    raw, header = bytearray(tiny_cache()), open_cache(path).header
    for view, block in missing:
        offset = digest_offset(header, view, block)
        raw[offset : offset + 8] = bytes(8)
    for view, block in wrong:
        raw[digest_offset(header, view, block)] ^= 1
    path.write_bytes(raw)
    assert [str(damage) for damage in find_damage(open_cache(path, unfinished=True))] == expected


def test_a_finished_file_that_lost_a_digest_is_called_damaged(path: Path) -> None:
    raw = bytearray(tiny_cache())
    offset = digest_offset(open_cache(path).header, 1, 2)
    raw[offset : offset + 8] = bytes(8)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="is damaged: 1 of its 12 digests are missing"):
        open_cache(path)


# damage


def header_text(raw: bytes) -> bytes:
    """The JSON of a finished file."""
    return raw[32 : 32 + int.from_bytes(raw[16:24], "little")]


def is_missing(header: Header, raw: bytes, view: int | None, samples: range | None) -> bool:
    """Whether the digest of a block is 0."""
    if samples is None:
        return False
    offset = digest_offset(header, view, samples.start // header.block_rows)
    return raw[offset : offset + 8] == bytes(8)


def parts_of(header: Header, header_end: int) -> list[tuple[slice, Part]]:
    """The parts of a finished file; every byte belongs to one of them."""
    parts: list[tuple[slice, Part]] = [
        (slice(0, header_end), ("header", None, None)),
        (slice(header_end, header.user_block), (USER_BLOCK, None, None)),
        *((slice(start, end), (STRUCTURE, None, None)) for start, end in gaps(header)),
    ]
    for array in header.arrays:
        if array.axis == "shared":
            parts.append((slice(array.offset, array.offset + array.nbytes), (SHARED, None, None)))
    for view in (None, *range(header.views)):
        what = "labels and keys" if view is None else "soft targets"
        for block in range(header.blocks):
            part = (what, view, header.block_range(block))
            offset = digest_offset(header, view, block)
            places = (*locate(header, view, block), slice(offset, offset + 8))
            parts += [(place, part) for place in places]
    return parts


def changed_parts(header: Header, before: bytes, after: bytes) -> set[Part]:
    """The parts that a checker must name; only the header, if it is unreadable."""
    end = 32 + len(header_text(before))
    if len(after) != len(before) or after[:end] != before[:end]:
        return {("header", None, None)}
    parts = {part for place, part in parts_of(header, end) if before[place] != after[place]}
    return {
        ("missing: the block" if is_missing(header, after, view, samples) else what, view, samples)
        for what, view, samples in parts
    }


def found_parts(path: Path) -> set[Part]:
    """The parts that opening and verifying name; the header, if the file cannot be opened."""
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError:
        return {("header", None, None)}
    return {
        (damage.what, damage.view, samples)
        for damage in find_damage(cache)
        for samples in blocks_of(damage, cache.header.block_rows)
    }


def blocks_of(damage: Damage, rows: int) -> list[range | None]:
    """The single blocks of a Damage, which reports adjacent missing blocks as one."""
    if damage.samples is None or not damage.missing:
        return [damage.samples]
    return [damage.samples[i : i + rows] for i in range(0, len(damage.samples), rows)]


def corrupted(random: np.random.Generator, raw: bytes) -> tuple[str, bytes]:
    """A randomly corrupted file, and what was done to it."""
    offset, other = (int(i) for i in random.integers(0, len(raw), 2))
    kind = str(random.choice(["bit", "word", "burst", "swap", "zero", "cut", "append"]))
    new = bytearray(raw)
    if kind == "bit":
        new[offset] ^= 1 << int(random.integers(8))
    elif kind in ("word", "burst"):
        count = 8 if kind == "word" else int(random.integers(1, 300))
        new[offset : offset + count] = random.bytes(len(new[offset : offset + count]))
    elif kind in ("swap", "zero"):
        size = int(random.choice([16, 80, 512, 4096]))
        offset, other = offset // size * size, min(other // size * size, len(raw) - size)
        offset = min(offset, len(raw) - size)
        if kind == "swap" and abs(offset - other) >= size:
            new[offset : offset + size], new[other : other + size] = (
                raw[other : other + size],
                raw[offset : offset + size],
            )
        elif kind == "zero":
            new[offset : offset + size] = bytes(size)
    elif kind == "cut":
        new = new[:offset]
    else:
        new += random.bytes(int(random.integers(1, 5000)))
    return f"{kind} at {offset:,}", bytes(new)


def misjudged(folder: Path, count: int, seed: int) -> list[str]:
    """Corruptions that are not found, or that are reported for other parts or rows than they hit."""
    path, random, wrong, done = folder / "tiny.h5", np.random.default_rng(seed), [], 0
    path.write_bytes(tiny_cache())
    header = open_cache(path).header
    front = slice(0, header.user_block)
    while done < count:
        what, raw = corrupted(random, tiny_cache())
        # the user block is nine tenths of such a small file: skip most of the hits on it
        if raw == tiny_cache() or (raw[front] != tiny_cache()[front] and random.random() < 0.8):
            continue
        done += 1
        path.write_bytes(raw)
        reported, expected = found_parts(path), changed_parts(header, tiny_cache(), raw)
        if not reported or reported != expected:
            missed, spurious = expected - reported, reported - expected
            wrong.append(f"{what}: {missed} not reported, {spurious} reported wrongly")
    return wrong


def test_any_corruption_is_found_and_the_right_rows_are_named(tmp_path: Path) -> None:
    assert misjudged(tmp_path, 600, seed=0) == []


@pytest.mark.parametrize(
    ("target", "blind"),
    [
        ("verify.hdf5_digest", lambda file, header: header.hdf5_digest),
        ("verify.shared_digest", lambda arrays, header: header.shared_digest),
        ("reader.Cache.block_digest", lambda cache, v, block: cache.arrays["digests"][v, block]),
        ("reader.Cache.sample_digest", lambda cache, block: cache.arrays["sample_digests"][block]),
    ],
)
def test_that_campaign_notices_a_check_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, blind: Callable[..., object]
) -> None:
    monkeypatch.setattr(f"softcache.cache.{target}", blind)
    assert misjudged(tmp_path, 150, seed=0)


def test_every_byte_of_a_file_is_some_part_of_it(path: Path) -> None:
    header = open_cache(path).header
    covered = np.zeros(header.file_bytes, np.int64)
    for place, _ in parts_of(header, 32 + len(header_text(tiny_cache()))):
        covered[place] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_found_in_every_part(path: Path, bit: int) -> None:
    header = open_cache(path).header
    for place, part in parts_of(header, 32 + len(header_text(tiny_cache()))):
        for offset in (place.start, (place.start + place.stop) // 2, place.stop - 1):
            raw = bytearray(tiny_cache())
            raw[offset] ^= 1 << bit
            path.write_bytes(raw)
            assert found_parts(path) == {part}, f"bit {bit} of byte {offset:,}"


def test_an_intact_file_has_no_damage_and_its_bytes_are_counted(path: Path) -> None:
    cache, counted = open_cache(path), list[int]()
    assert find_damage(cache, counted.append) == []
    assert sum(counted) == VIEWS * SAMPLES * cache.header.bytes_per_row


def test_digests_of_the_header_that_do_not_hold(path: Path) -> None:
    wrong: dict[Place, str] = {("hdf5_digest",): "0" * 16, ("shared_digest",): "no digest"}
    path.write_bytes(with_values(tiny_cache(), wrong))
    assert [str(damage) for damage in find_damage(open_cache(path))] == [STRUCTURE, SHARED]


def test_a_final_header_in_another_place(path: Path) -> None:
    # the same header at a later offset: all digests match, but the file is not the one that was made
    raw = bytearray(tiny_cache())
    text = header_text(tiny_cache())
    raw[32 : 32 + len(text)] = bytes(len(text))
    raw[32_768 : 32_768 + len(text)] = text
    path.write_bytes(with_preamble(bytes(raw), offset=32_768))
    assert [str(damage) for damage in find_damage(open_cache(path))] == [USER_BLOCK]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Damage("soft targets", 1, range(8, 16)), "soft targets of samples 8 to 15 in view 1"),
        (Damage("labels and keys", None, range(24, 30)), "labels and keys of samples 24 to 29"),
        (Damage(STRUCTURE), "the HDF5 structure"),
    ],
)
def test_damage_names_its_samples(damage: Damage, text: str) -> None:
    assert str(damage) == text


def test_a_digest_is_xxh3_over_the_values_of_the_parts() -> None:
    parts = [np.arange(6, dtype="<u2").reshape(2, 3)[:, ::2], np.array([7], "|u1")]
    assert digest_of(iter(parts)) == xxhash.xxh3_64_intdigest(b"\0\0\2\0\3\0\5\0\7")


# what the reader touches

READ = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and watching and opened.append(str(args[0])))
watching = False
import numpy as np
from softcache.cache import open_cache
from softcache.cache.verify import find_damage
{0}
watching = True
cache = open_cache(sys.argv[1])
cache.rows(0, np.arange(3), 2.0)
find_damage(cache), cache.content_id(), cache.class_names
{1}
watching = False
foreign = {{"h5py", "torch", "click"}} & set(sys.modules)
print("imported:", *sorted(foreign), "opened:", *sorted(set(opened)))
"""


def read_in_a_process(path: Path, before: str = "", after: str = "") -> str:
    code = READ.format(before, after)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_reading_imports_neither_h5py_nor_torch_and_opens_no_other_file(path: Path) -> None:
    assert read_in_a_process(path) == f"imported: opened: {path}"


def test_that_check_notices_an_import_and_an_open(path: Path) -> None:
    report = read_in_a_process(path, "import h5py, click", "open('/dev/null').close()")
    assert report == f"imported: click h5py opened: /dev/null {path}"
