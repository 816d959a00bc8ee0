"""Every encoding in torch and in numpy: what comes back of a row, for every distribution."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK, parse_encoding
from softcache.cache.encodings import (
    ENCODINGS,
    QUANTIZED_RANGE,
    encoding_from_json,
    encoding_to_json,
)
from softcache.dump.fit_basis import Directions, principal_directions, shared_arrays
from softcache.errors import FormatError, SettingsError
from softcache.losses import soft_loss
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import as_arrays, make_encoder
from softcache.targets.fetch import as_tensor
from softcache.types import SparseTargets, Targets

Rows = npt.NDArray[np.float64]

CPU = torch.device("cpu")
HALF = 2.0**-11  # half a step of float16, relative
FLOAT32 = 2e-6  # what float32 arithmetic adds, relative to the depth of a row
EDGE = 1 << 16  # classes up to which an id takes 16 bits

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


# rows of every kind


def log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def divergence(log_p: Rows, log_q: Rows) -> Rows:
    """KL(p ‖ q) in nats, (B,); a class without probability adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        found: Rows = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return found


def every_kind(classes: int, seed: int, spread: float) -> Rows:
    """Log-probabilities (7, C), of which each row is of another kind; exact in float32."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal(classes).clip(-4, 4)
    order, hot = random.permutation(classes), random.integers(classes)
    is_hot = np.arange(classes) == hot
    rows = [
        noise * spread,
        np.round(noise) * spread,  # ties
        np.zeros(classes),  # uniform
        np.where(is_hot, 0.0, -1e3 + noise),  # one-hot but for what no float32 can tell
        np.where(is_hot, 0.0, -np.inf),  # one-hot
        np.where(order < (classes + 1) // 2, noise * spread, -np.inf),  # half of them forbidden
        np.where(is_hot, 12.0, noise),  # very peaked
    ]
    return log_softmax(np.array(rows)).astype(np.float32).astype(np.float64)


@st.composite
def batches(draw: st.DrawFn, spreads: tuple[float, ...] = (0.1, 1, 3, 10, 100, 3e4)) -> Rows:
    classes = draw(st.sampled_from([2, 3, 10, 257, 1000]))
    return every_kind(classes, draw(st.integers(0, 1 << 32)), draw(st.sampled_from(spreads)))


@st.composite
def encodings(draw: st.DrawFn, name: str, classes: int) -> Encoding:
    match name:
        case "topk":
            kept = draw(st.sets(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), min_size=1))
            return TopK(draw(st.integers(1, min(classes - 1, 40))), tuple(sorted(kept)))
        case "basis":
            wide = draw(st.integers(0, min(classes - 1, 12)))
            narrow = draw(st.integers(0, min(classes - 1 - wide, 12) // 2)) * 2
            return Basis(max(wide, int(not narrow)), narrow, draw(st.integers(1, min(classes, 9))))
        case "sampled":
            return Sampled(draw(st.sampled_from([1, 2, 7, 50])))
    return ENCODINGS[name]()


@functools.cache
def directions(rank: int, classes: int) -> Directions:
    """Fitted to rows that have nothing to do with those that will be encoded."""
    generator = torch.Generator().manual_seed(0)
    return principal_directions(torch.randn(rank + 9, classes, generator=generator) * 3, rank)


def shared_of(encoding: Encoding, classes: int) -> dict[str, Tensor]:
    if not isinstance(encoding, Basis):
        return {}
    return shared_arrays(encoding, directions(encoding.rank, classes))


class Trip(NamedTuple):
    """A batch that went through an encoding, and back both ways."""

    stored: dict[str, npt.NDArray[Any]]
    targets: Targets
    torch: Rows
    numpy: Rows


def encode(
    encoding: Encoding,
    rows: Rows,
    temperature: float = 1.0,
    *,
    seed: int = 0,
    view: int = 0,
    samples: npt.NDArray[np.int64] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """As the file's writer takes them."""
    shared = shared_of(encoding, rows.shape[-1])
    encoder = make_encoder(encoding, shared, temperature=temperature, seed=seed, device=CPU)
    samples = np.arange(len(rows)) if samples is None else samples
    return as_arrays(encoder(torch.from_numpy(rows).float(), view, samples))


def round_trip(
    encoding: Encoding, rows: Rows, temperature: float = 1.0, wanted: float | None = None
) -> Trip:
    classes = rows.shape[-1]
    wanted = wanted or temperature
    stored, shared = encode(encoding, rows, temperature), shared_of(encoding, classes)
    tensors = {name: as_tensor(values) for name, values in stored.items()}
    if "ids" in tensors:
        tensors["ids"] = class_ids(tensors["ids"], classes)
    targets = decode(
        encoding,
        tensors | {name: tensor.float() for name, tensor in shared.items()},
        temperature=temperature,
        wanted=wanted,
        classes=classes,
    )
    plain = encoding.decode(
        stored | {name: tensor.numpy() for name, tensor in shared.items()},
        temperature,
        wanted,
        classes,
    )
    assert plain.dtype == np.float32
    found = to_dense(targets)
    assert found.dtype == torch.float32
    return Trip(stored, targets, found.double().numpy(), plain.astype(np.float64))


def temperatures_for(name: str) -> st.SearchStrategy[float]:
    return st.just(1.0) if name == "sampled" else st.sampled_from([0.5, 1.0, 3.0, 4.0, 8.0, 50.0])


# what all of them must do


@pytest.mark.parametrize("name", ENCODINGS)
@few
@given(data=st.data())
def test_torch_and_numpy_give_the_same_probabilities(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    trip = round_trip(encoding, rows, 1.0, data.draw(temperatures_for(name)))
    np.testing.assert_array_equal(np.isneginf(trip.torch), np.isneginf(trip.numpy))
    np.testing.assert_allclose(np.exp(trip.torch), np.exp(trip.numpy), rtol=1e-3, atol=1e-6)
    some = np.isfinite(trip.numpy)
    np.testing.assert_allclose(trip.torch[some], trip.numpy[some], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ENCODINGS)
@few
@given(data=st.data())
def test_probabilities_sum_to_one_and_none_is_negative(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    trip = round_trip(encoding, rows, 1.0, data.draw(temperatures_for(name)))
    for decoded in (trip.torch, trip.numpy):
        assert not np.isnan(decoded).any()
        assert name == "sampled" or np.isfinite(decoded).all()
        assert decoded.max() <= 1e-6
        np.testing.assert_allclose(np.exp(decoded).sum(-1), 1, atol=2e-5)


@pytest.mark.parametrize("name", ENCODINGS)
@few
@given(data=st.data())
def test_what_is_stored_is_what_the_encoding_declares(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    declared = encoding.arrays(rows.shape[-1])
    found = {array: values.dtype.str for array, values in encode(encoding, rows).items()}
    assert found == {array.name: array.dtype for array in declared if array.axis == "rows"}
    for array, values in encode(encoding, rows).items():
        shape = next(spec.shape for spec in declared if spec.name == array)
        assert values.shape == (len(rows), *shape)
    shared = shared_of(encoding, rows.shape[-1])
    assert {a: tuple(t.shape) for a, t in shared.items()} == {
        array.name: array.shape for array in declared if array.axis == "shared"
    }


@pytest.mark.parametrize("classes", [EDGE - 1, EDGE, EDGE + 1])
@pytest.mark.parametrize(
    "encoding",
    [Dense(), Quantized(), TopK(5), Basis(4, 4, 5), Sampled(20)],
    ids=lambda encoding: encoding.name,
)
def test_classes_on_both_sides_of_16_bits_keep_their_places(
    encoding: Encoding, classes: int
) -> None:
    # 32,767 is the last id that a signed 16 bits would hold; the last class is the highest of all
    favourites = np.array([0, 32_767, 32_768, 40_000, classes - 1])
    logits = np.random.default_rng(0).standard_normal((2, classes))
    logits[:, favourites] = np.arange(20, 25)
    rows = log_softmax(logits).astype(np.float32).astype(np.float64)
    trip = round_trip(encoding, rows)
    for decoded in (trip.torch, trip.numpy):
        np.testing.assert_allclose(np.exp(decoded).sum(-1), 1, atol=1e-4)
        largest = decoded.argsort(-1)[:, ::-1][:, :2]
        assert (largest == [classes - 1, 40_000]).all()
        if not isinstance(encoding, Sampled):
            assert divergence(rows, decoded).max() < 5e-3
    if "ids" in trip.stored:
        assert trip.stored["ids"].dtype.str == ("<u2" if classes <= EDGE else "<u4")
        assert trip.stored["ids"].max() == classes - 1


def test_ids_read_with_a_sign_would_be_noticed() -> None:
    stored = encode(TopK(2), log_softmax(np.eye(1, EDGE, 40_000) * 30))
    assert as_tensor(stored["ids"])[0, 0] == 40_000 - EDGE  # which class_ids() has to mend
    assert class_ids(as_tensor(stored["ids"]), EDGE)[0, 0] == 40_000


@pytest.mark.parametrize("classes", [40_000, 70_000])
def test_an_id_beyond_the_last_class_is_refused(classes: int) -> None:
    kind = "<u2" if classes <= EDGE else "<u4"
    ids = as_tensor(np.array([[0, classes - 1], [3, classes]], kind))
    with pytest.raises(FormatError, match=rf"stores class id {classes}; expected 0 to"):
        class_ids(ids, classes)
    assert class_ids(ids[:1], classes).tolist() == [[0, classes - 1]]
    if kind == "<u4":
        with pytest.raises(FormatError, match=r"stores class id 4294967295; expected 0 to 69999"):
            class_ids(as_tensor(np.array([[2**32 - 1]], kind)), classes)


def test_rows_with_positions_decode_as_rows() -> None:
    rows = every_kind(50, 3, 2.0)[:6]
    for encoding in (Dense(), Quantized(), TopK(4), Basis(3, 4, 2), Sampled(9)):
        shared = {name: t.numpy() for name, t in shared_of(encoding, 50).items()}
        stored = encode(encoding, rows)
        folded = {name: values.reshape(2, 3, -1) for name, values in stored.items()}
        np.testing.assert_allclose(
            encoding.decode(folded | shared, 1.0, 1.0, 50),
            encoding.decode(stored | shared, 1.0, 1.0, 50).reshape(2, 3, 50),
            rtol=1e-5,
        )


# quantized


def depths(log_probs: Rows) -> Rows:
    """How far each entry lies below the row's largest."""
    found: Rows = log_probs.max(-1, keepdims=True) - log_probs
    return found


def excess(rows: Rows, decoded: Rows, ranges: Rows) -> float:
    """By how much the worst entry is further off than `Quantized` says of itself."""
    exact = depths(rows)
    reached = np.minimum(exact, QUANTIZED_RANGE)
    bound = np.sqrt(reached * ranges) / 255 + ranges / 255**2
    off = np.abs(depths(decoded) - reached)
    return float((off - bound - 1e-5 - FLOAT32 * reached).max())


@few
@given(rows=batches())
def test_quantized_is_as_near_as_it_says(rows: Rows) -> None:
    trip = round_trip(Quantized(), rows)
    ranges = trip.stored["ranges"].astype(np.float64)
    deepest = np.minimum(depths(rows).max(-1, keepdims=True), QUANTIZED_RANGE)
    assert (ranges >= deepest * (1 - 1e-6)).all()
    assert (ranges <= np.maximum(deepest * (1 + 2 * HALF), 2e-6)).all()
    for decoded in (trip.torch, trip.numpy):
        assert excess(rows, decoded, ranges) <= 0


def test_the_bound_of_quantized_notices_codes_without_the_square() -> None:
    rows = every_kind(100, 0, 10.0)[:1]
    ranges = depths(rows).max(-1, keepdims=True)
    linear = -np.round(depths(rows) / ranges * 255) / 255 * ranges
    assert excess(rows, linear, ranges) > 0


@pytest.mark.parametrize("depth", [2e-6, 1e-5, 5e-5])
def test_quantized_is_as_near_as_it_says_where_all_classes_are_nearly_equal(depth: float) -> None:
    exact = np.array([[depth, 0.0, depth / 3]])
    stored = encode(Quantized(), -exact)
    ranges = stored["ranges"].astype(np.float64)
    reached = (stored["codes"].astype(np.float64) / 255) ** 2 * ranges
    assert (np.abs(reached - exact) <= np.sqrt(exact * ranges) / 255 + ranges / 255**2).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("wanted", [1.0, 2.0, 4.0, 8.0])
def test_quantized_rows_of_a_teacher_lose_at_most_a_thousandth_of_a_nat(
    temperature: float, wanted: float
) -> None:
    logits = np.random.default_rng(1).standard_normal((50, 500)) * 4
    rows = log_softmax(logits / temperature)
    trip = round_trip(Quantized(), rows, temperature, wanted)
    assert divergence(log_softmax(logits / wanted), trip.torch).max() < 1e-3


# topk


def head_mask(trip: Trip, classes: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((len(trip.stored["ids"]), classes), bool)
    np.put_along_axis(mask, trip.stored["ids"].astype(np.int64), True, -1)
    return mask


def log_sum(log_probs: Rows, where: npt.NDArray[np.bool_]) -> Rows:
    """log of the sum of the probabilities where the mask is, (B,)."""
    kept = np.where(where, log_probs, -np.inf)
    found: Rows = np.logaddexp.reduce(kept, -1)
    return found


@few
@given(data=st.data())
def test_topk_keeps_the_largest_classes(data: st.DataObject) -> None:
    rows = data.draw(batches())
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows)
    mask = head_mask(trip, rows.shape[-1])
    k = trip.stored["ids"].shape[-1]
    assert (mask.sum(-1) == k).all()  # each once
    assert (np.where(mask, rows, np.inf).min(-1) >= np.where(mask, -np.inf, rows).max(-1)).all()


@few
@given(data=st.data(), wanted=st.sampled_from([0.5, 1.0, 3.0, 8.0]))
def test_the_head_of_topk_is_exact_to_float16_relative_to_itself(
    data: st.DataObject, wanted: float
) -> None:
    rows = data.draw(batches(spreads=(0.1, 1, 3, 10, 100)))
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, wanted)
    ids = trip.stored["ids"].astype(np.int64)
    exact = np.take_along_axis(rows, ids, -1)
    bound = (np.abs(exact) + np.abs(exact[:, :1])) * (HALF + FLOAT32) / wanted
    for decoded in (trip.torch, trip.numpy):
        found = np.take_along_axis(decoded, ids, -1)
        with np.errstate(invalid="ignore"):
            off = np.abs((found - found[:, :1]) - (exact - exact[:, :1]) / wanted)
        allowed = bound + 1e-5 + FLOAT32 * np.abs(found)
        assert (off <= allowed)[exact > -60_000].all()


@few
@given(data=st.data())
def test_the_tail_of_topk_has_its_mass_at_every_temperature_kept(data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings("topk", rows.shape[-1]))
    assert isinstance(encoding, TopK)
    for wanted in encoding.temperatures:
        trip = round_trip(encoding, rows, 2.0, wanted)
        mask = head_mask(trip, rows.shape[-1])
        exact = log_softmax(rows * 2.0 / wanted)
        odds = log_sum(exact, ~mask) - log_sum(exact, mask)
        for decoded in (trip.torch, trip.numpy):
            found = log_sum(decoded, ~mask) - log_sum(decoded, mask)
            assert (np.abs(found - odds) <= np.abs(odds) * HALF + 1e-4)[odds > -60_000].all()
            assert (found < -60_000)[odds <= -60_000].all()


def test_a_tail_kept_at_one_temperature_alone_would_be_noticed_at_another() -> None:
    rows = every_kind(200, 0, 3.0)[:1]
    exact = log_softmax(rows / 4)
    off = []
    for temperatures in ((1.0, 4.0), (1.0,)):
        trip = round_trip(TopK(10, temperatures), rows, 1.0, 4.0)
        mask = head_mask(trip, 200)
        off.append(abs(np.exp(log_sum(trip.torch, mask)) - np.exp(log_sum(exact, mask)))[0])
    assert off[0] < 1e-3
    assert off[1] > 0.02


@few
@given(data=st.data(), wanted=st.sampled_from([0.25, 1.0, 3.0, 100.0]))
def test_the_tail_of_topk_is_even(data: st.DataObject, wanted: float) -> None:
    rows = data.draw(batches())
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, wanted)
    mask = head_mask(trip, rows.shape[-1])
    for decoded in (trip.torch, trip.numpy):
        assert (
            np.where(mask, -np.inf, decoded).max(-1) == np.where(mask, np.inf, decoded).min(-1)
        ).all()


def test_topk_at_an_endless_temperature_is_uniform() -> None:
    trip = round_trip(TopK(5), every_kind(100, 0, 3.0)[:1], 1.0, 1e5)
    np.testing.assert_allclose(trip.torch, -math.log(100), atol=1e-3)


def renormalised(rows: Rows, k: int, ratio: float) -> Rows:
    """What keeping the k largest alone gives: nothing for the others."""
    least = np.sort(rows, -1)[:, -k][:, None]
    return log_softmax(np.where(rows >= least, rows, -np.inf) * ratio)


def uniform_tail(rows: Rows, k: int, ratio: float) -> Rows:
    """What the k largest and one number for the rest give: an even tail, tempered as classes."""
    ids = np.argsort(-rows, -1, kind="stable")[:, :k]
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, ids, True, -1)
    tail = log_sum(rows, ~mask) - math.log(rows.shape[-1] - k)
    return log_softmax(np.where(mask, rows, tail[:, None]) * ratio)


@few
@given(data=st.data(), temperature=st.sampled_from([1.0, 4.0]))
def test_topk_is_no_worse_than_the_same_k_with_an_even_tail_or_none(
    data: st.DataObject, temperature: float
) -> None:
    rows = data.draw(batches(spreads=(0.1, 1, 3, 10)))
    k = data.draw(st.integers(1, min(rows.shape[-1] - 1, 40)))
    for wanted in (1.0, 2.0, 4.0, 8.0):
        ratio = temperature / wanted
        exact = log_softmax(rows * ratio)
        ours = divergence(exact, round_trip(TopK(k), rows, temperature, wanted).torch)
        for other in (renormalised, uniform_tail):
            # theirs are not rounded, ours are; hence the little that is allowed
            assert (ours <= divergence(exact, other(rows, k, ratio)) * 1.01 + 1e-4).all()


def test_the_tail_kept_at_several_temperatures_is_worth_its_bytes() -> None:
    logits = np.random.default_rng(2).standard_normal((100, 1000)) * 8  # the top class has 0.7
    rows = log_softmax(logits)
    exact = log_softmax(logits / 4)
    ours = divergence(exact, round_trip(TopK(32), rows, 1.0, 4.0).torch).mean()
    assert divergence(exact, uniform_tail(rows, 32, 0.25)).mean() > 1.2 * ours
    assert divergence(exact, renormalised(rows, 32, 0.25)).mean() == np.inf


# sampled


@few
@given(data=st.data())
def test_each_count_is_within_one_of_its_expectation(data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings("sampled", rows.shape[-1]))
    assert isinstance(encoding, Sampled)
    trip = round_trip(encoding, rows)
    p = np.exp(log_softmax(rows))
    for decoded in (trip.torch, trip.numpy):
        counts = np.exp(decoded) * encoding.n
        assert np.abs(counts - p * encoding.n).max() < 1 + 1e-4
    assert (np.take_along_axis(p, trip.stored["ids"].astype(np.int64), -1) > 0).all()


def test_draws_that_are_independent_would_be_noticed() -> None:
    # the counts of a multinomial are further from n p than 1
    p = np.full(10, 0.1)
    counts = np.random.default_rng(0).multinomial(100, p)
    assert np.abs(counts - 10).max() > 1


@pytest.mark.parametrize("n", [2, 7])
def test_no_draw_at_all_gives_a_class_without_probability(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = log_softmax(np.array([[-np.inf, 0.0, 1.0, -np.inf]]))
    for extreme in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(
            "softcache.targets.encode.uniform", lambda *_, at=extreme, **__: np.array([[at]])
        )
        assert set(encode(Sampled(n), rows)["ids"][0].tolist()) <= {1, 2}


def test_draws_depend_on_seed_view_and_sample_alone() -> None:
    rows = np.repeat(every_kind(300, 0, 2.0)[:1], 40, 0)
    samples = np.arange(100, 140)

    def drawn(seed: int, view: int, at: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = encode(
            Sampled(20), rows[: len(at)], seed=seed, view=view, samples=at
        )["ids"]
        return found

    whole = drawn(3, 1, samples)
    np.testing.assert_array_equal(whole, drawn(3, 1, samples))
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(whole[order], drawn(3, 1, samples[order]))
    np.testing.assert_array_equal(whole[7:9], drawn(3, 1, samples[7:9]))
    for other in (drawn(4, 1, samples), drawn(3, 2, samples), drawn(3, 1, samples + 1000)):
        assert (other != whole).any(-1).mean() > 0.9
    assert len(np.unique(whole, axis=0)) > 25  # nor are the samples' draws all the same


FALSE_ALARM = 1e-9  # how often the test of a sound sampler would fail, over all seeds
DRAWS, DRAWN_CLASSES, N = 20_000, 20, 8


def bias_allowed() -> float:
    """How far a mean count may be from n p.

    A systematic count is floor(n p), or one more; by Hoeffding's inequality the mean of m of them is
    further off than t with a probability of at most 2 exp(-2 m t²), for each of the classes.
    """
    return math.sqrt(math.log(2 * DRAWN_CLASSES / FALSE_ALARM) / (2 * DRAWS))


def mean_counts(rows: Rows) -> Rows:
    """Counts of each class among N draws, (C,), the mean over all rows."""
    ids = encode(Sampled(N), rows)["ids"].astype(np.int64)
    found: Rows = np.bincount(ids.ravel(), minlength=DRAWN_CLASSES) / len(rows)
    return found


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_sampled_is_unbiased(spread: float) -> None:
    row = every_kind(DRAWN_CLASSES, 5, spread)[:1]
    counts = mean_counts(np.repeat(row, DRAWS, 0))
    expected = N * np.exp(log_softmax(row)[0])
    assert np.abs(counts - expected).max() < bias_allowed()


def test_that_test_notices_a_sampler_that_is_biased() -> None:
    row = every_kind(DRAWN_CLASSES, 5, 1.0)[:1]
    expected = N * np.exp(log_softmax(row)[0])
    warmer = mean_counts(np.repeat(log_softmax(row / 1.05), DRAWS, 0))
    assert np.abs(warmer - expected).max() > bias_allowed()
    most_probable = np.zeros(DRAWN_CLASSES)
    most_probable[np.argsort(-row[0])[:N]] = 1
    assert np.abs(most_probable - expected).max() > bias_allowed()


def test_sampled_cannot_be_retempered() -> None:
    rows = every_kind(10, 0, 1.0)
    stored = encode(Sampled(5), rows, 4.0)
    message = (
        r"temperature 2 of a sampled cache made at 4: draws cannot be re-tempered; use its own"
    )
    with pytest.raises(SettingsError, match=message):
        Sampled(5).decode(stored, 4.0, 2.0, 10)
    ids = {"ids": class_ids(as_tensor(stored["ids"]), 10)}
    with pytest.raises(SettingsError, match=message):
        decode(Sampled(5), ids, temperature=4.0, wanted=2.0, classes=10)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many values the largest tensor has that comes about."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else [found]:
            if isinstance(part, Tensor):
                self.values = max(self.values, part.numel())
        return found


def test_decoding_many_draws_takes_memory_in_proportion_to_them() -> None:
    n, rows = 128, 4
    stored = encode(Sampled(n), np.repeat(every_kind(300, 0, 1.0)[:1], rows, 0))
    ids = class_ids(as_tensor(stored["ids"]), 300)
    with Largest() as largest:
        decode(Sampled(n), {"ids": ids}, temperature=1.0, wanted=1.0, classes=300)
    assert rows * n <= largest.values <= 8 * rows * n


# the loss on sparse targets


class LossAndGradient(NamedTuple):
    loss: float
    gradient: Rows


def soft_loss_of(logits: Rows, targets: Targets, temperature: float) -> LossAndGradient:
    student = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = soft_loss(student, targets, temperature)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return LossAndGradient(loss.item(), student.grad.double().numpy())


def differs(sparse: LossAndGradient, dense: LossAndGradient) -> bool:
    apart = not math.isclose(sparse.loss, dense.loss, rel_tol=1e-4, abs_tol=1e-5)
    return apart or not np.allclose(sparse.gradient, dense.gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["topk", "sampled"])
@few
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_the_loss_of_sparse_targets_is_that_of_dense_ones(
    name: str, data: st.DataObject, seed: int
) -> None:
    rows = data.draw(batches())
    wanted = data.draw(temperatures_for(name))
    targets = round_trip(data.draw(encodings(name, rows.shape[-1])), rows, 1.0, wanted).targets
    assert isinstance(targets, SparseTargets)
    assert targets.shape == rows.shape
    logits = np.random.default_rng(seed).standard_normal(rows.shape) * 3
    sparse = soft_loss_of(logits, targets, wanted)
    # -inf in a dense tensor makes NaN of the gradient: a class never drawn has a log p that is finite
    dense = soft_loss_of(logits, to_dense(targets).clamp(min=-1e5), wanted)
    assert not differs(sparse, dense)


def test_a_tail_forgotten_or_a_draw_counted_twice_would_be_noticed() -> None:
    rows = every_kind(50, 1, 2.0)[:2]
    logits = np.random.default_rng(0).standard_normal(rows.shape)
    topk, sampled = (round_trip(e, rows).targets for e in (TopK(5), Sampled(100)))
    assert isinstance(topk, SparseTargets)
    assert isinstance(sampled, SparseTargets)
    without = SparseTargets(topk.ids, topk.log_probs, topk.rest - 100, topk.classes)
    dense = soft_loss_of(logits, to_dense(topk), 1.0)
    assert differs(soft_loss_of(logits, without, 1.0), dense)
    again = sampled.log_probs.clone()
    again[again.isneginf()] = -3
    twice = SparseTargets(sampled.ids, again, sampled.rest, sampled.classes)
    dense = soft_loss_of(logits, to_dense(sampled).clamp(min=-1e5), 1.0)
    assert differs(soft_loss_of(logits, twice, 1.0), dense)


@few
@given(data=st.data(), wanted=st.sampled_from([1.0, 4.0]))
def test_the_loss_of_a_student_that_is_its_topk_targets_is_zero(
    data: st.DataObject, wanted: float
) -> None:
    rows = data.draw(batches(spreads=(0.1, 1, 3, 10)))
    targets = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, wanted).targets
    found = soft_loss_of(to_dense(targets).double().numpy() * wanted, targets, wanted)
    assert abs(found.loss) < 1e-5
    assert np.abs(found.gradient).max() < 1e-5


def test_the_loss_of_sparse_targets_keeps_its_precision_with_many_classes() -> None:
    random = np.random.default_rng(0)
    rows = log_softmax(random.standard_normal((2, EDGE + 1)) * 0.1)  # nearly all of it is tail
    logits = random.standard_normal(rows.shape)
    trip = round_trip(TopK(8), rows)
    expected = divergence(trip.numpy, log_softmax(logits)).mean()
    assert soft_loss_of(logits, trip.targets, 1.0).loss == pytest.approx(expected, abs=1e-5)


def test_draws_of_one_class_count_as_that_class() -> None:
    rows = log_softmax(np.array([[0.0, -np.inf, -np.inf], [0.0, 0.0, -np.inf]]))
    trip = round_trip(Sampled(6), rows)
    assert trip.stored["ids"].tolist() == [[0] * 6, [0] * 3 + [1] * 3]
    shares = np.array([[1, 0, 0], [0.5, 0.5, 0]])
    for decoded in (trip.torch, trip.numpy):
        np.testing.assert_allclose(np.exp(decoded), shares, atol=1e-6)
    found = soft_loss_of(np.zeros((2, 3)), trip.targets, 1.0)
    assert found.loss == pytest.approx((math.log(3) + math.log(1.5)) / 2, rel=1e-5)
    expected = (1 / 3 - shares) / 2
    np.testing.assert_allclose(found.gradient, expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_draws_is_on_average_that_of_the_distribution(temperature: float) -> None:
    # the same student and row in a large batch, whose loss is a mean: its gradient is one over draws
    row = every_kind(DRAWN_CLASSES, 8, 1.0)[:1]
    logits = np.random.default_rng(1).standard_normal((1, DRAWN_CLASSES)) * 2

    def gradient(rows: Rows, encoding: Encoding | None) -> Rows:
        exact = torch.from_numpy(rows).float()
        targets = round_trip(encoding, rows, temperature).targets if encoding else exact
        student = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        soft_loss(student.expand(len(rows), -1), targets, temperature).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        return student.grad.double().numpy()

    expected = gradient(row, None)
    # a count off by t moves the gradient, (q - count / n) / T, by t / n T
    allowed = bias_allowed() / N / temperature + 1e-6
    found = gradient(np.repeat(row, DRAWS, 0), Sampled(N))
    assert np.abs(found - expected).max() < allowed
    cut = gradient(np.repeat(renormalised(row, N, 1.0), 2, 0).clip(-1e5), None)
    assert np.abs(cut - expected).max() > allowed  # as the most probable N alone would do


# what a header and a command line may say


@pytest.mark.parametrize(
    "encoding",
    [
        Dense(),
        Quantized(),
        TopK(1),
        TopK(32, (0.5, 1.0, 20.0)),
        Basis(0, 2, 1),
        Basis(64, 10, 8),
        Sampled(1),
        Sampled(1 << 16),
    ],
)
def test_an_encoding_comes_back_from_its_json(encoding: Encoding) -> None:
    fields = json.loads(json.dumps(encoding_to_json(encoding)))
    assert fields["name"] == encoding.name
    assert encoding_from_json(fields) == encoding


def topk_json(**changes: object) -> dict[str, object]:
    return {"name": "topk", "k": 3, "temperatures": [1.0, 4.0]} | changes


def basis_json(**changes: object) -> dict[str, object]:
    return {"name": "basis", "wide": 4, "narrow": 2, "top": 1} | changes


KNOWN = r"; this softcache knows dense, quantized, topk, basis, sampled$"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, rf"^encoding is None{KNOWN}"),
        ("dense", rf"^encoding is 'dense'{KNOWN}"),
        ([], KNOWN),
        ({}, KNOWN),
        ({"name": None}, KNOWN),
        ({"name": ["dense"]}, KNOWN),
        ({"name": {"dense": 1}}, KNOWN),
        ({"name": "zip"}, KNOWN),
        ({"name": "Dense"}, KNOWN),
        ({"name": "x" * 10_000}, rf"^encoding is .{{80}}{KNOWN}"),
        ({"name": "dense\n\x1b[31m"}, rf"^encoding is [\x20-\x7e]+{KNOWN}"),
        ({"name": "dense", "k": 1}, r"; dense has nothing$"),
        ({"name": "quantized", "bits": 4}, r"; quantized has nothing$"),
        ({"name": "topk", "k": 1}, r"; topk has \['k', 'temperatures'\]$"),
        (topk_json(ids=2), r"; topk has \['k', 'temperatures'\]$"),
        ({"name": "basis", "wide": 4}, r"; basis has \['narrow', 'top', 'wide'\]$"),
        ({"name": "sampled"}, r"; sampled has \['n'\]$"),
        *(
            (topk_json(k=k), r"; k is no whole number from 0 up$")
            for k in (None, True, "3", 3.0, [3], -1, 1 << 31, 10**400)
        ),
        (topk_json(k=0), r"needs k from 1, and 1 to 16 ascending temperatures"),
        *(
            (topk_json(temperatures=t), r"; temperatures are no list of numbers above 0")
            for t in (None, 4.0, "14", {"1": 4}, [1, "4"], [True], [[1.0]], [None])
        ),
        *(
            (topk_json(temperatures=t), r"needs k from 1, and 1 to 16 ascending temperatures")
            for t in ([], [4, 1], [1, 1], list(range(1, 18)))
        ),
        *(
            (topk_json(temperatures=t), r"; temperatures are no list of numbers above 0")
            for t in ([0, 1], [-1], [math.nan], [1, math.inf])
        ),
        (topk_json(temperatures=[1, 2e6]), "needs temperatures above 0, up to 1e6$"),
        (topk_json(temperatures=[1, 1e7]), "needs temperatures above 0, up to 1e6$"),
        *((basis_json(**{n: -1}), rf"; {n} is no whole") for n in ("wide", "narrow", "top")),
        (basis_json(narrow=3), "needs an even narrow, top from 1, and some coefficients"),
        (basis_json(top=0), "needs an even narrow, top from 1, and some coefficients"),
        (basis_json(wide=0, narrow=0), "needs an even narrow, top from 1, and some coefficients"),
        ({"name": "sampled", "n": 0}, "sampled:0 draws; expected 1 to 65536"),
        ({"name": "sampled", "n": 65_537}, "sampled:65537 draws; expected 1 to 65536"),
    ],
)
def test_a_header_that_describes_no_encoding_is_refused(fields: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encoding_from_json(fields)


def test_a_header_with_a_temperature_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(FormatError, match="temperatures"):
        encoding_from_json(topk_json(temperatures=[1, 10**400]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), r"TopK\(k=0, .* needs k from 1"),
        (lambda: TopK(-3), r"TopK\(k=-3, .* needs k from 1"),
        (lambda: TopK(3, ()), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (4.0, 1.0)), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (1.0, 1.0)), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, tuple(map(float, range(1, 18)))), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (0.0, 1.0)), "needs temperatures above 0"),
        (lambda: TopK(3, (1.0, math.inf)), "needs temperatures above 0"),
        (lambda: Basis(-1, 4, 1), r"Basis\(wide=-1, .* needs an even narrow, top from 1"),
        (lambda: Basis(4, -2, 1), "needs an even narrow"),
        (lambda: Basis(4, 3, 1), "needs an even narrow"),
        (lambda: Basis(4, 2, 0), "top from 1"),
        (lambda: Basis(0, 0, 1), "some coefficients"),
        (lambda: Sampled(0), "sampled:0 draws; expected 1 to 65536"),
        (lambda: Sampled(65_537), "sampled:65537 draws; expected 1 to 65536"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(
    make: Callable[[], Encoding], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (TopK(10), "topk:10 of 10 classes leaves no tail; use dense"),
        (TopK(11), "topk:11 of 10 classes leaves no tail; use dense"),
        (Basis(11, 0, 1), "is more than 10 classes have; use dense"),
        (Basis(5, 6, 1), "is more than 10 classes have; use dense"),
        (Basis(1, 0, 11), "is more than 10 classes have; use dense"),
    ],
)
def test_parameters_that_do_not_fit_the_classes_are_refused(
    encoding: Encoding, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        encoding.arrays(10)
    assert encoding.arrays(12)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dense", Dense()),
        ("quantized", Quantized()),
        ("topk:32", TopK(32, (1.0, 2.0, 3.0, 4.0, 8.0))),  # with the dump's own temperature
        ("sampled:50", Sampled(50)),
    ],
)
def test_a_specification_names_an_encoding(spec: str, expected: Encoding) -> None:
    assert parse_encoding(spec, 3.0) == expected


@pytest.mark.parametrize(
    "spec",
    ["", "zip", "Dense", "dense:1", "topk", "topk:", "topk:x", "topk:-1", "topk:1.5", "sampled"],
)
def test_a_specification_of_no_encoding_is_refused_with_all_there_are(spec: str) -> None:
    with pytest.raises(
        SettingsError,
        match=rf"^encoding '{spec}' is unknown; expected dense, quantized, topk:K, basis:BYTES,K",
    ):
        parse_encoding(spec, 4.0)


@pytest.mark.parametrize("encoding", [Quantized(), TopK(4, (1.0, 2.0)), Sampled(7)])
def test_rows_are_encoded_alike_in_whatever_parts(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs = torch.log_softmax(torch.randn(23, 50, generator=torch.Generator()), -1)
    encode = make_encoder(encoding, {}, temperature=1.0, seed=3, device=CPU)
    whole = encode(log_probs, 1, np.arange(23))
    for rows in (1, 4, 22, 23):
        monkeypatch.setattr("softcache.targets.encode.PART_ELEMENTS", rows * 50)
        parts = encode(log_probs, 1, np.arange(23))
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(parts[name], tensor), (name, rows)
