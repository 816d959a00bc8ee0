"""Every sample of the data to its own row of the cache, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from softcache import join
from softcache.cache import Cache
from softcache.data import ArraySource, sample_keys
from softcache.dump import DumpConfig, dump
from softcache.errors import DataError
from softcache.imports import import_callable
from softcache.join import join_samples
from softcache.learner import Learner
from softcache.train import TrainConfig, train
from tests.conftest import make_arrays

Indices = npt.NDArray[np.int64]
MakeCache = Callable[..., Cache]

SAMPLES = 40


@pytest.fixture
def make_cache(tmp_path: Path, teacher_file: Path) -> MakeCache:
    def make(x: npt.NDArray[Any], y: Indices, **options: Any) -> Cache:
        np.savez(tmp_path / "data.npz", x=x, y=y)
        data, out = f"npz:{tmp_path / 'data.npz'}", tmp_path / "cache.h5"
        teacher = f"{teacher_file}:teacher"
        return dump(DumpConfig(teacher, data, temperature=1.0, out=out, device="cpu", **options))

    return make


@pytest.fixture
def data() -> ArraySource:
    return ArraySource("mine", *make_arrays(SAMPLES))


def picked(data: ArraySource, rows: Indices | list[int], name: str = "mine") -> ArraySource:
    return ArraySource(name, data.inputs[rows], data.labels[rows])


def is_joined(cache: Cache, rows: Indices, source: ArraySource) -> bool:
    """Has every sample a row of its own, with its own content and label?"""
    keys = sample_keys(torch.from_numpy(source.inputs))
    return bool(
        sorted(rows.tolist()) == list(range(len(source)))
        and (cache.keys[rows] == keys).all()
        and (cache.labels[rows] == source.labels).all()
    )


def test_the_same_data_join_in_order_without_a_word(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data.inputs, data.labels)
    assert join_samples(data, cache).tolist() == list(range(SAMPLES))
    assert capsys.readouterr().err == ""


def test_reordered_data_join_by_content_and_say_so(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data.inputs, data.labels)
    order = np.arange(SAMPLES)
    order[3:] = 3 + np.random.default_rng(0).permutation(SAMPLES - 3)
    assert order[3] != 3
    source = picked(data, order)
    rows = join_samples(source, cache)
    assert rows.tolist() == order.tolist()
    assert is_joined(cache, rows, source)
    note = "note: mine is in another order than the cache (first at sample 3); joined by content\n"
    assert capsys.readouterr().err == note


def test_a_join_by_place_would_be_noticed(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs, data.labels)
    source = picked(data, np.arange(SAMPLES)[::-1])
    assert is_joined(cache, join_samples(source, cache), source)
    assert not is_joined(cache, np.arange(SAMPLES), source)
    assert not is_joined(cache, np.zeros(SAMPLES, np.int64), source)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_change_nothing(
    make_cache: MakeCache, data: ArraySource, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "BATCH", 7)
    cache = make_cache(data.inputs, data.labels)
    order = np.random.default_rng(0).permutation(SAMPLES)
    assert join_samples(picked(data, order), cache, workers).tolist() == order.tolist()


def test_the_same_content_twice_goes_to_both_of_its_rows(
    make_cache: MakeCache, data: ArraySource
) -> None:
    twice = picked(data, [0, 1, 2, 1, 3, 1])
    cache = make_cache(twice.inputs, twice.labels)
    assert join_samples(twice, cache).tolist() == list(range(6))
    source = picked(data, [1, 3, 1, 2, 1, 0])
    rows = join_samples(source, cache)
    assert is_joined(cache, rows, source)
    assert rows.tolist() == [1, 4, 3, 2, 5, 0]  # in turn


def test_many_copies_go_to_their_rows_in_turn(make_cache: MakeCache, data: ArraySource) -> None:
    # a few are in turn by luck: numpy sorts a short array by insertion, which is stable
    copies = picked(data, [0, 1] * 50 + [2])
    cache = make_cache(copies.inputs, copies.labels)
    rows = join_samples(picked(data, [2] + [0, 1] * 50), cache)
    assert rows.tolist() == [100, *range(100)]


def test_the_same_content_with_two_labels_goes_to_the_row_of_its_label(
    make_cache: MakeCache, data: ArraySource
) -> None:
    twice = ArraySource("mine", data.inputs[[0, 0, 1]], np.array([2, 3, 4]))
    cache = make_cache(twice.inputs, twice.labels)
    source = picked(twice, [2, 1, 0])
    assert is_joined(cache, join_samples(source, cache), source)


# data that do not belong to the cache


@pytest.mark.parametrize("count", [1, SAMPLES - 1])
def test_cut_data_are_refused(make_cache: MakeCache, data: ArraySource, count: int) -> None:
    cache = make_cache(data.inputs, data.labels)
    expected = (
        rf"mine has {count} samples, .*cache\.h5 was made from 40 of npz:data\.npz@train; give"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(picked(data, list(range(count))), cache)


def test_data_with_more_samples_are_refused(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs[:30], data.labels[:30])
    with pytest.raises(
        DataError, match=r"mine has 40 samples, .* was made from 30 of npz:data\.npz"
    ):
        join_samples(data, cache)


def test_other_data_are_refused(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(*make_arrays(SAMPLES, seed=1))
    expected = (
        r"sample 0 of mine is not in .*cache\.h5, which was made from npz:data\.npz@train "
        r"\(40 samples differ\); give the data the cache was made from, or dump a cache of these"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(data, cache)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_changed_pixel_is_named_by_its_sample(
    make_cache: MakeCache, data: ArraySource, reverse: bool
) -> None:
    cache = make_cache(data.inputs, data.labels)
    changed = data.inputs.copy()
    changed[17, 0, 3, 3] += 1
    order = np.arange(SAMPLES)[::-1] if reverse else np.arange(SAMPLES)
    at = 22 if reverse else 17
    source = picked(ArraySource("mine", changed, data.labels), order)
    with pytest.raises(DataError, match=rf"sample {at} of mine is not in .* \(1 samples differ\)"):
        join_samples(source, cache)


def test_the_same_pixels_in_another_type_are_other_data(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs, data.labels)
    floats = ArraySource("mine", data.inputs.astype(np.float32), data.labels)
    with pytest.raises(DataError, match=r"sample 0 of mine is not in .* \(40 samples differ\)"):
        join_samples(floats, cache)


def test_a_sample_in_the_place_of_another_is_refused(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs[:4], data.labels[:4])
    with pytest.raises(DataError, match=r"sample \d of mine .* \(1 samples differ\)"):
        join_samples(picked(data, [0, 1, 2, 1]), cache)


def test_the_sample_that_is_once_too_often_is_named(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs[:4], data.labels[:4])
    with pytest.raises(DataError, match=r"sample 2 of mine is not in .* \(1 samples differ\)"):
        join_samples(picked(data, [1, 0, 0, 3]), cache)  # 0 twice, 2 not at all


# labels


def test_another_label_is_named_with_both(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs, data.labels)
    labels = data.labels.copy()
    labels[[5, 9]] = (labels[[5, 9]] + 1) % 5
    expected = (
        rf"sample 5 of mine has label {labels[5]}, and {data.labels[5]} in .*cache\.h5 \(2 labels "
        r"differ\); give the data the cache was made from"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(ArraySource("mine", data.inputs, labels), cache)


def test_another_label_of_reordered_data_is_named_by_its_place_there(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs, data.labels)
    source = picked(data, np.arange(SAMPLES)[::-1])
    source.labels[12] = (source.labels[12] + 1) % 5
    with pytest.raises(DataError, match=rf"sample 12 of mine has label {source.labels[12]}, and"):
        join_samples(source, cache)


def test_labels_may_be_missing_on_either_side(make_cache: MakeCache, data: ArraySource) -> None:
    unlabelled = np.where(np.arange(SAMPLES) % 2, -1, data.labels)
    cache = make_cache(data.inputs, unlabelled)
    for labels in (data.labels, np.full(SAMPLES, -1), unlabelled):
        rows = join_samples(ArraySource("mine", data.inputs, labels), cache)
        assert rows.tolist() == list(range(SAMPLES))


# what the join is for


def largest_error(
    monkeypatch: pytest.MonkeyPatch, teacher: nn.Module, config: TrainConfig
) -> float:
    """Train, and compare the targets of every step with what the teacher says of its very inputs."""
    errors = []

    def step(learner: Learner, inputs: Tensor, labels: Tensor, targets: Tensor, t: float) -> None:
        live = torch.log_softmax(teacher(inputs) / t, -1)
        errors.append((live - targets).abs().max().item())
        learner.losses.append(torch.zeros(3))

    monkeypatch.setattr(Learner, "step", step)
    train(config)
    return max(errors)


@pytest.mark.parametrize("augment", [None, "shift:2,flip"])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_target_belongs_to_the_pixels_the_student_sees(
    make_cache: MakeCache,
    data: ArraySource,
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    augment: str | None,
    reverse: bool,
) -> None:
    options = {"augment": augment, "views": 2} if augment else {}
    cache = make_cache(data.inputs, data.labels, **options)
    order = np.arange(SAMPLES)[::-1] if reverse else np.arange(SAMPLES)
    np.savez(tmp_path / "mine.npz", x=data.inputs[order], y=data.labels[order])
    config = TrainConfig(
        student="mlp:4",
        data=f"npz:{tmp_path / 'mine.npz'}",
        out=tmp_path / "run",
        cache=cache.path,
        epochs=2,
        device="cpu",
    )
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")()
    assert largest_error(monkeypatch, teacher, config) < 0.02
