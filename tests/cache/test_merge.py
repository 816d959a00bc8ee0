"""Parts of one dump become one file: the same rows as a dump of all of it, or a refusal by name."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softcache.cache import Cache, open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.merge import merge
from softcache.cache.reader import partial_path, verify
from softcache.cache.writer import digest_offset
from softcache.dump import DumpConfig, dump
from softcache.errors import FormatError, SettingsError
from tests.conftest import Run, make_arrays

SAMPLES = 60
Part = Callable[..., Cache]


@pytest.fixture
def config(teacher_file: Path, tmp_path: Path) -> DumpConfig:
    images, labels = make_arrays(SAMPLES)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    return DumpConfig(
        teacher=f"{teacher_file}:teacher",
        data=f"npz:{tmp_path / 'data.npz'}",
        temperature=2.0,
        views=4,
        augment="shift:1,mixup",
        seed=3,
        out=tmp_path / "whole.h5",
        batch_size=16,
    )


@pytest.fixture
def part(config: DumpConfig, monkeypatch: pytest.MonkeyPatch) -> Part:
    """Dump a part into a file of its own, in blocks of a few rows that no part ends with."""
    monkeypatch.setattr(cache_writer, "BLOCK_BYTES", 70)

    def part(name: str, **changes: object) -> Cache:
        return dump(replace(config, out=config.out.with_name(f"{name}.h5"), **changes))  # type: ignore[arg-type]

    return part


def views(first: int, stop: int) -> dict[str, int]:
    return {"first_view": first, "views": stop - first}


def check_same(found: Cache, whole: Cache) -> None:
    """All that is stored by row or by sample is the same, and so are rows' fingerprints."""
    for array in whole.header.arrays:
        if array.axis in ("rows", "samples"):
            np.testing.assert_array_equal(found.arrays[array.name], whole.arrays[array.name])
    for name in ("views", "samples", "first_view", "first_sample", "data_samples", "encoding"):
        assert getattr(found.header, name) == getattr(whole.header, name)
    np.testing.assert_array_equal(found.arrays["digests"], whole.arrays["digests"])
    assert verify(found) == []
    assert found.complete


def test_views_become_one_file(part: Part, tmp_path: Path) -> None:
    parts = [part("b", **views(1, 3)), part("c", **views(3, 4)), part("a", **views(0, 1))]
    found, whole = merge(parts, tmp_path / "merged.h5"), part("whole")
    check_same(found, whole)
    np.testing.assert_array_equal(found.arrays["fingerprints"], whole.arrays["fingerprints"])
    assert (found.header.summary or {})["entropy"] == (whole.header.summary or {})["entropy"]


def test_shards_become_one_file(part: Part, tmp_path: Path) -> None:
    parts = [part(f"shard{i}", shard=(i, 7)) for i in (3, 0, 6, 1, 5, 2, 4)]
    check_same(merge(parts, tmp_path / "merged.h5"), part("whole"))


def test_a_grid_of_both_becomes_one_file(part: Part, tmp_path: Path) -> None:
    parts = [
        part(f"{i}-{first}", shard=(i, 2), **views(first, first + 2))
        for first in (2, 0)
        for i in (1, 0)
    ]
    check_same(merge(parts, tmp_path / "merged.h5"), part("whole"))


def test_parts_that_do_not_begin_at_the_first_keep_their_numbers(
    part: Part, tmp_path: Path
) -> None:
    parts = [part(f"{v}", shard=(1, 2), **views(v, v + 1)) for v in (5, 6)]
    check_same(merge(parts, tmp_path / "merged.h5"), part("whole", shard=(1, 2), **views(5, 7)))


@pytest.mark.parametrize("encoding", ["quantized", "topk:2", "basis:4,2", "sampled:8", "auto"])
def test_every_encoding_can_be_merged(encoding: str, part: Part, tmp_path: Path) -> None:
    parts = [
        part("a", encoding=encoding, shard=(0, 2), views=2),
        part("b", encoding=encoding, shard=(1, 2), views=2),
    ]
    check_same(merge(parts, tmp_path / "merged.h5"), part("whole", encoding=encoding, views=2))


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shards=st.integers(1, 5), cuts=st.sets(st.integers(1, 3), max_size=3), order=st.randoms())
def test_any_cuts_come_to_the_same(
    shards: int, cuts: set[int], order: st.DataObject, part: Part, tmp_path: Path
) -> None:
    edges = [0, *sorted(cuts), 4]
    for old in tmp_path.glob("*.h5*"):
        old.unlink()
    parts = [
        part(f"{i}-{first}", shard=(i, shards), **views(first, stop))
        for i in range(shards)
        for first, stop in pairwise(edges)
    ]
    order.shuffle(parts)  # type: ignore[attr-defined]
    if len(parts) > 1:
        check_same(merge(parts, tmp_path / "merged.h5"), part("whole"))


def test_a_merged_file_says_how_far_its_parts_are_from_the_teacher(
    part: Part, tmp_path: Path
) -> None:
    parts = [part(f"shard{i}", shard=(i, 2), encoding="quantized") for i in range(2)]
    known = [(one.header.summary or {})["fidelity"] for one in parts]
    found = (merge(parts, tmp_path / "merged.h5").header.summary or {})["fidelity"]
    assert found["worst"] == max(one["worst"] for one in known)
    assert found["rows"] == sum(one["rows"] for one in known)
    assert found["mean"] == pytest.approx(np.mean([one["mean"] for one in known]))


DIFFERENT = {
    "temperature": ({"temperature": 4.0}, r"b\.h5 has temperature 4\.0, \S*a\.h5 has 2\.0"),
    "seed": ({"seed": 4}, r"b\.h5 has seed 4, \S*a\.h5 has 3"),
    "augment": ({"augment": "shift:2"}, r"has augment shift:2, \S*a\.h5 has shift:1,mixup"),
    "encoding": ({"encoding": "quantized"}, r"has encoding Quantized\(\), .* has Dense\(\)"),
    "precision": ({"precision": "bf16"}, "has precision bf16, .* has fp32"),
    "overlapping views": (views(1, 3), "views 0 to 1, .* 1 to 2: these overlap"),
    "a gap in the views": (views(3, 4), "views 0 to 1, .* 3 to 3: views 2 to 2 are missing"),
    "the same views": (views(0, 2), "views 0 to 1, .* 0 to 1: these overlap"),
    "other samples": (
        views(0, 2) | {"shard": (1, 2)},
        "samples 0 to 59, .* 30 to 59: these overlap",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_does_not_fit_is_named(kind: str, part: Part, tmp_path: Path) -> None:
    changes, message = DIFFERENT[kind]
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4) | changes)]  # type: ignore[operator]
    with pytest.raises(SettingsError, match=message):
        merge(parts, tmp_path / "merged.h5")
    assert not list(tmp_path.glob("merged*"))


def test_a_gap_in_the_samples_is_named(part: Part, tmp_path: Path) -> None:
    parts = [part(f"shard{i}", shard=(i, 3)) for i in (0, 2)]
    with pytest.raises(
        SettingsError, match=r"samples 0 to 19, .* 40 to 59: samples 20 to 39 are mis"
    ):
        merge(parts, tmp_path / "merged.h5")


def test_shards_of_different_views_are_refused(part: Part, tmp_path: Path) -> None:
    parts = [part("a", shard=(0, 2), views=2), part("b", shard=(1, 2), views=3)]
    with pytest.raises(SettingsError, match=r"b\.h5 .* views 0 to 2, \S*a\.h5 .* 0 to 1; all need"):
        merge(parts, tmp_path / "merged.h5")


def test_other_data_are_refused_by_their_first_sample(
    part: Part, config: DumpConfig, tmp_path: Path
) -> None:
    one = part("a", **views(0, 2))
    images, labels = make_arrays(SAMPLES)
    images[7] ^= 1
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    two = part("b", **views(2, 4))
    with pytest.raises(SettingsError, match=r"differ in the keys of sample 7; .* other data"):
        merge([one, two], tmp_path / "merged.h5")


def test_another_teacher_is_refused(part: Part, config: DumpConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        Path(str(config.teacher).split(":")[0]).read_text().replace("seed(7)", "seed(8)")
    )
    parts = [part("a", **views(0, 2)), part("b", teacher=f"{other}:teacher", **views(2, 4))]
    with pytest.raises(SettingsError, match=r"b\.h5 has teachers .*other\.py"):
        merge(parts, tmp_path / "merged.h5")


def test_a_basis_fitted_apart_is_refused_with_advice_that_helps(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = part("a", encoding="basis:4,2", shard=(0, 2))
    monkeypatch.setattr("softcache.choose.FIT_VIEWS", 2)  # as another machine's rounding might
    two = part("b", encoding="basis:4,2", shard=(1, 2))
    with pytest.raises(
        SettingsError, match=r"differ in mean, .* dump the one again with --like a\.h5"
    ):
        merge([one, two], tmp_path / "merged.h5")
    again = part("again", encoding="basis:4,2", shard=(1, 2), like=one.path)
    assert merge([one, again], tmp_path / "merged.h5").complete


def test_one_cache_is_nothing_to_merge(part: Part, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="1 cache to merge; give two or more"):
        merge([part("a")], tmp_path / "merged.h5")


def test_no_file_is_written_over(part: Part, tmp_path: Path) -> None:
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    with pytest.raises(SettingsError, match=r"a\.h5 is itself to be merged; give another --out"):
        merge(parts, parts[0].path)
    (tmp_path / "there.h5").write_text("mine")
    with pytest.raises(SettingsError, match=r"there\.h5 is there already; give another --out"):
        merge(parts, tmp_path / "there.h5")
    (tmp_path / "dump.h5.partial").write_bytes(part("whole").path.read_bytes())
    with pytest.raises(SettingsError, match=r"dump\.h5\.partial is in the way: it was begun by"):
        merge([part("c", shard=(0, 2)), part("d", shard=(1, 2), seed=3)], tmp_path / "dump.h5")


def damaged(cache: Cache, offset: int) -> Cache:
    raw = bytearray(cache.path.read_bytes())
    raw[offset] ^= 1
    cache.path.write_bytes(raw)
    return open_cache(cache.path)


def test_a_damaged_part_is_named_and_nothing_is_finished(part: Part, tmp_path: Path) -> None:
    one, two = part("a", **views(0, 2)), part("b", **views(2, 4))
    array = two.header.array("log_probs")
    row = two.header.samples + two.header.block_rows  # the second block of the part's second view
    bad = damaged(two, array.offset + row * array.row_bytes)
    samples = two.header.block_range(1)
    message = rf"b\.h5 is damaged: soft targets of samples {samples.start} to {samples.stop - 1} in view 1"
    with pytest.raises(FormatError, match=message):
        merge([one, bad], tmp_path / "merged.h5")
    assert not (tmp_path / "merged.h5").exists()


def test_damage_to_what_all_rows_share_is_named(part: Part, tmp_path: Path) -> None:
    one, two = part("a", **views(0, 2)), part("b", **views(2, 4))
    bad = damaged(two, two.header.array("class_names").offset)
    with pytest.raises(FormatError, match=r"b\.h5 is damaged: the arrays shared by all rows"):
        merge([one, bad], tmp_path / "merged.h5")


def test_a_stopped_merge_goes_on(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    expected = merge(parts, tmp_path / "merged.h5").path.read_bytes()
    rows = 0

    def stop(count: int) -> None:
        nonlocal rows
        rows += count
        if rows > 2.5 * SAMPLES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=""):
        merge(parts, tmp_path / "again.h5", stop)
    partial = open_cache(partial_path(tmp_path / "again.h5"), unfinished=True)
    assert (partial.arrays["digests"][:2] != 0).all()
    # a block that is there already is not copied again: its source may be gone by now
    digest = digest_offset(parts[0].header, 0, 0)
    gone = damaged(parts[0], digest)
    assert merge([gone, parts[1]], tmp_path / "again.h5").path.read_bytes() == expected


def test_a_killed_merge_goes_on(part: Part, tmp_path: Path, run: Run) -> None:
    parts = [part(f"shard{i}", shard=(i, 3)).path for i in range(3)]
    run("merge", *parts, "--out", "undisturbed.h5", check=True)
    expected = (tmp_path / "undisturbed.h5").read_bytes()
    command = [sys.executable, "-m", "softcache", "merge", *map(str, parts), "--out", "merged.h5"]
    for wait in (0.1, 0.25, 0.4):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (tmp_path / "merged.h5").unlink(missing_ok=True)  # it may have been done before
    found = run("merge", *parts, "--out", "merged.h5")
    assert found.returncode == 0, found.stderr
    assert "60 samples x 4 view(s)" in found.stdout
    assert (tmp_path / "merged.h5").read_bytes() == expected


def test_a_merged_file_is_used_as_any_other(
    part: Part, config: DumpConfig, tmp_path: Path, run: Run
) -> None:
    parts = [part(f"shard{i}", shard=(i, 2), views=2).path for i in range(2)]
    run("merge", *parts, "--out", "merged.h5", check=True)
    assert "intact" in run("verify", "merged.h5", check=True).stdout
    train = ["train", "merged.h5", "--student", "mlp:4", "--data", config.data, "--epochs", "1"]
    run(*train, "--out", "run", check=True)
    extended = dump(replace(config, out=tmp_path / "merged.h5"))
    np.testing.assert_array_equal(extended.arrays["log_probs"], part("whole").arrays["log_probs"])


def test_a_bad_command_is_one_line(run: Run, tmp_path: Path) -> None:
    found = run("merge", "none.h5", "neither.h5", "--out", "c.h5")
    assert found.returncode != 0
    assert found.stderr.count("\n") == 1
    assert "none.h5: No such file or directory" in found.stderr
