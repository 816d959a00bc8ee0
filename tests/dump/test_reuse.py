"""Finished rows are kept when samples are added to the data or removed from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softcache.cache import Cache, open_cache
from softcache.cache.reader import partial_path
from softcache.dump import loop as dump_loop
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.reuse import aside_path, runs_of
from softcache.errors import DataError, SettingsError
from softcache.teachers.teacher import Teacher
from tests.configs import replace
from tests.conftest import make_arrays


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """A dump in small blocks, of a file that tests change."""
    config = replace(
        dump_config, data=f"npz:{tmp_path / 'data.npz'}", eval_data=None, batch_size=16
    )
    save(config, np.arange(300))
    return config


def save(config: DumpConfig, samples: np.ndarray, new: int = 0) -> None:
    """Write some of the samples, and new ones in front of them."""
    images, labels = make_arrays()
    more, more_labels = make_arrays(max(new, 1), seed=9)
    x = np.concatenate([more[:new], images[samples]])
    y = np.concatenate([more_labels[:new], labels[samples]])
    np.savez(config.data.removeprefix("npz:"), x=x, y=y)


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the teacher was run on, call by call, from the dump loop."""
    counts: list[int] = []
    original = Teacher.logits

    def counted(self: Teacher, inputs: object, samples: object = None) -> object:
        counts.append(len(inputs))  # type: ignore[arg-type]
        return original(self, inputs, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(Teacher, "logits", counted)
    return counts


def stop_at_the_end(config: DumpConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a dump that fails once all rows are written, and keeps its unfinished file."""

    def fail(*_: object, **__: object) -> None:
        raise DataError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(dump_loop, "finish_dump", fail)
        with pytest.raises(DataError, match="stopped"):
            dump(config)
    assert partial_path(config.out).exists()


def same_rows(cache: Cache, fresh: Cache) -> None:
    rows = np.arange(cache.header.samples)
    assert np.array_equal(cache.keys, fresh.keys)
    assert np.array_equal(cache.labels, fresh.labels)
    np.testing.assert_allclose(cache.rows(0, rows), fresh.rows(0, rows), atol=2e-3)


@pytest.mark.parametrize("encoding", ["dense", "topk:3"])
def test_rows_of_removed_samples_go_and_all_others_stay(
    config: DumpConfig,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
    rows_run: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(config, encoding=encoding)
    stop_at_the_end(config, monkeypatch)
    save(config, np.delete(np.arange(300), [7, 100, 250]))
    rows_run.clear()
    cache = dump(config)
    assert "297 of 297 rows are taken over from" in capsys.readouterr().out
    assert 16 not in rows_run  # no batch of the dump loop
    assert not aside_path(config.out).exists()
    same_rows(cache, dump(replace(config, out=config.out.with_name("fresh.h5"))))


def test_added_samples_cost_only_their_own_blocks(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, rows_run: list[int]
) -> None:
    stop_at_the_end(config, monkeypatch)
    save(config, np.arange(300), new=10)
    rows_run.clear()
    cache = dump(config)
    assert rows_run.count(16) <= 2
    same_rows(cache, dump(replace(config, out=config.out.with_name("fresh.h5"))))


def test_a_finished_cache_gives_its_rows_with_like(
    config: DumpConfig, rows_run: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    finished = dump(config)
    save(config, np.arange(5, 300))
    with pytest.raises(
        SettingsError, match=r"data_samples 300, now it is 295.*--like .*takes over"
    ):
        dump(config)
    rows_run.clear()
    cache = dump(replace(config, out=config.out.with_name("new.h5"), like=finished.path))
    assert "295 of 295 rows are taken over" in capsys.readouterr().out
    assert 16 not in rows_run
    same_rows(cache, dump(replace(config, out=config.out.with_name("fresh.h5"))))
    assert open_cache(finished.path).header.samples == 300


def test_a_stop_while_rows_are_taken_over_loses_none(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, rows_run: list[int]
) -> None:
    stop_at_the_end(config, monkeypatch)
    save(config, np.arange(5, 300))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dump_loop, "fill_cache", fail)
        with pytest.raises(Exception, match="stopped"):
            dump(config)
    assert aside_path(config.out).exists()
    rows_run.clear()
    dump(config)
    assert 16 not in rows_run
    assert not aside_path(config.out).exists()


@pytest.mark.parametrize(
    "change", [{"augment": "flip", "views": 2}, {"encoding": "sampled:3"}, {"temperature": 2.0}]
)
def test_rows_that_depend_on_more_than_the_sample_are_not_taken_over(
    config: DumpConfig, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config if "temperature" in change else replace(config, **change)
    stop_at_the_end(first, monkeypatch)
    save(config, np.arange(5, 300))
    with pytest.raises(SettingsError, match="was started with"):
        dump(replace(config, **change))
    assert partial_path(config.out).exists()


def test_runs_are_ranges_of_adjacent_entries() -> None:
    mask = np.array([True, True, False, True, False, False, True])
    assert runs_of(mask) == [range(2), range(3, 4), range(6, 7)]
    assert runs_of(np.zeros(3, np.bool_)) == []
