"""FORMAT.md rule by rule: one test for every number, on real files."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

import softcache
from softcache.cache import Basis, Cache, Dense, Header, Quantized, Sampled, TopK, open_cache
from softcache.cache import writer as writer_module
from softcache.cache.allocate import create
from softcache.cache.reader import digest_of, open_trainable, partial_path
from softcache.cache.verify import find_damage
from softcache.cache.writer import Writer
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.embedded import CacheSource
from softcache.data.keys import sample_keys
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import DataError, FormatError, SettingsError
from softcache.join.fingerprints import check_replay
from softcache.targets.encode import as_arrays, make_encoder
from softcache.util.counter_rng import uniform
from tests.cache.test_header import (
    GONE,
    WRONG,
    Place,
    array_at,
    header_of,
    refused,
    tiny_cache,
    with_fields,
    with_preamble,
    with_text,
    with_values,
)
from tests.cache.test_writer import (
    SAMPLES,
    SUMMARY,
    VIEWS,
    begin,
    digest_offset,
    draft,
    fill,
    locate,
    record,
    row_values,
    run_dump,
    sample_values,
    shared_values,
    unsynced_commits,
)

Rows = npt.NDArray[np.float64]

FORMAT = (Path(softcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache."""
    path = tmp_path / "tiny.h5"
    path.write_bytes(tiny_cache())
    return path


@pytest.fixture
def unborn(tmp_path: Path) -> Path:
    """Where a cache may be made."""
    return tmp_path / "new.h5"


# every rule has a test


def rules(text: str) -> set[str]:
    """The numbers of the rules in a specification."""
    return set(re.findall(r"^- \*\*(F\d+)\*\* ", text, re.MULTILINE))


def marked_rules(functions: Iterable[object]) -> set[str]:
    """The numbers that tests are marked with."""
    marks = [mark for function in functions for mark in getattr(function, "pytestmark", [])]
    return {number for mark in marks if mark.name == "must" for number in mark.args}


def test_every_rule_has_a_test_and_every_test_a_rule() -> None:
    assert len(rules(FORMAT)) >= 24
    assert marked_rules(vars(sys.modules[__name__]).values()) == rules(FORMAT)


def test_every_must_of_the_specification_is_in_a_rule() -> None:
    paragraphs = FORMAT.split("RFC 2119")[1].split("\n\n")
    items = [item for text in paragraphs for item in re.split(r"^(?=- )", text, flags=re.MULTILINE)]
    assert [item for item in items if "MUST" in item and not rules(item)] == []


def test_that_check_notices_a_rule_without_a_test() -> None:
    @pytest.mark.must("F1", "F2")
    def some_test() -> None: ...

    text = "- **F1** A file MUST\n- **F2** The header MUST\n- **F99** Nobody\n  MUST - **F3** no"
    assert rules(text) - marked_rules([some_test, marked_rules, "text"]) == {"F99"}


# layout


@pytest.mark.must("F1")
@pytest.mark.parametrize("at", range(8))
def test_a_file_begins_with_the_magic(path: Path, at: int) -> None:
    assert path.read_bytes()[:8] == bytes.fromhex("89 53 46 54 43 0d 0a 1a")
    raw = bytearray(tiny_cache())
    raw[at] ^= 1
    refused(bytes(raw), path.parent, "a file that begins with .*, not a cache")


@pytest.mark.must("F2")
def test_the_header_is_at_most_a_mebibyte_and_inside_the_file_behind_the_preamble(
    path: Path,
) -> None:
    size = len(tiny_cache())
    offset, length = struct.unpack("<QQ", tiny_cache()[8:24])
    assert json.loads(tiny_cache()[offset : offset + length])["format"] == "softcache"
    for changed, message in (
        ({"length": (1 << 20) + 1}, "header of 1,048,577 bytes; at most 1,048,576 are read"),
        ({"offset": size - length + 1}, f"header at .* to {size + 1:,} of a file of {size:,}"),
        ({"offset": 31}, "header at 31 to"),
    ):
        refused(with_preamble(tiny_cache(), **changed), path.parent, message)


@pytest.mark.must("F3")
def test_the_header_matches_the_digest_in_the_preamble(path: Path) -> None:
    digest = int.from_bytes(tiny_cache()[24:32], "little")
    assert digest == xxhash.xxh3_64_intdigest(open_cache(path).header_bytes)
    raw = with_preamble(tiny_cache(), digest=digest ^ 1 << 63)
    refused(raw, path.parent, "the header does not match its digest")


@pytest.mark.must("F4")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"seed"', '"seéd"'.encode(), "the header is not JSON"),
        (b'"seed": 3', b'"seed": 3, "seed": 3', "the header's JSON has a key twice"),
        (b'"rows": 60', b'"rows": 60, "rows": 60', "the header's JSON has a key twice"),
        (b"4.0", b"NaN", "the header's JSON holds NaN"),
        (b"4.0", b"Infinity", "the header's JSON holds Infinity"),
        (b"4.0", b"1e309", "the header's JSON holds '1e309'"),
        (b'{"arrays"', b'[{"arrays"', "the header is not JSON"),
    ],
)
def test_the_header_is_one_json_object(path: Path, old: bytes, new: bytes, message: str) -> None:
    text = json.dumps(header_of(tiny_cache()), sort_keys=True).encode()
    assert text.count(old) == 1
    refused(with_text(tiny_cache(), text.replace(old, new)), path.parent, message)


@pytest.mark.must("F4")
def test_no_integer_of_the_header_is_beyond_a_double(path: Path) -> None:
    raw = with_values(tiny_cache(), {("teachers", 0, "parameters"): 1 << 1024})
    refused(raw, path.parent, "the header's JSON holds '179769.*; expected smaller numbers")


@pytest.mark.must("F4", "F12")
@pytest.mark.parametrize("number", [(1 << 64) - 1, -(1 << 63), 10**308 - 1])
def test_a_newer_minor_version_may_hold_any_integer_of_64_bits_and_more(
    path: Path, number: int
) -> None:
    newer: dict[Place, Any] = {("version",): [1, 2], ("unheard_of",): number}
    path.write_bytes(with_values(tiny_cache(), newer))
    assert open_cache(path).header.version == (1, 2)


@pytest.mark.must("F5")
@pytest.mark.parametrize("change", [-1, 1])
def test_file_bytes_is_the_size_of_the_file(path: Path, change: int) -> None:
    size = path.stat().st_size
    assert open_cache(path).header.file_bytes == size
    raw = with_values(tiny_cache(), {("file_bytes",): size + change})
    refused(raw, path.parent, f"the file has {size:,} bytes, its header says {size + change:,}")


@pytest.mark.must("F6")
def test_the_user_block_behind_the_final_header_is_zero(path: Path) -> None:
    cache = open_cache(path)
    user_block, end = cache.header.user_block, 32 + len(cache.header_bytes)
    assert tiny_cache()[end:user_block] == bytes(user_block - end)
    for at in (end, user_block // 2, user_block - 1):
        raw = bytearray(tiny_cache())
        raw[at] = 1
        path.write_bytes(raw)
        assert [str(damage) for damage in find_damage(open_cache(path))] == [
            "the user block behind the header"
        ]


@pytest.mark.must("F7")
def test_the_root_group_says_what_the_file_is(path: Path) -> None:
    with h5py.File(path) as file:
        assert file.userblock_size == open_cache(path).header.user_block
        assert "a softcache cache" in file.attrs["softcache"].decode("ascii")


def clock_times(raw: bytes, since: float, until: float) -> list[int]:
    """Seconds of a span of time that the bytes hold as a number of 32 bits, as HDF5 does."""
    span = range(int(since) - 1, int(until) + 2)
    return [second for second in span if struct.pack("<I", second) in raw]


@pytest.mark.must("F8")
def test_neither_clock_nor_host_nor_path_is_in_the_file(unborn: Path) -> None:
    since = time.time()
    raw = run_dump(unborn)
    assert clock_times(raw, since, time.time()) == []
    assert raw == tiny_cache(), "made at another time, in another folder"
    assert b"pytest" not in raw
    host = socket.gethostname().encode()
    assert len(host) < 4 or host not in raw


@pytest.mark.must("F8")
def test_that_check_notices_what_h5py_writes_of_the_clock(unborn: Path) -> None:
    since = time.time()
    with h5py.File(unborn, "w") as file:
        file.create_dataset("x", data=[1], track_times=True)
    assert clock_times(unborn.read_bytes(), since, time.time())


# header


@pytest.mark.must("F10")
@pytest.mark.parametrize("value", [GONE, None, "SOFTCACHE", 1], ids=repr)
def test_format_is_softcache(path: Path, value: object) -> None:
    assert header_of(tiny_cache())["format"] == "softcache"
    raw = with_values(tiny_cache(), {("format",): value})
    refused(raw, path.parent, "the header does not say format softcache")


@pytest.mark.must("F11")
@pytest.mark.parametrize(
    ("version", "message"),
    [
        ([2, 0], r"format version 2.0, this softcache reads 1.x; update softcache"),
        ([0, 1], r"format version 0.1, this softcache reads 1.x; dump it again"),
    ],
)
def test_another_major_version_is_refused_and_the_old_side_named(
    path: Path, version: list[int], message: str
) -> None:
    refused(with_values(tiny_cache(), {("version",): version}), path.parent, message)


@pytest.mark.must("F12")
@pytest.mark.parametrize("minor", [0, 1])
def test_a_feature_that_must_be_understood_and_is_unknown(path: Path, minor: int) -> None:
    raw = with_values(
        tiny_cache(), {("version",): [1, minor], ("must_understand",): ["unheard_of"]}
    )
    refused(raw, path.parent, "features that this softcache does not know: 'unheard_of'")


@pytest.mark.must("F12")
def test_unknown_fields_are_refused_in_our_own_version_and_ignored_in_a_newer(path: Path) -> None:
    raw = with_values(tiny_cache(), {("unheard_of",): 1})
    refused(raw, path.parent, "the header has unknown fields: 'unheard_of'")
    path.write_bytes(with_values(raw, {("version",): [1, 2]}))
    assert find_damage(open_cache(path)) == []


def fields_of_the_table() -> list[str]:
    """The first column of the table of header fields."""
    table = FORMAT.split("- **F13**")[1].split("## ")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


@pytest.mark.must("F13")
def test_the_table_has_the_fields_that_the_code_has() -> None:
    fields = {field.name for field in dataclasses.fields(Header)}
    assert set(fields_of_the_table()) == fields - {"version", "must_understand"}


@pytest.mark.must("F13")
@pytest.mark.parametrize("field", fields_of_the_table())
def test_a_field_is_there_of_its_type_and_in_its_range(path: Path, field: str) -> None:
    raw = with_values(tiny_cache(), {(field,): GONE})
    refused(raw, path.parent, f"the header lacks {field}$")
    for value, message in WRONG[field]:
        refused(with_values(tiny_cache(), {(field,): value}), path.parent, message)


# arrays


@pytest.mark.must("F20")
@pytest.mark.parametrize("dtype", ["<f8", ">f2", "<i4", "|O", "|S0", "|S1025", "<U4", "|b1"])
def test_types_of_arrays(path: Path, dtype: str) -> None:
    found = {array.dtype for array in open_cache(path).header.arrays}
    assert found <= {"<f2", "<f4", "<i8", "<u8", "|S14"}
    for name in ("log_probs", "class_names"):
        raw = with_values(tiny_cache(), {("arrays", array_at(name), "dtype"): dtype})
        refused(raw, path.parent, f"array {name} has type '{re.escape(dtype)}'; expected one of")


@pytest.mark.must("F21")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "array name 'a/b' is no plain word"),
        ("..", "array name '..' is no plain word"),
        ("labels", "two arrays have one name"),
    ],
)
def test_names_are_plain_words_each_once(path: Path, name: str, message: str) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("keys"), "name"): name})
    refused(raw, path.parent, message)


@pytest.mark.must("F22")
def test_arrays_lie_behind_the_user_block_in_the_file_and_apart(path: Path) -> None:
    arrays = {array.name: array for array in open_cache(path).header.arrays}
    assert all(array.offset % 8 == 0 for array in arrays.values())
    end, keys = len(tiny_cache()) // 8 * 8 + 8, arrays["keys"]
    for name, offset, message in (
        ("log_probs", 65_534, "array log_probs begins at 65,534, inside the user block"),
        ("sample_digests", end - 32, f"array sample_digests ends at {end:,}, past the file"),
        ("sample_digests", end - 39, rf"begins at {end - 39:,}; expected a multiple of 8$"),
        ("class_names", keys.offset + 1, "begins at .*, inside array keys, which ends at"),
        ("keys", arrays["labels"].offset, "begins at .*, inside array (keys|labels), which ends"),
    ):
        raw = with_values(tiny_cache(), {("arrays", array_at(name), "offset"): offset})
        refused(raw, path.parent, message)


@pytest.mark.must("F23")
def test_arrays_are_those_of_the_encoding_and_of_every_cache(path: Path) -> None:
    fields = header_of(tiny_cache())
    found = {a["name"]: (a["dtype"], a["shape"], a["axis"]) for a in fields["arrays"]}
    assert found == {
        "log_probs": ("<f2", [2, 30, 5], "rows"),
        "labels": ("<i8", [30], "samples"),
        "keys": ("<u8", [30], "samples"),
        "class_names": ("|S14", [5], "shared"),
        "fingerprinted": ("<i8", [3], "shared"),
        "fingerprints": ("<f4", [2, 3, 8], "shared"),
        "digests": ("<u8", [2, 4], "commits"),
        "sample_digests": ("<u8", [4], "commits"),
    }
    for at, array in enumerate(fields["arrays"]):
        others = [*fields["arrays"][:at], *fields["arrays"][at + 1 :]]
        for arrays in (others, [*others, array | {"name": "another"}]):
            refused(
                with_fields(tiny_cache(), fields | {"arrays": arrays}),
                path.parent,
                "a dense cache has arrays",
            )
        shape = [*array["shape"][:-1], array["shape"][-1] + 1]
        wrong: dict[str, Any] = {"shape": shape, "dtype": "<u4", "axis": "rows"}
        for part_name, value in wrong.items():
            if array[part_name] != value:
                raw = with_values(tiny_cache(), {("arrays", at, part_name): value})
                # fingerprinted says how many fingerprints are expected: either may be the wrong one
                name = "fingerprint(ed|s)" if array["name"] == "fingerprinted" else array["name"]
                refused(raw, path.parent, rf"array {name} is .*; expected ")


@pytest.fixture
def embedded(tmp_path: Path) -> bytes:
    """A cache that holds its samples."""
    path = Path(__file__).parent.parent / "files" / "1.1" / "embedded.h5"
    return path.read_bytes()


@pytest.mark.must("F25")
def test_embedded_inputs_are_those_of_the_keys(embedded: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.h5").write_bytes(embedded)
    cache = open_cache(tmp_path / "c.h5")
    assert cache.header.version == (1, 1)
    source = CacheSource(cache)
    inputs, labels = source.fetch(range(len(source)))
    np.testing.assert_array_equal(sample_keys(inputs), cache.keys)
    np.testing.assert_array_equal(labels, cache.labels)


@pytest.mark.must("F25")
def test_what_is_named_as_embedded_must_be_there_and_nothing_else(
    embedded: bytes, tmp_path: Path
) -> None:
    fields = header_of(embedded)
    at = next(i for i, array in enumerate(fields["arrays"]) if array["name"] == "inputs")
    array = fields["arrays"][at]
    others = [*fields["arrays"][:at], *fields["arrays"][at + 1 :]]
    for arrays, message in (
        (others, "array inputs is not there; expected numbers, since must_understand names it"),
        ([*others, array | {"dtype": "|S1"}], r"array inputs is \|S1; expected numbers"),
        ([*others, array | {"axis": "rows"}], "array inputs is .* by rows; expected"),
        ([*others, array | {"shape": [47, *array["shape"][1:]]}], "array inputs is .*; expected"),
    ):
        refused(with_fields(embedded, fields | {"arrays": arrays}), tmp_path, message)
    unnamed = with_fields(embedded, fields | {"must_understand": []})
    refused(unnamed, tmp_path, "unknown: 'inputs'")


@pytest.mark.must("F24")
def test_hdf5_reads_the_same_values_under_the_same_names(path: Path) -> None:
    cache = open_cache(path)
    with h5py.File(path) as file:
        assert set(file) == set(cache.arrays)
        for name, array in cache.arrays.items():
            assert file[name].chunks is None
            assert file[name].dtype == array.dtype
            assert file[name][()].tobytes() == array.tobytes()


# blocks and commits


@pytest.mark.must("F30")
def test_digests_are_xxh3_over_the_bytes_of_a_block(path: Path) -> None:
    cache, raw = open_cache(path), tiny_cache()
    for view in (None, *range(VIEWS)):
        for block in range(cache.header.blocks):
            digest = xxhash.xxh3_64()
            for place in locate(cache.header, view, block):
                digest.update(raw[place])
            at = digest_offset(cache.header, view, block)
            assert raw[at : at + 8] == digest.intdigest().to_bytes(8, "little")


@pytest.mark.must("F30")
def test_a_digest_that_comes_out_as_0_is_written_as_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def update(self, part: object) -> None: ...

        def intdigest(self) -> int:
            return 0

    monkeypatch.setattr("softcache.cache.reader.xxhash.xxh3_64", Zero)
    assert digest_of(iter([np.zeros(3)])) == 1


@pytest.mark.must("F31")
def test_a_digest_is_0_until_the_data_of_its_block_are_synced(
    unborn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 200)
    begin(unborn)
    assert not open_cache(partial_path(unborn), unfinished=True).arrays["digests"].any()
    with Writer(unborn) as writer:
        calls = record(monkeypatch)
        fill(writer)
        writer.finish(SUMMARY)
    assert unsynced_commits(calls, writer.header) == []
    without = [call for call in calls if call[0] != "fdatasync"]
    assert unsynced_commits(without, writer.header), "the check itself sees nothing"


@pytest.mark.must("F32")
def test_a_file_without_summary_or_with_a_digest_of_0_is_refused(unborn: Path) -> None:
    begin(unborn)
    with Writer(unborn) as writer:
        fill(writer)
    partial = partial_path(unborn)
    with pytest.raises(
        FormatError, match="is unfinished: all blocks are there, but not its summary; run"
    ):
        open_cache(partial)
    assert not open_cache(partial, unfinished=True).complete

    raw = bytearray(run_dump(unborn))
    assert open_cache(unborn).complete
    at = digest_offset(open_cache(unborn).header, 1, 3)
    raw[at : at + 8] = bytes(8)
    unborn.write_bytes(raw)
    with pytest.raises(FormatError, match=r"is damaged: 1 of its 12 digests are gone"):
        open_cache(unborn)


@pytest.mark.must("F32")
def test_the_first_complete_views_of_an_unfinished_file_may_train(unborn: Path) -> None:
    begin(unborn)
    partial = partial_path(unborn)
    with Writer(unborn) as writer:
        fill(writer, batches=4)  # the three of view 0, and one of view 1
    found = open_trainable(partial)
    assert (found.header.views, found.complete) == (1, False)
    every = np.arange(SAMPLES)
    rows = open_cache(partial, unfinished=True).rows(0, every)
    np.testing.assert_array_equal(found.rows(0, every), rows)

    whole = partial.read_bytes()
    for view in (0, None):  # one block of soft targets, one of labels and keys
        raw = bytearray(whole)
        at = digest_offset(found.header, view, 2)
        raw[at : at + 8] = bytes(8)
        partial.write_bytes(raw)
        with pytest.raises(
            FormatError, match="is unfinished, and not one of its views is complete"
        ):
            open_trainable(partial)


@pytest.mark.must("F33")
def test_the_name_appears_with_the_finished_file_and_not_before(unborn: Path) -> None:
    partial = unborn.with_name("new.h5.partial")
    begin(unborn)
    assert list(unborn.parent.iterdir()) == [partial]
    with Writer(unborn) as writer:
        fill(writer, batches=3)
    with Writer(unborn) as writer:
        fill(writer)
        writer.commit()
        assert list(unborn.parent.iterdir()) == [partial]
        assert writer.finish(SUMMARY) == unborn
    assert list(unborn.parent.iterdir()) == [unborn]
    assert open_cache(unborn).complete


@pytest.mark.must("F34")
def test_a_writer_that_goes_on_fills_blocks_again_that_went_bad(unborn: Path) -> None:
    begin(unborn)
    with Writer(unborn) as writer:
        fill(writer)
        header = writer.header
    raw = bytearray(partial_path(unborn).read_bytes())
    raw[locate(header, 1, 2)[0].start] ^= 1
    raw[locate(header, None, 0)[1].start] ^= 1
    partial_path(unborn).write_bytes(raw)
    with Writer(unborn) as writer:
        assert np.flatnonzero(writer.missing(0)).tolist() == list(range(8))
        assert np.flatnonzero(writer.missing(1)).tolist() == list(range(16, 24))
        fill(writer)
        writer.finish(SUMMARY)
    assert unborn.read_bytes() == tiny_cache()


# fingerprints


def replayed(unborn: Path, source: Source, augmentation: Augmentation, off: float) -> Cache:
    """A cache of `source` of which one fingerprint is off by a share of its input's size."""
    chosen, values = np.array([2, 19, 28]), shared_values()
    raw = source.fetch(chosen.tolist())[0].float() / 255
    pixels = np.arange(raw[0].numel())
    draws = [uniform(0, j, pixels, stream=0, draws=1)[:, 0] for j in range(8)]
    signs = np.where(np.stack(draws) < 0.5, 1.0, -1.0)  # (8, n)
    inputs = [augmentation(raw, None, view, chosen) for view in range(VIEWS)]
    x = torch.stack(inputs).double().flatten(2).numpy()  # (views, F, n)
    found = x @ signs.T / np.sqrt(len(pixels))
    found[1, 2, 5] += off * np.sqrt(np.square(x[1, 2]).mean())
    values |= {"fingerprinted": chosen, "fingerprints": found.astype("<f4")}
    create(unborn, draft(), values)
    with Writer(unborn) as writer:
        fill(writer)
        writer.finish(SUMMARY)
    return open_cache(unborn)


@pytest.mark.must("F35")
@pytest.mark.parametrize("off", [0.0, 0.0015, 0.0025, -0.0025, 1.0, np.nan])
def test_fingerprints_are_compared_before_views_are_replayed(unborn: Path, off: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 6, 6), dtype=np.uint8)
    np.savez(unborn.with_suffix(".npz"), x=images, y=np.zeros(SAMPLES, np.int64))
    source = open_source(f"npz:{unborn.with_suffix('.npz')}")
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    cache = replayed(unborn, source, augmentation, off)
    if abs(off) < 0.002:
        check_replay(cache, source, augmentation, np.arange(SAMPLES), np.arange(SAMPLES))
    else:
        with pytest.raises(
            DataError, match=r"sample 28 of .* in view 1 is not what the teacher of"
        ):
            check_replay(cache, source, augmentation, np.arange(SAMPLES), np.arange(SAMPLES))


@pytest.mark.must("F35")
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_fingerprints_are_compared_sample_by_sample_in_whatever_order(
    unborn: Path, off: float
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 6, 6), dtype=np.uint8)
    order_of_today = np.random.default_rng(1).permutation(SAMPLES)
    places = np.argsort(order_of_today)  # of each sample of the cache in today's data
    sources = []
    for name, order in (("first", np.arange(SAMPLES)), ("again", order_of_today)):
        np.savez(unborn.with_name(f"{name}.npz"), x=images[order], y=np.zeros(SAMPLES, np.int64))
        sources.append(open_source(f"npz:{unborn.with_name(f'{name}.npz')}"))
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    cache = replayed(unborn, sources[0], augmentation, off)
    if not off:
        check_replay(cache, sources[1], augmentation, places, places)
        in_order = np.arange(SAMPLES)
        with pytest.raises(DataError, match=r"sample \d+ of .* is not what the teacher of"):
            check_replay(cache, sources[1], augmentation, in_order, in_order)
    else:
        with pytest.raises(
            DataError, match=rf"sample {places[28]} of .*again.npz.* in view 1 is not"
        ):
            check_replay(cache, sources[1], augmentation, places, places)


@pytest.mark.must("F35")
@pytest.mark.parametrize(("forged", "named"), [(SAMPLES, f"0 to {SAMPLES}"), (-1, "-1 to 14")])
def test_a_fingerprint_of_no_sample_is_refused(unborn: Path, forged: int, named: str) -> None:
    np.savez(
        unborn.with_suffix(".npz"),
        x=np.zeros((SAMPLES, 1, 6, 6), np.uint8),
        y=np.zeros(SAMPLES, np.int64),
    )
    create(unborn, draft(), shared_values() | {"fingerprinted": np.array([0, forged, 14])})
    with Writer(unborn) as writer:
        fill(writer)
        writer.finish(SUMMARY)
    source = open_source(f"npz:{unborn.with_suffix('.npz')}")
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    message = rf"new.h5 has fingerprints of samples {named}; expected 0 to 29: .*get it again"
    in_order = np.arange(SAMPLES)
    with pytest.raises(FormatError, match=message):
        check_replay(open_cache(unborn), source, augmentation, in_order, in_order)


# encodings


@pytest.mark.must("F40")
@pytest.mark.parametrize("temperature", [None, 1.0, 100.0])
def test_rows_decode_to_log_probabilities(path: Path, temperature: float | None) -> None:
    rows = open_cache(path).rows(0, np.arange(SAMPLES), temperature)
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(-1), 1, atol=1e-6)


def log_softmax(logits: Rows) -> Rows:
    """Over the last axis."""
    normalized: Rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


@pytest.mark.must("F40")
def test_only_what_sampled_has_not_drawn_has_no_probability() -> None:
    decoded = Sampled(4).decode({"ids": np.array([[3, 0, 3, 3]], "<u2")}, 4.0, 4.0, 5)
    assert np.isneginf(decoded).tolist() == [[False, True, True, False, True]]
    np.testing.assert_allclose(np.exp(decoded), [[0.25, 0, 0, 0.75, 0]], rtol=1e-6)


@pytest.mark.must("F41")
@pytest.mark.parametrize("wanted", [1.0, 2.0, 8.0])
def test_rows_of_quantized_at_another_temperature(wanted: float) -> None:
    codes = np.array([[0, 255, 51, 102, 204]], "|u1")
    stored = {"codes": codes, "ranges": np.array([[12.5]], "<f2")}
    log_p = log_softmax(-12.5 * (codes / 255.0) ** 2)
    decoded = Quantized().decode(stored, 4.0, wanted, 5)
    np.testing.assert_allclose(decoded, log_softmax(log_p * 4.0 / wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.must("F41")
@pytest.mark.parametrize("wanted", [1.0, 2.0, 4.0, 8.0])
def test_rows_at_another_temperature(path: Path, wanted: float) -> None:
    rows = open_cache(path).rows(1, np.arange(SAMPLES), wanted)
    expected = log_softmax(row_values(1)["log_probs"].astype(np.float64) * 4.0 / wanted)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.must("F42")
def test_what_is_below_the_lowest_float16_is_stored_as_it(unborn: Path) -> None:
    encode = make_encoder(Dense(), {}, temperature=4.0, seed=0, device=torch.device("cpu"))
    log_probs = torch.full((SAMPLES, 5), -1.6)
    log_probs[:, 1:] = torch.tensor([-65504.0, -65519.0, -1e9, -torch.inf])
    rows = as_arrays(encode(log_probs, 0, np.arange(SAMPLES)))
    begin(unborn)
    with Writer(unborn) as writer:
        for view in range(VIEWS):
            writer.write(view, 0, rows, sample_values())
        writer.finish(SUMMARY)
    cache = open_cache(unborn)
    assert (cache.arrays["log_probs"][:, :, 1:] == -65504.0).all()
    assert np.isfinite(cache.rows(0, np.arange(SAMPLES), 1.0)).all()


def cache_of(path: Path, encoding: TopK | Sampled, rows: dict[str, npt.NDArray[Any]]) -> None:
    """A finished cache of another encoding, in which every view holds the same rows."""
    create(path, dataclasses.replace(draft(), encoding=encoding), shared_values())
    with Writer(path) as writer:
        for view in range(VIEWS):
            writer.write(view, 0, rows, sample_values())
        writer.finish(SUMMARY)


@pytest.mark.must("F43")
@pytest.mark.parametrize(("largest", "named"), [(4, 0), (5, 1), (65_535, 1)])
def test_ids_are_below_the_number_of_classes(unborn: Path, largest: int, named: int) -> None:
    ids = np.zeros((SAMPLES, 3), "<u2")
    ids[17, 2] = largest
    cache_of(unborn, Sampled(3), {"ids": ids})
    cache = open_cache(unborn)
    assert cache.header.array("ids").dtype == "<u2"
    damage = [str(found) for found in find_damage(cache)]
    wrong = [f"class ids beyond the last class of samples 0 to 29 in view {v}" for v in (0, 1)]
    assert damage == wrong * named
    if named:
        with pytest.raises(FormatError, match=f"stores class id {largest}; expected 0 to 4: .*get"):
            cache.rows(1, np.arange(SAMPLES))
        assert len(cache.rows(1, np.arange(17))) == 17, "these are as they should be"


def tail_at(kept: dict[float, float], limit: float, wanted: float) -> float:
    """The tail of F44: of the lines in 1/T through the points kept and `limit` at 0, the nearest."""
    points = sorted([(0.0, limit), *((1 / t, tail) for t, tail in kept.items())])
    x = 1 / wanted
    first = max((i for i in range(len(points) - 1) if points[i][0] <= x), default=0)
    (x0, y0), (x1, y1) = points[first : first + 2]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


@pytest.mark.must("F44")
@pytest.mark.parametrize("wanted", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 50.0])
def test_topk_takes_the_tail_linearly_in_the_inverse_temperature(wanted: float) -> None:
    classes, ids, others = 7, [5, 0, 3], [1, 2, 4, 6]
    kept = {1.0: -4.0, 2.0: -1.5, 4.0: -0.25}
    stored = {
        "ids": np.array([ids], "<u2"),
        "log_probs": np.array([[-0.5, -1.25, -3.0]], "<f2"),
        "tails": np.array([list(kept.values())], "<f2"),
    }
    decoded = TopK(3, tuple(kept)).decode(stored, 4.0, wanted, classes)
    tail = tail_at(kept, np.log(4 / 3), wanted)
    head = log_softmax(np.array([-0.5, -1.25, -3.0]) * 4.0 / wanted) - np.log1p(np.exp(tail))
    np.testing.assert_allclose(decoded[0, ids], head, rtol=1e-5, atol=1e-6)
    rest = -np.log1p(np.exp(-tail)) - np.log(4)
    np.testing.assert_allclose(decoded[0, others], [rest] * 4, rtol=1e-5, atol=1e-6)


def test_that_oracle_meets_the_points_and_the_limit() -> None:
    kept = {1.0: -4.0, 2.0: -1.5, 4.0: -0.25}
    assert {t: tail_at(kept, 0.5, t) for t in kept} == kept
    assert abs(tail_at(kept, 0.5, 1e9) - 0.5) < 1e-6
    assert tail_at(kept, 0.5, 4 / 3) == -2.75, "the middle of the line from 1 to 2 in 1/T"


@pytest.mark.must("F45")
def test_the_shared_arrays_of_basis() -> None:
    shared = {a.name: (a.dtype, a.shape) for a in Basis(2, 4, 2).arrays(6) if a.axis == "shared"}
    assert shared == {
        "mean": ("<f4", (6,)),
        "directions": ("<f2", (6, 6)),
        "direction_steps": ("<f4", (6,)),
    }


@pytest.mark.must("F45")
@pytest.mark.parametrize("wanted", [1.0, 4.0, 8.0])
def test_basis_is_a_sum_of_directions_and_rests(wanted: float) -> None:
    random, classes = np.random.default_rng(5), 6
    wide, narrow = [-127, 3], [-8, 7, 0, 5]
    packed = [(a + 8) | (b + 8) << 4 for a, b in (narrow[:2], narrow[2:])]
    stored = {
        "codes": np.array([[wide[0] % 256, wide[1] % 256, *packed]], "|u1"),
        "steps": np.array([[0.25, 0.125]], "<f2"),
        "ids": np.array([[4, 1]], "<u2"),
        "rests": np.array([[-100, 7]], "|i1"),
        "mean": random.normal(size=classes).astype("<f4"),
        "directions": random.normal(size=(6, classes)).astype("<f2"),
        "direction_steps": random.random(6).astype("<f4"),
    }
    x = stored["mean"].astype(np.float64)
    for j, code in enumerate(wide + narrow):
        step = 0.25 * float(stored["direction_steps"][j])
        x += code * step * stored["directions"][j].astype(np.float64)
    x[4] += -100 * 0.125
    x[1] += 7 * 0.125
    decoded = Basis(wide=2, narrow=4, top=2).decode(stored, 4.0, wanted, classes)
    np.testing.assert_allclose(decoded[0], log_softmax(x * 4.0 / wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.must("F46")
def test_sampled_rows_are_refused_at_another_temperature(unborn: Path) -> None:
    ids = np.tile(np.array([[1, 1, 4]], "<u2"), (SAMPLES, 1))
    cache_of(unborn, Sampled(3), {"ids": ids})
    cache = open_cache(unborn)
    shares = np.exp(cache.rows(0, np.arange(3)))  # -inf of what was not drawn
    np.testing.assert_allclose(shares, [[0, 2 / 3, 0, 0, 1 / 3]] * 3, rtol=1e-6)
    with pytest.raises(
        SettingsError, match=r"temperature 1 of a sampled cache made at 4: .*cannot"
    ):
        cache.rows(0, np.arange(3), 1.0)
