"""More views for a finished cache, and parts of a dump: nothing is asked twice, nothing is risked."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from softcache.cache import Cache, open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.reader import partial_path
from softcache.dump import DumpConfig, dump
from softcache.errors import DataError, SettingsError, SoftcacheError
from softcache.teacher import Ensemble
from tests.conftest import Run, make_arrays

SAMPLES = 60


@pytest.fixture
def config(teacher_file: Path, tmp_path: Path) -> DumpConfig:
    images, labels = make_arrays(SAMPLES)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    return DumpConfig(
        teacher=f"{teacher_file}:teacher",
        data=f"npz:{tmp_path / 'data.npz'}",
        temperature=2.0,
        views=2,
        augment="shift:1,mixup",
        out=tmp_path / "cache.h5",
        batch_size=16,
    )


def fresh(config: DumpConfig, **changes: object) -> Cache:
    """The same in one go, into another file."""
    return dump(replace(config, out=config.out.with_name("fresh.h5"), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["dense", "basis:4,2", "auto", "sampled:8"])
def test_views_added_later_come_to_the_same_bytes(encoding: str, config: DumpConfig) -> None:
    config = replace(config, encoding=encoding)
    dump(config)
    for views in (3, 5):
        dump(replace(config, views=views))
    assert config.out.read_bytes() == fresh(config, views=5).path.read_bytes()


def test_the_teacher_is_asked_about_the_new_views_alone(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(config)
    asked: list[int] = []
    original = Ensemble.log_probs

    def counted(self: Ensemble, *arguments: object, **named: object) -> object:
        asked.append(len(arguments[0]))  # type: ignore[arg-type]
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Ensemble, "log_probs", counted)
    dump(replace(config, views=3))
    sampled = 3 * SAMPLES  # all rows, of so few, are asked again for the fidelity
    assert sum(asked) == SAMPLES + sampled


def test_the_old_file_is_whole_until_the_new_one_is(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(config)
    before = config.out.read_bytes()

    def fail(*arguments: object, **named: object) -> object:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(cache_writer.Writer, "finish", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            dump(replace(config, views=3))
    assert config.out.read_bytes() == before
    partial = open_cache(partial_path(config.out), unfinished=True)
    assert (partial.arrays["digests"] != 0).all()
    dump(replace(config, views=3))
    assert config.out.read_bytes() == fresh(config, views=3).path.read_bytes()
    assert not partial_path(config.out).exists()


def test_a_killed_extension_goes_on(config: DumpConfig, run: Run, tmp_path: Path) -> None:
    arguments = [
        "dump", "--teacher", config.teacher, "--data", config.data, "--temperature", "2",
        "--augment", "shift:1,mixup", "--batch-size", "16",
    ]  # fmt: skip
    run(*map(str, arguments), "--out", "cache.h5", "--views", "2", check=True)
    before = (tmp_path / "cache.h5").read_bytes()
    command = [sys.executable, "-m", "softcache", *map(str, arguments), "--out", "cache.h5"]
    process = subprocess.Popen([*command, "--views", "40"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cache.h5.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "cache.h5.partial").exists():
        assert (tmp_path / "cache.h5").read_bytes() == before
    run(*map(str, arguments), "--out", "cache.h5", "--views", "40", check=True)
    run(*map(str, arguments), "--out", "fresh.h5", "--views", "40", check=True)
    assert (tmp_path / "cache.h5").read_bytes() == (tmp_path / "fresh.h5").read_bytes()


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "temperature": ({"temperature": 3.0}, "temperature 2.0, now it is 3.0"),
    "augment": ({"augment": "shift:2"}, "augment 'shift:1,mixup', now it is 'shift:2'"),
    "seed": ({"seed": 1}, "seed 0, now it is 1"),
    "encoding": ({"encoding": "quantized"}, "encoding 'dense', now it is 'quantized'"),
    "shard": ({"shard": (0, 2)}, "samples 60, now it is 30"),
    "first view": ({"first_view": 1}, "first_view 0, now it is 1"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_views_of_other_settings_are_not_added(kind: str, config: DumpConfig) -> None:
    changes, message = CHANGES[kind]
    before = dump(config).path.read_bytes()
    with pytest.raises(SettingsError, match=re.escape(message)):
        dump(replace(config, **{"views": 3, **changes}))  # type: ignore[arg-type]
    assert config.out.read_bytes() == before
    assert not partial_path(config.out).exists()


def test_fewer_views_than_there_are_would_lose_some(config: DumpConfig) -> None:
    before = dump(config).path.read_bytes()
    with pytest.raises(SettingsError, match="views 2, now it is 1"):
        dump(replace(config, views=1))
    assert config.out.read_bytes() == before


def test_views_are_not_added_to_those_of_other_data(config: DumpConfig, tmp_path: Path) -> None:
    before = dump(config).path.read_bytes()
    images, labels = make_arrays(SAMPLES, seed=5)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    with pytest.raises(SettingsError, match="begun with other data: sample 0"):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == before


def test_views_that_would_be_drawn_otherwise_are_not_added(
    config: DumpConfig, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def draw(sample):\n    return sample\n")
    config = replace(config, augment=f"{own}:draw")
    before = dump(config).path.read_bytes()
    own.write_text("def draw(sample):\n    return 255 - sample\n")
    with pytest.raises(DataError, match=r"in view 0 is not what the teacher .* has changed"):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == before


def test_damaged_views_are_not_copied(config: DumpConfig) -> None:
    cache = dump(config)
    raw = bytearray(config.out.read_bytes())
    raw[cache.header.array("log_probs").offset + 3] ^= 1
    config.out.write_bytes(raw)
    with pytest.raises(
        SoftcacheError, match=r"is damaged: soft targets of samples 0 to .* in view 0"
    ):
        dump(replace(config, views=3))
    assert config.out.read_bytes() == bytes(raw)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 60])
def test_shards_have_each_sample_once(shards: int, config: DumpConfig) -> None:
    seen: list[int] = []
    parts = sorted({0, shards // 2, shards - 1})
    for shard in range(shards) if shards < 8 else parts:
        header = fresh(config, shard=(shard, shards), overwrite=True).header
        seen += range(header.first_sample, header.first_sample + header.samples)
    if shards < 8:
        assert seen == list(range(SAMPLES))
    else:
        assert len(set(seen)) == len(seen) == len(parts)


def test_a_shard_holds_the_rows_of_the_whole(config: DumpConfig) -> None:
    whole = dump(config)
    part = fresh(config, shard=(1, 4), first_view=1, views=1)
    assert (part.header.first_sample, part.header.samples) == (15, 15)
    np.testing.assert_array_equal(part.arrays["log_probs"][0], whole.arrays["log_probs"][1, 15:30])
    np.testing.assert_array_equal(part.keys, whole.keys[15:30])
    np.testing.assert_array_equal(part.labels, whole.labels[15:30])


def test_more_shards_than_samples_are_refused(config: DumpConfig) -> None:
    with pytest.raises(
        SettingsError, match="61 shards of 60 samples; expected at most one for each"
    ):
        dump(replace(config, shard=(0, 61)))


def test_an_encoding_is_taken_from_a_cache_like_it(config: DumpConfig) -> None:
    like = fresh(config, encoding="basis:4,2")
    found = dump(replace(config, like=like.path, first_view=2))
    assert found.header.encoding == like.header.encoding
    for name in ("mean", "directions", "direction_steps"):
        np.testing.assert_array_equal(found.arrays[name], like.arrays[name])


def test_a_cache_of_another_temperature_is_no_model(config: DumpConfig) -> None:
    like = fresh(config, temperature=4.0)
    with pytest.raises(
        SettingsError, match=r"--like \S*fresh\.h5 has temperature 4\.0; this dump has 2"
    ):
        dump(replace(config, like=like.path))
