"""FORMAT.md rule by rule: at least one test for every number, on real files."""

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
import pytest
import xxhash

import softcache
from softcache.cache import Header, open_cache
from softcache.cache.verify import find_damage
from softcache.data.embedded import CacheSource
from softcache.data.keys import sample_keys
from tests.cache import test_format_rows, test_format_tokens, test_layout, test_values
from tests.cache.header_cases import (
    GONE,
    Place,
    header_of,
    refused,
    tiny_cache,
    with_fields,
    with_text,
    with_values,
)
from tests.cache.test_header import WRONG, cache_with, with_preamble
from tests.cache.test_header_arrays import array_at
from tests.cache.test_writer import digest_offset, locate
from tests.cache.writer_cases import VIEWS, run_dump
from tests.targets import test_pack

FORMAT = (Path(softcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache."""
    path = tmp_path / "tiny.h5"
    path.write_bytes(tiny_cache())
    return path


# every rule has a test
def rules(text: str) -> set[str]:
    """The numbers of the rules in the text of a specification."""
    return set(re.findall(r"^- \*\*(F\d+)\*\* ", text, re.MULTILINE))


def marked_rules(functions: Iterable[object]) -> set[str]:
    """The rule numbers that tests are marked with."""
    marks = [mark for function in functions for mark in getattr(function, "pytestmark", [])]
    return {number for mark in marks if mark.name == "must" for number in mark.args}


def test_every_rule_has_a_test_and_every_test_a_rule() -> None:
    assert len(rules(FORMAT)) >= 24
    others = (test_format_rows, test_format_tokens, test_layout, test_values, test_pack)
    modules = (sys.modules[__name__], *others)
    here = [value for module in modules for value in vars(module).values()]
    assert marked_rules(here) == rules(FORMAT)


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
@pytest.mark.parametrize("position", range(8))
def test_a_file_begins_with_the_magic(path: Path, position: int) -> None:
    assert path.read_bytes()[:8] == bytes.fromhex("89 53 46 54 43 0d 0a 1a")
    raw = bytearray(tiny_cache())
    raw[position] ^= 1
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
        (b'"seed": 3', b'"seed": 3, "seed": 3', "the header's JSON has a duplicate key"),
        (b'"rows": 60', b'"rows": 60, "rows": 60', "the header's JSON has a duplicate key"),
        (b"4.0", b"NaN", "the header's JSON has NaN"),
        (b"4.0", b"Infinity", "the header's JSON has Infinity"),
        (b"4.0", b"1e309", "the header's JSON has '1e309'"),
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
    refused(raw, path.parent, "the header's JSON has '179769.*; expected smaller numbers")


@pytest.mark.must("F4", "F12")
@pytest.mark.parametrize("number", [(1 << 64) - 1, -(1 << 63), 10**308 - 1])
def test_a_newer_minor_version_may_hold_any_integer_of_64_bits_and_more(
    path: Path, number: int
) -> None:
    newer: dict[Place, Any] = {("version",): [1, 4], ("unheard_of",): number}
    path.write_bytes(with_values(tiny_cache(), newer))
    assert open_cache(path).header.version == (1, 4)


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
    for offset in (end, user_block // 2, user_block - 1):
        raw = bytearray(tiny_cache())
        raw[offset] = 1
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
    """The seconds of a time span that occur in the bytes as 32-bit numbers, as HDF5 stores them."""
    span = range(int(since) - 1, int(until) + 2)
    return [second for second in span if struct.pack("<I", second) in raw]


@pytest.mark.must("F8")
def test_neither_clock_nor_host_nor_path_is_in_the_file(new_path: Path) -> None:
    since = time.time()
    raw = run_dump(new_path)
    assert clock_times(raw, since, time.time()) == []
    assert raw == tiny_cache(), "made at another time, in another folder"
    assert b"pytest" not in raw
    host = socket.gethostname().encode()
    assert len(host) < 4 or host not in raw


@pytest.mark.must("F8")
def test_that_check_notices_what_h5py_writes_of_the_clock(new_path: Path) -> None:
    since = time.time()
    with h5py.File(new_path, "w") as file:
        file.create_dataset("x", data=[1], track_times=True)
    assert clock_times(new_path.read_bytes(), since, time.time())


# header
@pytest.mark.must("F10")
@pytest.mark.parametrize("value", [GONE, None, "SOFTCACHE", 1], ids=repr)
def test_format_is_softcache(path: Path, value: object) -> None:
    assert header_of(tiny_cache())["format"] == "softcache"
    raw = with_values(tiny_cache(), {("format",): value})
    shown = None if value is GONE else value
    refused(raw, path.parent, f"format is {shown!r}; expected 'softcache': this is not a cache")


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
    path.write_bytes(with_values(raw, {("version",): [1, 4]}))
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
    raw = with_values(cache_with(field), {(field,): GONE})
    refused(raw, path.parent, f"the header lacks {field}$")
    for value, message in WRONG[field]:
        refused(with_values(cache_with(field), {(field,): value}), path.parent, message)


# arrays
@pytest.mark.must("F20")
@pytest.mark.parametrize("dtype", ["<f8", ">f2", ">i4", "|O", "|S0", "|S1025", "<U4", "|b1"])
def test_types_of_arrays(path: Path, dtype: str) -> None:
    dtypes = {array.dtype for array in open_cache(path).header.arrays}
    assert dtypes <= {"<f2", "<f4", "<i8", "<u8", "|S14"}
    for name in ("log_probs", "class_names"):
        raw = with_values(tiny_cache(), {("arrays", array_at(name), "dtype"): dtype})
        refused(raw, path.parent, f"array {name} has type '{re.escape(dtype)}'; expected one of")


@pytest.mark.must("F21")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "array name is 'a/b'; expected a plain word"),
        ("..", "array name is '..'; expected a plain word"),
        ("labels", "two arrays have the same name"),
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
    arrays_of_file = {a["name"]: (a["dtype"], a["shape"], a["axis"]) for a in fields["arrays"]}
    assert arrays_of_file == {
        "log_probs": ("<f2", [2, 30, 5], "rows"),
        "labels": ("<i8", [30], "samples"),
        "keys": ("<u8", [30], "samples"),
        "class_names": ("|S14", [5], "shared"),
        "fingerprinted": ("<i8", [3], "shared"),
        "fingerprints": ("<f4", [2, 3, 8], "shared"),
        "digests": ("<u8", [2, 4], "commits"),
        "sample_digests": ("<u8", [4], "commits"),
    }
    for index, array in enumerate(fields["arrays"]):
        others = [*fields["arrays"][:index], *fields["arrays"][index + 1 :]]
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
                raw = with_values(tiny_cache(), {("arrays", index, part_name): value})
                # fingerprinted determines the shape of fingerprints, so that either of them can be named
                name = "fingerprint(ed|s)" if array["name"] == "fingerprinted" else array["name"]
                refused(raw, path.parent, rf"array {name} is .*; expected ")


@pytest.fixture
def embedded(tmp_path: Path) -> bytes:
    """A cache with embedded samples."""
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
    index = next(i for i, array in enumerate(fields["arrays"]) if array["name"] == "inputs")
    array = fields["arrays"][index]
    others = [*fields["arrays"][:index], *fields["arrays"][index + 1 :]]
    for arrays, message in (
        (others, "array inputs is missing; expected numbers, since must_understand names it"),
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
            offset = digest_offset(cache.header, view, block)
            assert raw[offset : offset + 8] == digest.intdigest().to_bytes(8, "little")
