"""The Python interface: soft targets as tensors, and samples with the soft targets of their pixels."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import softcache
from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, FormatError, SettingsError, SoftcacheError
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.conftest import SAMPLES, make_arrays
from tests.test_readme import Own


@pytest.fixture
def views(dump_config: DumpConfig) -> Cache:
    """A cache of three views with embedded inputs."""
    return dump(replace(dump_config, views=3, augment="shift:1", embed_inputs=True))


# an open cache


def test_targets_are_those_of_the_rows_at_any_temperature(views: Cache) -> None:
    cache = softcache.open(views.path)
    rows = torch.tensor([5, 0, 299])
    for view, temperature in ((0, None), (2, 1.5)):
        targets = cache.targets(rows, view=view, temperature=temperature)
        assert isinstance(targets, torch.Tensor)
        assert targets.dtype == torch.float32
        np.testing.assert_allclose(
            targets, views.rows(view, rows.numpy(), temperature), rtol=1e-4, atol=1e-4
        )
    assert (len(cache), cache.classes, cache.views, cache.temperature) == (SAMPLES, 5, 3, 4.0)
    assert cache.content_id == views.content_id()


def test_targets_of_few_classes_stay_sparse_and_can_be_made_dense(dump_config: DumpConfig) -> None:
    cache = softcache.open(dump(replace(dump_config, encoding="topk:2")).path)
    sparse = cache.targets([1, 2])
    assert isinstance(sparse, softcache.SparseTargets)
    dense = softcache.to_dense(sparse)
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(2))
    labels = torch.tensor([0, 1])
    losses = [
        softcache.distillation_loss(
            torch.zeros(2, 5), targets, labels, temperature=4.0, alpha=1.0
        ).total
        for targets in (sparse, dense)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [300]}, r"row 300 of .*tiny\.h5; expected 0 to 299"),
        ({"rows": [-1]}, r"row -1 of .*; expected 0 to 299"),
        ({"rows": [0], "view": 3}, r"view 3 of .*; expected 0 to 2"),
        ({"rows": [0], "temperature": 0.0}, r"temperature is 0\.0; expected a number above 0"),
        ({"rows": [0], "temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_what_cannot_be_had_is_told(
    arguments: dict[str, object], message: str, views: Cache
) -> None:
    with pytest.raises(SettingsError, match=message):
        softcache.open(views.path).targets(**arguments)  # type: ignore[arg-type]


def test_damage_is_found_if_it_is_looked_for(views: Cache) -> None:
    raw = bytearray(views.path.read_bytes())
    raw[views.header.array("log_probs").offset + 7] ^= 1
    views.path.write_bytes(raw)
    softcache.open(views.path)
    with pytest.raises(FormatError, match=r"tiny\.h5 is damaged"):
        softcache.open(views.path, verify=True)


# a data set


def test_every_target_is_what_the_teacher_says_of_these_pixels(
    views: Cache, teacher_file: Path
) -> None:
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")().eval()
    data = softcache.SoftLabelDataset(Own(), views.path)
    seen_labels = []
    for epoch in range(3):
        data.set_epoch(epoch)
        for inputs, labels, targets in DataLoader(data, batch_size=50):
            with torch.no_grad():
                live = torch.log_softmax(teacher(inputs) / 4.0, -1)
            assert (live - targets).abs().max() < 2e-3
            seen_labels.append(labels)
    np.testing.assert_array_equal(torch.cat(seen_labels), np.tile(make_arrays()[1], 3))


def test_targets_of_another_epoch_would_be_noticed(views: Cache, teacher_file: Path) -> None:
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")().eval()
    data = softcache.SoftLabelDataset(Own(), views.path)
    inputs = torch.stack([data[i][0] for i in range(50)])
    data.set_epoch(1)
    targets = torch.stack([data[i][2] for i in range(50)])
    with torch.no_grad():
        live = torch.log_softmax(teacher(inputs) / 4.0, -1)
    assert (live - targets).abs().max() > 0.05


def test_one_sample_is_the_one_of_a_batch(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, softcache.open(views.path), temperature=2.0)
    batch = data.__getitems__([7, 3])
    for index, batch_item in zip((7, 3), batch, strict=True):
        for tensor, batch_tensor in zip(data[index], batch_item, strict=True):
            assert torch.equal(tensor, batch_tensor)
    assert len(data) == SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same(workers: int, views: Cache) -> None:
    data = softcache.SoftLabelDataset(Own(), views.path)
    loader = DataLoader(data, batch_size=64, num_workers=workers)
    again = softcache.SoftLabelDataset(Own(), views.path)
    for batch, expected in zip(loader, DataLoader(again, batch_size=64), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_mixed_samples_of_two_labels_count_as_unlabelled(dump_config: DumpConfig) -> None:
    cache = dump(replace(dump_config, views=2, augment="mixup"))
    data = softcache.SoftLabelDataset(Own(), cache.path)
    labels = np.array([int(data[i][1]) for i in range(SAMPLES)])
    unmixed_labels = make_arrays()[1]
    assert 0.05 < (labels >= 0).mean() < 0.6
    np.testing.assert_array_equal(labels[labels >= 0], unmixed_labels[labels >= 0])


def test_items_are_numbered_as_in_the_data_set(views: Cache) -> None:
    reordered = Own()
    order = np.random.default_rng(0).permutation(SAMPLES)
    reordered.images, reordered.labels = reordered.images[order], reordered.labels[order]
    data, embedded = (
        softcache.SoftLabelDataset(dataset, views.path, rotate=False)
        for dataset in (reordered, None)
    )
    for index in (0, 7, 299):
        assert int(data[index][1]) == int(reordered.labels[index])
        for a, b in zip(data[index], embedded[int(order[index])], strict=True):
            assert torch.equal(a, b)


def test_other_samples_are_refused(views: Cache) -> None:
    other = Own()
    other.images = other.images.copy()
    other.images[17] ^= 1
    with pytest.raises(DataError, match="sample 17 of Own is not in"):
        softcache.SoftLabelDataset(other, views.path)


def test_raw_samples_may_be_floats_as_they_were_dumped(views: Cache) -> None:
    data = softcache.SoftLabelDataset(None, views.path)
    assert data[0][0].dtype == torch.float32
    assert data[0][0].max() <= 1
    assert to_float(torch.zeros(1, dtype=torch.uint8)).dtype == torch.float32


def test_it_can_go_to_another_process(views: Cache) -> None:
    cache = pickle.loads(pickle.dumps(softcache.open(views.path)))
    assert cache.content_id == views.content_id()


# the module


def test_every_name_is_there_and_no_other() -> None:
    for name in softcache.__all__:
        assert getattr(softcache, name) is not None
    assert softcache.SoftcacheError is SoftcacheError
    with pytest.raises(AttributeError, match="module 'softcache' has no attribute 'nothing'"):
        _ = softcache.nothing


def test_importing_it_does_not_import_torch() -> None:
    program = (
        "import sys, softcache; print('torch' in sys.modules); softcache.open; "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]
