"""Training on some of the samples that a cache knows, on others besides, and with other labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import Cache
from softcache.data.source import ArraySource
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError
from softcache.join.joined_data import JoinedData
from softcache.join.match import join, match_samples
from tests.conftest import make_arrays

CPU = torch.device("cpu")
SAMPLES = 40

MakeCache = Callable[..., Cache]


@pytest.fixture
def data() -> ArraySource:
    """Samples of which every pixel row differs."""
    return ArraySource("mine", *make_arrays(SAMPLES))


@pytest.fixture
def make_cache(tmp_path: Path, teacher_file: Path) -> MakeCache:
    def make(samples: ArraySource, **options: object) -> Cache:
        path = tmp_path / "data.npz"
        np.savez(path, x=samples.inputs, y=samples.labels)
        config = DumpConfig(
            teacher=f"{teacher_file}:teacher", data=f"npz:{path}", temperature=1.0,
            out=tmp_path / "cache.h5", device="cpu", **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return dump(config)

    return make


def picked(source: ArraySource, indices: object) -> ArraySource:
    at = np.asarray(indices)
    return ArraySource("mine", source.inputs[at], source.labels[at])


def joined(source: ArraySource, cache: Cache, **options: object) -> JoinedData:
    return join(
        source,
        cache,
        augment=None,
        temperatures=[1.0],
        device=CPU,
        **options,  # type: ignore[arg-type]
    )


def right_targets(part: JoinedData, cache: Cache, whole: ArraySource) -> bool:
    """Whether each sample comes with the soft targets of its own content."""
    assert part.targets is not None
    rows = part.sample_ids - cache.header.first_sample
    targets = part.targets(np.zeros(len(rows), np.int64), rows)[1.0]
    own = [
        int(np.flatnonzero((whole.inputs == image).all((1, 2, 3)))[0])
        for image in part.source.fetch(part.source_indices.tolist())[0].numpy()
    ]
    assert isinstance(targets, torch.Tensor)
    return bool(np.allclose(targets.numpy(), cache.rows(0, np.array(own)), atol=1e-5))


@pytest.mark.parametrize("count", [1, 7, 39])
def test_any_subset_in_any_order_joins_by_content(
    make_cache: MakeCache, data: ArraySource, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data)
    chosen = np.random.default_rng(count).permutation(SAMPLES)[:count]
    part = joined(picked(data, chosen), cache)
    assert len(part) == count
    assert sorted(part.source_indices.tolist()) == list(range(count))
    assert right_targets(part, cache, data)
    assert f"note: mine has {count} of the 40 samples of the cache; joined by content" in (
        capsys.readouterr().out
    )


def test_targets_of_another_sample_would_be_noticed(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(data)
    part = joined(picked(data, [5, 3, 9]), cache)
    object.__setattr__(part, "sample_ids", part.sample_ids[::-1].copy())
    assert not right_targets(part, cache, data)


def test_a_subset_of_a_shard_joins(make_cache: MakeCache, data: ArraySource) -> None:
    shard = make_cache(data, shard=(1, 4))
    part = joined(picked(data, [19, 12]), shard)
    assert part.sample_ids.tolist() == [12, 19]
    assert part.source_indices.tolist() == [1, 0]


def test_unknown_samples_are_left_out_if_that_is_asked_for(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(picked(data, range(10, 30)))
    with pytest.raises(DataError, match=r"sample 0 of mine is not in .* \(20 of 40 are unknown\)"):
        joined(data, cache)
    capsys.readouterr()
    part = joined(data, cache, known_only=True)
    assert part.source_indices.tolist() == list(range(10, 30))
    assert "note: 20 of the 40 samples of mine are not in" in capsys.readouterr().out


def test_data_of_which_nothing_is_known_are_refused_in_any_case(
    make_cache: MakeCache, data: ArraySource
) -> None:
    cache = make_cache(ArraySource("other", *make_arrays(SAMPLES, seed=1)))
    with pytest.raises(DataError, match=r"sample 0 of mine is not in .* \(40 of 40 are unknown\)"):
        joined(data, cache, known_only=True)


def test_copies_of_a_sample_take_a_row_each(make_cache: MakeCache, data: ArraySource) -> None:
    twice = picked(data, [0, 1, 0, 2])
    cache = make_cache(twice)
    match = match_samples(picked(data, [2, 0, 0]), cache)
    assert match.cache_rows.tolist() == [0, 2, 3]
    assert match.source_indices.tolist() == [1, 2, 0]
    with pytest.raises(DataError, match=r"sample 2 of mine is not in .* \(1 of 3 are unknown\)"):
        match_samples(picked(data, [0, 0, 0]), cache)


@pytest.mark.parametrize(("preferred", "expected"), [("data", 3), ("cache", 1)])
def test_other_labels_are_refused_or_one_side_is_preferred(
    make_cache: MakeCache, data: ArraySource, preferred: str, expected: int
) -> None:
    data.labels[:] = 1
    cache = make_cache(data)
    relabelled = ArraySource("mine", data.inputs, np.where(np.arange(SAMPLES) == 7, 3, 1))
    with pytest.raises(
        DataError,
        match=r"sample 7 of mine has label 3, but 1 in .* \(1 labels differ\).*--labels data or --labels",
    ):
        joined(relabelled, cache)
    part = joined(relabelled, cache, labels=preferred)
    labels = part.source.fetch(list(range(SAMPLES)))[1]
    assert labels[7] == expected
    assert set(np.delete(labels, 7).tolist()) == {1}


def test_mixed_samples_need_all_of_them(make_cache: MakeCache, data: ArraySource) -> None:
    cache = make_cache(data, augment="shift:1,mixup", views=2)
    with pytest.raises(SettingsError, match="each mixed with any of them, but mine has only 20"):
        joined(picked(data, range(20)), cache)


def test_a_subset_without_fingerprints_says_that_views_cannot_be_checked(
    make_cache: MakeCache, data: ArraySource, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(data, augment="shift:1", views=2)
    printed = set(cache.arrays["fingerprinted"].tolist())
    others = [row for row in range(SAMPLES) if row not in printed]
    joined(picked(data, others), cache)
    assert "has none of the samples with fingerprints" in capsys.readouterr().out
    joined(picked(data, [*others, *printed]), cache)
    assert "fingerprints" not in capsys.readouterr().out
