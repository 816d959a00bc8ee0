"""`dense`: bounds on the error of a decoded row, for every kind of distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softcache.cache import Dense, parse_encoding
from softcache.cache.array_spec import ArraySpec
from softcache.cache.encodings import FLOAT16_LOWEST, MAX_TEMPERATURE
from softcache.targets.encode import as_arrays, make_encoder

Rows = npt.NDArray[np.float64]

RELATIVE = 2.0**-11  # half a step of a normal float16
ABSOLUTE = 2.0**-25  # half a step of a subnormal one
FLOAT32 = 1e-5  # tolerance for the arithmetic of the decoder

same_every_time = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def log_softmax(logits: Rows) -> Rows:
    with np.errstate(invalid="ignore"):  # -inf stays -inf
        shifted = logits - logits.max(-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def store(log_probs: Rows) -> npt.NDArray[np.float16]:
    """Rows (B, C) as the file stores them."""
    encode = make_encoder(Dense(), {}, temperature=1.0, seed=0, device=torch.device("cpu"))
    stored = as_arrays(encode(torch.from_numpy(log_probs).float(), 0, np.arange(len(log_probs))))
    assert list(stored) == ["log_probs"]
    return stored["log_probs"]


def decode(
    stored: npt.NDArray[np.float16], temperature: float = 1.0, requested: float = 1.0
) -> Rows:
    classes = stored.shape[-1]
    decoded = Dense().decode({"log_probs": stored}, temperature, requested, classes)
    assert decoded.dtype == np.float32
    return decoded.astype(np.float64)


def divergence(log_p: Rows, log_q: Rows) -> Rows:
    """KL(p ‖ q) in nats, (B,); classes with zero probability contribute nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        kl: Rows = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return kl


def slack(log_probs: Rows, ratio: float = 1.0) -> Rows:
    """A bound on the error of each entry at T', (B, C).

    Rounding moves an entry of log p by at most half a step, re-tempering multiplies that by T/T',
    and the log of the normalizing sum moves by at most its mean over the distribution.
    """
    moved = (np.abs(log_probs) * RELATIVE + ABSOLUTE) * ratio
    p = np.exp(log_softmax(log_probs * ratio))
    weighted = np.where(p > 0, p * np.exp(np.where(p > 0, moved, 0)), 0)
    normalizer = np.log(np.maximum(weighted.sum(-1, keepdims=True), 1.0))
    bound: Rows = moved + normalizer + FLOAT32 * (1 + np.abs(log_probs * ratio) / 10)
    return bound


@st.composite
def distributions(draw: st.DrawFn) -> Rows:
    """One row of log-probabilities: any spread, with ties, one-hot, uniform, or with impossible classes."""
    classes = draw(st.sampled_from([2, 3, 10, 257, 1000]))
    seed, spread = (
        draw(st.integers(0, 1 << 32)),
        draw(st.sampled_from([0.0, 1e-3, 1, 10, 1e3, 3e4])),
    )
    random = np.random.default_rng(seed)
    logits = random.standard_normal((1, classes)).clip(-1, 1) * spread
    kind = draw(st.sampled_from(["any", "ties", "one-hot", "forbidden"]))
    if kind == "ties":
        logits = np.round(logits / max(spread, 1e-3)) * spread
    elif kind == "one-hot":
        logits[:, draw(st.integers(0, classes - 1))] += 1e3
    elif kind == "forbidden":
        logits[:, draw(st.integers(1, classes - 1)) :] = -np.inf
    return log_softmax(logits)


def near(decoded: Rows, exact: Rows, bound: Rows) -> bool:
    """Within the bound where there is any probability, and negligible elsewhere."""
    possible = exact > -80
    return bool(
        (np.abs(decoded - exact) <= bound)[possible].all() and (decoded[~possible] < -70).all()
    )


@same_every_time
@given(distributions())
@example(np.log(np.full((1, 65_537), 1 / 65_537)))
def test_what_comes_back_is_within_half_a_step_of_float16(log_probs: Rows) -> None:
    decoded = decode(store(log_probs))
    assert near(decoded, log_probs, slack(log_probs))
    assert divergence(log_probs, decoded).max() <= 1e-5, "what the docstring of Dense promises"


@same_every_time
@given(distributions(), st.sampled_from([1.0, 4.0]), st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]))
def test_any_temperature_follows_from_what_is_stored(
    log_probs: Rows, temperature: float, requested: float
) -> None:
    ratio = temperature / requested
    exact = log_softmax(np.maximum(log_probs, FLOAT16_LOWEST) * ratio)
    retempered = decode(store(log_probs), temperature, requested)
    assert near(retempered, exact, slack(np.maximum(log_probs, FLOAT16_LOWEST), ratio))


def test_that_bound_notices_bfloat16_and_a_temperature_forgotten() -> None:
    log_probs = log_softmax(np.random.default_rng(0).standard_normal((50, 10)) * 3)
    coarse = torch.from_numpy(log_probs).bfloat16().double().numpy()
    assert not near(log_softmax(coarse), log_probs, slack(log_probs))
    exact = log_softmax(log_probs / 4)
    assert not near(decode(store(log_probs)), exact, slack(log_probs, 0.25))


@same_every_time
@given(distributions(), st.sampled_from([0.5, 1.0, 4.0, 100.0]))
def test_probabilities_are_finite_not_negative_and_sum_to_one(
    log_probs: Rows, requested: float
) -> None:
    decoded = decode(store(log_probs), 1.0, requested)
    assert np.isfinite(decoded).all()
    assert (decoded <= 0).all()
    assert np.abs(np.exp(decoded).sum(-1) - 1).max() < 1e-5


@pytest.mark.parametrize("deep", [-np.inf, -1e30, -70_000.0, -65_520.0, -65_504.0])
def test_what_is_too_deep_for_float16_is_stored_as_its_lowest(deep: float) -> None:
    log_probs = np.array([[0.0, deep, deep]])
    stored = store(log_probs)
    assert stored.dtype == np.dtype("<f2")
    assert stored.tolist() == [[0.0, FLOAT16_LOWEST, FLOAT16_LOWEST]]
    assert decode(stored).tolist() == [[0.0, FLOAT16_LOWEST, FLOAT16_LOWEST]]


def test_the_largest_class_stays_the_largest() -> None:
    log_probs = log_softmax(np.random.default_rng(1).standard_normal((1000, 100)) * 2)
    decoded = decode(store(log_probs))
    top = log_probs.argmax(-1)[:, None]
    assert (np.take_along_axis(decoded, top, -1)[:, 0] == decoded.max(-1)).all()


def test_rows_of_positions_decode_as_rows() -> None:
    stored = store(log_softmax(np.random.default_rng(2).standard_normal((6, 7))))
    np.testing.assert_array_equal(
        decode(stored.reshape(2, 3, 7), 4.0, 2.0), decode(stored, 4.0, 2.0).reshape(2, 3, 7)
    )


def test_decoding_changes_nothing_that_is_stored() -> None:
    stored = store(log_softmax(np.zeros((2, 3))))
    before = stored.copy()
    stored.setflags(write=False)
    decode(stored, 4.0, 1.0)
    np.testing.assert_array_equal(stored, before)


@pytest.mark.parametrize("classes", [2, 1000, 65_537])
def test_a_row_takes_two_bytes_a_class(classes: int) -> None:
    assert Dense().arrays(classes) == [ArraySpec("log_probs", "<f2", "rows", (classes,))]


@pytest.mark.parametrize("spec", ["dense", "quantized", "topk:2", "sampled:3"])
def test_every_encoding_takes_the_highest_temperature_of_a_header(spec: str) -> None:
    assert parse_encoding(spec, MAX_TEMPERATURE).name == spec.partition(":")[0]
