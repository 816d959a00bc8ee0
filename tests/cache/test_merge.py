"""Parts of one dump become one file with the same rows as a whole dump, or are refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softcache.cache import Cache, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as cache_writer
from softcache.cache.merge import SETTINGS, merge
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.cache.writer import digest_offset
from softcache.cli.app import main
from softcache.data.augment import parse_augment
from softcache.data.open import open_source
from softcache.dump import select_encoding
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, SettingsError
from softcache.join.fingerprints import fingerprints
from tests.conftest import Run, make_arrays

SAMPLES, BLOCK_ROWS = 60, 8  # a batch is a multiple of a block
Part = Callable[..., Cache]

# exact arithmetic, so that a row is the same in any batch and on any machine
TEACHER = """
import torch
from torch import nn

class Teacher(nn.Module):
    def __init__(self, classes, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randint(-64, 65, (64, classes), generator=generator) / 4096)

    def forward(self, x):
        return (x * 255).round().flatten(1) @ self.weight

def teacher():
    return Teacher(5, 7)

def other():
    return Teacher(5, 8)

def wide():
    return Teacher(6, 7)
"""


def exact_config(folder: Path) -> DumpConfig:
    """A small, reproducible dump of four views."""
    (folder / "models.py").write_text(TEACHER)
    write_data(folder / "data.npz")
    return DumpConfig(
        teacher=f"{folder / 'models.py'}:teacher",
        data=f"npz:{folder / 'data.npz'}",
        temperature=2.0,
        views=4,
        augment="shift:1,mixup",
        seed=3,
        out=folder / "whole.h5",
        batch_size=16,
    )


def write_data(path: Path, *, image: int | None = None, label: int | None = None) -> None:
    """Write the data; `image` and `label` are samples with one pixel or the label changed."""
    images, labels = make_arrays(SAMPLES)
    if image is not None:
        images[image, 0, 0, 0] ^= 255
    if label is not None:
        labels[label] = (labels[label] + 1) % 5
    np.savez(path, x=images, y=labels)


def write_other_data(folder: Path) -> None:
    """Write the data under another name, and fewer samples under the same name."""
    write_data(folder / "copy.npz")
    (folder / "less").mkdir()
    images, labels = make_arrays(SAMPLES - 10)
    np.savez(folder / "less" / "data.npz", x=images, y=labels)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DumpConfig:
    """A dump in small blocks that are committed at once; most parts do not end at the end of a block."""
    monkeypatch.setattr(cache_allocate, "BLOCK_BYTES", 10 * BLOCK_ROWS)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    return exact_config(tmp_path)


@pytest.fixture
def part(config: DumpConfig) -> Part:
    """Dump a part of the whole into its own file."""

    def part(name: str, **changes: object) -> Cache:
        return dump(replace(config, out=config.out.with_name(f"{name}.h5"), **changes))  # type: ignore[arg-type]

    return part


def views(first: int, stop: int) -> dict[str, Any]:
    return {"first_view": first, "views": stop - first}


def check_same(merged: Cache, whole: Cache) -> None:
    """The merged cache is intact, and stores the same as the whole but for the fingerprints."""
    same_blocks = merged.header.block_rows == whole.header.block_rows
    for array in whole.header.arrays:
        if not array.name.startswith("fingerprint") and (same_blocks or array.axis != "commits"):
            np.testing.assert_array_equal(merged.arrays[array.name], whole.arrays[array.name])
    for name in (*SETTINGS, "views", "samples", "first_view", "first_sample"):
        assert getattr(merged.header, name) == getattr(whole.header, name)
    for name in ("entropy", "agreement", "rows"):
        assert (merged.header.summary or {})[name] == (whole.header.summary or {})[name]
    assert find_damage(merged) == []
    assert merged.complete
    assert not partial_path(merged.path).exists()


def check_fingerprints(merged: Cache, config: DumpConfig, parts: Sequence[Cache]) -> None:
    """The merged cache has fingerprints of the same samples as the parts, and they are correct."""
    header = merged.header
    sample_ids = merged.arrays["fingerprinted"] + header.first_sample
    expected_ids = {
        int(cache_row) + cache.header.first_sample
        for cache in parts
        for cache_row in cache.arrays["fingerprinted"]
    }
    assert sample_ids.tolist() == sorted(expected_ids)
    expected, _ = fingerprints(
        open_source(config.data),
        parse_augment(config.augment, seed=config.seed, total=SAMPLES),
        views=range(header.first_view, header.first_view + header.views),
        sample_ids=sample_ids,
    )
    np.testing.assert_allclose(merged.arrays["fingerprints"], expected, rtol=1e-5, atol=1e-6)


# a merged cache is the same as one dump of everything


def test_views_become_one_file(part: Part, config: DumpConfig, tmp_path: Path) -> None:
    parts = [part("b", **views(1, 3)), part("c", **views(3, 4)), part("a", **views(0, 1))]
    merged, whole = merge(parts, tmp_path / "merged.h5"), part("whole")
    check_same(merged, whole)
    check_fingerprints(merged, config, parts)
    for name in ("fingerprinted", "fingerprints"):
        np.testing.assert_array_equal(merged.arrays[name], whole.arrays[name])


def test_shards_become_one_file(part: Part, config: DumpConfig, tmp_path: Path) -> None:
    parts = [part(f"shard{i}", shard=(i, 7)) for i in (3, 0, 6, 1, 5, 2, 4)]
    merged = merge(parts, tmp_path / "merged.h5")
    borders = [cache.header.first_sample % merged.header.block_rows for cache in parts]
    assert borders.count(0) < 3, "most shards start inside a block"
    check_same(merged, part("whole"))
    check_fingerprints(merged, config, parts)


def test_a_grid_of_both_becomes_one_file(part: Part, config: DumpConfig, tmp_path: Path) -> None:
    parts = [
        part(f"{i}-{first}", shard=(i, 2), **views(first, first + 2))
        for first in (2, 0)
        for i in (1, 0)
    ]
    merged = merge(parts, tmp_path / "merged.h5")
    check_same(merged, part("whole"))
    check_fingerprints(merged, config, parts)


def test_parts_that_do_not_begin_at_the_first_keep_their_numbers(
    part: Part, config: DumpConfig, tmp_path: Path
) -> None:
    parts = [part(f"{i}-{v}", shard=(i, 4), **views(v, v + 1)) for v in (6, 5) for i in (2, 3)]
    merged = merge(parts, tmp_path / "merged.h5")
    assert (merged.header.first_view, merged.header.first_sample) == (5, 30)
    assert merged.header.data_samples == SAMPLES
    check_same(merged, part("whole", shard=(1, 2), **views(5, 7)))
    check_fingerprints(merged, config, parts)


def test_what_is_merged_can_be_merged_again(part: Part, config: DumpConfig, tmp_path: Path) -> None:
    parts = [part(f"{i}-{v}", shard=(i, 2), **views(v, v + 2)) for v in (0, 2) for i in (0, 1)]
    halves = [merge(parts[:2], tmp_path / "first.h5"), merge(parts[2:], tmp_path / "second.h5")]
    merged = merge(halves, tmp_path / "merged.h5")
    check_same(merged, part("whole"))
    check_fingerprints(merged, config, parts)


@pytest.mark.parametrize(
    "encoding", ["dense", "quantized", "topk:2", "basis:4,2", "sampled:8", "auto"]
)
def test_every_encoding_can_be_merged(encoding: str, part: Part, tmp_path: Path) -> None:
    parts = [
        part("a", encoding=encoding, shard=(0, 2), views=2),
        part("b", encoding=encoding, shard=(1, 2), views=2),
    ]
    check_same(merge(parts, tmp_path / "merged.h5"), part("whole", encoding=encoding, views=2))


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shards=st.integers(1, 5),
    cuts=st.sets(st.integers(1, 3), max_size=3),
    encoding=st.sampled_from(["dense", "quantized", "topk:2", "sampled:8"]),
    block_bytes=st.sampled_from([10, 80, 1000, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_any_cuts_come_to_the_same(
    shards: int,
    cuts: set[int],
    encoding: str,
    block_bytes: int,
    seed: int,
    part: Part,
    tmp_path: Path,
) -> None:
    for old in tmp_path.glob("*.h5*"):
        old.unlink()
    parts = [
        part(f"{i}-{first}", shard=(i, shards), encoding=encoding, **views(first, stop))
        for i in range(shards)
        for first, stop in pairwise([0, *sorted(cuts), 4])
    ]
    if len(parts) == 1:
        return
    random.Random(seed).shuffle(parts)
    with pytest.MonkeyPatch.context() as patch:  # does not affect the blocks of the parts
        patch.setattr(cache_allocate, "BLOCK_BYTES", block_bytes)
        check_same(merge(parts, tmp_path / "merged.h5"), part("whole", encoding=encoding))


@pytest.mark.parametrize("name", ["log_probs", "keys", "labels", "class_names", "digests"])
def test_that_check_notices_two_rows_that_changed_places(name: str, part: Part) -> None:
    whole = part("whole")
    check_same(whole, whole)
    swapped = np.array(whole.arrays[name])
    rows = swapped[0] if name in ("log_probs", "digests") else swapped
    other = next(i for i in range(1, len(rows)) if np.any(rows[i] != rows[0]))
    rows[[0, other]] = rows[[other, 0]]
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_same(replace(whole, arrays=dict(whole.arrays) | {name: swapped}), whole)


def test_that_check_notices_fingerprints_of_another_view(part: Part, config: DumpConfig) -> None:
    whole = part("whole")
    check_fingerprints(whole, config, [whole])
    rolled = np.roll(whole.arrays["fingerprints"], 1, 0)
    wrong = replace(whole, arrays=dict(whole.arrays) | {"fingerprints": rolled})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_fingerprints(wrong, config, [whole])


# refusals

# for every setting that the parts must agree in, except `positions`, which no dump uses
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "npz:copy.npz"}, r"b\.h5 has data npz:copy\.npz\S*, \S*a\.h5 has npz:data\."),
    "data_samples": ({"data": "npz:less/data.npz"}, r"has data_samples 50, \S*a\.h5 has 60"),
    "classes": ({"teacher": "models.py:wide"}, r"has classes 6, \S*a\.h5 has 5"),
    "teachers": ({"teacher": "models.py:other"}, r"has teachers .*models\.py:other.*, \S*a\.h5 has"),
    "temperature": ({"temperature": 4.0}, r"b\.h5 has temperature 4\.0, \S*a\.h5 has 2\.0"),
    "precision": ({"precision": "bf16"}, r"has precision bf16, \S*a\.h5 has fp32"),
    "encoding": ({"encoding": "quantized"}, r"has encoding Quantized\(\), \S*a\.h5 has Dense\(\)"),
    "augment": ({"augment": "shift:2"}, r"has augment shift:2, \S*a\.h5 has shift:1,mixup"),
    "must_understand": ({"embed_inputs": True}, r"has must_understand \('inputs',\), .* has \(\)"),
    "seed": ({"seed": 4}, r"b\.h5 has seed 4, \S*a\.h5 has 3; only parts of one dump can be merged"),
    "weights of teachers": (
        {"teacher": ["models.py:teacher", "models.py:other"], "teacher_weight": [3, 1]},
        "has teachers .*'weight': 0.75",
    ),
    "overlapping views": (views(1, 3), "views 0 to 1, .* 1 to 2: these overlap; the parts must meet"),
    "a gap in the views": (views(3, 4), "views 0 to 1, .* 3 to 3: views 2 to 2 are missing; the p"),
    "the same views": (views(0, 2), "views 0 to 1, .* 0 to 1: these overlap"),
    "overlapping samples": (
        views(0, 2) | {"shard": (1, 2)},
        "samples 0 to 59, .* 30 to 59: these overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_does_not_fit_is_named(
    kind: str, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_other_data(tmp_path)
    changes, message = DIFFERENT[kind]
    monkeypatch.chdir(tmp_path)
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4) | changes)]
    with pytest.raises(SettingsError, match=message):
        merge(parts, tmp_path / "merged.h5")
    assert not list(tmp_path.glob("merged*"))


def test_every_setting_that_decides_the_rows_has_its_refusal() -> None:
    assert set(SETTINGS) - {"positions"} <= set(DIFFERENT)


def test_a_gap_in_the_samples_is_named(part: Part, tmp_path: Path) -> None:
    parts = [part(f"shard{i}", shard=(i, 3)) for i in (0, 2)]
    message = r"samples 0 to 19, .* 40 to 59: samples 20 to 39 are missing; the parts must meet"
    with pytest.raises(SettingsError, match=message):
        merge(parts, tmp_path / "merged.h5")


def test_shards_of_different_views_are_refused(part: Part, tmp_path: Path) -> None:
    parts = [part("a", shard=(0, 2), views=2), part("b", shard=(1, 2), views=3)]
    with pytest.raises(
        SettingsError, match=r"b\.h5 .* views 0 to 2, but \S*a\.h5 .* 0 to 1; all shards need"
    ):
        merge(parts, tmp_path / "merged.h5")


@pytest.mark.parametrize(("changed", "named"), [({"image": 37}, "keys"), ({"label": 37}, "labels")])
def test_other_data_are_refused_by_their_first_sample(
    changed: dict[str, int], named: str, part: Part, tmp_path: Path
) -> None:
    first = part("a", shard=(1, 2), **views(0, 2))
    write_data(tmp_path / "data.npz", **changed)
    second = part("b", shard=(1, 2), **views(2, 4))
    message = rf"b\.h5 and \S*a\.h5 differ in the {named} of sample 37; .* from different data"
    with pytest.raises(SettingsError, match=message):
        merge([first, second], tmp_path / "merged.h5")


def test_a_basis_fitted_apart_is_refused_with_advice_that_helps(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = part("a", encoding="basis:4,2", shard=(0, 2))
    monkeypatch.setattr(select_encoding, "FIT_VIEWS", 2)  # gives another basis
    second = part("b", encoding="basis:4,2", shard=(1, 2))
    message = r"b\.h5 and \S*a\.h5 differ in mean, .*; dump b\.h5 again with --like a\.h5"
    with pytest.raises(SettingsError, match=message):
        merge([first, second], tmp_path / "merged.h5")
    again = part("again", encoding="basis:4,2", shard=(1, 2), like=first.path)
    merged = merge([first, again], tmp_path / "merged.h5")
    monkeypatch.undo()
    monkeypatch.setattr(cache_allocate, "BLOCK_BYTES", 10 * BLOCK_ROWS)
    np.testing.assert_array_equal(
        merged.arrays["codes"], part("whole", encoding="basis:4,2").arrays["codes"]
    )


def test_one_cache_is_nothing_to_merge(part: Part, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="1 cache to merge; give two or more"):
        merge([part("a")], tmp_path / "merged.h5")


def test_no_file_is_written_over(part: Part, tmp_path: Path) -> None:
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    before = parts[0].path.read_bytes()
    (tmp_path / "there.h5").write_text("mine")
    (tmp_path / "link.h5").symlink_to(parts[0].path)
    for name in ("a.h5", "link.h5"):
        with pytest.raises(
            SettingsError, match=f"{name} is one of the caches to merge; give another --o"
        ):
            merge(parts, tmp_path / name)
    with pytest.raises(
        SettingsError, match=r"there\.h5 already exists, and is not these caches merged"
    ):
        merge(parts, tmp_path / "there.h5")
    assert (tmp_path / "there.h5").read_text() == "mine"
    assert parts[0].path.read_bytes() == before


def test_a_finished_merge_is_left_alone(
    part: Part, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    out = tmp_path / "merged.h5"
    merged = merge(parts, out)
    before = out.stat()
    again = merge(parts[::-1], out)
    assert again.content_id() == merged.content_id()
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "is already complete; nothing to do" in capsys.readouterr().out
    # one row of a part differs: the merged file is not of these parts
    raw = bytearray(parts[0].path.read_bytes())
    raw[parts[0].header.array("log_probs").offset] ^= 1
    parts[0].path.write_bytes(raw)
    with pytest.raises(SettingsError, match="already exists, and is not these caches merged"):
        merge([open_cache(parts[0].path), parts[1]], out)


@pytest.mark.parametrize("changes", [{"seed": 4}, {"views": 3}, {"shard": (0, 2)}])
def test_a_partial_of_something_else_is_in_the_way(
    changes: dict[str, Any], part: Part, tmp_path: Path
) -> None:
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    partial = tmp_path / "merged.h5.partial"
    part("other", **changes).path.rename(partial)
    before = partial.read_bytes()
    with pytest.raises(
        SettingsError, match=r"merged\.h5\.partial is in the way: it was started with other"
    ):
        merge(parts, tmp_path / "merged.h5")
    assert partial.read_bytes() == before


def test_a_partial_of_other_rows_is_refused(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same settings, but other rows, as another machine's rounding can produce."""
    parts = stopped_merge(part, tmp_path, monkeypatch)
    array = parts[0].header.array("log_probs")
    other = damaged(parts[0], array.offset)
    digest = other.block_digest(0, 0).to_bytes(8, "little")
    other = damaged(other, digest_offset(other.header, 0, 0), digest)
    message = r"merged\.h5\.partial has other log_probs of rows 0 to 7 than .*a\.h5: .*remove it"
    with pytest.raises(SettingsError, match=message):
        merge([other, parts[1]], tmp_path / "merged.h5")


def test_a_part_that_was_damaged_after_it_was_copied_stops_nothing(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = stopped_merge(part, tmp_path, monkeypatch)
    bad = damaged(parts[0], parts[0].header.array("log_probs").offset)
    check_same(merge([bad, parts[1]], tmp_path / "merged.h5"), part("whole"))


def stopped_merge(part: Part, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cache]:
    """Two parts, and an unfinished merge of them that has two blocks."""
    parts = [part("a", **views(0, 2)), part("b", **views(2, 4))]
    with monkeypatch.context() as patched:
        stop_after(patched, writes=2)
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            merge(parts, folder / "merged.h5")
    return parts


def stop_after(monkeypatch: pytest.MonkeyPatch, *, writes: int) -> None:
    """Raise KeyboardInterrupt once `writes` blocks are written and committed."""
    write, counter = cache_writer.Writer.write, count()

    def stopping(self: cache_writer.Writer, *arguments: Any) -> None:
        if next(counter) == writes:
            raise KeyboardInterrupt("Ctrl-C")
        write(self, *arguments)

    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(cache_writer.Writer, "write", stopping)


def test_the_order_of_the_parts_does_not_show(part: Part, tmp_path: Path) -> None:
    parts = [part(f"{i}", shard=(i, 3)) for i in range(3)]
    files = [
        merge([parts[i] for i in order], tmp_path / "far" / f"{number}.h5").path.read_bytes()
        for number, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    ]
    assert files[0] == files[1] == files[2]


def test_views_of_shards_merged_before_are_refused_with_what_helps(
    part: Part, tmp_path: Path
) -> None:
    shards = [part(f"one{i}", shard=(i, 2), **views(0, 2)) for i in (0, 1)]
    first, second = merge(shards, tmp_path / "one.h5"), part("two", **views(2, 4))
    with pytest.raises(SettingsError, match="merge the views of each shard first, then the shards"):
        merge([first, second], tmp_path / "merged.h5")


def test_ctrl_c_says_how_to_go_on(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(part(f"{i}", **views(i, i + 1)).path) for i in (0, 1)]
    stop_after(monkeypatch, writes=1)
    arguments = ["merge", *paths, "--out", str(tmp_path / "merged.h5")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: stopped; the same command continues"
    monkeypatch.undo()
    assert CliRunner().invoke(main, arguments).exit_code == 0


# damage


def test_damaged_labels_are_not_taken_for_other_data(part: Part, tmp_path: Path) -> None:
    first, second = part("a", **views(0, 2)), part("b", **views(2, 4))
    bad = damaged(second, second.header.array("labels").offset)
    with pytest.raises(FormatError, match=r"b\.h5 is damaged: labels and keys of samples 0 to 7"):
        merge([first, bad], tmp_path / "merged.h5")


def damaged(cache: Cache, offset: int, values: bytes | None = None) -> Cache:
    """The cache with `values` at `offset`; by default, one bit is flipped there."""
    raw = bytearray(cache.path.read_bytes())
    raw[offset : offset + len(values or b"1")] = values or bytes([raw[offset] ^ 1])
    cache.path.write_bytes(raw)
    return open_cache(cache.path)


def test_a_damaged_part_is_named_and_nothing_is_finished(part: Part, tmp_path: Path) -> None:
    first, second = (part(f"{i}", shard=(i, 2)) for i in (0, 1))
    intact, header = second.path.read_bytes(), second.header
    array, labels = header.array("log_probs"), header.array("labels")
    row = header.samples + BLOCK_ROWS  # the second block of the part's second view
    places = {
        "soft targets of samples 8 to 15 in view 1": array.offset + row * array.row_bytes,
        "labels and keys of samples 24 to 29": labels.offset + 29 * labels.row_bytes,
    }
    for what, offset in places.items():
        bad = damaged(second, offset)
        message = rf"1\.h5 is damaged: {what}; softcache verify 1\.h5 says what to do"
        with pytest.raises(FormatError, match=message):
            merge([first, bad], tmp_path / "merged.h5")
        assert not (tmp_path / "merged.h5").exists()
        second.path.write_bytes(intact)
    # once the part is intact again, the same merge continues
    check_same(merge([first, open_cache(second.path)], tmp_path / "merged.h5"), part("whole"))


def test_damage_to_what_all_rows_share_is_named(part: Part, tmp_path: Path) -> None:
    first, second = part("a", **views(0, 2)), part("b", **views(2, 4))
    bad = damaged(second, second.header.array("fingerprints").offset)
    with pytest.raises(FormatError, match=r"b\.h5 is damaged: the arrays shared by all rows"):
        merge([first, bad], tmp_path / "merged.h5")
    assert not list(tmp_path.glob("merged*"))


def test_class_ids_beyond_the_last_are_not_copied(part: Part, tmp_path: Path) -> None:
    first, second = (part(f"{i}", shard=(i, 2), encoding="topk:2") for i in (0, 1))
    forged = damaged(second, second.header.array("ids").offset, b"\5\0")
    digest = forged.block_digest(0, 0).to_bytes(8, "little")
    forged = damaged(forged, digest_offset(second.header, 0, 0), digest)
    with pytest.raises(
        FormatError, match=r"1\.h5 is damaged: class ids beyond the last class of s"
    ):
        merge([first, forged], tmp_path / "merged.h5")


# the command line


def test_a_merged_file_is_used_as_any_other(
    part: Part, config: DumpConfig, tmp_path: Path, run: Run
) -> None:
    parts = [part(f"shard{i}", shard=(i, 2), views=2).path for i in range(2)]
    result = run("merge", *parts, "--out", "merged.h5", check=True)
    content_id = open_cache(tmp_path / "merged.h5").content_id()
    assert result.stdout.startswith("merged.h5: 60 samples x 2 view(s), ")
    assert content_id in result.stdout
    assert "intact" in run("verify", "merged.h5", "--expect", content_id, check=True).stdout
    train = ["train", "merged.h5", "--student", "mlp:4", "--data", config.data, "--epochs", "2"]
    run(*train, "--out", "run", check=True)
    assert (tmp_path / "run" / "student.safetensors").exists()
    extended = dump(replace(config, out=tmp_path / "merged.h5"))
    check_same(extended, part("whole"))
    check_fingerprints(extended, config, [part("whole")])
