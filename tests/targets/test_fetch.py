"""Soft targets as students get them, compared with float64 and with the numpy reader."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from softcache.cache import Array as CacheArray
from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.targets.decode import to_dense
from softcache.targets.encode import soften
from softcache.targets.fetch import make_gather, soft_targets

Array = npt.NDArray[np.float64]
MakeCache = Callable[..., Cache]

SAMPLES, CLASSES = 60, 12
CPU = torch.device("cpu")
# its logits are its inputs, so that a test can choose them
TEACHER = "torch.nn:Flatten"


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    """A function that dumps a teacher with the given logits, (N, C)."""

    def make(logits: Array, temperature: float = 4.0, **options: object) -> Cache:
        np.savez(tmp_path / "logits.npz", x=logits[:, None, None].astype(np.float32))
        config = DumpConfig(
            teacher=TEACHER,
            data=f"npz:{tmp_path / 'logits.npz'}",
            temperature=temperature,
            out=tmp_path / "cache.h5",
            batch_size=16,
            device="cpu",
            **options,  # type: ignore[arg-type]
        )
        return dump(config)

    return make


@pytest.fixture
def logits() -> Array:
    rounded = np.random.default_rng(0).normal(0, 6, (SAMPLES, CLASSES)).astype(np.float32)
    return rounded.astype(np.float64)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def divergence(log_p: Array, log_q: npt.NDArray[np.floating]) -> float:
    """The largest KL(p ‖ q) of any row, in nats."""
    return float((np.exp(log_p) * (log_p - log_q.astype(np.float64))).sum(-1).max())


def targets_of(
    cache: Cache, cache_rows: npt.NDArray[np.int64], temperature: float, view: int = 0
) -> torch.Tensor:
    """Dense targets of rows of the cache, as a student gets them."""
    targets = soft_targets(cache, temperature, CPU)(view, cache_rows)
    assert isinstance(targets, torch.Tensor)
    return targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soften_is_log_softmax_of_logits_by_temperature(logits: Array, dtype: torch.dtype) -> None:
    tensor = torch.tensor(logits).to(dtype)
    log_probs = soften(tensor, 4.0)
    assert log_probs.dtype == torch.float32
    np.testing.assert_allclose(log_probs, log_softmax(tensor.double().numpy() / 4), atol=1e-5)


@pytest.mark.parametrize("stored_at", [1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_targets_are_the_teachers_at_any_temperature(
    make_cache: MakeCache, logits: Array, stored_at: float, temperature: float
) -> None:
    cache = make_cache(logits, stored_at)
    cache_rows = np.arange(SAMPLES)
    targets = targets_of(cache, cache_rows, temperature)
    assert targets.dtype == torch.float32
    assert divergence(log_softmax(logits / temperature), targets.numpy()) < 1e-5
    # the comparison fails at another temperature
    assert divergence(log_softmax(logits / (temperature * 1.1)), targets.numpy()) > 1e-5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e5])
def test_torch_and_numpy_decode_the_same(
    make_cache: MakeCache, logits: Array, scale: float, temperature: float
) -> None:
    cache = make_cache(logits * scale)
    cache_rows = np.arange(SAMPLES)
    targets = targets_of(cache, cache_rows, temperature)
    np.testing.assert_allclose(
        targets, cache.rows(0, cache_rows, temperature), rtol=1e-5, atol=1e-5
    )


def test_what_is_stored_is_the_nearest_float16(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits)
    stored = cache.arrays["log_probs"][0]
    exact = log_softmax(logits / 4)
    assert stored.dtype == np.dtype("<f2")
    # half a step of float16, plus a little for the float32 softmax
    assert (np.abs(stored - exact) <= 0.51 * np.spacing(np.abs(stored)).astype(float)).all()


def test_a_teacher_that_is_certain_gives_finite_targets(make_cache: MakeCache) -> None:
    certain = np.where(np.eye(CLASSES, dtype=bool), 0.0, -1e6)
    cache = make_cache(certain, 1.0)
    assert cache.arrays["log_probs"].min() == np.finfo(np.float16).min
    cache_rows = np.arange(CLASSES)
    for temperature in (1.0, 8.0):
        targets = targets_of(cache, cache_rows, temperature)
        assert targets.isfinite().all()
        assert torch.equal(targets.exp(), torch.eye(CLASSES))


def test_rows_sum_to_one_after_rounding(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits)
    cache_rows = np.arange(SAMPLES)
    targets = targets_of(cache, cache_rows, 4.0)
    np.testing.assert_allclose(targets.double().exp().sum(-1), 1, atol=1e-6)
    # the stored ones do not, so the decoder has to normalize
    assert np.abs(np.exp(cache.arrays["log_probs"][0].astype(float)).sum(-1) - 1).max() > 1e-5


def test_rows_come_in_the_order_asked_for(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits)
    cache_rows = np.array([7, 3, 59, 3, 0])  # in any order, with repeats
    expected = log_softmax(logits[cache_rows] / 2)
    np.testing.assert_allclose(targets_of(cache, cache_rows, 2.0), expected, atol=0.02)
    assert np.abs(log_softmax(logits[:5] / 2) - expected).max() > 1  # the first rows differ


def test_each_view_has_targets_of_its_own(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits, views=3, augment="flip")
    rows = np.random.default_rng(1).permutation(SAMPLES)[:20]
    by_view = [targets_of(cache, rows, 8.0, view) for view in range(3)]
    for view, targets in enumerate(by_view):
        np.testing.assert_allclose(targets, cache.rows(view, rows, 8.0), atol=1e-5)
    assert not torch.equal(by_view[0], by_view[1])


def test_each_row_of_a_batch_may_be_of_a_view_of_its_own(
    make_cache: MakeCache, logits: Array
) -> None:
    random = np.random.default_rng(1)
    rows, views = random.permutation(SAMPLES)[:20], random.integers(0, 3, 20)
    for encoding in ("dense", "topk:5", "quantized"):
        cache = make_cache(logits, views=3, augment="flip", encoding=encoding, overwrite=True)
        fetch = soft_targets(cache, 8.0, CPU)
        mixed = to_dense(fetch(views, rows))
        by_view = torch.stack([to_dense(fetch(view, rows)) for view in range(3)])
        assert torch.equal(mixed, by_view[views, np.arange(20)])
        assert not torch.allclose(mixed, by_view[(views + 1) % 3, np.arange(20)], atol=0.1)
        assert torch.equal(to_dense(fetch(np.array(2), rows)), by_view[2])


def test_the_read_only_map_gives_no_warning(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets_of(cache, np.arange(5), 4.0)


def test_the_file_stays_as_it_is(make_cache: MakeCache, logits: Array) -> None:
    cache = make_cache(logits)
    before = cache.path.read_bytes()
    targets = targets_of(cache, np.arange(SAMPLES), 4.0)
    targets.zero_()  # a student is free to modify its batch
    assert cache.path.read_bytes() == before


def test_rows_of_a_slow_file_are_asked_for_and_come_the_same(
    make_cache: MakeCache, logits: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(logits, 2.0)
    prefetched: list[list[int]] = []
    prefetch_rows = Cache.prefetch_rows

    def noted(self: Cache, array: CacheArray, rows: npt.NDArray[np.int64]) -> None:
        prefetched.append(rows.tolist())
        prefetch_rows(self, array, rows)

    monkeypatch.setattr(Cache, "prefetch_rows", noted)
    rows = np.array([2, 0, 2, 1])
    monkeypatch.setattr("softcache.targets.fetch.SLOW_ROW", 10.0)
    fast = make_gather(cache)
    expected = fast(rows)
    fast(rows)
    assert prefetched == []  # nothing to do while rows are in memory
    monkeypatch.setattr("softcache.targets.fetch.SLOW_ROW", -1.0)
    slow = make_gather(cache)
    for _ in range(3):
        gathered = slow(rows)
        for name, tensor in expected.items():
            assert torch.equal(gathered[name], tensor)
    assert prefetched == [rows.tolist()] * 2  # from the second batch on
