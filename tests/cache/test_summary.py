"""The summary of a cache equals one computed by hand, on a subset of rows and for merged parts too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.cache import Cache, open_cache, summary
from softcache.cache.merge import merge
from softcache.cache.summary import pooled_fidelity, summarize, summary_row_count
from softcache.dump.loop import dump
from tests.cache.test_merge import exact_config, views, write_data
from tests.cache.writer_cases import (
    CLASSES,
    SAMPLES,
    VIEWS,
    draft,
    row_values,
    run_dump,
    sample_values,
)

FIDELITY = {
    "rows": 10, "mean": 2e-4, "p99": 1e-3, "worst": 2e-3, "at": {"4": 2e-4, "1": 8e-4}, "moved": 0.01
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with two views of 30 samples, some of them unlabelled."""
    run_dump(tmp_path / "tiny.h5")
    return open_cache(tmp_path / "tiny.h5")


def by_hand(rows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Mean entropy, and agreement with the labels, of rows counted through all views."""
    log_probs = np.concatenate([row_values(view)["log_probs"] for view in range(VIEWS)])[rows]
    labels = np.tile(sample_values()["labels"], VIEWS)[rows]
    logs = log_probs.astype(np.float64)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))  # undo the rounding to float16
    labelled = labels >= 0
    entropy = -(np.exp(logs) * logs).sum(1).mean()
    return float(entropy), float((logs.argmax(1) == labels)[labelled].mean())


# one cache


def test_all_rows_of_a_small_cache_are_looked_at(cache: Cache) -> None:
    measured = summarize(cache)
    entropy, agreement = by_hand(np.arange(VIEWS * SAMPLES))
    assert measured["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert measured["agreement"] == pytest.approx(agreement)
    assert measured["rows"] == VIEWS * SAMPLES
    # the comparison would notice rows that are left out
    assert measured["entropy"] != pytest.approx(by_hand(np.arange(SAMPLES))[0], rel=1e-6)


def test_unlabelled_samples_neither_agree_nor_differ(cache: Cache) -> None:
    labels = sample_values()["labels"]
    assert (labels < 0).any()
    all_labelled = replace(cache, arrays=dict(cache.arrays) | {"labels": labels.clip(0)})
    assert summarize(all_labelled)["agreement"] != pytest.approx(summarize(cache)["agreement"])


def test_without_labels_there_is_no_agreement(cache: Cache) -> None:
    unlabelled = replace(cache, arrays=dict(cache.arrays) | {"labels": np.full(SAMPLES, -1)})
    measured = summarize(unlabelled)
    assert measured["agreement"] is None
    assert measured["entropy"] == summarize(cache)["entropy"]


def test_of_many_rows_some_are_looked_at_spread_through_all_views(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "SUMMARY_VALUES", 10 * CLASSES + 1)
    measured = summarize(cache)
    entropy, agreement = by_hand(np.arange(0, VIEWS * SAMPLES, 6))
    assert (measured["entropy"], measured["agreement"]) == pytest.approx((entropy, agreement))
    assert measured["rows"] == summary_row_count(cache) == 10
    assert measured["entropy"] != pytest.approx(by_hand(np.arange(10))[0])


def test_one_row_at_least_is_looked_at(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "SUMMARY_VALUES", CLASSES - 1)
    assert summary_row_count(cache) == summarize(cache)["rows"] == 1


@pytest.mark.parametrize("rows", [1, 7, 31])
def test_how_many_rows_are_read_at_once_changes_nothing(
    rows: int, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, done = summarize(cache), list[int]()
    monkeypatch.setattr(summary, "CHUNK_VALUES", rows * CLASSES)
    again = summarize(cache, done.append)
    assert again.pop("warnings", None) == expected.pop("warnings", None)
    assert again == pytest.approx(expected)
    assert sum(done) == VIEWS * SAMPLES
    assert max(done) == rows


def test_classes_that_were_never_drawn_count_as_nothing(tmp_path: Path) -> None:
    cache = dump(replace(exact_config(tmp_path), encoding="sampled:8", views=1))
    counts = np.stack([np.bincount(row, minlength=5) for row in cache.arrays["ids"][0]])
    assert (counts == 0).any()
    shares = counts / 8
    entropy = -(shares * np.log(np.where(counts, shares, 1))).sum(1).mean()
    assert summarize(cache)["entropy"] == pytest.approx(entropy, rel=1e-6)


# several parts


def with_fidelity(cache: Cache, fidelity: dict[str, Any] | None) -> Cache:
    """The cache with this fidelity in its summary, or without any."""
    optional = {"fidelity": fidelity} if fidelity else {}
    new_summary: dict[str, Any] = {"entropy": 1.0, "agreement": None, "rows": 1, **optional}
    return replace(cache, header=replace(cache.header, summary=new_summary))


def test_parts_count_by_the_rows_they_were_measured_on(cache: Cache) -> None:
    other = {
        "rows": 30, "mean": 4e-4, "p99": 5e-4, "worst": 3e-3, "at": {"1": 4e-4, "4": 0.0}, "moved": 0.05
    }  # fmt: skip
    pooled = pooled_fidelity([with_fidelity(cache, FIDELITY), with_fidelity(cache, other)])
    assert pooled is not None
    by_temperature = pooled.pop("at")
    assert by_temperature == pytest.approx({"4": 0.5e-4, "1": 5e-4})
    assert pooled == pytest.approx(
        {"rows": 40, "mean": 3.5e-4, "p99": 1e-3, "worst": 3e-3, "moved": 0.04}
    )


@pytest.mark.parametrize("name", ["repeats", "unstored"])
def test_some_figures_are_pooled_if_all_parts_have_them(cache: Cache, name: str) -> None:
    parts = [FIDELITY | {name: 1e-3}, FIDELITY | {"rows": 30, name: 5e-3}]
    pooled = pooled_fidelity([with_fidelity(cache, part) for part in parts])
    assert pooled
    assert pooled[name] == pytest.approx(4e-3)
    without = pooled_fidelity([with_fidelity(cache, part) for part in (*parts, FIDELITY)])
    assert without
    assert name not in without


@given(
    rows=st.lists(st.integers(1, 4096), min_size=1, max_size=6),
    numbers=st.lists(st.floats(0, 10), min_size=6, max_size=6),
)
def test_the_mean_of_the_parts_is_that_of_all_their_rows(
    rows: list[int], numbers: list[float]
) -> None:
    parts = [
        FIDELITY | {"rows": count, "mean": mean, "moved": mean / 10, "at": {"2": mean}}
        for count, mean in zip(rows, numbers, strict=False)
    ]
    pooled = pooled_fidelity([with_fidelity(header_only(), part) for part in parts])
    assert pooled is not None
    mean_of_rows = np.repeat(numbers[: len(rows)], rows).mean()
    assert pooled["mean"] == pytest.approx(mean_of_rows, abs=1e-12)
    assert pooled["at"] == pytest.approx({"2": mean_of_rows}, abs=1e-12)
    assert pooled["moved"] == pytest.approx(mean_of_rows / 10, abs=1e-12)
    assert pooled["rows"] == sum(rows)


def header_only() -> Cache:
    """A cache with nothing but a header, which is all that pooling reads."""
    return Cache(Path("none.h5"), draft(), b"", {})


def test_a_part_that_was_not_measured_leaves_all_unsaid(cache: Cache) -> None:
    measured = with_fidelity(cache, FIDELITY)
    unfinished = replace(cache, header=replace(cache.header, summary=None))
    assert pooled_fidelity([measured, with_fidelity(cache, None)]) is None
    assert pooled_fidelity([measured, unfinished]) is None
    assert pooled_fidelity([measured, measured]) is not None


def test_parts_measured_at_other_temperatures_leave_all_unsaid(cache: Cache) -> None:
    other = FIDELITY | {"at": {"4": 2e-4, "2": 8e-4}}
    assert pooled_fidelity([with_fidelity(cache, FIDELITY), with_fidelity(cache, other)]) is None


def test_a_merged_file_says_how_far_its_parts_are_from_the_teacher(tmp_path: Path) -> None:
    config = replace(exact_config(tmp_path), encoding="quantized")
    parts = [dump(replace(config, shard=(i, 2), out=tmp_path / f"{i}.h5")) for i in range(2)]
    fidelities = [(part.header.summary or {})["fidelity"] for part in parts]
    merged = (merge(parts, tmp_path / "merged.h5").header.summary or {})["fidelity"]
    assert merged["worst"] == max(fidelity["worst"] for fidelity in fidelities)
    assert merged["rows"] == sum(fidelity["rows"] for fidelity in fidelities)
    assert merged["mean"] == pytest.approx(np.mean([fidelity["mean"] for fidelity in fidelities]))
    # the whole dump is measured on the same rows, and agrees up to floating-point noise
    whole = (dump(config).header.summary or {})["fidelity"]
    assert whole["mean"] == pytest.approx(merged["mean"], rel=0.01)
    assert set(whole) == set(merged)


def test_a_part_without_a_measure_merges_into_a_file_without_one(tmp_path: Path) -> None:
    config = exact_config(tmp_path)
    parts = [dump(replace(config, shard=(i, 2), out=tmp_path / f"{i}.h5")) for i in range(2)]
    parts[1] = with_fidelity(parts[1], None)
    merged = merge(parts, tmp_path / "merged.h5").header.summary
    assert merged is not None
    assert set(merged) == {"entropy", "agreement", "rows"}


def test_an_evaluation_that_one_part_has_is_kept(tmp_path: Path) -> None:
    config = exact_config(tmp_path)
    write_data(tmp_path / "test.npz")
    evaluated = replace(config, eval_data=f"npz:{tmp_path / 'test.npz'}")
    first = dump(replace(config, out=tmp_path / "a.h5", **views(0, 2)))
    second = dump(replace(evaluated, out=tmp_path / "b.h5", **views(2, 4)))
    assert first.header.evaluation is None
    assert second.header.evaluation is not None
    for number, order in enumerate(([first, second], [second, first])):
        merged = merge(order, tmp_path / f"{number}.h5")
        assert merged.header.evaluation == second.header.evaluation


@pytest.mark.parametrize("change", [{"at": 3}, {"rows": "many"}, {"rows": 0}, {"mean": None}])
def test_a_measure_that_makes_no_sense_is_left_out(cache: Cache, change: dict[str, Any]) -> None:
    """A header can contain anything."""
    assert pooled_fidelity([with_fidelity(cache, FIDELITY)] * 2) is not None
    assert pooled_fidelity([with_fidelity(cache, FIDELITY | change)] * 2) is None


@pytest.mark.parametrize(
    ("rows", "run"), [(60, 1), (512, 2), (1000, 3), (134_217, 32), (10**9, 32)]
)
def test_many_rows_stand_in_runs_that_reach_from_first_to_last(
    rows: int, run: int, cache: Cache
) -> None:
    """No row is read twice, and none beyond the last."""
    header = replace(cache.header, views=1, samples=rows, classes=5)
    count = summary_row_count(replace(cache, header=header))
    assert summary._run(count) == run
    assert count % run == 0
    spread = rows / count
    starts = (np.arange(0, count, run) * spread).astype(np.int64)
    assert starts[0] == 0
    assert rows - spread * run <= starts[-1] + run <= rows
    assert (np.diff(starts) >= run).all()
