"""Caches that earlier releases wrote are read for ever after."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash

from softcache.cache import Cache, Sampled, open_cache
from softcache.cache.header import PREAMBLE, preamble
from softcache.cache.reader import verify
from softcache.errors import FormatError
from softcache.info import describe
from softcache.targets import soft_targets, to_dense
from tests.files.make import ENCODINGS, OTHER_TEMPERATURE, expected

FOLDER = Path(__file__).parent.parent / "files"
FILES = sorted(FOLDER.glob("*/*.h5"))


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_every_encoding_is_there() -> None:
    names = {path.stem for path in FILES if path.parent.name == "1.0"}
    assert names == {*ENCODINGS, "two-teachers", "unlabelled"}
    assert {
        open_cache(FOLDER / "1.0" / f"{name}.h5").header.encoding.name for name in ENCODINGS
    } == {*ENCODINGS}


def test_it_is_whole_and_the_one_that_was_written(path: Path) -> None:
    cache = open_cache(path)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert verify(cache) == []
    assert cache.content_id() == facts["content_id"]
    assert cache.header.samples == facts["samples"]
    assert cache.header.version == tuple(map(int, path.parent.name.split(".")))
    assert facts["content_id"] in describe(cache)


def test_its_rows_decode_to_what_they_did(path: Path) -> None:
    found = expected(open_cache(path))
    with np.load(path.with_suffix(".npz")) as then:
        assert set(then) == set(found)
        for name, values in found.items():
            np.testing.assert_allclose(values, then[name], rtol=1e-5, atol=1e-5)


def test_its_rows_decode_to_the_same_in_torch(path: Path) -> None:
    cache = open_cache(path)
    with np.load(path.with_suffix(".npz")) as then:
        check_torch(cache, cache.header.temperature, then["rows"])
        if not isinstance(cache.header.encoding, Sampled):
            check_torch(cache, OTHER_TEMPERATURE, then["other"])


def check_torch(cache: Cache, temperature: float, rows: np.ndarray) -> None:
    fetch = soft_targets(cache, temperature, torch.device("cpu"))
    for view, then in enumerate(rows):
        now = to_dense(fetch(view, np.arange(cache.header.samples)))
        np.testing.assert_allclose(now.numpy(), then, rtol=1e-4, atol=1e-4)


def test_hdf5_reads_the_same_arrays(path: Path) -> None:
    cache = open_cache(path)
    with h5py.File(path) as file:
        assert set(file) == set(cache.arrays)
        for name, values in cache.arrays.items():
            np.testing.assert_array_equal(file[name][()], values)


def rewritten(path: Path, folder: Path, **changes: object) -> Path:
    """A copy with another header of the same length or less, and its digest."""
    raw = bytearray(path.read_bytes())
    _, offset, length, _ = PREAMBLE.unpack(raw[: PREAMBLE.size])
    fields = json.loads(raw[offset : offset + length]) | changes
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
    raw[offset : offset + max(length, len(text))] = text.ljust(length, b"\0")
    raw[: PREAMBLE.size] = preamble(offset, text)
    assert PREAMBLE.unpack(raw[: PREAMBLE.size])[3] == xxhash.xxh3_64_intdigest(text)
    copy = folder / path.name
    copy.write_bytes(raw)
    return copy


def test_a_newer_major_version_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"format version 2\.0, this softcache reads 1\.x; update"
    ):
        open_cache(rewritten(path, tmp_path, version=[2, 0]))


def test_an_older_major_version_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"format version 0\.9, .* reads 1\.x; dump it again"):
        open_cache(rewritten(path, tmp_path, version=[0, 9]))


def test_a_newer_minor_version_with_news_is_read(path: Path, tmp_path: Path) -> None:
    found = open_cache(rewritten(path, tmp_path, version=[1, 7], a_field_of_tomorrow=[1, 2]))
    np.testing.assert_array_equal(found.keys, open_cache(path).keys)


def test_unknown_fields_of_todays_version_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown fields: 'a_field_of_tomorrow'"):
        open_cache(rewritten(path, tmp_path, a_field_of_tomorrow=1))


def test_a_feature_that_must_be_understood_is_refused(path: Path, tmp_path: Path) -> None:
    changes = {"version": [1, 7], "must_understand": ["delta"]}
    with pytest.raises(FormatError, match=r"needs features .* does not know: 'delta'; update"):
        open_cache(rewritten(path, tmp_path, **changes))
