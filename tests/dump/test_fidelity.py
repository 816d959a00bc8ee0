"""The fidelity of stored rows to the teacher: the measure itself, and the faults it detects."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache import Cache, Sampled, open_cache
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.open import open_source
from softcache.dump import fidelity
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import (
    divergence,
    draw_rows,
    fidelity_line,
    measure_fidelity,
    retemper,
    teacher_rows,
    temperatures_of,
)
from softcache.dump.loop import dump
from softcache.dump.prepare import load_teachers
from softcache.types import SparseTargets
from softcache.util.tensors import to_float
from tests.conftest import SAMPLES

Rows = npt.NDArray[np.float64]

ENCODINGS = ["dense", "quantized", "topk:2", "basis:4,2", "sampled:50"]


def log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def oracle(log_p: Rows, log_q: Rows) -> Rows:
    """KL(p ‖ q) in nats, (B,), in float64; a class without probability adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        divergences: Rows = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return divergences


def measure(cache: Cache, config: DumpConfig, **options: Any) -> dict[str, Any]:
    """The fidelity of a cache to the teacher of `config`, on its data."""
    source = open_source(config.data)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    teachers = load_teachers(config, source, augmentation)
    return measure_fidelity(cache, source, teachers, augmentation, **options)


# which rows


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    views=st.integers(1, 5),
    samples=st.integers(1, 300),
    count=st.integers(1, 500),
    seed=st.integers(0, (1 << 63) - 1),
)
def test_rows_are_drawn_once_each_in_order(views: int, samples: int, count: int, seed: int) -> None:
    pairs = draw_rows(views, samples, count, seed)
    assert pairs.shape == (min(count, views * samples), 2)
    assert ((pairs >= 0) & (pairs < [views, samples])).all()
    rows = pairs @ [samples, 1]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(pairs, draw_rows(views, samples, count, seed))


def test_rows_are_drawn_from_everywhere() -> None:
    pairs = np.concatenate([draw_rows(4, 50, 40, seed) for seed in range(1000)])
    counts = np.bincount(pairs @ [50, 1], minlength=200)
    # binomial, n = 1000 and p = 1/5, standard deviation 12.6: among 200 rows, one is 7 of them off
    # once in 10^9 times
    assert np.abs(counts - 200).max() < 7 * 12.7


def test_another_seed_draws_other_rows() -> None:
    assert (draw_rows(1, 1000, 100, 0) != draw_rows(1, 1000, 100, 1)).any()


@pytest.mark.parametrize(("views", "samples"), [(1, 1 << 24), (3, 10**9), (1 << 8, 1 << 40)])
def test_rows_of_a_very_large_cache_are_drawn_without_listing_them(
    views: int, samples: int
) -> None:
    pairs = draw_rows(views, samples, 500, 0)
    assert len(pairs) > 490  # duplicates are dropped
    assert ((pairs >= 0) & (pairs < [views, samples])).all()
    assert (np.diff(pairs @ [samples, 1]) > 0).all()
    assert pairs[:, 1].max() > 0.9 * samples
    assert set(pairs[:, 0].tolist()) >= ({0} if views == 1 else {0, views - 1})


# the measure


def random_rows(seed: int, rows: int = 20, classes: int = 7) -> Rows:
    return log_softmax(np.random.default_rng(seed).standard_normal((rows, classes)) * 3)


def tensor(rows: Rows) -> Tensor:
    return torch.from_numpy(rows).float()


def test_divergence_is_that_of_the_teacher_from_what_is_stored() -> None:
    p, q = random_rows(0), random_rows(1)
    kl = divergence(tensor(p), tensor(q))
    np.testing.assert_allclose(kl, oracle(p, q), rtol=1e-4)
    assert not np.allclose(kl, oracle(q, p), rtol=0.01)  # the direction matters


def test_divergence_of_a_row_from_itself_is_zero() -> None:
    p = tensor(random_rows(0))
    assert divergence(p, p).abs().max() == 0


def test_a_class_that_the_teacher_excludes_adds_nothing() -> None:
    p = log_softmax(np.array([[0.0, 1.0, -np.inf], [-np.inf, 0.0, -np.inf]]))
    for lowest in (-65504.0, -np.inf):
        q = np.where(np.isneginf(p), lowest, p)
        np.testing.assert_allclose(divergence(tensor(p), tensor(q)), 0, atol=1e-6)
    q = log_softmax(np.zeros((2, 3)))
    np.testing.assert_allclose(divergence(tensor(p), tensor(q)), oracle(p, q), rtol=1e-5)


def sparse(log_probs: Rows, k: int, rest: Rows) -> SparseTargets:
    """Targets of the first k classes, with log-probability `rest` (B,) for each of the others."""
    ids = torch.arange(k).expand(len(log_probs), k)
    return SparseTargets(ids, tensor(log_probs[:, :k]), tensor(rest), log_probs.shape[1])


def test_divergence_from_sparse_targets_counts_the_tail() -> None:
    p, q = random_rows(0), random_rows(1)
    rest = np.log(np.exp(q[:, 3:]).mean(-1))
    even = np.concatenate([q[:, :3], np.repeat(rest[:, None], 4, 1)], 1)
    np.testing.assert_allclose(
        divergence(tensor(p), sparse(q, 3, rest)), oracle(p, even), rtol=1e-4
    )


def test_divergence_from_draws_is_taken_the_other_way_round() -> None:
    # a class that was not drawn has probability 0: KL(teacher ‖ stored) would be infinite
    p, q = random_rows(0), random_rows(1)
    drawn = log_softmax(np.where(np.arange(7) < 3, q, -np.inf))
    targets = sparse(drawn, 3, np.full(20, -np.inf))
    kl = divergence(tensor(p), targets)
    assert kl.isfinite().all()
    np.testing.assert_allclose(kl, oracle(drawn, p), rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 8.0])
def test_retempering_gives_what_the_teacher_would_have_said(temperature: float) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 7)) * 5
    retempered = retemper(tensor(log_softmax(logits / 4)), 4.0, temperature)
    np.testing.assert_allclose(retempered, log_softmax(logits / temperature), atol=1e-4)


def test_the_caches_own_temperature_comes_first_and_each_once() -> None:
    assert temperatures_of(4.0, sampled=False) == [4.0, 1.0, 2.0, 8.0]
    assert temperatures_of(3.0, sampled=False) == [3.0, 1.0, 2.0, 4.0, 8.0]
    assert temperatures_of(3.0, sampled=True) == [3.0]


# running the teacher again


def test_the_teacher_is_asked_about_the_same_augmented_samples(dump_config: DumpConfig) -> None:
    config = replace(dump_config, views=3, augment="shift:2,flip", seed=5)
    cache = dump(config)
    source = open_source(config.data)
    augmentation = parse_augment("shift:2,flip", seed=5, total=SAMPLES)
    teacher = load_teachers(config, source, augmentation)
    pairs = draw_rows(3, SAMPLES, 100, 1)

    def rows_with(seed: int) -> Tensor:
        augmentation = parse_augment("shift:2,flip", seed=seed, total=SAMPLES)
        return teacher_rows(teacher, source, pairs, temperature=4.0, augmentation=augmentation)

    log_probs = rows_with(seed=5)
    stored = np.stack([cache.rows(int(view), np.array([sample]))[0] for view, sample in pairs])
    np.testing.assert_allclose(log_probs, stored, atol=5e-3)
    assert np.abs(rows_with(seed=6).numpy() - stored).max() > 0.1  # other views
    view, sample = map(int, pairs[50])
    images = to_float(source.fetch([sample])[0])
    images = augmentation(images, None, view, np.array([sample]))
    np.testing.assert_allclose(teacher.log_probs(images, 4.0), log_probs[50:51], atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_measured_is_the_mean_and_the_worst_of_the_rows(
    encoding: str, dump_config: DumpConfig
) -> None:
    config = replace(dump_config, eval_data=None, encoding=encoding)
    cache = dump(config)
    source = open_source(config.data)
    cache_rows = np.arange(SAMPLES)
    images = to_float(source.fetch(cache_rows.tolist())[0])
    teacher = load_teachers(config, source, Augmentation(None, 0))
    sampled = isinstance(cache.header.encoding, Sampled)
    measured = measure(cache, config, rows=10**6)
    assert measured["rows"] == SAMPLES
    assert list(measured["at"]) == (["4"] if sampled else ["4", "1", "2", "8"])
    for name, mean in measured["at"].items():
        exact = teacher.log_probs(images, float(name)).double().numpy()
        stored = cache.rows(0, cache_rows, float(name)).astype(np.float64)
        kl = oracle(stored, exact) if sampled else oracle(exact, stored)
        assert mean == pytest.approx(kl.mean(), rel=0.02, abs=2e-7)
        if name == "4":
            assert measured["mean"] == mean
            assert measured["worst"] == pytest.approx(kl.max(), rel=0.02, abs=2e-6)
            assert measured["p99"] == pytest.approx(np.quantile(kl, 0.99), rel=0.02, abs=2e-6)


def test_the_dump_records_what_is_measured(
    dump_config: DumpConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(dump_config, encoding="topk:2", views=2, augment="flip")
    cache = dump(config)
    assert cache.header.summary is not None
    recorded = cache.header.summary["fidelity"]
    assert recorded == measure(cache, config)
    assert fidelity_line(recorded, False) in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("augment", ["shift:2", "shift:1,mixup"])
def test_a_shard_of_later_views_is_compared_with_its_own_samples(
    augment: str, dump_config: DumpConfig
) -> None:
    config = replace(dump_config, eval_data=None, augment=augment, views=2, first_view=5)
    cache = dump(replace(config, shard=(1, 3)))
    assert measure(cache, config)["worst"] < 1e-5
    for header in (replace(cache.header, first_view=4), replace(cache.header, first_sample=99)):
        other = replace(cache, header=header)
        assert measure(other, config)["worst"] > 0.01


def test_so_many_rows_are_held_at_once_and_no_more(
    cache: Cache, dump_config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(cache, dump_config, rows=17)["rows"] == 17
    monkeypatch.setattr(fidelity, "VALUES", 50)
    assert measure(cache, dump_config, rows=17)["rows"] == 10  # with 5 classes each
    monkeypatch.setattr(fidelity, "VALUES", 1)
    assert measure(cache, dump_config, rows=17)["rows"] == 1


# what it detects


def swap(cache: Cache, first: tuple[int, int], second: tuple[int, int]) -> Cache:
    """Exchange two rows, each (view, cache row), in every array of the file."""
    raw = bytearray(cache.path.read_bytes())
    for array in cache.header.arrays:
        if array.axis == "rows":
            size = array.row_bytes
            one, other = (
                slice(start, start + size)
                for view, cache_row in (first, second)
                for start in [array.offset + (view * cache.header.samples + cache_row) * size]
            )
            raw[one], raw[other] = raw[other], raw[one]
    cache.path.write_bytes(raw)
    return open_cache(cache.path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_rows_swapped_in_the_file_are_noticed(encoding: str, dump_config: DumpConfig) -> None:
    config = replace(dump_config, eval_data=None, encoding=encoding)
    cache = dump(config)
    # swap the most confident row and the next one with another top class
    log_probs = cache.rows(0, np.arange(SAMPLES))
    by_confidence = log_probs.max(-1).argsort()[::-1]
    top_classes = log_probs.argmax(-1)
    first = int(by_confidence[0])
    second = next(int(row) for row in by_confidence if top_classes[row] != top_classes[first])
    before = measure(cache, config, rows=SAMPLES)
    after = measure(swap(cache, (0, first), (0, second)), config, rows=SAMPLES)
    assert after["worst"] > before["worst"] + 0.1
    assert after["mean"] > before["mean"] + 0.2 / SAMPLES


def test_views_swapped_in_the_file_are_noticed(dump_config: DumpConfig) -> None:
    config = replace(dump_config, eval_data=None, views=2, augment="shift:2")
    cache = dump(config)
    assert measure(cache, config)["worst"] < 1e-5
    for sample in range(20):
        cache = swap(cache, (0, sample), (1, sample))
    assert measure(cache, config)["worst"] > 0.01


def test_another_teacher_is_noticed(
    cache: Cache, dump_config: DumpConfig, teacher_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.py").write_text(teacher_file.read_text().replace("seed(7)", "seed(8)"))
    assert measure(cache, dump_config)["mean"] < 1e-5
    other = replace(dump_config, teacher=f"{tmp_path / 'other.py'}:teacher")
    assert measure(cache, other)["mean"] > 0.05


def test_data_in_another_order_are_noticed(
    cache: Cache, dump_config: DumpConfig, data_file: Path, tmp_path: Path
) -> None:
    images = np.load(data_file)["x_train"]
    np.savez(tmp_path / "reversed.npz", x=images[::-1])
    other = replace(dump_config, data=f"npz:{tmp_path / 'reversed.npz'}")
    assert measure(cache, other)["mean"] > 0.05


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_encoded_again_are_where_they_were(encoding: str, dump_config: DumpConfig) -> None:
    config = replace(dump_config, eval_data=None, encoding=encoding, views=2, augment="flip,mixup")
    cache = dump(config)
    assert cache.header.summary is not None
    assert cache.header.summary["fidelity"]["moved"] == measure(cache, config)["moved"]
    assert measure(cache, config)["moved"] < 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_moved_is_the_share_of_probability_that_lies_elsewhere(
    encoding: str, dump_config: DumpConfig, teacher_file: Path, tmp_path: Path
) -> None:
    cache = dump(replace(dump_config, eval_data=None, encoding=encoding))
    other = tmp_path / "other.py"
    other.write_text(teacher_file.read_text().replace("seed(7)", "seed(8)"))
    config = replace(
        dump_config,
        teacher=f"{other}:teacher",
        out=tmp_path / "other.h5",
        eval_data=None,
        encoding=encoding,
    )
    measured = measure(cache, config, rows=SAMPLES)["moved"]
    cache_rows = np.arange(SAMPLES)
    moved = np.abs(np.exp(cache.rows(0, cache_rows)) - np.exp(dump(config).rows(0, cache_rows)))
    # a basis is fitted to its teacher, so the two caches have different ones
    assert measured == pytest.approx(
        moved.sum(-1).mean() / 2, rel=0.1 if "basis" in encoding else 1e-3
    )
    assert measured > 0.3


# the line of text


def test_the_line_says_direction_amount_and_temperatures() -> None:
    measured = {
        "rows": 1024,
        "mean": 1.5e-4,
        "p99": 2e-3,
        "worst": 0.03,
        "at": {"4": 1.5e-4, "1": 0},
    }
    assert fidelity_line(measured, sampled=False) == (
        "fidelity: KL(teacher ‖ stored) mean 1.5e-04, 99th percentile 2.0e-03, worst 3.0e-02 nats on "
        "1,024 rows; mean at T=4 1.5e-04, T=1 0.0e+00"
    )
    assert re.match(r"fidelity: KL\(stored ‖ teacher\) mean", fidelity_line(measured, sampled=True))


def test_the_mass_that_topk_leaves_out_is_told(
    dump_config: DumpConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dump(replace(dump_config, out=tmp_path / "dense.h5")).rows(0, np.arange(SAMPLES))
    mass = np.sort(np.exp(dense.astype(np.float64)), -1)[:, -2:].sum(-1)
    capsys.readouterr()
    cache = dump(replace(dump_config, encoding="topk:2"))
    unstored = (cache.header.summary or {})["fidelity"]["unstored"]
    assert unstored == pytest.approx(-np.log(mass).mean(), rel=1e-3)
    assert unstored > 0.01
    assert f"; -ln(mass of the stored classes) {unstored:.1e}" in capsys.readouterr().out
    others = (open_cache(tmp_path / "dense.h5").header.summary or {})["fidelity"]
    assert "unstored" not in others
