"""Every encoding in torch and in numpy: what is decoded from rows of every kind of distribution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK
from softcache.cache.encodings import ENCODINGS, QUANTIZED_RANGE
from softcache.errors import FormatError
from softcache.targets.decode import class_ids
from softcache.targets.fetch import as_tensor
from tests.targets.encodings_cases import (
    EDGE,
    Rows,
    Trip,
    batches,
    divergence,
    encode,
    encodings,
    every_kind,
    few,
    log_softmax,
    renormalised,
    round_trip,
    shared_of,
    temperatures_for,
)

HALF = 2.0**-11  # half a step of float16, relative
FLOAT32 = 2e-6  # error of float32 arithmetic, relative to the depth of a row


# what every encoding must do
@pytest.mark.parametrize("name", ENCODINGS)
@few
@given(data=st.data())
def test_torch_and_numpy_give_the_same_probabilities(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    trip = round_trip(encoding, rows, 1.0, data.draw(temperatures_for(name)))
    np.testing.assert_array_equal(np.isneginf(trip.torch), np.isneginf(trip.numpy))
    np.testing.assert_allclose(np.exp(trip.torch), np.exp(trip.numpy), rtol=1e-3, atol=1e-6)
    finite = np.isfinite(trip.numpy)
    np.testing.assert_allclose(trip.torch[finite], trip.numpy[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "bernoulli"])
@few
@given(data=st.data())
def test_probabilities_sum_to_one_and_none_is_negative(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    trip = round_trip(encoding, rows, 1.0, data.draw(temperatures_for(name)))
    for decoded in (trip.torch, trip.numpy):
        assert not np.isnan(decoded).any()
        assert name in ("sampled", "packed") or np.isfinite(decoded).all()
        assert decoded.max() <= 1e-6
        np.testing.assert_allclose(np.exp(decoded).sum(-1), 1, atol=2e-5)


@pytest.mark.parametrize("name", ENCODINGS)
@few
@given(data=st.data())
def test_what_is_stored_is_what_the_encoding_declares(name: str, data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings(name, rows.shape[-1]))
    declared = encoding.arrays(rows.shape[-1])
    dtypes = {array: values.dtype.str for array, values in encode(encoding, rows).items()}
    assert dtypes == {array.name: array.dtype for array in declared if array.axis == "rows"}
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
    # 32,767 is the largest id that fits into a signed 16-bit integer; the last class is the likeliest
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
    assert as_tensor(stored["ids"])[0, 0] == 40_000 - EDGE  # class_ids() has to undo this
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
    below: Rows = log_probs.max(-1, keepdims=True) - log_probs
    return below


def excess(rows: Rows, decoded: Rows, ranges: Rows) -> float:
    """By how much the worst entry exceeds the error bound that `Quantized` documents."""
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
@pytest.mark.parametrize("target_temperature", [1.0, 2.0, 4.0, 8.0])
def test_quantized_rows_of_a_teacher_lose_at_most_a_thousandth_of_a_nat(
    temperature: float, target_temperature: float
) -> None:
    logits = np.random.default_rng(1).standard_normal((50, 500)) * 4
    rows = log_softmax(logits / temperature)
    trip = round_trip(Quantized(), rows, temperature, target_temperature)
    assert divergence(log_softmax(logits / target_temperature), trip.torch).max() < 1e-3


# topk
def head_mask(trip: Trip, classes: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((len(trip.stored["ids"]), classes), bool)
    np.put_along_axis(mask, trip.stored["ids"].astype(np.int64), True, -1)
    return mask


def log_sum(log_probs: Rows, where: npt.NDArray[np.bool_]) -> Rows:
    """log of the sum of the probabilities where the mask is set, (B,)."""
    kept = np.where(where, log_probs, -np.inf)
    sums: Rows = np.logaddexp.reduce(kept, -1)
    return sums


@few
@given(data=st.data())
def test_topk_keeps_the_largest_classes(data: st.DataObject) -> None:
    rows = data.draw(batches())
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows)
    mask = head_mask(trip, rows.shape[-1])
    k = trip.stored["ids"].shape[-1]
    assert (mask.sum(-1) == k).all()  # no duplicates
    assert (np.where(mask, rows, np.inf).min(-1) >= np.where(mask, -np.inf, rows).max(-1)).all()


@few
@given(data=st.data(), target_temperature=st.sampled_from([0.5, 1.0, 3.0, 8.0]))
def test_the_head_of_topk_is_exact_to_float16_relative_to_itself(
    data: st.DataObject, target_temperature: float
) -> None:
    rows = data.draw(batches(spreads=(0.1, 1, 3, 10, 100)))
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, target_temperature)
    ids = trip.stored["ids"].astype(np.int64)
    exact = np.take_along_axis(rows, ids, -1)
    bound = (np.abs(exact) + np.abs(exact[:, :1])) * (HALF + FLOAT32) / target_temperature
    for decoded in (trip.torch, trip.numpy):
        head = np.take_along_axis(decoded, ids, -1)
        with np.errstate(invalid="ignore"):
            off = np.abs((head - head[:, :1]) - (exact - exact[:, :1]) / target_temperature)
        allowed = bound + 1e-5 + FLOAT32 * np.abs(head)
        assert (off <= allowed)[exact > -60_000].all()


@few
@given(data=st.data())
def test_the_tail_of_topk_has_its_mass_at_every_temperature_kept(data: st.DataObject) -> None:
    rows = data.draw(batches())
    encoding = data.draw(encodings("topk", rows.shape[-1]))
    assert isinstance(encoding, TopK)
    for target_temperature in encoding.temperatures:
        trip = round_trip(encoding, rows, 2.0, target_temperature)
        mask = head_mask(trip, rows.shape[-1])
        exact = log_softmax(rows * 2.0 / target_temperature)
        odds = log_sum(exact, ~mask) - log_sum(exact, mask)
        for decoded in (trip.torch, trip.numpy):
            decoded_odds = log_sum(decoded, ~mask) - log_sum(decoded, mask)
            allowed = np.abs(odds) * HALF + 1e-4
            assert (np.abs(decoded_odds - odds) <= allowed)[odds > -65_000].all()
            assert (decoded_odds < -60_000)[odds <= -65_000].all()


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
@given(data=st.data(), target_temperature=st.sampled_from([0.25, 1.0, 3.0, 100.0]))
def test_the_tail_of_topk_is_even(data: st.DataObject, target_temperature: float) -> None:
    rows = data.draw(batches())
    trip = round_trip(data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, target_temperature)
    mask = head_mask(trip, rows.shape[-1])
    for decoded in (trip.torch, trip.numpy):
        assert (
            np.where(mask, -np.inf, decoded).max(-1) == np.where(mask, np.inf, decoded).min(-1)
        ).all()


def test_topk_at_an_endless_temperature_is_uniform() -> None:
    trip = round_trip(TopK(5), every_kind(100, 0, 3.0)[:1], 1.0, 1e5)
    np.testing.assert_allclose(trip.torch, -math.log(100), atol=1e-3)


def uniform_tail(rows: Rows, k: int, ratio: float) -> Rows:
    """Rows cut to their k largest entries, with an even tail that is tempered class by class."""
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
    for target_temperature in (1.0, 2.0, 4.0, 8.0):
        ratio = temperature / target_temperature
        exact = log_softmax(rows * ratio)
        kl = divergence(exact, round_trip(TopK(k), rows, temperature, target_temperature).torch)
        for other in (renormalised, uniform_tail):
            # only topk is rounded to float16, hence the small allowance
            assert (kl <= divergence(exact, other(rows, k, ratio)) * 1.01 + 1e-4).all()


def test_the_tail_kept_at_several_temperatures_is_worth_its_bytes() -> None:
    logits = np.random.default_rng(2).standard_normal((100, 1000)) * 8  # top-1 about 0.7
    rows = log_softmax(logits)
    exact = log_softmax(logits / 4)
    kl = divergence(exact, round_trip(TopK(32), rows, 1.0, 4.0).torch).mean()
    assert divergence(exact, uniform_tail(rows, 32, 0.25)).mean() > 1.2 * kl
    assert divergence(exact, renormalised(rows, 32, 0.25)).mean() == np.inf
