"""Every epoch of a DataLoader has other views, whoever drives it and wherever its items are made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import softcache
from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from tests.conftest import SAMPLES

VIEWS = 3


@pytest.fixture
def views(dump_config: DumpConfig) -> Cache:
    """A cache of three views with embedded inputs."""
    return dump(replace(dump_config, views=VIEWS, augment="shift:1", embed_inputs=True))


def views_seen(cache: Cache, loader: DataLoader[object], epoch: int | None = None) -> set[int]:
    """Which views the soft targets of a whole pass are from; rotate=False gives one view an epoch."""
    data = loader.dataset
    assert isinstance(data, softcache.SoftLabelDataset)
    if epoch is not None:
        data.set_epoch(epoch)
    targets = torch.cat([batch[2] for batch in loader]).sort(0).values
    rows = np.arange(SAMPLES)
    return {
        view
        for view in range(VIEWS)
        if np.allclose(targets, np.sort(cache.rows(view, rows), 0), atol=1e-3)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_gives_each_pass_the_next_views(views: Cache, workers: int) -> None:
    data = softcache.SoftLabelDataset(None, views.path, rotate=False)
    loader: DataLoader[object] = DataLoader(
        data, 50, sampler=softcache.ViewSampler(data), num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    seen = [views_seen(views, loader) for _ in range(4)]
    assert sorted(next(iter(one)) for one in seen[:3]) == [0, 1, 2]
    assert all(len(one) == 1 for one in seen)
    assert seen[3] == seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_reaches_workers_that_live_on(views: Cache, workers: int) -> None:
    data = softcache.SoftLabelDataset(None, views.path, rotate=False)
    loader: DataLoader[object] = DataLoader(
        data, 50, num_workers=workers, persistent_workers=workers > 0
    )
    seen = [views_seen(views, loader, epoch) for epoch in (0, 1, 2, 1)]
    assert sorted(next(iter(one)) for one in seen[:3]) == [0, 1, 2]
    assert seen[3] == seen[1]


def test_set_epoch_of_the_sampler_says_which_pass_it_is(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    sampler = softcache.ViewSampler(data, seed=5)
    assert len(sampler) == SAMPLES
    first, second = list(sampler), list(sampler)
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert sorted(item for _, item in first) == list(range(SAMPLES))
    assert [item for _, item in first] != [item for _, item in second]
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert list(softcache.ViewSampler(data, shuffle=False)) == [(0, n) for n in range(SAMPLES)]


def test_pairs_of_several_epochs_in_a_batch_are_each_in_their_own_view(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path, rotate=False)
    both = data.__getitems__([(0, 7), (2, 7)])
    torch.testing.assert_close(both[0][2], data[0, 7][2])
    torch.testing.assert_close(both[1][2], data[2, 7][2])
    assert not torch.equal(both[0][0], both[1][0])


def test_a_second_pass_in_the_same_epoch_is_warned_of_once(
    views: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    loader: DataLoader[object] = DataLoader(data, 64)
    list(loader)
    assert not caplog.records
    list(loader)
    list(loader)
    (record,) = caplog.records
    assert "a second pass over" in record.message
    assert "sampler=softcache.ViewSampler(dataset)" in record.message
    caplog.clear()
    for epoch in range(3):
        data.set_epoch(epoch)
        list(loader)
    sampler = softcache.ViewSampler(data)
    for _ in range(3):
        list(DataLoader(data, 64, sampler=sampler))
    assert not caplog.records


def test_items_draw_nothing_from_the_global_generator(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for index in (0, 5):
        data[index]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0, 0.0, -1, float("inf"), float("nan")])
def test_a_temperature_that_is_none_is_refused(views: Cache, temperature: float) -> None:
    with pytest.raises(SettingsError, match=r"temperature is .*; expected a number above 0"):
        softcache.SoftLabelDataset(None, views.path, temperature=temperature)


def test_workers_that_are_not_forked_have_the_same_items(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path, rotate=False)
    loaders = [
        DataLoader(data, 100, num_workers=workers, multiprocessing_context=context)
        for workers, context in ((0, None), (1, "spawn"))
    ]
    here, there = (list(loader) for loader in loaders)
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_part_of_a_data_set_is_not_sampled(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    with pytest.raises(SettingsError, match="a ViewSampler of Subset; expected a SoftLabelDataset"):
        softcache.ViewSampler(torch.utils.data.Subset(data, [0, 1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float"):
        data.set_epoch(1.5)  # type: ignore[arg-type]


def test_a_look_at_an_item_is_no_second_pass(
    views: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    data[0]
    for epoch in range(2):
        data.set_epoch(epoch)
        list(DataLoader(data, 64))
    assert not caplog.records
