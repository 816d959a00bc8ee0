"""Untrusted headers: every malformed preamble, JSON and field is refused with its own message."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Header
from softcache.cache.header import MAX_HEADER, PREAMBLE
from softcache.cache.verify import find_damage
from tests.cache.header_cases import (
    GONE,
    JSON,
    WHOLE,
    Place,
    header_of,
    opened,
    refused,
    tiny_cache,
    with_text,
    with_values,
)
from tests.cache.writer_cases import SAMPLES, SUMMARY
from tests.token_caches import token_cache


def with_preamble(raw: bytes, **parts: int) -> bytes:
    """The file with another offset, length or digest in its preamble."""
    magic, offset, length, digest = PREAMBLE.unpack(raw[: PREAMBLE.size])
    fields = {"offset": offset, "length": length, "digest": digest} | parts
    return PREAMBLE.pack(magic, *fields.values()) + raw[PREAMBLE.size :]


def test_the_cache_is_good_before_it_is_changed_and_after_a_change_that_means_nothing(
    tmp_path: Path,
) -> None:
    assert find_damage(opened(tiny_cache(), tmp_path)) == []
    cache = opened(with_values(tiny_cache(), {("data",): "npz:other.npz@test"}), tmp_path)
    assert cache.header.data == "npz:other.npz@test"
    assert find_damage(cache) == []


# the preamble
def test_a_header_of_4_gigabytes(tmp_path: Path) -> None:
    raw = with_preamble(tiny_cache(), length=1 << 32)
    refused(raw, tmp_path, r"header of 4,294,967,296 bytes; at most 1,048,576 are read")


def test_a_header_of_a_byte_more_than_is_read(tmp_path: Path) -> None:
    raw = with_preamble(tiny_cache(), length=MAX_HEADER + 1)
    refused(raw, tmp_path, r"header of 1,048,577 bytes; at most 1,048,576 are read")


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 100), (31, 100), (1 << 40, 100), ((1 << 64) - 1, 100), (69_000, 1 << 20), (1 << 63, 0)],
)
def test_a_header_outside_the_file_or_in_the_preamble(
    tmp_path: Path, offset: int, length: int
) -> None:
    raw = with_preamble(tiny_cache(), offset=offset, length=length)
    message = f"header at {offset:,} to {offset + length:,} of a file of {len(raw):,} bytes"
    refused(raw, tmp_path, message)


def test_a_header_that_does_not_match_its_digest(tmp_path: Path) -> None:
    raw = tiny_cache()
    refused(with_preamble(raw, digest=1), tmp_path, r"header does not match its digest.*damaged")
    refused(raw.replace(b'"seed":3', b'"seed":4'), tmp_path, r"header does not match its digest")


# JSON
def depth(brackets: bytes, count: int) -> bytes:
    return brackets[:1] * count + brackets[1:] * count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (depth(b"[]", 30_000), "nested too deeply"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 12_000 + b"0" + b"}" * 5_000, "nested too deeply"),
        (b"", "the header is not JSON"),
        (b"\0", "the header is not JSON"),
        (b"{", "the header is not JSON"),
        (b"{}\0", "the header is not JSON"),
        (b"{'format': 'softcache'}", "the header is not JSON"),
        (b"\xff\xfe{\0}\0", "the header is not JSON"),
        ('{"format": "softcaché"}'.encode(), "the header is not JSON"),
        (b'\xef\xbb\xbf{"format": "softcache"}', "the header is not JSON"),
        (b'{"format": "soft\ncache"}', "the header is not JSON"),
        (b"[]", "the header's JSON is not an object"),
        (b'"softcache"', "the header's JSON is not an object"),
        (b"null", "the header's JSON is not an object"),
        (b"{}", "format is None; expected 'softcache': this is not a cache"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_header_that_is_no_json_object(tmp_path: Path, text: bytes, message: str) -> None:
    refused(with_text(tiny_cache(), text), tmp_path, message)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (b"NaN", "the header's JSON has NaN; expected finite numbers"),
        (b"Infinity", "the header's JSON has Infinity; expected finite numbers"),
        (b"-Infinity", "the header's JSON has -Infinity; expected finite numbers"),
        (b"1e999", "the header's JSON has '1e999'; expected finite numbers"),
        (b"-1e999", "the header's JSON has '-1e999'; expected finite numbers"),
        (b"1" * 5000 + b".5", "the header's JSON has '111111.*; expected finite numbers"),
        (b"1" + b"0" * 400, "the header's JSON has '1000.*; expected smaller numbers"),
        (b"1" * 5000, "the header's JSON has '1111.*; expected smaller numbers"),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_a_number_that_is_no_number(tmp_path: Path, number: bytes, message: str) -> None:
    text = json.dumps(header_of(tiny_cache())).encode()
    assert text.count(b'"temperature": 4.0') == 1
    text = text.replace(b'"temperature": 4.0', b'"temperature": ' + number)
    refused(with_text(tiny_cache(), text), tmp_path, message)


@pytest.mark.parametrize("sign", ["", "-"])
def test_an_integer_beyond_a_double_is_refused_anywhere(tmp_path: Path, sign: str) -> None:
    number = int(f"{sign}1{'0' * 400}")
    raw = with_values(tiny_cache(), {("teachers", 0, "layers"): number})
    refused(raw, tmp_path, f"the header's JSON has '{sign}1000.*; expected smaller numbers")


@pytest.mark.parametrize(
    ("key", "twice"),
    [
        (b'"seed": 3', b'"seed": 3, "seed": 4'),
        (b'"seed": 3', b'"seed": 3, "\\u0073eed": 3'),
        (b'"name": "keys"', b'"name": "keys", "name": "labels"'),
        (b'"entropy": 1.25', b'"entropy": 1.25, "entropy": 0.5'),
        (b'"parameters": 77', b'"parameters": 77, "parameters": 78'),
    ],
)
def test_a_key_twice(tmp_path: Path, key: bytes, twice: bytes) -> None:
    text = json.dumps(header_of(tiny_cache())).encode()
    assert text.count(key) == 1
    raw = with_text(tiny_cache(), text.replace(key, twice))
    refused(raw, tmp_path, "the header's JSON has a duplicate key")


# versions
@pytest.mark.parametrize(
    ("version", "advice"),
    [([2, 0], "update softcache"), ([65536, 0], "update softcache"), ([0, 9], "dump it again")],
)
def test_another_major_version_is_refused_and_the_old_side_named(
    tmp_path: Path, version: list[int], advice: str
) -> None:
    raw = with_values(tiny_cache(), {("version",): version, ("unheard_of",): 1})
    wrong = f"format version {version[0]}.{version[1]}, this softcache reads 1.x; {advice}"
    refused(raw, tmp_path, re.escape(wrong))


def test_a_newer_minor_version_is_read_and_its_new_fields_are_ignored(tmp_path: Path) -> None:
    values: dict[Place, Any] = {("version",): [1, 7], ("unheard_of",): {"deep": [1, "x"]}}
    cache = opened(with_values(tiny_cache(), values), tmp_path)
    assert cache.header.version == (1, 7)
    assert find_damage(cache) == []
    expected = opened(tiny_cache(), tmp_path).rows(1, np.arange(SAMPLES))
    np.testing.assert_array_equal(cache.rows(1, np.arange(SAMPLES)), expected)


def test_an_unknown_field_in_a_header_of_our_own_version(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("unheard_of",): 1, ("\x1b[31m",): 2})
    refused(raw, tmp_path, "the header has unknown fields: .*unheard_of")


@pytest.mark.parametrize("version", [[1, 0], [1, 7]])
def test_a_feature_that_must_be_understood_and_is_not(tmp_path: Path, version: list[int]) -> None:
    values: dict[Place, Any] = {("version",): version, ("must_understand",): ["zstd", "\x1b[31m"]}
    message = "needs features that this softcache does not know: .*zstd.*; update softcache"
    refused(with_values(tiny_cache(), values), tmp_path, message)


TEACHERS = "expected objects with name, parameters and weight, in printable text of at most 4096 characters$"


def teacher(**fields: object) -> list[JSON]:
    """A list of one valid teacher, with `fields` replaced or added."""
    return [{"name": "t", "parameters": 7, "weight": 1.0, **fields}]


def token_rows(**changes: object) -> JSON:
    """The field `rows` of the cache of documents, with changes."""
    fields: JSON = header_of(token_cache())["rows"]
    return fields | changes


def topk(k: object, temperatures: object) -> JSON:
    return {"name": "topk", "k": k, "temperatures": temperatures}


def basis(wide: int, narrow: int, top: int) -> JSON:
    return {"name": "basis", "wide": wide, "narrow": narrow, "top": top}


def cache_with(field: str) -> bytes:
    """The bytes of a finished cache that has a field."""
    return token_cache() if field == "rows" else tiny_cache()


COUNT = token_rows()["count"]

# for every field of the header: values of a wrong type or out of range, and the message for each
WRONG: dict[str, list[tuple[Any, str]]] = {
    "version": [
        (None, "version is None; expected a list"),
        ("1.0", "version is '1.0'; expected a list"),
        ([1], r"version is \[1\]; expected \[major, minor\]"),
        ([1, 0, 0], r"version is \[1, 0, 0\]; expected \[major, minor\]"),
        ([1.0, 0], f"version is 1.0; {WHOLE}"),
        ([True, 0], f"version is True; {WHOLE}"),
        ([1, -1], f"version is -1; {WHOLE}"),
    ],
    "must_understand": [
        (None, "must_understand is None; expected a list of names"),
        ("zstd", "must_understand is 'zstd'; expected a list of names"),
        ({}, "must_understand is {}; expected a list of names"),
        ([1], r"must_understand is \[1\]; expected a list of names"),
    ],
    "views": [
        (0, f"views is 0; {WHOLE}1 to"),
        (-1, f"views is -1; {WHOLE}1 to"),
        (2.0, f"views is 2.0; {WHOLE}1 to"),
        ("2", f"views is '2'; {WHOLE}1 to"),
        (True, f"views is True; {WHOLE}1 to"),
        (None, f"views is None; {WHOLE}1 to"),
        ((1 << 48) // SAMPLES + 1, f"views is .*; {WHOLE}1 to {(1 << 48) // SAMPLES}"),
    ],
    "samples": [
        (0, f"samples is 0; {WHOLE}1 to"),
        (1.5, f"samples is 1.5; {WHOLE}1 to"),
        ([30], rf"samples is \[30\]; {WHOLE}1 to"),
        ((1 << 48) + 1, f"samples is .*; {WHOLE}1 to {1 << 48}"),
        (10**18, f"samples is 1000000000000000000; {WHOLE}1 to {1 << 48}"),
        (10**4000, "the header's JSON has '1000.*; expected smaller numbers"),
    ],
    "positions": [
        (None, "positions is None; expected a list"),
        (3, "positions is 3; expected a list"),
        ([0], f"positions is 0; {WHOLE}1 to"),
        ([-3], f"positions is -3; {WHOLE}1 to"),
        (["3"], f"positions is '3'; {WHOLE}1 to"),
        ([[3]], rf"positions is \[3\]; {WHOLE}1 to"),
        ([1] * 9, "positions is .*; expected a list of at most 8 whole numbers"),
        ([1] * 100_0, "positions is .*; expected a list of at most 8 whole numbers"),
    ],
    "classes": [
        (1, f"classes is 1; {WHOLE}2 to"),
        ("5", f"classes is '5'; {WHOLE}2 to"),
        (None, f"classes is None; {WHOLE}2 to"),
        ((1 << 24) + 1, f"classes is 16777217; {WHOLE}2 to 16777216"),
    ],
    "temperature": [
        (0, "temperature is 0; expected a number above 0"),
        (-4.0, "temperature is -4.0; expected a number above 0"),
        ("4", "temperature is '4'; expected a number above 0"),
        (True, "temperature is True; expected a number above 0"),
        (None, "temperature is None; expected a number above 0"),
        ([4.0], r"temperature is \[4.0\]; expected a number above 0"),
        (1_000_001, "temperature is 1000001; expected a number above 0, up to 1e6"),
        (2e6, "temperature is 2000000.0; expected a number above 0, up to 1e6"),
    ],
    "encoding": [
        (None, "encoding is None"),
        ("dense", "encoding is 'dense'"),
        ([], r"encoding is \[\]"),
        ({}, "encoding is {}"),
        ({"name": "unheard_of"}, "encoding .*'unheard_of'"),
        ({"name": ["dense"]}, "encoding .*'dense'"),
        ({"name": "dense", "unheard_of": 1}, "encoding .*'unheard_of'"),
        ({"name": "topk", "k": 3}, r"encoding is .*; topk has k, temperatures"),
        (topk(0, [1.0]), "encoding is .* needs k of at least 1"),
        (topk(3.0, [1.0]), "encoding is .*; expected k to be a whole number, 0 or more"),
        (topk(5, [1.0]), "topk:5 of 5 classes leaves no tail; use dense"),
        (topk(3, []), "encoding is .* needs k of at least 1, and 1 to 16 ascending temperatures"),
        (topk(3, [2.0, 1.0]), "encoding is .* needs .* 1 to 16 ascending temperatures"),
        (topk(3, [float(t) for t in range(1, 18)]), "encoding is .* needs .* 1 to 16 ascending"),
        (topk(3, "1"), "encoding is .*; expected temperatures to be a list of numbers"),
        (topk(3, [True]), "encoding is .*; expected temperatures to be a list of numbers"),
        (topk(3, [0.0, 1.0]), "encoding is .*temperatures"),
        (
            basis(2, 1, 1),
            "encoding is .* needs an even narrow, top of at least 1, and some coefficients",
        ),
        (
            basis(0, 0, 1),
            "encoding is .* needs an even narrow, top of at least 1, and some coefficients",
        ),
        (
            basis(2, 2, 0),
            "encoding is .* needs an even narrow, top of at least 1, and some coefficients",
        ),
        (basis(-1, 2, 1), "encoding is .*; expected wide to be a whole number, 0 or more"),
        (basis(2, 4, 1), r"Basis\(.*\) needs more than 5 classes; use dense"),
        (basis(2, 2, 6), r"Basis\(.*\) needs more than 5 classes; use dense"),
        ({"name": "sampled", "n": 0}, "sampled:0 draws; expected 1 to 65536"),
        ({"name": "sampled", "n": 65537}, "sampled:65537 draws; expected 1 to 65536"),
        (
            {"name": "sampled", "n": True},
            "encoding is .*; expected n to be a whole number, 0 or more",
        ),
    ],
    "seed": [
        (-1, f"seed is -1; {WHOLE}0 to"),
        (1 << 63, f"seed is 9223372036854775808; {WHOLE}0 to"),
        (0.0, f"seed is 0.0; {WHOLE}0 to"),
        (None, f"seed is None; {WHOLE}0 to"),
    ],
    "first_view": [
        (-1, f"first_view is -1; {WHOLE}0 to"),
        (0.0, f"first_view is 0.0; {WHOLE}0 to"),
        ((1 << 48) + 1, f"first_view is {(1 << 48) + 1}; {WHOLE}0 to {1 << 48}"),
        (1 << 64, f"first_view is {1 << 64}; {WHOLE}0 to {1 << 48}"),
        (10**307, f"first_view is 1000.*; {WHOLE}0 to {1 << 48}"),
        (10**308, "the header's JSON has '1000.*; expected smaller numbers"),
    ],
    "first_sample": [
        (-1, f"first_sample is -1; {WHOLE}0 to"),
        ("0", f"first_sample is '0'; {WHOLE}0 to"),
        (None, f"first_sample is None; {WHOLE}0 to"),
        (1, f"first_sample is 1; {WHOLE}0 to 0$"),  # the cache has all 30 samples of the data set
    ],
    "data_samples": [
        (SAMPLES - 1, f"data_samples is {SAMPLES - 1}; {WHOLE}{SAMPLES} to {1 << 48}"),
        ((1 << 48) + 1, f"data_samples is {(1 << 48) + 1}; {WHOLE}{SAMPLES} to {1 << 48}"),
        (0, f"data_samples is 0; {WHOLE}{SAMPLES} to"),
        (30.0, f"data_samples is 30.0; {WHOLE}{SAMPLES} to"),
        ("30", f"data_samples is '30'; {WHOLE}{SAMPLES} to"),
        (True, f"data_samples is True; {WHOLE}{SAMPLES} to"),
        (None, f"data_samples is None; {WHOLE}{SAMPLES} to"),
    ],
    "augment": [
        (2, "augment is 2; expected printable text"),
        (["shift"], r"augment is \['shift'\]; expected printable text"),
        ("shift\n", r"augment is 'shift\\n'; expected printable text"),
        ("x" * 5000, "augment is 'xxx.*; expected printable text"),
    ],
    "precision": [
        (None, "precision is None; expected printable text"),
        (32, "precision is 32; expected printable text"),
        ("fp32\x07", r"precision is 'fp32\\x07'; expected printable text"),
    ],
    "data": [
        (None, "data is None; expected printable text"),
        ({}, "data is {}; expected printable text"),
        ("\x1b[2J", r"data is '\\x1b\[2J'; expected printable text"),
        ("\u202egnp", r"data is '\\u202egnp'; expected printable text"),
        ("\ud800", r"data is '\\ud800'; expected printable text"),
    ],
    "choice": [
        ("auto", "choice is 'auto'; expected an object with asked, and the candidates"),
        ([], r"choice is \[\]; expected an object with asked, and the candidates"),
        ({}, "choice is {}; expected an object with asked, and the candidates"),
    ],
    "teachers": [
        (None, f"teachers is None; {TEACHERS}"),
        ({}, f"teachers is {{}}; {TEACHERS}"),
        (["mlp"], rf"teachers is \['mlp'\]; {TEACHERS}"),
        ([{}], rf"teachers is \[{{}}\]; {TEACHERS}"),
        ([{"name": "t", "parameters": 7}], f"teachers is .*; {TEACHERS}"),
        (teacher(name=3), f"teachers is .*'name': 3.*; {TEACHERS}"),
        (teacher(parameters=-1), f"teachers is .*'parameters': -1.*; {TEACHERS}"),
        (teacher(parameters=True), f"teachers is .*'parameters': True.*; {TEACHERS}"),
        (teacher(parameters="7"), f"teachers is .*'parameters': '7'.*; {TEACHERS}"),
        (teacher(weight=0), f"teachers is .*'weight': 0.*; {TEACHERS}"),
        (teacher(weight=-0.5), f"teachers is .*'weight': -0.5.*; {TEACHERS}"),
        (teacher(weight=1.5), f"teachers is .*'weight': 1.5.*; {TEACHERS}"),
        (teacher(weight=True), f"teachers is .*'weight': True.*; {TEACHERS}"),
        (teacher(weight="1"), f"teachers is .*'weight': '1'.*; {TEACHERS}"),
        (teacher() + teacher(weight=None), f"teachers is .*; {TEACHERS}"),
    ],
    "evaluation": [
        ("3 of 10", "evaluation is '3 of 10'; expected data, digest, errors and samples"),
        ({}, "evaluation is {}; expected data, digest, errors and samples"),
        ([], r"evaluation is \[\]; expected data, digest, errors and samples"),
        ({"data": 1, "digest": "", "errors": 0, "samples": 1}, "data is 1; expected printable"),
        ({"data": "", "digest": None, "errors": 0, "samples": 1}, "digest is None; expected"),
        ({"data": "", "digest": "", "errors": 2, "samples": 1}, f"errors is 2; {WHOLE}0 to 1"),
        ({"data": "", "digest": "", "errors": 0, "samples": 0}, f"samples is 0; {WHOLE}1 to"),
    ],
    "software": [
        (None, "software is None; expected versions by name"),
        (["numpy"], r"software is \['numpy'\]; expected versions by name"),
        ({"numpy": 2}, "software is {'numpy': 2}; expected versions by name"),
    ],
    "block_rows": [
        (0, f"block_rows is 0; {WHOLE}1 to 30"),
        (SAMPLES + 1, f"block_rows is 31; {WHOLE}1 to 30"),
        (8.0, f"block_rows is 8.0; {WHOLE}1 to 30"),
        (None, f"block_rows is None; {WHOLE}1 to 30"),
    ],
    "user_block": [
        (None, f"user_block is None; {WHOLE}512 to"),
        (0, f"user_block is 0; {WHOLE}512 to"),
        (256, f"user_block is 256; {WHOLE}512 to"),
        (65_535, "user block of 65,535 bytes; expected a power of 2 that fits"),
        ((1 << 23) + 1, f"user_block is {(1 << 23) + 1}; {WHOLE}512 to {1 << 23}"),
        (1 << 40, f"user_block is {1 << 40}; {WHOLE}512 to {1 << 23}"),
        (1 << 23, "user block of 8,388,608 bytes; expected a power of 2 that fits"),
        (1 << 17, "user block of 131,072 bytes; expected a power of 2 that fits"),
    ],
    "file_bytes": [
        (None, f"file_bytes is None; {WHOLE}1 to"),
        (0, f"file_bytes is 0; {WHOLE}1 to"),
        ("1", f"file_bytes is '1'; {WHOLE}1 to"),
        (1, "its header says 1; it was truncated or appended to"),
        (1 << 60, "its header says 1,152,921,504,606,846,976; it was truncated or appended to"),
    ],
    "hdf5_digest": [
        (None, "hdf5_digest is None; expected printable text"),
        (7, "hdf5_digest is 7; expected printable text"),
    ],
    "shared_digest": [
        (None, "shared_digest is None; expected printable text"),
        ([], r"shared_digest is \[\]; expected printable text"),
    ],
    "arrays": [
        (None, "arrays is None; expected a list of at most 64"),
        ({}, "arrays is {}; expected a list of at most 64"),
        ([{}] * 65, "arrays is .*; expected a list of at most 64"),
        ([1], "an array is described as 1; expected name, dtype, shape, axis, offset"),
        ([{}], "an array is described as {}; expected name, dtype, shape, axis, offset"),
        (
            [],
            r"a dense cache has arrays \['class_names', .*'log_probs'.*; missing here: class_names, ",
        ),
    ],
    "summary": [
        ("done", "summary is 'done'; expected entropy, agreement, rows"),
        ([], r"summary is \[\]; expected entropy, agreement, rows"),
        ({}, "summary is {}; expected entropy, agreement, rows"),
        (SUMMARY | {"entropy": "1"}, "summary has entropy '1'; expected 0 or more"),
        (SUMMARY | {"entropy": None}, "summary has entropy None; expected 0 or more"),
        (SUMMARY | {"entropy": -1.0}, "summary has entropy -1.0; expected 0 or more"),
        (SUMMARY | {"agreement": "1"}, "summary has agreement '1'; expected 0 to 1, or null"),
        (SUMMARY | {"agreement": True}, "summary has agreement True; expected 0 to 1, or null"),
        (SUMMARY | {"agreement": 1.5}, "summary has agreement 1.5; expected 0 to 1, or null"),
        (SUMMARY | {"agreement": -0.5}, "summary has agreement -0.5; expected 0 to 1, or null"),
        (SUMMARY | {"fidelity": 1e-4}, "summary has fidelity 0.0001; expected numbers by name"),
        (SUMMARY | {"fidelity": {"kl": "0"}}, "summary has fidelity .*; expected numbers by name"),
        (SUMMARY | {"fidelity": {"kl": True}}, "summary has fidelity .*; expected numbers by name"),
        (SUMMARY | {"perplexity": 0.0}, "summary has perplexity 0.0; expected a number above 0"),
        (SUMMARY | {"perplexity": "7"}, "summary has perplexity '7'; expected a number above 0"),
        ({"entropy": 1.0, "agreement": None, "rows": 0}, f"rows is 0; {WHOLE}1 to"),
    ],
    "rows": [
        (None, "rows is None; expected count and unit"),
        ([], r"rows is \[\]; expected count and unit"),
        ({"count": 1}, "rows is {'count': 1}; expected count and unit"),
        ({"unit": "token"}, "rows is {'unit': 'token'}; expected count and unit"),
        (token_rows(stem="x"), "rows is {.*; expected count and unit"),
        (token_rows(count=0), f"count is 0; {WHOLE}1 to"),
        (token_rows(count=-1), f"count is -1; {WHOLE}1 to"),
        (token_rows(count=1.0), f"count is 1.0; {WHOLE}1 to"),
        (token_rows(count=True), f"count is True; {WHOLE}1 to"),
        (token_rows(count=1 << 49), f"count is {1 << 49}; {WHOLE}1 to {1 << 48}"),
        (token_rows(count=1 << 48), "block_rows is 8, which makes .* blocks; expected at most"),
        (token_rows(count=1), f"block_rows is 8; {WHOLE}1 to 1"),
        (
            token_rows(count=COUNT + 1),
            rf"array log_probs is .*; expected <f2 \[1, {COUNT + 1}, 24\]",
        ),
        (
            token_rows(count=COUNT - 1),
            rf"array log_probs is .*; expected <f2 \[1, {COUNT - 1}, 24\]",
        ),
        (token_rows(count=COUNT + 800), r"array log_probs is .*; expected <f2 \[1, "),
        (token_rows(unit="sample"), "rows has unit 'sample'; expected token, word, frame, pixel"),
        (token_rows(unit=None), "rows has unit None; expected token, word, frame, pixel"),
        (token_rows(unit=["token"]), r"rows has unit \['token'\]; expected token, word"),
        (token_rows(tokenizer=3), "tokenizer is 3; expected printable text"),
        (token_rows(template="\x1b[2J"), "template is .*; expected printable text"),
        (token_rows(loss_on=None), "loss_on is None; expected printable text"),
        *(
            (token_rows(**{name: -1}), f"{name} is -1; {WHOLE}0 to")
            for name in ("tokens", "bytes", "vocabulary", "length", "stride")
        ),
    ],
}


def test_every_field_of_the_header_is_tried_with_wrong_values() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(Header)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(field, value, message) for field, wrong in WRONG.items() for value, message in wrong],
    ids=lambda value: repr(value)[:24],
)
def test_a_field_of_wrong_type_or_out_of_range(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    refused(with_values(cache_with(field), {(field,): value}), tmp_path, message)


@pytest.mark.parametrize("field", sorted(set(WRONG) - {"version", "must_understand"}))
def test_a_field_that_is_not_there(tmp_path: Path, field: str) -> None:
    refused(with_values(cache_with(field), {(field,): GONE}), tmp_path, f"the header lacks {field}")


@pytest.mark.parametrize("field", ["version", "must_understand"])
def test_a_field_that_is_looked_at_first_is_not_there(tmp_path: Path, field: str) -> None:
    raw = with_values(tiny_cache(), {(field,): GONE})
    refused(raw, tmp_path, f"{field} is None; expected a list")


@pytest.mark.parametrize("value", [GONE, None, "hdf5", ["softcache"]], ids=repr)
def test_another_format(tmp_path: Path, value: object) -> None:
    raw = with_values(tiny_cache(), {("format",): value})
    shown = re.escape(repr(None if value is GONE else value))
    refused(raw, tmp_path, f"format is {shown}; expected 'softcache': this is not a cache")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("augment", None),
        ("evaluation", None),
        ("temperature", 4),
        ("temperature", 1e6),
        ("seed", 0),
        ("seed", (1 << 63) - 1),
        ("first_view", 1 << 48),
        ("data_samples", SAMPLES + 1),
        ("data_samples", 1 << 48),
    ],
)
def test_a_value_that_is_allowed(tmp_path: Path, field: str, value: object) -> None:
    header = opened(with_values(tiny_cache(), {(field,): value}), tmp_path).header
    assert getattr(header, field) == value


@pytest.mark.parametrize(("first", "total"), [(0, 31), (1, 31), (70, 100)])
def test_a_shard_lies_within_the_whole_data(tmp_path: Path, first: int, total: int) -> None:
    values: dict[Place, Any] = {("first_sample",): first, ("data_samples",): total}
    header = opened(with_values(tiny_cache(), values), tmp_path).header
    assert (header.first_sample, header.data_samples) == (first, total)
    values[("first_sample",)] = total - SAMPLES + 1
    message = f"first_sample is {total - SAMPLES + 1}; {WHOLE}0 to {total - SAMPLES}$"
    refused(with_values(tiny_cache(), values), tmp_path, message)


TEXTS: list[Place] = [
    ("teachers", 0, "name"),
    ("teachers", 0, "sha256"),
    ("software", "numpy"),
]


@pytest.mark.parametrize("hostile", ["\x1b[2J", "two\nlines", "\ud800", "x" * 5000])
@pytest.mark.parametrize("place", TEXTS, ids=str)
def test_text_that_a_terminal_should_not_get(tmp_path: Path, place: Place, hostile: str) -> None:
    message = rf"{place[0]} is .*; expected (objects with name, parameters|versions by name)"
    refused(with_values(tiny_cache(), {place: hostile}), tmp_path, message)


def test_a_name_of_software_that_a_terminal_should_not_get(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("software", "\x1b[2J"): "1"})
    refused(raw, tmp_path, "software is .*; expected versions by name")


@pytest.mark.parametrize("place", TEXTS, ids=str)
def test_text_that_is_refused_is_told_what_text_is_taken(tmp_path: Path, place: Place) -> None:
    refused(with_values(tiny_cache(), {place: "x" * 5000}), tmp_path, "expected .*printable text")
