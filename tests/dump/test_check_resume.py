"""Views added to a finished cache, parts of a dump, stopped merges: no row is computed or risked twice."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache import Cache, disk, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as cache_writer
from softcache.cache.merge import merge
from softcache.cache.reader import partial_path
from softcache.data.augment import Augmentation
from softcache.data.open import open_source
from softcache.dump import select_encoding
from softcache.dump.check_resume import SETTINGS
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import draft_header, load_teachers
from softcache.errors import DataError, FormatError, SettingsError
from softcache.files.verify import verify_cache
from softcache.teachers.ensemble import Ensemble
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.cache.test_merge import (
    BLOCK_ROWS,
    SAMPLES,
    damaged,
    exact_config,
    write_data,
    write_other_data,
)
from tests.configs import replace
from tests.conftest import Run, make_arrays

BLOCKS = -(-SAMPLES // BLOCK_ROWS)  # of one view
Work = Callable[[], object]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DumpConfig:
    """A dump of two views, in blocks of a few rows, each committed as soon as it is whole."""
    monkeypatch.setattr(cache_allocate, "BLOCK_BYTES", 10 * BLOCK_ROWS)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    return replace(exact_config(tmp_path), views=2, out=tmp_path / "cache.h5")


def fresh(config: DumpConfig, **changes: Any) -> Cache:
    """The same dump in one go, into another file."""
    return dump(replace(config, out=config.out.with_name("fresh.h5"), **changes))


def committed(path: Path) -> int:
    """Blocks of rows that an unfinished cache holds."""
    return int((open_cache(path, unfinished=True).arrays["digests"] != 0).sum())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the teachers compute, call by call."""
    rows: list[int] = []
    log_probs = Ensemble.log_probs

    def counted(self: Ensemble, inputs: Tensor, *arguments: Any, **named: Any) -> Tensor:
        rows.append(len(inputs))
        return log_probs(self, inputs, *arguments, **named)

    monkeypatch.setattr(Ensemble, "log_probs", counted)
    return rows


# views added to a finished cache


@pytest.mark.parametrize(
    "encoding", ["dense", "quantized", "topk:2", "basis:4,2", "sampled:8", "auto"]
)
def test_views_added_later_come_to_the_same_bytes(encoding: str, config: DumpConfig) -> None:
    config = replace(config, encoding=encoding)
    dump(config)
    for views in (3, 5):
        dump(replace(config, views=views))
    assert config.out.read_bytes() == fresh(config, views=5).path.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": (1, 3)},
        {"first_view": 3},
        {"teacher": ["models.py:teacher", "models.py:other"], "teacher_weight": [1, 3]},
        {"eval_data": "npz:data.npz"},
        {"augment": "flip,cutout:3"},
        {"batch_size": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_parts_of_any_kind_may_get_views_added(
    changes: dict[str, Any], config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(config, **changes)
    dump(config)
    dump(replace(config, views=4))
    assert config.out.read_bytes() == fresh(config, views=4).path.read_bytes()


@pytest.mark.parametrize("encoding", ["dense", "basis:4,2", "auto"])
def test_the_teacher_is_asked_about_the_new_views_alone(
    encoding: str, config: DumpConfig, computed: list[int]
) -> None:
    config = replace(config, encoding=encoding, eval_data=config.data)
    dump(config)
    computed.clear()
    dump(replace(config, views=3))
    # with so few rows, every one of them is computed once more to measure the fidelity
    assert sum(computed) == SAMPLES + 3 * SAMPLES
    computed.clear()
    dump(replace(config, views=3))
    assert sum(computed) == 0, "the cache is complete"


@pytest.mark.parametrize("encoding", ["basis:4,2", "auto"])
def test_the_encoding_stays_the_one_that_was_fitted(
    encoding: str, config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, encoding=encoding)
    first = dump(config)
    fitted = {a.name: np.array(first.arrays[a.name]) for a in first.header.arrays}
    monkeypatch.setattr(select_encoding, "FIT_VIEWS", 2)  # a new fit would differ
    extended, refitted = dump(replace(config, views=3)), fresh(config)
    for name in {"mean", "directions", "direction_steps"} & set(fitted):
        np.testing.assert_array_equal(extended.arrays[name], fitted[name])
    assert extended.header.encoding == first.header.encoding
    assert extended.header.choice == first.header.choice != refitted.header.choice


# the old file stays until the new one is complete


def test_a_failure_at_the_very_end_leaves_the_old_file(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    before = dump(config).path.read_bytes()

    def fail(*arguments: object, **named: object) -> object:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(cache_writer.Writer, "finish", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            dump(replace(config, views=3))
    assert config.out.read_bytes() == before
    assert committed(partial_path(config.out)) == 3 * BLOCKS
    computed.clear()
    dump(replace(config, views=3))
    assert sum(computed) == 3 * SAMPLES, "only for the fidelity"
    assert config.out.read_bytes() == fresh(config, views=3).path.read_bytes()
    assert not partial_path(config.out).exists()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_killed_extension_leaves_the_old_file_and_goes_on(
    config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(config, device="cpu")  # a forked child has no GPU
    before, more = dump(config).path.read_bytes(), replace(config, views=4)
    writes = writes_of(lambda: fresh(config, views=4))
    kept = []
    for point in spread(writes):
        config.out.write_bytes(before)
        kill_at(point, lambda: dump(more))
        assert config.out.read_bytes() == before
        assert "intact" in verify_cache(config.out)
        partial = partial_path(config.out)
        kept.append(committed(partial) if partial.exists() else 0)
        if point == writes // 2:
            training = make_train_config(
                student="mlp:4", data=config.data, out=tmp_path / "run", cache=config.out, epochs=1
            )
            train(replace(training, device="cpu"))
        dump(more)
        assert config.out.read_bytes() == config.out.with_name("fresh.h5").read_bytes()
        assert not partial.exists()
    assert kept == sorted(kept), "a later kill leaves more blocks"
    assert kept[0] == 0
    assert any(2 * BLOCKS < blocks < 4 * BLOCKS for blocks in kept), (
        "some kills while new views are written"
    )


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_an_extension_has_begun_outlives_the_old_file(
    config: DumpConfig, computed: list[int]
) -> None:
    config = replace(config, device="cpu")
    dump(config)
    more = replace(config, views=4)
    kill_at(3 * writes_of(lambda: fresh(config, views=4)) // 4, lambda: dump(more))
    assert committed(partial_path(config.out)) > 2 * BLOCKS
    config.out.unlink()
    computed.clear()
    dump(more)
    assert sum(computed) < 2 * SAMPLES + 4 * SAMPLES, "the first two views only for the fidelity"
    assert config.out.read_bytes() == config.out.with_name("fresh.h5").read_bytes()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_another_number_of_views_does_not_go_on_with_a_begun_extension(config: DumpConfig) -> None:
    config = replace(config, device="cpu")
    before = dump(config).path.read_bytes()
    kill_at(30, lambda: dump(replace(config, views=4)))
    partial = partial_path(config.out)
    unfinished = partial.read_bytes()
    with pytest.raises(SettingsError, match=r"partial was started with views 4, now it is 3"):
        dump(replace(config, views=3))
    dump(config)  # the finished cache is the requested one, so nothing is touched
    assert (config.out.read_bytes(), partial.read_bytes()) == (before, unfinished)


# refusals

# a change of each setting that determines the values, and how the refusal describes it
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "npz:copy.npz"}, "data 'npz:data.npz@train', now it is 'npz:copy.npz@train'"),
    "data_samples": ({"data": "npz:less/data.npz"}, "data_samples 60, now it is 50"),
    "first_sample": ({"shard": (1, 2)}, "first_sample 0, now it is 30"),
    "samples": ({"shard": (0, 2)}, "samples 60, now it is 30"),
    "classes": ({"teacher": "models.py:wide"}, "classes 5, now it is 6"),
    "teachers": ({"teacher": "models.py:other"}, "another teacher (name 'models.py:teacher', now"),
    "temperature": ({"temperature": 3.0}, "temperature 2.0, now it is 3.0"),
    "precision": ({"precision": "bf16"}, "precision 'fp32', now it is 'bf16'"),
    "choice": ({"encoding": "quantized"}, "encoding 'dense', now it is 'quantized'"),
    "first_view": ({"first_view": 1}, "first_view 0, now it is 1"),
    "views": ({"views": 1}, "views 2, now it is 1"),
    "augment": ({"augment": "shift:2"}, "augment 'shift:1,mixup', now it is 'shift:2'"),
    "seed": ({"seed": 1}, "seed 3, now it is 1"),
    "must_understand": ({"embed_inputs": True}, "nothing embedded, now inputs; use the same"),
    "weights": ({"teacher": "retrained/models.py:teacher"}, "another teacher (sha256 '"),
    "two teachers": ({"teacher": ["models.py:teacher"] * 2}, "1 teacher(s), now 2; use the same"),
    "evaluation": ({"eval_data": "npz:copy.npz"}, "evaluation data none, now it is npz:copy.npz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_views_of_other_settings_are_not_added(
    kind: str, config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_other_data(tmp_path)
    (tmp_path / "retrained").mkdir()
    retrained = (tmp_path / "models.py").read_text().replace("Teacher(5, 7)", "Teacher(5, 9)")
    (tmp_path / "retrained" / "models.py").write_text(retrained)
    monkeypatch.chdir(tmp_path)
    changes, message = CHANGES[kind]
    before = dump(config).path.read_bytes()
    with pytest.raises(SettingsError, match=rf"cache\.h5 was started with {re.escape(message)}"):
        dump(replace(config, **{"views": 3, **changes}))
    assert config.out.read_bytes() == before
    assert not partial_path(config.out).exists()


def test_every_setting_that_decides_the_values_has_its_refusal() -> None:
    assert set(SETTINGS) <= set(CHANGES)


@pytest.mark.parametrize("changed", [{"image": 37}, {"label": 37}])
def test_views_are_not_added_to_those_of_other_data(
    changed: dict[str, int], config: DumpConfig, tmp_path: Path
) -> None:
    before = dump(config).path.read_bytes()
    write_data(tmp_path / "data.npz", **changed)
    with pytest.raises(SettingsError, match=r"with other data: sample 37 of npz:data\.npz@train"):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == before


def test_views_that_would_be_drawn_otherwise_are_not_added(
    config: DumpConfig, tmp_path: Path
) -> None:
    transform = tmp_path / "own.py"
    transform.write_text("def draw(sample):\n    return sample\n")
    config = replace(config, augment=f"{transform}:draw")
    before = dump(config).path.read_bytes()
    transform.write_text("def draw(sample):\n    return 255 - sample\n")
    with pytest.raises(DataError, match=r"in view 0 is not what the teacher .* has changed"):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == before


def test_damaged_views_are_not_copied(config: DumpConfig) -> None:
    cache = dump(config)
    raw = damaged(cache, cache.header.array("log_probs").offset + 3).path.read_bytes()
    message = (
        r"cache\.h5 is damaged: soft targets of samples 0 to 7 in view 0; softcache verify cac"
    )
    with pytest.raises(FormatError, match=message):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == raw


# parts


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(samples=st.integers(1, 200), data=st.data())
def test_shards_have_each_sample_once_in_nearly_equal_parts(
    samples: int, data: st.DataObject, config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays(samples)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    source = open_source(config.data)
    teacher = load_teachers(config, source, Augmentation(None, 0))
    shards = data.draw(st.integers(1, samples))
    sample_ids, sizes = list[int](), set[int]()
    for shard in range(shards):
        header = draft_header(replace(config, shard=(shard, shards)), source, teacher)
        sample_ids += range(header.first_sample, header.first_sample + header.samples)
        sizes.add(header.samples)
    assert sample_ids == list(range(samples))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("encoding", ["dense", "topk:2", "basis:4,2", "sampled:8"])
def test_a_shard_of_later_views_like_another_holds_the_rows_of_the_whole(
    encoding: str, config: DumpConfig
) -> None:
    whole = dump(replace(config, encoding=encoding, views=4))
    part = fresh(config, shard=(1, 4), first_view=2, views=2, like=whole.path)
    assert (part.header.first_sample, part.header.samples) == (15, 15)
    for array in whole.header.arrays:
        values = whole.arrays[array.name]
        if array.axis == "rows":
            np.testing.assert_array_equal(part.arrays[array.name], values[2:, 15:30])
        elif array.axis == "samples":
            np.testing.assert_array_equal(part.arrays[array.name], values[15:30])
        elif array.axis == "shared" and not array.name.startswith("fingerprint"):
            np.testing.assert_array_equal(part.arrays[array.name], values)


def test_the_command_line_adds_views_and_makes_parts(
    config: DumpConfig, run: Run, tmp_path: Path
) -> None:
    command = [
        "dump", "--teacher", config.teacher, "--data", config.data, "--temperature", "2",
        "--augment", "shift:1,mixup", "--seed", "3", "--batch-size", "16",
    ]  # fmt: skip
    dump(replace(config, encoding="basis:4,2"))
    more = ["--out", "cache.h5", "--views", "3", "--encoding", "basis:4,2"]
    assert "adding views to cache.h5" in run(*map(str, command), *more, check=True).stdout
    part = ["--out", "part.h5", "--views", "1:3", "--shard", "1/2", "--like", "cache.h5"]
    run(*map(str, command), *part, check=True)
    whole, half = open_cache(tmp_path / "cache.h5"), open_cache(tmp_path / "part.h5")
    np.testing.assert_array_equal(half.arrays["codes"], whole.arrays["codes"][1:, 30:])


# stops


def at_each_write(note: Callable[[], None], work: Work) -> None:
    """Do some work, and call `note` before each of its writes to a cache."""
    pwrite = disk.pwrite

    def noted(file: int, values: bytes, offset: int) -> None:
        note()
        pwrite(file, values, offset)

    with pytest.MonkeyPatch.context() as patch:
        for module in (cache_allocate, cache_writer):
            patch.setattr(module, "pwrite", noted)
        work()


def writes_of(work: Work) -> int:
    """Do some work; returns how often it writes to a cache."""
    writes: list[None] = []
    at_each_write(lambda: writes.append(None), work)
    return len(writes)


def kill_at(write: int, work: Work) -> None:
    """Do some work in a process that is killed just before its `write`-th write to a cache."""
    writes = count(1)

    def note() -> None:
        if next(writes) == write:
            os.kill(os.getpid(), signal.SIGKILL)

    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=at_each_write, args=(note, work))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def spread(writes: int) -> list[int]:
    """Write numbers to kill at: the first, the three quarters, and the last three."""
    return [1, writes // 4, writes // 2, writes * 3 // 4, writes - 2, writes - 1, writes]


@pytest.fixture
def parts(config: DumpConfig, tmp_path: Path) -> list[Cache]:
    """Three shards of two views."""
    return [dump(replace(config, shard=(i, 3), out=tmp_path / f"{i}.h5")) for i in range(3)]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_killed_merge_ends_in_the_same_bytes(parts: list[Cache], tmp_path: Path) -> None:
    out = tmp_path / "merged.h5"
    writes = writes_of(lambda: merge(parts, out))
    expected = out.read_bytes()
    kept = []
    for point in spread(writes):
        out.unlink()
        kill_at(point, lambda: merge(parts, out))
        assert not out.exists()
        partial = partial_path(out)
        kept.append(committed(partial) if partial.exists() else 0)
        assert merge(parts, out).path.read_bytes() == expected
    assert kept == sorted(kept), "a later kill leaves more blocks"
    assert 0 == kept[0] < kept[2] < kept[-1] == 2 * BLOCKS


def test_a_stopped_merge_copies_what_is_missing_or_damaged(
    parts: list[Cache], tmp_path: Path
) -> None:
    expected = merge(parts, tmp_path / "merged.h5").path.read_bytes()
    out, done = tmp_path / "again.h5", list[int]()

    def stop(added: int) -> None:
        done.append(added)
        if sum(done) > SAMPLES:
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        merge(parts, out, stop)
    partial = open_cache(partial_path(out), unfinished=True)
    assert (partial.arrays["digests"] != 0).sum(1).tolist() == [BLOCKS, 1]
    # rows that were copied before are not read again: their source may be damaged by now
    parts[1] = damaged(parts[1], parts[1].header.array("log_probs").offset)
    raw = bytearray(partial.path.read_bytes())
    raw[partial.header.array("log_probs").offset] ^= 1  # a row of the first part
    partial.path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"1\.h5 is damaged: soft targets of samples 0 to 7"):
        merge(parts, tmp_path / "third.h5")
    assert merge(parts, out).path.read_bytes() == expected
