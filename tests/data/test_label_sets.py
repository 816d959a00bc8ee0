"""Samples with any number of labels, from every kind of data that can have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.data.class_names import align_classes
from softcache.data.label_sets import batch_sets, set_codes
from softcache.data.loader import loader, sequential_batches
from softcache.data.open import open_source
from softcache.data.source import has_label_sets, label_sets
from softcache.errors import DataError

SETS = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
DATASET = """
import numpy as np, torch
from torch.utils.data import Dataset

class Data(Dataset):
    classes = ["cat", "dog", "car"]
    def __init__(self, labels): self.labels = labels
    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return torch.full((2,), float(i)), self.labels[i]

def tensors(): return Data(torch.tensor([[1., 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]))
def bools(): return Data(np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], bool))
def ragged(): return Data([np.array([1, 0, 1]), np.array([1, 0]), 2, 1])
def partly(): return Data(torch.tensor([[1., 0, 1], [torch.nan] * 3, [-1, -1, -1], [0, 0, 0]]))
def scores(): return Data(torch.tensor([[.5, 0, 1]] * 4))
"""


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.bool_])
def test_rows_of_zeros_and_ones_are_sets(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2), "f4"), y=SETS.astype(dtype))
    source = open_source(f"npz:{tmp_path}/d.npz")
    assert has_label_sets(source)
    assert (source.fetch([3, 0])[1] == SETS[[3, 0]]).all()
    subset = open_source(f"npz:{tmp_path}/d.npz?samples=2")
    assert (subset.fetch([1])[1] == SETS[[1]]).all()


@pytest.mark.parametrize("missing", [np.nan, -1])
def test_a_row_without_labels(tmp_path: Path, missing: float) -> None:
    labels = SETS.astype(np.float32)
    labels[1] = missing
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2), "f4"), y=labels)
    source = open_source(f"npz:{tmp_path}/d.npz")
    (batch,) = loader(source, sequential_batches(4, 4))
    assert batch.labels.tolist() == [0, -1, 0, 0]
    assert (batch_sets(batch, 3)[[0, 2, 3]] == SETS[[0, 2, 3]]).all()


def test_one_label_each_stays_a_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 2), "f4"), y=np.eye(3))
    source = open_source(f"npz:{tmp_path}/d.npz")
    assert not has_label_sets(source)
    assert source.fetch([2])[1].tolist() == [2]
    assert label_sets(np.array([2, -1]), 3).tolist() == [[0, 0, 1], [0, 0, 0]]


def test_other_numbers_are_no_sets(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2), "f4"), y=SETS * 2)
    with pytest.raises(DataError, match=r"labels are int64 of shape \(4, 3\); expected integers"):
        open_source(f"npz:{tmp_path}/d.npz")


@pytest.mark.parametrize("name", ["tensors", "bools"])
def test_a_dataset_may_return_sets(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.py").write_text(DATASET)
    source = open_source(f"{tmp_path}/d.py:{name}")
    assert has_label_sets(source)
    (batch,) = loader(source, sequential_batches(4, 4))
    assert (batch.sets.numpy() == SETS).all()
    assert batch.sets.dtype == torch.uint8


def test_a_dataset_may_leave_samples_without_labels(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(DATASET)
    (batch,) = loader(open_source(f"{tmp_path}/d.py:partly"), sequential_batches(4, 4))
    assert batch.labels.tolist() == [0, -1, -1, 0]
    assert batch_sets(batch, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_dataset_must_be_consistent(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(DATASET)
    with pytest.raises(
        DataError, match=r"labels of one batch have different shapes, \[\(\), \(2,\)"
    ):
        open_source(f"{tmp_path}/d.py:ragged").fetch(range(4))
    with pytest.raises(DataError, match="whole number as its label"):
        open_source(f"{tmp_path}/d.py:scores").fetch([0])


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(DATASET)
    source = open_source(f"{tmp_path}/d.py:tensors")
    mapped = align_classes(source, ("car", "bus", "cat", "dog"), "the teacher")
    assert mapped.fetch([0, 2])[1].tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]


def test_codes_tell_sets_apart() -> None:
    random = np.random.default_rng(0)
    sets = np.unique(random.integers(0, 2, (500, 20)), axis=0).astype(np.uint8)
    codes = set_codes(sets)
    assert len(np.unique(codes)) == len(sets)
    assert codes.min() >= 0
    assert (set_codes(sets[::-1]) == codes[::-1]).all()
