"""Every cache row is joined to its own sample of the data, or nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from softcache.cache import Cache
from softcache.data.keys import sample_keys
from softcache.data.source import ArraySource
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError
from softcache.join import match
from softcache.join.joined_data import (
    JoinedData,
    TrainingBatch,
    concatenate_batches,
    concatenate_labels,
    concatenate_targets,
    hard_label_data,
)
from softcache.join.match import join as join_data
from softcache.join.match import join_samples
from softcache.losses import hard_loss
from softcache.targets.decode import to_dense
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from softcache.types import MixedLabels, SparseTargets, Targets
from softcache.util.callables import import_callable
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
        return dump(
            DumpConfig(
                teacher=teacher, data=data, temperature=1.0, out=out, device="cpu", **options
            )
        )

    return make


@pytest.fixture
def data() -> ArraySource:
    return ArraySource("mine", *make_arrays(SAMPLES))


def picked(data: ArraySource, rows: Indices | list[int], name: str = "mine") -> ArraySource:
    return ArraySource(name, data.inputs[rows], data.labels[rows])


def is_joined(cache: Cache, source_indices: Indices, source: ArraySource) -> bool:
    """Does every cache row have a sample of its own, with the same content and label?"""
    keys = sample_keys(torch.from_numpy(source.inputs))
    return bool(
        len(set(source_indices.tolist())) == len(source_indices) == cache.header.samples
        and (cache.keys == keys[source_indices]).all()
        and (cache.labels == source.labels[source_indices]).all()
    )


def test_the_same_data_join_in_order_without_a_word(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data.inputs, data.labels)
    capsys.readouterr()
    assert join_samples(data, cache).tolist() == list(range(SAMPLES))
    assert capsys.readouterr().out == ""


def test_reordered_data_join_by_content_and_say_so(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data.inputs, data.labels)
    order = np.arange(SAMPLES)
    order[3:] = 3 + np.random.default_rng(0).permutation(SAMPLES - 3)
    assert order[3] != 3
    source = picked(data, order)
    capsys.readouterr()
    source_indices = join_samples(source, cache)
    assert source_indices.tolist() == np.argsort(order).tolist()
    assert is_joined(cache, source_indices, source)
    note = (
        "note: mine is not in the order of the cache (first difference at sample 3); "
        "joined by content\n"
    )
    assert capsys.readouterr().out == note


def test_a_join_by_position_would_be_noticed(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs, data.labels)
    source = picked(data, np.arange(SAMPLES)[::-1])
    assert is_joined(cache, join_samples(source, cache), source)
    assert not is_joined(cache, np.arange(SAMPLES), source)
    assert not is_joined(cache, np.zeros(SAMPLES, np.int64), source)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_change_nothing(
    make_cache: MakeCache, data: ArraySource, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match, "BATCH", 7)
    cache = make_cache(data.inputs, data.labels)
    order = np.random.default_rng(0).permutation(SAMPLES)
    source_indices = join_samples(picked(data, order), cache, workers)
    assert source_indices.tolist() == np.argsort(order).tolist()


def test_the_same_content_twice_goes_to_both_of_its_rows(
    make_cache: MakeCache, data: ArraySource
) -> None:
    twice = picked(data, [0, 1, 2, 1, 3, 1])
    cache = make_cache(twice.inputs, twice.labels)
    assert join_samples(twice, cache).tolist() == list(range(6))
    source = picked(data, [1, 3, 1, 2, 1, 0])
    source_indices = join_samples(source, cache)
    assert is_joined(cache, source_indices, source)
    assert source_indices.tolist() == [5, 0, 3, 2, 1, 4]  # in order


def test_many_copies_go_to_their_rows_in_turn(make_cache: MakeCache, data: ArraySource) -> None:
    # a few copies would keep their order by luck: numpy sorts short arrays by insertion, which is stable
    copies = picked(data, [0, 1] * 50 + [2])
    cache = make_cache(copies.inputs, copies.labels)
    source_indices = join_samples(picked(data, [2] + [0, 1] * 50), cache)
    assert source_indices.tolist() == [*range(1, 101), 0]


def test_the_same_content_with_two_labels_goes_to_the_row_of_its_label(
    make_cache: MakeCache, data: ArraySource
) -> None:
    twice = ArraySource("mine", data.inputs[[0, 0, 1]], np.array([2, 3, 4]))
    cache = make_cache(twice.inputs, twice.labels)
    source = picked(twice, [2, 1, 0])
    assert is_joined(cache, join_samples(source, cache), source)


# data that do not belong to the cache


@pytest.mark.parametrize("count", [1, SAMPLES - 1])
def test_cut_data_are_refused_where_all_are_needed(
    make_cache: MakeCache, data: ArraySource, count: int
) -> None:
    cache = make_cache(data.inputs, data.labels)
    expected = rf"mine has {count} of the 40 samples of .*cache\.h5; all are needed here"
    with pytest.raises(DataError, match=expected):
        join_samples(picked(data, list(range(count))), cache)


def test_data_with_more_samples_are_refused(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs[:30], data.labels[:30])
    expected = (
        r"sample 30 of mine is not in .*, which was made from npz:data\.npz@train \(10 of 40 are unknown\); "
        ".* or add --known-only to train on the others"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(data, cache)


def test_other_data_are_refused(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(*make_arrays(SAMPLES, seed=1))
    expected = (
        r"sample 0 of mine is not in .*cache\.h5, which was made from npz:data\.npz@train "
        r"\(40 of \d+ are unknown\); give the data the cache was made from, or dump a cache of these"
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
    source_index = 22 if reverse else 17
    source = picked(ArraySource("mine", changed, data.labels), order)
    with pytest.raises(
        DataError, match=rf"sample {source_index} of mine is not in .* \(1 of \d+ are unknown\)"
    ):
        join_samples(source, cache)


def test_the_same_pixels_in_another_type_are_other_data(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs, data.labels)
    floats = ArraySource("mine", data.inputs.astype(np.float32), data.labels)
    with pytest.raises(DataError, match=r"sample 0 of mine is not in .* \(40 of \d+ are unknown\)"):
        join_samples(floats, cache)


def test_a_sample_in_the_place_of_another_is_refused(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs[:4], data.labels[:4])
    with pytest.raises(DataError, match=r"sample \d of mine .* \(1 of \d+ are unknown\)"):
        join_samples(picked(data, [0, 1, 2, 1]), cache)


def test_the_sample_that_is_once_too_often_is_named(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs[:4], data.labels[:4])
    with pytest.raises(DataError, match=r"sample 2 of mine is not in .* \(1 of \d+ are unknown\)"):
        join_samples(picked(data, [1, 0, 0, 3]), cache)  # 0 twice, 2 not at all


# labels


def test_another_label_is_named_with_both(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs, data.labels)
    labels = data.labels.copy()
    labels[[5, 9]] = (labels[[5, 9]] + 1) % 5
    expected = (
        rf"sample 5 of mine has label {labels[5]}, but {data.labels[5]} in .*cache\.h5 \(2 labels "
        r"differ\); give the data the cache was made from"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(ArraySource("mine", data.inputs, labels), cache)


def test_another_label_of_reordered_data_is_named_by_its_source_index(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs, data.labels)
    source = picked(data, np.arange(SAMPLES)[::-1])
    source.labels[12] = (source.labels[12] + 1) % 5
    with pytest.raises(DataError, match=rf"sample 12 of mine has label {source.labels[12]}, but"):
        join_samples(source, cache)


def test_labels_may_be_missing_on_either_side(make_cache: MakeCache, data: ArraySource) -> None:
    unlabelled = np.where(np.arange(SAMPLES) % 2, -1, data.labels)
    cache = make_cache(data.inputs, unlabelled)
    for labels in (data.labels, np.full(SAMPLES, -1), unlabelled):
        source_indices = join_samples(ArraySource("mine", data.inputs, labels), cache)
        assert source_indices.tolist() == list(range(SAMPLES))


# shards


def shard_of(make_cache: MakeCache, data: ArraySource, **options: Any) -> Cache:
    """A cache of the samples 10 to 19."""
    return make_cache(data.inputs, data.labels, shard=(1, 4), **options)


def test_the_whole_data_set_in_order_joins_to_its_shard(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = shard_of(make_cache, data)
    capsys.readouterr()
    source_indices = join_samples(data, shard)
    assert source_indices.tolist() == list(range(10, 20))
    assert is_joined(shard, source_indices, data)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("left", "right"), [(10, 19), (12, 13), (19, 20), (0, 15)])
def test_the_whole_data_set_out_of_order_is_refused(
    make_cache: MakeCache, data: ArraySource, left: int, right: int
) -> None:
    shard = shard_of(make_cache, data)
    order = np.arange(SAMPLES)
    order[[left, right]] = right, left
    expected = (
        r"^sample \d+ of mine is not in .*cache\.h5, a shard of npz:data\.npz@train \(30 of 40 are "
        "unknown\\); "
        r"give the data of the cache, in the order of the dump, or the samples of the shard alone"
    )
    with pytest.raises(DataError, match=expected):
        join_samples(picked(data, order), shard)


def test_the_samples_of_a_shard_alone_join_in_any_order(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = shard_of(make_cache, data)
    capsys.readouterr()
    assert join_samples(picked(data, np.arange(10, 20)), shard).tolist() == list(range(10))
    assert capsys.readouterr().out == ""
    order = np.random.default_rng(0).permutation(10)
    source = picked(data, 10 + order)
    source_indices = join_samples(source, shard)
    assert source_indices.tolist() == np.argsort(order).tolist()
    assert is_joined(shard, source_indices, source)
    assert (
        "note: mine is not in the order of the cache (first difference at"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(("rows", "first"), [(range(9), 0), (range(10, 21), 10), (range(39), 0)])
def test_samples_of_other_shards_are_refused_with_those_of_the_shard(
    make_cache: MakeCache, data: ArraySource, rows: range, first: int
) -> None:
    shard = shard_of(make_cache, data)
    with pytest.raises(DataError, match=rf"sample {first} of mine is not in .* are unknown"):
        join_samples(picked(data, list(rows)), shard)


def test_the_samples_of_another_shard_are_refused(make_cache: MakeCache, data: ArraySource) -> None:
    shard = shard_of(make_cache, data)
    with pytest.raises(DataError, match=r"sample 0 of mine is not in .* \(10 of \d+ are unknown\)"):
        join_samples(picked(data, np.arange(20, 30)), shard)


def test_mixup_of_a_shard_needs_the_whole_data_set(
    make_cache: MakeCache, data: ArraySource
) -> None:
    shard = shard_of(make_cache, data, augment="mixup", views=2)
    cpu = torch.device("cpu")
    whole = join_data(data, shard, augment=None, temperatures=[1.0], device=cpu)
    assert len(whole) == 10
    expected = (
        r"cache\.h5 holds 10 of 40 samples, each mixed with any of them, but mine has only 10; give the "
        "whole data"
    )
    shard_samples = picked(data, np.arange(10, 20))
    with pytest.raises(SettingsError, match=expected):
        join_data(shard_samples, shard, augment=None, temperatures=[1.0], device=cpu)


def test_partners_of_a_shard_in_another_order_are_refused(
    make_cache: MakeCache, data: ArraySource
) -> None:
    # the samples of the shard are in order, but not the samples that they are mixed with
    shard = shard_of(make_cache, data, augment="mixup", views=2)
    order = np.concatenate([np.arange(20), np.arange(39, 19, -1)])
    with pytest.raises(
        DataError, match=r"sample 1\d of mine in view \d is not what the teacher of"
    ):
        join_data(
            picked(data, order), shard, augment=None, temperatures=[1.0], device=torch.device("cpu")
        )


# several data sets in one batch


def a_batch(
    samples: int, shape: tuple[int, ...] = (1, 8, 8), targets: Targets | None = None
) -> TrainingBatch:
    return TrainingBatch(
        torch.rand(samples, *shape),
        torch.arange(samples) % 5,
        {} if targets is None else {1.0: targets},
    )


def test_batches_of_several_data_sets_become_one() -> None:
    first, second = a_batch(3, targets=some_rows(3)), a_batch(2, targets=some_rows(2))
    joint = concatenate_batches([first, second])
    assert torch.equal(joint.inputs, torch.cat([first.inputs, second.inputs]))
    assert isinstance(joint.labels, Tensor)
    assert joint.labels.tolist() == [0, 1, 2, 0, 1]
    assert isinstance(joint.targets[1.0], Tensor)
    assert torch.equal(joint.targets[1.0], torch.cat([some_rows(3), some_rows(2)]))
    assert concatenate_batches([first]) is first


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2, 1, 8, 7), torch.zeros(2, 64), torch.zeros(2, 1, 8, 8, dtype=torch.int64)],
)
def test_inputs_of_different_shapes_or_types_are_refused(inputs: Tensor) -> None:
    other = a_batch(2)._replace(inputs=inputs)
    with pytest.raises(
        DataError,
        match=r"inputs of the data sets differ: \[.*\(1, 8, 8\).*\]; expected the same shape and dtype",
    ):
        concatenate_batches([a_batch(3), other])


def some_rows(samples: int, classes: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, classes, generator=generator).log_softmax(-1)


def sparse(log_probs: Tensor, k: int) -> SparseTargets:
    """The k largest classes; the others share what is left equally."""
    top, ids = log_probs.topk(k)
    rest = torch.log1p(-top.exp().sum(-1)) - np.log(log_probs.shape[1] - k)
    return SparseTargets(ids, top, rest, log_probs.shape[1])


@pytest.mark.parametrize(
    ("ks", "stays_sparse"),
    [((3, 3), True), ((3, 4), False), ((3, 0), False), ((0, 3), False), ((3, 3, 3), True)],
)
def test_targets_are_together_what_they_are_alone(ks: tuple[int, ...], stays_sparse: bool) -> None:
    dense = [some_rows(4 + number) for number in range(len(ks))]
    parts = [sparse(rows, k) if k else rows for rows, k in zip(dense, ks, strict=True)]
    joint = concatenate_targets(parts)
    assert isinstance(joint, SparseTargets) is stays_sparse
    expected = torch.cat([to_dense(part) for part in parts])
    torch.testing.assert_close(to_dense(joint), expected)
    assert (expected.exp().sum(-1) - 1).abs().max() < 1e-5  # each part is a distribution


def test_without_targets_there_are_none_together() -> None:
    assert concatenate_batches([a_batch(3), a_batch(2)]).targets == {}


def test_labels_that_are_not_mixed_count_as_mixed_with_nothing() -> None:
    plain = torch.tensor([3, -1])
    mixed = MixedLabels(torch.tensor([0, 1]), torch.tensor([2, -1]), torch.tensor([0.25, 0.5]))
    joint = concatenate_labels([plain, mixed])
    assert isinstance(joint, MixedLabels)
    log_probs = some_rows(4, 5)
    # two samples have all their labels: one that is not mixed, and one with its partner
    expected = -(log_probs[0, 3] + 0.75 * log_probs[2, 0] + 0.25 * log_probs[2, 2]) / 2
    torch.testing.assert_close(hard_loss(log_probs, joint), expected)
    assert torch.equal(concatenate_labels([mixed])[0], mixed[0])
    unmixed = concatenate_labels([plain, plain])
    assert isinstance(unmixed, Tensor)
    assert unmixed.tolist() == [3, -1, 3, -1]


# which view


def views_over(part: JoinedData, epochs: int) -> Indices:
    """The view of each sample in each epoch, (epochs, N)."""
    return np.array(
        [np.broadcast_to(part.views(epoch, part.sample_ids), len(part)) for epoch in range(epochs)]
    )


def joined(cache: Cache, source: ArraySource, *, rotate: bool = True) -> JoinedData:
    return join_data(
        source, cache, augment=None, temperatures=[1.0], device=torch.device("cpu"), rotate=rotate
    )


def test_a_sample_goes_through_all_views_in_turn_from_one_of_its_own(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data.inputs, data.labels, views=4, first_view=2, augment="flip")
    views = views_over(joined(cache, data), 9)
    assert ((views >= 2) & (views < 6)).all()
    assert ((views[1:] - views[:-1]) % 4 == 1).all()
    counts = np.bincount(views[0] - 2, minlength=4)
    assert counts.sum() == SAMPLES
    assert counts.min() >= 3  # an epoch is a mixture of all views
    # a sample has the same views wherever it is in the data, and in any batch
    part = joined(cache, picked(data, np.arange(SAMPLES)[::-1]))
    np.testing.assert_array_equal(views_over(part, 9), views)
    assert np.array_equal(part.views(3, part.sample_ids[[7, 1]]), views[3, [7, 1]])


def test_without_rotation_an_epoch_is_one_view(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data.inputs, data.labels, views=4, first_view=2, augment="flip")
    views = views_over(joined(cache, data, rotate=False), 9)
    assert views[:, 0].tolist() == [2, 3, 4, 5, 2, 3, 4, 5, 2]
    assert (views == views[:, :1]).all()


def test_on_labels_alone_every_epoch_is_a_view_of_its_own(data: ArraySource) -> None:
    views = views_over(hard_label_data(data, "flip", 3, 5), 9)
    assert (views == np.arange(9)[:, None]).all()


# what the join is for


def largest_error(
    monkeypatch: pytest.MonkeyPatch, teacher: nn.Module, config: TrainConfig
) -> float:
    """Train, and compare the targets of every step with the teacher's output for the same inputs."""
    errors = []

    def step(learner: Student, inputs: Tensor, labels: Tensor, targets: Tensor, *_: object) -> None:
        live = torch.log_softmax(teacher(inputs) / learner.temperature, -1)
        errors.append((live - targets).abs().max().item())
        learner.losses.append(torch.zeros(3))

    monkeypatch.setattr(Student, "step", step)
    train(config)
    return max(errors)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("augment", [None, "shift:2,flip", "shift:1,mixup"])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_target_belongs_to_the_pixels_the_student_sees(
    make_cache: MakeCache,
    data: ArraySource,
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    augment: str | None,
    reverse: bool,
    rotate: bool,
) -> None:
    options = {"augment": augment, "views": 2} if augment else {}
    cache = make_cache(data.inputs, data.labels, **options)
    order = np.arange(SAMPLES)[::-1] if reverse else np.arange(SAMPLES)
    np.savez(tmp_path / "mine.npz", x=data.inputs[order], y=data.labels[order])
    config = make_train_config(
        student="mlp:4",
        data=f"npz:{tmp_path / 'mine.npz'}",
        out=tmp_path / "run",
        cache=cache.path,
        epochs=2,
        device="cpu",
        rotate=rotate,
    )
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")()
    assert largest_error(monkeypatch, teacher, config) < 0.02


@pytest.mark.parametrize(
    ("augment", "given"),
    [
        *((augment, "whole") for augment in (None, "shift:2,flip", "shift:1,mixup")),
        *((augment, "own") for augment in (None, "shift:2,flip")),  # mixup needs the whole
        *((augment, "own backwards") for augment in (None, "shift:2,flip")),
    ],
)
def test_every_target_of_a_shard_belongs_to_the_pixels_the_student_sees(
    make_cache: MakeCache,
    data: ArraySource,
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    augment: str | None,
    given: str,
) -> None:
    options = {"augment": augment, "views": 3, "first_view": 5} if augment else {}
    shard = shard_of(make_cache, data, **options)
    rows = {
        "whole": np.arange(SAMPLES),
        "own": np.arange(10, 20),
        "own backwards": np.arange(19, 9, -1),
    }
    order = rows[given]
    np.savez(tmp_path / "mine.npz", x=data.inputs[order], y=data.labels[order])
    config = make_train_config(
        student="mlp:4",
        data=f"npz:{tmp_path / 'mine.npz'}",
        out=tmp_path / "run",
        cache=shard.path,
        epochs=3,
        device="cpu",
    )
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")()
    assert largest_error(monkeypatch, teacher, config) < 0.02
