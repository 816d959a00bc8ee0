"""Untrusted arrays and files: every malformed one is refused with its own message."""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from softcache.cache import open_cache
from softcache.cache.header import PREAMBLE, preamble
from softcache.cache.verify import find_damage
from softcache.errors import FormatError
from tests.cache.header_cases import (
    GONE,
    JSON,
    WHOLE,
    Place,
    header_of,
    refused,
    tiny_cache,
    with_fields,
    with_values,
)


def array_at(name: str) -> int:
    """Index of an array in the header's list."""
    return next(i for i, a in enumerate(header_of(tiny_cache())["arrays"]) if a["name"] == name)


# arrays
@pytest.mark.parametrize(
    "name", ["../labels", "/etc/passwd", "a/b", "a\\b", "..", "", "a b", "a\0", "1st", "é/è"]
)
def test_a_name_that_is_no_plain_word(tmp_path: Path, name: str) -> None:
    raw = with_values(tiny_cache(), {("arrays", 0, "name"): name})
    refused(
        raw,
        tmp_path,
        r"(array name is .*; expected a plain word|name is .*; expected printable text)",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "name is 3; expected printable text"),
        (
            "\u0430",
            r"a dense cache has .*; missing here: log_probs, unknown: '\\u0430'",
        ),  # a Cyrillic letter, which is a plain word
        ("labels", "two arrays have the same name"),
        ("logits", "a dense cache has .*; missing here: log_probs, unknown: 'logits'"),
    ],
)
def test_a_name_of_no_array_or_of_another(tmp_path: Path, value: object, message: str) -> None:
    at = array_at("log_probs")
    refused(with_values(tiny_cache(), {("arrays", at, "name"): value}), tmp_path, message)


def test_the_array_that_is_too_many_is_named(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("log_probs"), "name"): "zebras"})
    refused(raw, tmp_path, "zebras")


def test_an_array_too_few(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("keys")): GONE})
    refused(raw, tmp_path, r"a dense cache has arrays .*'keys'.*; missing here: keys, unknown: ")


@pytest.mark.parametrize(
    "dtype", [">f2", ">i8", "=f2", "f2", "<f8", "|O", "O", "<U5", "|V8", "<M8[s]"]
)
def test_a_type_of_other_endianness_or_kind(tmp_path: Path, dtype: str) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("log_probs"), "dtype"): dtype})
    refused(raw, tmp_path, rf"array log_probs has type '{re.escape(dtype)}'; expected one of <f2, ")


@pytest.mark.parametrize("dtype", ["|S0", "|S1025", "|S", "|Sx", "|S-1", "|S" + "9" * 4000])
def test_text_too_short_or_too_long(tmp_path: Path, dtype: str) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("class_names"), "dtype"): dtype})
    refused(raw, tmp_path, r"array class_names has type .*; expected .*or text \|S1 to \|S1024")


def test_text_of_a_length_in_another_script(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("class_names"), "dtype"): "|S\u0663"})
    refused(raw, tmp_path, r"array class_names has type .*; expected .*or text \|S1 to \|S1024")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("dtype", None, "dtype is None; expected printable text"),
        ("dtype", "<f4", r"array log_probs is <f4 \[2, 30, 5\] by rows; expected <f2 \[2, 30, 5\]"),
        ("axis", None, "array log_probs has axis None; expected rows, labels, samples"),
        ("axis", ["rows"], r"array log_probs has axis \['rows'\]; expected rows, labels, samples"),
        ("axis", "files", "array log_probs has axis 'files'; expected rows, labels, samples"),
        ("axis", "shared", r"array log_probs is .* by shared; expected .* by rows"),
        ("shape", None, "shape is None; expected a list"),
        ("shape", "30", "shape is '30'; expected a list"),
        ("shape", [2, 30, 0], f"shape is 0; {WHOLE}1 to"),
        ("shape", [2, 30, -5], f"shape is -5; {WHOLE}1 to"),
        ("shape", [2, 30, 5.0], f"shape is 5.0; {WHOLE}1 to"),
        ("shape", [1] * 9, "shape is .*; expected a list of at most 8"),
        ("shape", [2, 30, 4], r"array log_probs is <f2 \[2, 30, 4\] .*; expected <f2 \[2, 30, 5\]"),
        ("shape", [30, 2, 5], r"array log_probs is <f2 \[30, 2, 5\] .*; expected <f2 \[2, 30, 5\]"),
        ("offset", None, f"offset is None; {WHOLE}0 to"),
        ("offset", 67584.0, f"offset is 67584.0; {WHOLE}0 to"),
        ("offset", -1, f"offset is -1; {WHOLE}0 to"),
        ("offset", (1 << 60) + 1, f"offset is {(1 << 60) + 1}; {WHOLE}0 to {1 << 60}"),
        ("offset", 1 << 64, f"offset is {1 << 64}; {WHOLE}0 to {1 << 60}"),
        ("offset", 10**307, f"offset is 1000.*; {WHOLE}0 to {1 << 60}"),
        ("offset", 10**308, "the header's JSON has '1000.*; expected smaller numbers"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_part_of_an_array_of_wrong_type_or_out_of_range(
    tmp_path: Path, part: str, value: object, message: str
) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("log_probs"), part): value})
    refused(raw, tmp_path, message)


def test_fingerprints_of_a_number_of_samples_that_is_not_there(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("fingerprinted"), "shape"): []})
    refused(
        raw, tmp_path, r"array fingerprinted is <i8 \[\] by shared; expected <i8 \[\d+\] by shared"
    )


@pytest.mark.parametrize("part", ["name", "dtype", "shape", "axis", "offset"])
def test_a_part_of_an_array_that_is_not_there(tmp_path: Path, part: str) -> None:
    raw = with_values(tiny_cache(), {("arrays", 0, part): GONE})
    refused(raw, tmp_path, "an array is described as .*; expected name, dtype, shape, axis, offset")


def test_an_array_with_a_part_too_many(tmp_path: Path) -> None:
    raw = with_values(tiny_cache(), {("arrays", 0, "file"): "/etc/passwd"})
    refused(raw, tmp_path, "an array is described as .*; expected name, dtype, shape, axis, offset")


@pytest.mark.parametrize(
    "shape",
    [
        [1 << 40, 1 << 40],
        [1 << 48] * 8,
        [1 << 32, 1 << 32, 5],  # 0 elements, if multiplied in 64 bits
        [1 << 48, 1 << 16, 2],
    ],
    ids=str,
)
def test_a_shape_whose_product_overflows(tmp_path: Path, shape: list[int]) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("log_probs"), "shape"): shape})
    refused(raw, tmp_path, r"array log_probs of shape .* is larger than any file")


def test_counts_whose_product_overflows_and_shapes_that_agree(tmp_path: Path) -> None:
    fields = header_of(tiny_cache())
    views, samples, classes = 1 << 16, 1 << 32, 1 << 24
    fields |= {"views": views, "samples": samples, "classes": classes, "block_rows": samples}
    fields["data_samples"] = samples
    for array in fields["arrays"]:
        array["shape"] = {
            "log_probs": [views, samples, classes],
            "labels": [samples],
            "keys": [samples],
            "class_names": [classes],
            "fingerprinted": [3],
            "fingerprints": [views, 3, 8],
            "digests": [views, 1],
            "sample_digests": [1],
        }[array["name"]]
    raw = with_fields(tiny_cache(), fields)
    refused(raw, tmp_path, "array log_probs of shape .* is larger than any file")


@pytest.mark.parametrize("past", [1, 32, 1 << 40], ids="{:,}".format)
def test_an_array_past_the_end_of_the_file(tmp_path: Path, past: int) -> None:
    fields = header_of(tiny_cache())
    last = fields["arrays"][array_at("sample_digests")]
    size = 8 * last["shape"][0]
    last["offset"] = -(-(len(tiny_cache()) + past - size) // 8) * 8
    end = last["offset"] + size
    message = f"array sample_digests ends at {end:,}, past the file's end at {len(tiny_cache()):,}"
    refused(with_fields(tiny_cache(), fields), tmp_path, message)


@pytest.mark.parametrize("name", ["labels", "log_probs", "digests", "class_names"])
@pytest.mark.parametrize("shift", [0, 8, -8])
def test_an_array_that_overlaps_another(tmp_path: Path, name: str, shift: int) -> None:
    fields = header_of(tiny_cache())
    keys = fields["arrays"][array_at("keys")]
    other = fields["arrays"][array_at(name)]
    keys["offset"] = other["offset"] + shift
    message = r"array \w+ begins at [\d,]+, inside (array \w+|the user block), which ends at [\d,]+"
    refused(with_fields(tiny_cache(), fields), tmp_path, message)


@pytest.mark.parametrize("name", ["keys", "class_names", "sample_digests"])
@pytest.mark.parametrize("shift", [1, 2, 4, 7])
def test_an_array_that_lies_astride(tmp_path: Path, name: str, shift: int) -> None:
    # numpy reads unaligned values, but slowly, and not on every machine
    fields = header_of(tiny_cache())
    end = len(tiny_cache()) // 64 * 64 + 64
    room = 1 << 12
    fields["arrays"][array_at(name)]["offset"] = end + shift
    fields["file_bytes"] = len(tiny_cache()) + room
    raw = with_fields(tiny_cache(), fields) + bytes(room)
    refused(raw, tmp_path, f"array {name} begins at {end + shift:,}; expected a multiple of 8$")
    fields["arrays"][array_at(name)]["offset"] = end + 8
    (tmp_path / "even.h5").write_bytes(with_fields(tiny_cache(), fields) + bytes(room))
    open_cache(
        tmp_path / "even.h5", unfinished=True
    )  # the layout is valid, whatever the values are


@pytest.mark.parametrize("offset", [0, 32, 65_535])
def test_an_array_in_the_user_block(tmp_path: Path, offset: int) -> None:
    raw = with_values(tiny_cache(), {("arrays", array_at("keys"), "offset"): offset})
    message = f"array keys begins at {offset:,}, inside the user block, which ends at 65,536"
    refused(raw, tmp_path, message)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            1 << 22,
            "is damaged: 8,388,608 of its 8,388,608 digests are missing",
        ),  # the largest number of blocks that is allowed
        ((1 << 22) + 1, "block_rows is 1, which makes 4,194,305 blocks; .*at most 4,194,304"),
    ],
)
def test_a_small_file_that_claims_very_many_blocks(
    tmp_path: Path, samples: int, message: str
) -> None:
    # a sparse file takes no room on disk, but reading 2^29 digests would take 4 GB of memory
    fields = header_of(tiny_cache())
    fields |= {"views": 1, "samples": samples, "classes": 2, "block_rows": 1}
    fields["data_samples"] = samples
    end = fields["user_block"]
    for array in fields["arrays"]:
        leading = {"rows": [1, samples], "samples": [samples], "shared": []}
        trailing = {
            "log_probs": [2],
            "class_names": [2],
            "fingerprinted": [3],
            "fingerprints": [1, 3, 8],
        }
        trailing |= {"digests": [1, samples], "sample_digests": [samples]}
        shape = [*leading.get(array["axis"], []), *trailing.get(array["name"], [])]
        array |= {"shape": shape, "offset": end}
        end += -(-np.dtype(array["dtype"]).itemsize * math.prod(shape) // 8) * 8
    fields["file_bytes"] = end
    raw = with_fields(tiny_cache(), fields)
    path = tmp_path / "sparse.h5"
    with path.open("wb") as file:
        file.write(raw[: fields["user_block"]])
        file.truncate(end)
    assert path.stat().st_blocks * 512 < 1 << 20 < path.stat().st_size
    with pytest.raises(FormatError, match=message):
        open_cache(path)


# files that are truncated, appended to, or of another kind
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "the file is empty, not a cache"),
        (1, "a file that begins with 89, not a cache"),
        (7, "a file that begins with 89534654430d0a, not a cache"),
        (32, r"header at 32 to [\d,]+ of a file of 32 bytes; the file is truncated or damaged"),
        (
            1000,
            r"header at 32 to [\d,]+ of a file of 1,000 bytes; the file is truncated or damaged",
        ),
        (
            60_000,
            r"the file has 60,000 bytes, its header says [\d,]+; it was truncated or appended to",
        ),
        (
            66_000,
            r"the file has 66,000 bytes, its header says [\d,]+; it was truncated or appended to",
        ),
        (-1, r"the file has [\d,]+ bytes, its header says [\d,]+; it was truncated or appended to"),
    ],
)
def test_a_truncated_file(tmp_path: Path, size: int, message: str) -> None:
    refused(tiny_cache()[:size], tmp_path, message)


@pytest.mark.parametrize("size", [8, 20, 31])
def test_a_file_cut_within_the_preamble_is_said_to_be_cut(tmp_path: Path, size: int) -> None:
    refused(tiny_cache()[:size], tmp_path, f"the file was truncated to {size} bytes; copy it again")


@pytest.mark.parametrize("more", [b"\0", b"x" * 4096, b"a cache"], ids=["1", "page", "twice"])
def test_a_file_that_was_added_to(tmp_path: Path, more: bytes) -> None:
    raw = tiny_cache() + more.replace(b"a cache", tiny_cache())
    refused(
        raw,
        tmp_path,
        f"the file has {len(raw):,} bytes, its header says .* truncated or appended to",
    )


def plain_hdf5() -> bytes:
    with io.BytesIO() as file:
        with h5py.File(file, "w") as group:
            group["log_probs"] = np.zeros((4, 3), np.float16)
        return file.getvalue()


def archive(save: Callable[..., None]) -> bytes:
    with io.BytesIO() as file:
        save(file, np.zeros(3))
        return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the file is empty, not a cache; make one with softcache dump"),
        (plain_hdf5(), "an HDF5 file, but not a softcache cache; make one with softcache dump"),
        (archive(np.savez), "a zip archive .*, not a cache; make one with softcache dump"),
        (archive(np.save), "an npy file, not a cache; make one with softcache dump"),
        (gzip.compress(b"x"), "a gzip file, not a cache; make one with softcache dump"),
        (b"\x80\x04pickle", "a file that begins with 8004[0-9a-f]+, not a cache; make one"),
        (b"\x1b[2Jtext", "a file that begins with 1b5b324a[0-9a-f]+, not a cache; make one"),
        (bytes(100_000), "a file that begins with 0000000000000000, not a cache; make one"),
    ],
    ids=["empty", "hdf5", "npz", "npy", "gzip", "pickle", "text", "zeros"],
)
def test_a_file_of_another_kind(tmp_path: Path, raw: bytes, message: str) -> None:
    refused(raw, tmp_path, message)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none.h5: No such file or directory; expected a cache"):
        open_cache(tmp_path / "none.h5")


@pytest.mark.parametrize("kind", ["folder", "device", "pipe", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "special"
    message = f"this is a {kind}, not a file; give a cache made by softcache dump"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mknod(path, 0o140644)  # S_IFSOCK
        message = "No such device or address; expected a cache"
    # in a separate process with a timeout, since waiting on a pipe would never return
    code = f"from softcache.cache import open_cache; open_cache({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"softcache.errors.FormatError: {path}: {message}"
    )


# many small changes
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 511, 512, 65536, 1 << 31, 1 << 32, 1 << 48, 1 << 60,
    1 << 63, 1 << 64, 10**300, -(10**300), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, "", " ", "rows",
    "samples", "shared", "commits", "labels", "dense", "|S1", "|S0", "|S9999", "<f2", "<f8", ">f2",
    "\0", "\ud800", "\u0660", "x" * 5000, "../x", "/", [], [0], [[]], [1, 0], [None], ["x"], [1] * 9,
    [1 << 48] * 8, {}, {"": {}}, {"name": "dense"}, {"name": None}, {"__class__": "x"}, {"a": {"b": [{}]}},
]  # fmt: skip


def places(value: object, prefix: Place = ()) -> list[Place]:
    """The path to every value in a header."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [prefix, *(p for key, child in children for p in places(child, (*prefix, key)))]


def mutated_fields(random: np.random.Generator, fields: JSON) -> JSON:
    """A header with one to three values replaced, moved, duplicated or deleted."""
    fields = copy.deepcopy(fields)
    for _ in range(random.integers(1, 4)):
        paths = [place for place in places(fields) if place]
        place, other = (paths[i] for i in random.integers(0, len(paths), 2))
        parent: Any = fields
        for step in place[:-1]:
            parent = parent[step]
        last, kind = place[-1], random.integers(0, 6)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[int(last)]))
        elif kind == 2:  # a value from elsewhere in the header
            value: Any = fields
            for step in other:
                value = value[step]
            parent[last] = copy.deepcopy(value)
        elif kind == 3 and type(parent[last]) is int:
            parent[last] += int(random.choice([-1, 1, 8, -8, 4096, 1 << 40]))
        else:
            parent[last] = copy.deepcopy(VALUES[random.integers(len(VALUES))])
    return fields


def mutated_text(random: np.random.Generator, text: bytes) -> bytes:
    """JSON with a few bytes changed, deleted, duplicated, or copied from elsewhere in it."""
    for _ in range(random.integers(1, 4)):
        at, other = (int(i) for i in random.integers(0, len(text), 2))
        count = int(random.integers(1, 9))
        piece = [
            bytes([text[at] ^ 1 << int(random.integers(8))]),
            random.bytes(1),
            b"",
            text[at : at + count] * 2,
            text[other : other + count],
            random.choice([b"[", b"{", b'"', b"\\", b",", b":", b"1e999", b"NaN", b"-", b"9" * 30]),
        ][random.integers(6)]
        text = text[:at] + piece + text[at + (count if not piece else 1) :]
    return text


def survivors(folder: Path, count: int, seed: int) -> int:
    """How many of `count` mutated headers, each with a valid digest, are accepted.

    Any exception but FormatError, in opening or in reading the cache, propagates.
    """
    random = np.random.default_rng(seed)
    fields, path, accepted = header_of(tiny_cache()), folder / "mutated.h5", 0
    messages = []
    text = json.dumps(fields).encode()
    path.write_bytes(tiny_cache())
    for _ in range(count):
        if random.random() < 0.6:
            new = json.dumps(mutated_fields(random, fields)).encode()
        else:
            new = mutated_text(random, text)
        with path.open("r+b") as file:
            file.write(preamble(PREAMBLE.size, new) + new.ljust(len(text) + 20_000, b"\0"))
        try:
            cache = open_cache(path, unfinished=True)
        except FormatError as error:
            messages.append(str(error))
            continue
        accepted += 1
        find_damage(cache)
        try:
            rows = cache.rows(0, np.arange(cache.header.samples))
            assert rows.shape[0] == cache.header.samples
        except FormatError as error:  # with another encoding, the same bytes may be no distribution
            messages.append(str(error))
        assert len(cache.class_names) == cache.header.classes
    assert all(message.isprintable() for message in messages)
    return accepted


def test_a_mutated_header_raises_nothing_but_a_format_error(tmp_path: Path) -> None:
    accepted = survivors(tmp_path, 2000, seed=0)
    assert 20 < accepted < 1000, "the mutations are too strong, or nothing is checked"


def test_that_campaign_notices_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a reader that trusts the type of a field, the kind of mistake that the campaign must find
    monkeypatch.setattr("softcache.cache.header.text_of", lambda fields, name: fields[name].strip())
    with pytest.raises((AttributeError, TypeError), match=r"strip|unhashable|isidentifier"):
        survivors(tmp_path, 300, seed=0)
