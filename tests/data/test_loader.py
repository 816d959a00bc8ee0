"""Batches: their order, their contents, and that worker processes change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softcache.data.augment import Augmentation, parse_augment
from softcache.data.keys import sample_keys
from softcache.data.loader import (
    Batch,
    Request,
    ShuffledBatches,
    augmented,
    joint_loader,
    loader,
    make_request,
    sequential_batches,
)
from softcache.data.open import open_source
from softcache.data.source import ArraySource
from softcache.errors import DataError
from tests.conftest import make_arrays

# the order of batches


def test_a_sampler_chooses_the_order_of_an_epoch() -> None:
    class Reversed(ShuffledBatches):
        def order(self) -> npt.NDArray[np.int64]:
            return np.arange(self.samples)[::-1] + 100 * self.epoch

    batches = Reversed(6, 4, seed=0)
    assert [request.source_indices for request in batches] == [[5, 4, 3, 2], [1, 0]]
    batches.set_epoch(1, first=1)
    assert [request.source_indices for request in batches] == [[101, 100]]
    shuffled = ShuffledBatches(50, 8, seed=1)
    assert flat(shuffled) == shuffled.order().tolist()


def flat(batches: Iterable[Request]) -> list[int]:
    return [index for batch in batches for index in batch.source_indices]


@pytest.mark.parametrize(
    ("samples", "batch_size"), [(10, 5), (10, 4), (12, 5), (3, 8), (1, 4), (1, 1), (4, 1)]
)
def test_an_epoch_has_every_sample_once(samples: int, batch_size: int) -> None:
    batches = list(ShuffledBatches(samples, batch_size, seed=3))
    assert sorted(flat(batches)) == list(range(samples))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == len(ShuffledBatches(samples, batch_size, seed=3))


@pytest.mark.parametrize(("samples", "batch_size"), [(11, 5), (5, 4), (3, 2)])
def test_a_remainder_of_one_sample_is_left_out(samples: int, batch_size: int) -> None:
    # batch normalization cannot train on a single sample
    batches = list(ShuffledBatches(samples, batch_size, seed=3))
    assert [len(batch) for batch in batches] == [batch_size] * (samples // batch_size)
    assert len(set(flat(batches))) == samples - 1
    assert len(batches) == len(ShuffledBatches(samples, batch_size, seed=3))


def test_the_sample_left_out_is_another_each_epoch() -> None:
    batches = ShuffledBatches(11, 5, seed=0)
    left_out = set()
    for epoch in range(20):
        batches.set_epoch(epoch)
        left_out |= set(range(11)) - set(flat(batches))
    assert len(left_out) > 3


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int = 7) -> tuple[int, ...]:
        batches = ShuffledBatches(100, batch_size, seed)
        batches.set_epoch(epoch)
        return tuple(flat(batches))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(order(*key) == indices for key, indices in orders.items())
    assert len(set(orders.values())) == len(orders)
    assert order(1, 2) == order(1, 2, batch_size=30)


def test_batches_are_what_the_request_makes_of_indices_and_epoch() -> None:
    def request(indices: npt.NDArray[np.int64], epoch: int) -> Request:
        return Request(indices.tolist(), view=10 + epoch, sample_ids=100 + indices)

    batches = ShuffledBatches(10, 4, 3, request)
    batches.set_epoch(2)
    requests = list(batches)
    plain = ShuffledBatches(10, 4, 3)
    plain.set_epoch(2)
    assert flat(requests) == flat(plain)
    for made in requests:
        assert made.view == 12
        assert made.sample_ids is not None
        assert made.sample_ids.tolist() == [100 + index for index in made.source_indices]


def test_sequential_batches_hold_every_sample_in_order() -> None:
    assert sequential_batches(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert sequential_batches(6, 3) == [range(3), range(3, 6)]
    assert sequential_batches(2, 3) == [range(2)]


# the loader


@dataclass(frozen=True)
class CountedSource(ArraySource):
    """Records the indices of every fetch."""

    calls: list[list[int]] = field(default_factory=list)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        self.calls.append(list(indices))
        return super().fetch(indices)


@pytest.fixture
def counted() -> CountedSource:
    x, y = make_arrays(20)
    return CountedSource("tiny", x, y)


class OneByOne(Dataset[tuple[Tensor, int]]):
    """The source as a Dataset without __getitems__, from which torch fetches single samples."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, labels = self.source.fetch([index])
        return inputs[0], int(labels[0])


def test_the_source_is_asked_once_for_a_batch(counted: CountedSource) -> None:
    batches = [[3, 1, 2], [19, 0], [7]]
    list(loader(counted, batches))
    assert counted.calls == batches


def test_asking_for_single_samples_would_be_noticed(counted: CountedSource) -> None:
    list(DataLoader(OneByOne(counted), batch_sampler=[[3, 1, 2], [19, 0], [7]]))
    assert counted.calls == [[3], [1], [2], [19], [0], [7]]


def test_a_batch_holds_what_the_source_holds(counted: CountedSource) -> None:
    batch = next(iter(loader(counted, [[5, 2]], keys=True)))
    assert batch.source_indices.tolist() == [5, 2]
    assert np.array_equal(batch.inputs.numpy(), counted.inputs[[5, 2]])
    assert batch.labels.tolist() == counted.labels[[5, 2]].tolist()
    assert np.array_equal(batch.keys.numpy().view(np.uint64), sample_keys(batch.inputs))


def test_a_batch_without_partners_has_none(counted: CountedSource) -> None:
    batch = next(iter(loader(counted, [Request([5, 2])])))
    assert len(batch.partners) == len(batch.partner_labels) == 0


def test_a_request_asks_for_the_partners_of_its_samples() -> None:
    mixup, samples = parse_augment("mixup", seed=3, total=20), np.array([4, 9, 2])
    drawn = mixup.partners(6, samples)
    assert drawn is not None
    request = make_request(mixup, [4, 9, 2], 6, samples)
    assert request.view == 6
    assert list(request.partner_indices) == drawn.tolist()
    # if the data are in another order, partners are looked up by sample id, not by position
    source_index_of = np.arange(20)[::-1]
    moved = make_request(mixup, source_index_of[samples].tolist(), 6, samples, source_index_of)
    assert list(moved.partner_indices) == source_index_of[drawn].tolist()
    assert list(moved.partner_indices) != drawn.tolist()


def test_a_request_without_mixup_asks_for_no_partners() -> None:
    request = make_request(parse_augment("flip", seed=3, total=20), [4], 6, np.array([4]))
    assert len(request) == 1
    assert list(request.partner_indices) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_partners_and_their_labels(counted: CountedSource, workers: int) -> None:
    batch = next(iter(loader(counted, [Request([5, 2], partner_indices=[2, 7])], workers=workers)))
    assert batch.labels.tolist() == counted.labels[[5, 2]].tolist()
    assert np.array_equal(batch.partners.numpy(), counted.inputs[[2, 7]])
    assert batch.partner_labels.tolist() == counted.labels[[2, 7]].tolist()


def test_inputs_and_partners_become_floats_before_they_are_mixed(counted: CountedSource) -> None:
    mixup, samples = parse_augment("mixup", seed=3, total=20), np.arange(20)
    request = make_request(mixup, range(20), 1, samples)
    batch = next(iter(loader(counted, [request])))
    mixed = augmented(batch, mixup, 1, samples, torch.device("cpu"))
    weights = mixup.partner_weights(1, samples)[:, None, None, None]
    partners = counted.inputs[list(request.partner_indices)] / 255
    expected = counted.inputs / 255 * (1 - weights) + partners * weights
    assert mixed.dtype == torch.float32
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("spec", [None, "shift:2,flip", "crop:0.5,jitter:0.3,mixup"])
def test_reordered_data_give_every_sample_the_same_view(spec: str | None) -> None:
    # sample n of a cache is augmented as number n, wherever it is in the current data
    x, y = make_arrays(20)
    augmentation = parse_augment(spec, seed=3, total=20)

    def views(order: npt.NDArray[np.int64]) -> Tensor:
        """The views by sample id, from data with sample `order[i]` at index i."""
        source, source_index_of = ArraySource("tiny", x[order], y[order]), np.argsort(order)
        sample_ids = np.arange(20)
        indices = source_index_of.tolist()
        request = make_request(augmentation, indices, 1, sample_ids, source_index_of)
        batch = next(iter(loader(source, [request], augmentation=augmentation)))
        return augmented(batch, augmentation, 1, sample_ids, torch.device("cpu"))

    in_order = views(np.arange(20))
    assert torch.equal(views(np.random.default_rng(0).permutation(20)), in_order)


def test_keys_are_made_only_where_they_are_asked_for(counted: CountedSource) -> None:
    assert len(next(iter(loader(counted, [[5, 2]]))).keys) == 0


def test_worker_processes_give_the_same_batches_in_the_same_order() -> None:
    x, y = make_arrays(50)
    source = ArraySource("tiny", x, y)

    def epochs(workers: int) -> list[Batch]:
        batches = ShuffledBatches(50, 8, seed=1)
        epoch_loader = loader(source, batches, workers=workers, keys=True)
        loaded: list[Batch] = []
        for epoch in range(2):
            batches.set_epoch(epoch)  # reaches workers that persist from the previous epoch
            loaded += epoch_loader
        return loaded

    alone, together = epochs(0), epochs(2)
    assert len(alone) == len(together) == 14
    for expected, batch in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))
    assert not torch.equal(alone[0].source_indices, alone[7].source_indices)


@pytest.fixture
def broken_images(tmp_path: Path) -> str:
    """The specification of an image folder with a broken first image, 0.png."""
    (tmp_path / "cat").mkdir()
    for name in "123":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "cat" / f"{name}.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"hello")
    return f"folder:{tmp_path}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_process_is_the_same_one_line(
    broken_images: str, workers: int
) -> None:
    batches = loader(open_source(broken_images), [[1], [0], [2]], workers=workers)
    with pytest.raises(
        DataError, match=r"^\S*cat/0\.png cannot be read as an image \([^\n]*\)[^\n]*$"
    ):
        list(batches)


def test_a_loader_gives_what_comes_before_the_error(broken_images: str) -> None:
    batches = iter(loader(open_source(broken_images), [[1, 2], [0]], workers=1))
    assert len(next(batches).source_indices) == 2
    with pytest.raises(DataError, match="cannot be read as an image"):
        next(batches)


# several sources


def several() -> list[tuple[ArraySource, Augmentation]]:
    """Two sources with different samples, each with its own augmentation."""
    return [
        (ArraySource("one", *make_arrays(20)), parse_augment("flip", seed=3, total=20)),
        (ArraySource("two", *make_arrays(9, seed=1)), Augmentation(None, 0, 9)),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_joint_batch_comes_by_the_number_of_its_source(workers: int) -> None:
    parts = several()
    requests = [{0: Request([5, 2]), 1: Request([8])}, {1: Request([0, 1])}, {0: Request([7])}]
    batches = list(joint_loader(parts, requests, workers=workers))
    assert [list(batch) for batch in batches] == [[0, 1], [1], [0]]
    for batch, by_part in zip(batches, requests, strict=True):
        for part, request in by_part.items():
            source = parts[part][0]
            assert batch[part].source_indices.tolist() == list(request.source_indices)
            assert np.array_equal(
                batch[part].inputs.numpy(), source.inputs[list(request.source_indices)]
            )
            assert np.array_equal(
                batch[part].labels.numpy(), source.labels[list(request.source_indices)]
            )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_one_of_several_sources_is_the_same_one_line(
    broken_images: str, workers: int
) -> None:
    parts = [several()[1], (open_source(broken_images), Augmentation(None, 0))]
    batches = joint_loader(parts, [{0: Request([3]), 1: Request([0])}], workers=workers)
    with pytest.raises(
        DataError, match=r"^\S*cat/0\.png cannot be read as an image \([^\n]*\)[^\n]*$"
    ):
        list(batches)
