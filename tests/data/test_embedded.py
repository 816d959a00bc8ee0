"""Caches that embed their samples: one file is all that a student needs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import open_cache
from softcache.cache.merge import merge
from softcache.cache.verify import find_damage
from softcache.data.embedded import CacheSource
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace
from tests.conftest import SAMPLES, Run, make_arrays
from tests.train.loop_cases import save_data


@pytest.fixture
def embedded(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    data = save_data(tmp_path, *make_arrays())  # a copy that a test can change
    return replace(
        dump_config, data=data, views=3, augment="shift:1,mixup", embed_inputs=True, eval_data=None
    )


def student(cache: Path, out: Path, data: str = "") -> TrainConfig:
    return make_train_config(
        student="mlp:16",
        cache=cache,
        data=data or (),
        out=out,
        epochs=2,
        batch_size=64,
        device="cpu",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_student_of_the_file_alone_is_the_one_of_its_data(
    workers: int, embedded: DumpConfig, tmp_path: Path
) -> None:
    cache = dump(embedded)
    train(student(cache.path, tmp_path / "with", embedded.data))
    Path(embedded.data.removeprefix("npz:")).unlink()
    train(replace(student(cache.path, tmp_path / "without"), workers=workers))
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_inputs_are_the_raw_ones(embedded: DumpConfig) -> None:
    cache = dump(embedded)
    images, labels = make_arrays()
    np.testing.assert_array_equal(cache.arrays["inputs"], images)
    inputs, fetched_labels = CacheSource(cache).fetch([3, 299, 3])
    assert inputs.dtype == torch.uint8
    np.testing.assert_array_equal(inputs, images[[3, 299, 3]])
    np.testing.assert_array_equal(fetched_labels, labels[[3, 299, 3]])


def test_a_callable_of_the_users_own_leaves_them_raw(embedded: DumpConfig, tmp_path: Path) -> None:
    path = tmp_path / "augment.py"
    path.write_text("def invert(sample):\n    return 255 - sample\n")
    cache = dump(replace(embedded, augment=f"{path}:invert,shift:1"))
    np.testing.assert_array_equal(cache.arrays["inputs"], make_arrays()[0])
    train(replace(student(cache.path, tmp_path / "run"), augment=f"{path}:invert,shift:1"))


def test_damage_to_an_input_is_found_and_mended(embedded: DumpConfig) -> None:
    cache = dump(embedded)
    before = cache.path.read_bytes()
    raw = bytearray(before)
    raw[cache.header.array("inputs").offset + 5] ^= 1
    cache.path.write_bytes(raw)
    assert [str(damage) for damage in find_damage(open_cache(cache.path))] == [
        f"labels, keys and inputs of samples 0 to {cache.header.block_rows - 1}"
    ]


def test_a_stopped_dump_goes_on_to_the_same_bytes(embedded: DumpConfig, tmp_path: Path) -> None:
    whole = dump(embedded).path.read_bytes()
    one_view = replace(embedded, out=tmp_path / "more.h5", views=1)
    dump(one_view)
    assert dump(replace(one_view, views=3)).path.read_bytes() == whole


def test_shards_of_it_merge(embedded: DumpConfig, tmp_path: Path) -> None:
    config = replace(embedded, augment="shift:1")
    parts = [dump(replace(config, shard=(i, 2), out=tmp_path / f"{i}.h5", views=2)) for i in (0, 1)]
    assert parts[1].arrays["inputs"].shape[0] == SAMPLES // 2
    merged = merge(parts, tmp_path / "merged.h5")
    np.testing.assert_array_equal(merged.arrays["inputs"], make_arrays()[0])
    train(student(merged.path, tmp_path / "run"))
    train(student(parts[1].path, tmp_path / "half"))


def test_mixup_of_a_shard_needs_the_samples_that_are_elsewhere(
    embedded: DumpConfig, tmp_path: Path
) -> None:
    shard = dump(replace(embedded, shard=(0, 2)))
    with pytest.raises(
        SettingsError, match=r"tiny\.h5 holds 150 of 300 samples, each mixed with any of"
    ):
        train(student(shard.path, tmp_path / "run"))


def test_a_cache_with_and_one_without_do_not_merge(embedded: DumpConfig, tmp_path: Path) -> None:
    without, embedding = (
        dump(replace(embedded, shard=(i, 2), embed_inputs=bool(i), out=tmp_path / f"{i}.h5"))
        for i in (0, 1)
    )
    with pytest.raises(SettingsError, match=r"has must_understand \('inputs',\), .* has \(\)"):
        merge([without, embedding], tmp_path / "merged.h5")


def test_a_begun_dump_is_not_gone_on_with_otherwise(embedded: DumpConfig) -> None:
    dump(embedded)
    with pytest.raises(
        SettingsError, match="was started with inputs embedded, now nothing; use the s"
    ):
        dump(replace(embedded, embed_inputs=False))


def test_a_cache_of_targets_alone_needs_data(dump_config: DumpConfig, run: Run) -> None:
    cache = dump(dump_config)
    result = run("train", cache.path, "--student", "mlp:4", "--out", "run")
    assert result.returncode == 2
    assert (
        "holds only soft targets; give its samples, npz:tiny.npz@train, with --data"
        in result.stderr
    )


def test_types_without_a_place_in_the_format_are_refused(
    embedded: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    np.savez(tmp_path / "wide.npz", x=images.astype(np.float64), y=labels)
    with pytest.raises(
        SettingsError,
        match="are float64, which a cache cannot store; expected uint8, float32, or an",
    ):
        dump(replace(embedded, data=f"npz:{tmp_path / 'wide.npz'}"))


def test_another_process_opens_the_file_anew(embedded: DumpConfig) -> None:
    source = CacheSource(dump(embedded))
    data = pickle.dumps(source)
    assert len(data) < 2000
    reopened = pickle.loads(data)
    np.testing.assert_array_equal(reopened.fetch([7])[0], source.fetch([7])[0])


def test_info_says_so(embedded: DumpConfig, run: Run) -> None:
    cache = dump(embedded)
    output = run("info", cache.path, check=True).stdout
    assert "format 1.1" in output
    assert "augmented by shift:1,mixup, seed 0, embedded" in output
