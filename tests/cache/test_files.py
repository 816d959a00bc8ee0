"""Caches written by earlier releases stay readable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash

from softcache.cache import Cache, Sampled, open_cache
from softcache.cache.header import PREAMBLE, preamble
from softcache.cache.verify import find_damage
from softcache.errors import FormatError
from softcache.files.describe import describe, facts
from softcache.targets.decode import to_dense
from softcache.targets.fetch import soft_targets
from tests.files import make
from tests.files.make import ENCODINGS, OTHER_TEMPERATURE, expected

FOLDER = Path(__file__).parent.parent / "files"
FILES = sorted(FOLDER.glob("*/*.h5"))


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def written(path: Path) -> dict[str, Any]:
    """The facts recorded when the file was made."""
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return record


def test_every_encoding_is_there() -> None:
    names = {path.stem for path in FILES if path.parent.name == "1.0"}
    assert names == {*ENCODINGS, "two-teachers", "unlabelled"}
    assert {
        open_cache(FOLDER / "1.0" / f"{name}.h5").header.encoding.name for name in ENCODINGS
    } == {*ENCODINGS}


def test_it_is_whole_and_the_one_that_was_written(path: Path) -> None:
    cache, record = open_cache(path), written(path)
    assert find_damage(cache) == []
    assert cache.content_id() == record["content_id"]
    assert cache.header.samples == record["samples"]
    assert cache.header.version == tuple(map(int, path.parent.name.split(".")))


def test_info_says_what_it_is(path: Path) -> None:
    cache = open_cache(path)
    assert f"format {path.parent.name}" in describe(cache)
    assert written(path)["content_id"] in describe(cache)
    assert json.loads(json.dumps(facts(cache)))["content_id"] == written(path)["content_id"]


def test_a_byte_that_changed_would_be_noticed(path: Path, tmp_path: Path) -> None:
    header, copy = open_cache(path).header, tmp_path / path.name
    for array in header.arrays:
        raw = bytearray(path.read_bytes())
        raw[array.offset + array.nbytes - 1] ^= 1
        copy.write_bytes(raw)
        damaged = open_cache(copy)
        assert len(find_damage(damaged)) == 1
        changed = damaged.content_id() != written(path)["content_id"]
        assert changed == (array.axis == "commits")  # it covers the digests, and they the rest


def check_rows(cache: Cache, path: Path) -> None:
    """Rows, labels and keys are the ones stored beside the file."""
    arrays = expected(cache)
    with np.load(path.with_suffix(".npz")) as recorded:
        assert set(recorded) == set(arrays)
        for name, values in arrays.items():
            tolerance = 1e-5 if name in ("rows", "other", "inputs") else 0
            np.testing.assert_allclose(values, recorded[name], rtol=tolerance, atol=tolerance)
        if cache.header.multi_label:
            return  # log-odds of each class on its own
        mass = np.exp(recorded["rows"].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mass, 1, rtol=1e-5)


def test_its_rows_decode_to_what_they_did(path: Path) -> None:
    check_rows(open_cache(path), path)


@pytest.mark.parametrize("names", [("log_probs",), ("labels", "keys")])
def test_that_check_notices_two_rows_that_changed_places(
    names: tuple[str, ...], path: Path
) -> None:
    cache = open_cache(path)
    rolled = {
        a.name: np.roll(cache.arrays[a.name], 1, 1 if a.axis == "rows" else 0)
        for a in cache.header.arrays
        if a.name in names or (a.axis == "rows" and "log_probs" in names)
    }
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_rows(replace(cache, arrays=dict(cache.arrays) | rolled), path)


def test_its_rows_decode_to_the_same_in_torch(path: Path) -> None:
    cache = open_cache(path)
    with np.load(path.with_suffix(".npz")) as recorded:
        check_torch(cache, cache.header.temperature, recorded["rows"])
        if not isinstance(cache.header.encoding, Sampled):
            check_torch(cache, OTHER_TEMPERATURE, recorded["other"])


def check_torch(cache: Cache, temperature: float, rows: np.ndarray) -> None:
    fetch = soft_targets(cache, temperature, torch.device("cpu"))
    for view, expected_rows in enumerate(rows):
        decoded = to_dense(fetch(view, np.arange(cache.header.row_count)))
        np.testing.assert_allclose(decoded.numpy(), expected_rows, rtol=1e-4, atol=1e-4)


def test_hdf5_reads_the_same_arrays(path: Path) -> None:
    cache = open_cache(path)
    with h5py.File(path) as file:
        assert set(file) == set(cache.arrays)
        for name, values in cache.arrays.items():
            np.testing.assert_array_equal(file[name][()], values)


def rewritten(path: Path, folder: Path, **changes: object) -> Path:
    """A copy with changes in its header, and a matching digest."""
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
    cache = open_cache(rewritten(path, tmp_path, version=[1, 7], a_field_of_tomorrow=[1, 2]))
    assert cache.header.version == (1, 7)
    check_rows(cache, path)
    assert find_damage(cache) == []


def test_unknown_fields_of_todays_version_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown fields: 'a_field_of_tomorrow'"):
        open_cache(rewritten(path, tmp_path, a_field_of_tomorrow=1))


def test_a_feature_that_must_be_understood_is_refused(path: Path, tmp_path: Path) -> None:
    changes = {"version": [1, 7], "must_understand": ["delta"]}
    with pytest.raises(FormatError, match=r"needs features .* does not know: 'delta'; update"):
        open_cache(rewritten(path, tmp_path, **changes))


def test_files_of_a_release_are_never_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in FOLDER.glob("*/*")}
    make.main()
    output = capsys.readouterr().out
    assert output.count(".h5 exists, and is never rewritten; skipped") == len(FILES)
    assert {path: path.stat().st_mtime_ns for path in FOLDER.glob("*/*")} == before


def test_its_header_would_be_written_again_to_the_byte(path: Path) -> None:
    cache = open_cache(path)
    assert cache.header.to_bytes() == cache.header_bytes
    has_field = b'"rows":{' in cache.header_bytes
    assert has_field == (path.parent.name == "1.3"), "fields of a feature are only where it is"
