"""FORMAT.md rule by rule, continued: commits, fingerprints and encodings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from softcache.cache import Basis, Cache, Dense, Quantized, Sampled, TopK, open_cache
from softcache.cache import writer as writer_module
from softcache.cache.allocate import create
from softcache.cache.reader import digest_of, open_trainable, partial_path
from softcache.cache.verify import find_damage
from softcache.cache.writer import Writer
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import DataError, FormatError, SettingsError
from softcache.join.fingerprints import check_replay
from softcache.targets.encode import as_arrays, make_encoder
from softcache.util.counter_rng import uniform
from tests.cache.header_cases import tiny_cache
from tests.cache.test_writer import digest_offset, locate, record, unsynced_commits
from tests.cache.writer_cases import (
    SAMPLES,
    SUMMARY,
    VIEWS,
    begin,
    draft,
    fill,
    row_values,
    run_dump,
    sample_values,
    shared_values,
)

Rows = npt.NDArray[np.float64]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache."""
    path = tmp_path / "tiny.h5"
    path.write_bytes(tiny_cache())
    return path


@pytest.mark.must("F30")
def test_a_digest_that_comes_out_as_0_is_written_as_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def update(self, part: object) -> None: ...

        def intdigest(self) -> int:
            return 0

    monkeypatch.setattr("softcache.cache.reader.xxhash.xxh3_64", Zero)
    assert digest_of(iter([np.zeros(3)])) == 1


@pytest.mark.must("F31")
def test_a_digest_is_0_until_the_data_of_its_block_are_synced(
    new_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 200)
    begin(new_path)
    assert not open_cache(partial_path(new_path), unfinished=True).arrays["digests"].any()
    with Writer(new_path) as writer:
        calls = record(monkeypatch)
        fill(writer)
        writer.finish(SUMMARY)
    assert unsynced_commits(calls, writer.header) == []
    without = [call for call in calls if call[0] != "fdatasync"]
    assert unsynced_commits(without, writer.header), "the check itself notices nothing"


@pytest.mark.must("F32")
def test_a_file_without_summary_or_with_a_digest_of_0_is_refused(new_path: Path) -> None:
    begin(new_path)
    with Writer(new_path) as writer:
        fill(writer)
    partial = partial_path(new_path)
    with pytest.raises(
        FormatError, match="is unfinished: it has all its blocks, but no summary; run"
    ):
        open_cache(partial)
    assert not open_cache(partial, unfinished=True).complete

    raw = bytearray(run_dump(new_path))
    assert open_cache(new_path).complete
    offset = digest_offset(open_cache(new_path).header, 1, 3)
    raw[offset : offset + 8] = bytes(8)
    new_path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"is damaged: 1 of its 12 digests are missing"):
        open_cache(new_path)


@pytest.mark.must("F32")
def test_the_first_complete_views_of_an_unfinished_file_may_train(new_path: Path) -> None:
    begin(new_path)
    partial = partial_path(new_path)
    with Writer(new_path) as writer:
        fill(writer, batches=4)  # three of view 0, and one of view 1
    cache = open_trainable(partial)
    assert (cache.header.views, cache.complete) == (1, False)
    cache_rows = np.arange(SAMPLES)
    rows = open_cache(partial, unfinished=True).rows(0, cache_rows)
    np.testing.assert_array_equal(cache.rows(0, cache_rows), rows)

    whole = partial.read_bytes()
    for view in (0, None):  # a block of soft targets, a block of labels and keys
        raw = bytearray(whole)
        offset = digest_offset(cache.header, view, 2)
        raw[offset : offset + 8] = bytes(8)
        partial.write_bytes(raw)
        with pytest.raises(
            FormatError, match="is unfinished, and training needs at least its first view complete"
        ):
            open_trainable(partial)


@pytest.mark.must("F33")
def test_the_name_appears_with_the_finished_file_and_not_before(new_path: Path) -> None:
    partial = new_path.with_name("new.h5.partial")
    begin(new_path)
    assert list(new_path.parent.iterdir()) == [partial]
    with Writer(new_path) as writer:
        fill(writer, batches=3)
    with Writer(new_path) as writer:
        fill(writer)
        writer.commit()
        assert list(new_path.parent.iterdir()) == [partial]
        assert writer.finish(SUMMARY) == new_path
    assert list(new_path.parent.iterdir()) == [new_path]
    assert open_cache(new_path).complete


@pytest.mark.must("F34")
def test_a_writer_that_goes_on_fills_blocks_again_that_went_bad(new_path: Path) -> None:
    begin(new_path)
    with Writer(new_path) as writer:
        fill(writer)
        header = writer.header
    raw = bytearray(partial_path(new_path).read_bytes())
    raw[locate(header, 1, 2)[0].start] ^= 1
    raw[locate(header, None, 0)[1].start] ^= 1
    partial_path(new_path).write_bytes(raw)
    with Writer(new_path) as writer:
        assert np.flatnonzero(writer.missing(0)).tolist() == list(range(8))
        assert np.flatnonzero(writer.missing(1)).tolist() == list(range(16, 24))
        fill(writer)
        writer.finish(SUMMARY)
    assert new_path.read_bytes() == tiny_cache()


# fingerprints
def replayed(new_path: Path, source: Source, augmentation: Augmentation, off: float) -> Cache:
    """A cache of `source` with one fingerprint off by a fraction of its input's root mean square."""
    sample_ids, values = np.array([2, 19, 28]), shared_values()
    raw = source.fetch(sample_ids.tolist())[0].float() / 255
    pixels = np.arange(raw[0].numel())
    draws = [uniform(0, j, pixels, stream=0, draws=1)[:, 0] for j in range(8)]
    signs = np.where(np.stack(draws) < 0.5, 1.0, -1.0)  # (8, n)
    inputs = [augmentation(raw, None, view, sample_ids) for view in range(VIEWS)]
    x = torch.stack(inputs).double().flatten(2).numpy()  # (views, F, n)
    fingerprints = x @ signs.T / np.sqrt(len(pixels))  # (views, F, 8)
    fingerprints[1, 2, 5] += off * np.sqrt(np.square(x[1, 2]).mean())
    values |= {"fingerprinted": sample_ids, "fingerprints": fingerprints.astype("<f4")}
    create(new_path, draft(), values)
    with Writer(new_path) as writer:
        fill(writer)
        writer.finish(SUMMARY)
    return open_cache(new_path)


@pytest.mark.must("F35")
@pytest.mark.parametrize("off", [0.0, 0.0015, 0.0025, -0.0025, 1.0, np.nan])
def test_fingerprints_are_compared_before_views_are_replayed(new_path: Path, off: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 6, 6), dtype=np.uint8)
    np.savez(new_path.with_suffix(".npz"), x=images, y=np.zeros(SAMPLES, np.int64))
    source = open_source(f"npz:{new_path.with_suffix('.npz')}")
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    cache = replayed(new_path, source, augmentation, off)
    if abs(off) < 0.002:
        check_replay(cache, source, augmentation, np.arange(SAMPLES), np.arange(SAMPLES))
    else:
        with pytest.raises(
            DataError, match=r"sample 28 of .* in view 1 is not what the teacher of"
        ):
            check_replay(cache, source, augmentation, np.arange(SAMPLES), np.arange(SAMPLES))


@pytest.mark.must("F35")
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_fingerprints_are_compared_sample_by_sample_in_whatever_order(
    new_path: Path, off: float
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 6, 6), dtype=np.uint8)
    new_order = np.random.default_rng(1).permutation(SAMPLES)
    source_indices = np.argsort(new_order)  # of each cache_row in the reordered data
    sources = []
    for name, order in (("first", np.arange(SAMPLES)), ("again", new_order)):
        np.savez(new_path.with_name(f"{name}.npz"), x=images[order], y=np.zeros(SAMPLES, np.int64))
        sources.append(open_source(f"npz:{new_path.with_name(f'{name}.npz')}"))
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    cache = replayed(new_path, sources[0], augmentation, off)
    if not off:
        check_replay(cache, sources[1], augmentation, source_indices, source_indices)
        in_order = np.arange(SAMPLES)
        with pytest.raises(DataError, match=r"sample \d+ of .* is not what the teacher of"):
            check_replay(cache, sources[1], augmentation, in_order, in_order)
    else:
        with pytest.raises(
            DataError, match=rf"sample {source_indices[28]} of .*again.npz.* in view 1 is not"
        ):
            check_replay(cache, sources[1], augmentation, source_indices, source_indices)


@pytest.mark.must("F35")
@pytest.mark.parametrize(("forged", "named"), [(SAMPLES, f"0 to {SAMPLES}"), (-1, "-1 to 14")])
def test_a_fingerprint_of_no_sample_is_refused(new_path: Path, forged: int, named: str) -> None:
    np.savez(
        new_path.with_suffix(".npz"),
        x=np.zeros((SAMPLES, 1, 6, 6), np.uint8),
        y=np.zeros(SAMPLES, np.int64),
    )
    create(new_path, draft(), shared_values() | {"fingerprinted": np.array([0, forged, 14])})
    with Writer(new_path) as writer:
        fill(writer)
        writer.finish(SUMMARY)
    source = open_source(f"npz:{new_path.with_suffix('.npz')}")
    augmentation = parse_augment("shift:2", seed=3, total=SAMPLES)
    message = rf"new.h5 has fingerprints of samples {named}; expected 0 to 29: .*get it again"
    in_order = np.arange(SAMPLES)
    with pytest.raises(FormatError, match=message):
        check_replay(open_cache(new_path), source, augmentation, in_order, in_order)


# encodings
@pytest.mark.must("F40")
@pytest.mark.parametrize("temperature", [None, 1.0, 100.0])
def test_rows_decode_to_log_probabilities(path: Path, temperature: float | None) -> None:
    rows = open_cache(path).rows(0, np.arange(SAMPLES), temperature)
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(-1), 1, atol=1e-6)


def log_softmax(logits: Rows) -> Rows:
    """Log softmax over the last axis, in float64."""
    normalized: Rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


@pytest.mark.must("F40")
def test_only_what_sampled_has_not_drawn_has_no_probability() -> None:
    decoded = Sampled(4).decode({"ids": np.array([[3, 0, 3, 3]], "<u2")}, 4.0, 4.0, 5)
    assert np.isneginf(decoded).tolist() == [[False, True, True, False, True]]
    np.testing.assert_allclose(np.exp(decoded), [[0.25, 0, 0, 0.75, 0]], rtol=1e-6)


@pytest.mark.must("F41")
@pytest.mark.parametrize("requested", [1.0, 2.0, 8.0])
def test_rows_of_quantized_at_another_temperature(requested: float) -> None:
    codes = np.array([[0, 255, 51, 102, 204]], "|u1")
    stored = {"codes": codes, "ranges": np.array([[12.5]], "<f2")}
    log_p = log_softmax(-12.5 * (codes / 255.0) ** 2)
    decoded = Quantized().decode(stored, 4.0, requested, 5)
    np.testing.assert_allclose(decoded, log_softmax(log_p * 4.0 / requested), rtol=1e-5, atol=1e-5)


@pytest.mark.must("F41")
@pytest.mark.parametrize("requested", [1.0, 2.0, 4.0, 8.0])
def test_rows_at_another_temperature(path: Path, requested: float) -> None:
    rows = open_cache(path).rows(1, np.arange(SAMPLES), requested)
    expected = log_softmax(row_values(1)["log_probs"].astype(np.float64) * 4.0 / requested)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.must("F42")
def test_what_is_below_the_lowest_float16_is_stored_as_it(new_path: Path) -> None:
    encode = make_encoder(Dense(), {}, temperature=4.0, seed=0, device=torch.device("cpu"))
    log_probs = torch.full((SAMPLES, 5), -1.6)
    log_probs[:, 1:] = torch.tensor([-65504.0, -65519.0, -1e9, -torch.inf])
    rows = as_arrays(encode(log_probs, 0, np.arange(SAMPLES)))
    begin(new_path)
    with Writer(new_path) as writer:
        for view in range(VIEWS):
            writer.write(view, 0, rows, sample_values())
        writer.finish(SUMMARY)
    cache = open_cache(new_path)
    assert (cache.arrays["log_probs"][:, :, 1:] == -65504.0).all()
    assert np.isfinite(cache.rows(0, np.arange(SAMPLES), 1.0)).all()


def cache_of(path: Path, encoding: TopK | Sampled, rows: dict[str, npt.NDArray[Any]]) -> None:
    """Write a finished cache of another encoding, with the same rows in every view."""
    create(path, dataclasses.replace(draft(), encoding=encoding), shared_values())
    with Writer(path) as writer:
        for view in range(VIEWS):
            writer.write(view, 0, rows, sample_values())
        writer.finish(SUMMARY)


@pytest.mark.must("F43")
@pytest.mark.parametrize(("largest", "named"), [(4, 0), (5, 1), (65_535, 1)])
def test_ids_are_below_the_number_of_classes(new_path: Path, largest: int, named: int) -> None:
    ids = np.zeros((SAMPLES, 3), "<u2")
    ids[17, 2] = largest
    cache_of(new_path, Sampled(3), {"ids": ids})
    cache = open_cache(new_path)
    assert cache.header.array("ids").dtype == "<u2"
    damage = [str(part) for part in find_damage(cache)]
    wrong = [f"class ids beyond the last class of samples 0 to 29 in view {v}" for v in (0, 1)]
    assert damage == wrong * named
    if named:
        with pytest.raises(FormatError, match=f"stores class id {largest}; expected 0 to 4: .*get"):
            cache.rows(1, np.arange(SAMPLES))
        assert len(cache.rows(1, np.arange(17))) == 17, "these rows are intact"


def tail_at(tails: dict[float, float], limit: float, requested: float) -> float:
    """The tail of F44: linear in 1/T through the stored points, with `limit` at 1/T = 0."""
    points = sorted([(0.0, limit), *((1 / t, tail) for t, tail in tails.items())])
    x = 1 / requested
    first = max((i for i in range(len(points) - 1) if points[i][0] <= x), default=0)
    (x0, y0), (x1, y1) = points[first : first + 2]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


@pytest.mark.must("F44")
@pytest.mark.parametrize("requested", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 50.0])
def test_topk_takes_the_tail_linearly_in_the_inverse_temperature(requested: float) -> None:
    classes, ids, others = 7, [5, 0, 3], [1, 2, 4, 6]
    tails = {1.0: -4.0, 2.0: -1.5, 4.0: -0.25}
    stored = {
        "ids": np.array([ids], "<u2"),
        "log_probs": np.array([[-0.5, -1.25, -3.0]], "<f2"),
        "tails": np.array([list(tails.values())], "<f2"),
    }
    decoded = TopK(3, tuple(tails)).decode(stored, 4.0, requested, classes)
    tail = tail_at(tails, np.log(4 / 3), requested)
    head = log_softmax(np.array([-0.5, -1.25, -3.0]) * 4.0 / requested) - np.log1p(np.exp(tail))
    np.testing.assert_allclose(decoded[0, ids], head, rtol=1e-5, atol=1e-6)
    other = -np.log1p(np.exp(-tail)) - np.log(4)
    np.testing.assert_allclose(decoded[0, others], [other] * 4, rtol=1e-5, atol=1e-6)


def test_that_oracle_meets_the_points_and_the_limit() -> None:
    tails = {1.0: -4.0, 2.0: -1.5, 4.0: -0.25}
    assert {t: tail_at(tails, 0.5, t) for t in tails} == tails
    assert abs(tail_at(tails, 0.5, 1e9) - 0.5) < 1e-6
    assert tail_at(tails, 0.5, 4 / 3) == -2.75, "the middle of the line from 1 to 2 in 1/T"


@pytest.mark.must("F45")
def test_the_shared_arrays_of_basis() -> None:
    shared = {a.name: (a.dtype, a.shape) for a in Basis(2, 4, 2).arrays(6) if a.axis == "shared"}
    assert shared == {
        "mean": ("<f4", (6,)),
        "directions": ("<f2", (6, 6)),
        "direction_steps": ("<f4", (6,)),
    }


@pytest.mark.must("F45")
@pytest.mark.parametrize("requested", [1.0, 4.0, 8.0])
def test_basis_is_a_sum_of_directions_and_residuals(requested: float) -> None:
    random, classes = np.random.default_rng(5), 6
    wide, narrow = [-127, 3], [-8, 7, 0, 5]
    packed = [(a + 8) | (b + 8) << 4 for a, b in (narrow[:2], narrow[2:])]
    stored = {
        "codes": np.array([[wide[0] % 256, wide[1] % 256, *packed]], "|u1"),
        "steps": np.array([[0.25, 0.125]], "<f2"),
        "ids": np.array([[4, 1]], "<u2"),
        "rests": np.array([[-100, 7]], "|i1"),
        "mean": random.normal(size=classes).astype("<f4"),
        "directions": random.normal(size=(6, classes)).astype("<f2"),
        "direction_steps": random.random(6).astype("<f4"),
    }
    x = stored["mean"].astype(np.float64)
    for j, code in enumerate(wide + narrow):
        step = 0.25 * float(stored["direction_steps"][j])
        x += code * step * stored["directions"][j].astype(np.float64)
    x[4] += -100 * 0.125
    x[1] += 7 * 0.125
    decoded = Basis(wide=2, narrow=4, top=2).decode(stored, 4.0, requested, classes)
    np.testing.assert_allclose(decoded[0], log_softmax(x * 4.0 / requested), rtol=1e-4, atol=1e-4)


@pytest.mark.must("F46")
def test_sampled_rows_are_refused_at_another_temperature(new_path: Path) -> None:
    ids = np.tile(np.array([[1, 1, 4]], "<u2"), (SAMPLES, 1))
    cache_of(new_path, Sampled(3), {"ids": ids})
    cache = open_cache(new_path)
    shares = np.exp(cache.rows(0, np.arange(3)))  # -inf for classes that were not drawn
    np.testing.assert_allclose(shares, [[0, 2 / 3, 0, 0, 1 / 3]] * 3, rtol=1e-6)
    with pytest.raises(
        SettingsError, match=r"temperature 1 of a sampled cache made at 4: .*cannot"
    ):
        cache.rows(0, np.arange(3), 1.0)
