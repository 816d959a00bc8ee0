"""Sampled rows, the loss on sparse targets, and encodings in headers and on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK, parse_encoding
from softcache.cache.encodings import encoding_from_json, encoding_to_json
from softcache.errors import FormatError, SettingsError
from softcache.losses import soft_loss
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import make_encoder
from softcache.targets.fetch import as_tensor
from softcache.types import SparseTargets, Targets
from tests.targets.encodings_cases import (
    CPU,
    EDGE,
    Rows,
    batches,
    divergence,
    encode,
    encodings,
    every_kind,
    few,
    log_softmax,
    renormalised,
    round_trip,
    temperatures_for,
)


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
    # the counts of a multinomial differ from n p by more than 1
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
            "softcache.targets.encode.uniform", lambda *_, draw=extreme, **__: np.array([[draw]])
        )
        assert set(encode(Sampled(n), rows)["ids"][0].tolist()) <= {1, 2}


def test_draws_depend_on_seed_view_and_sample_alone() -> None:
    rows = np.repeat(every_kind(300, 0, 2.0)[:1], 40, 0)
    samples = np.arange(100, 140)

    def drawn(seed: int, view: int, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        stored = encode(
            Sampled(20), rows[: len(sample_ids)], seed=seed, view=view, sample_ids=sample_ids
        )
        return stored["ids"]

    whole = drawn(3, 1, samples)
    np.testing.assert_array_equal(whole, drawn(3, 1, samples))
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(whole[order], drawn(3, 1, samples[order]))
    np.testing.assert_array_equal(whole[7:9], drawn(3, 1, samples[7:9]))
    for other in (drawn(4, 1, samples), drawn(3, 2, samples), drawn(3, 1, samples + 1000)):
        assert (other != whole).any(-1).mean() > 0.9
    assert len(np.unique(whole, axis=0)) > 25  # samples differ from each other too


FALSE_ALARM = 1e-9  # probability, over all seeds, that the test fails for a correct sampler
DRAWS, DRAWN_CLASSES, N = 20_000, 20, 8


def bias_allowed() -> float:
    """How far the mean count of any class can be from n p, except with probability FALSE_ALARM.

    A systematic count is floor(n p) or one more, so by Hoeffding's inequality the mean of m counts
    is off by more than t with a probability of at most 2 exp(-2 m t²), for each class.
    """
    return math.sqrt(math.log(2 * DRAWN_CLASSES / FALSE_ALARM) / (2 * DRAWS))


def mean_counts(rows: Rows) -> Rows:
    """How often each class is among the N draws, averaged over all rows, (C,)."""
    ids = encode(Sampled(N), rows)["ids"].astype(np.int64)
    means: Rows = np.bincount(ids.ravel(), minlength=DRAWN_CLASSES) / len(rows)
    return means


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
    """Records the size of the largest tensor that is created."""

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
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor):
                self.values = max(self.values, output.numel())
        return result


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
    losses_differ = not math.isclose(sparse.loss, dense.loss, rel_tol=1e-4, abs_tol=1e-5)
    return losses_differ or not np.allclose(sparse.gradient, dense.gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["topk", "sampled"])
@few
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_the_loss_of_sparse_targets_is_that_of_dense_ones(
    name: str, data: st.DataObject, seed: int
) -> None:
    rows = data.draw(batches())
    target_temperature = data.draw(temperatures_for(name))
    targets = round_trip(
        data.draw(encodings(name, rows.shape[-1])), rows, 1.0, target_temperature
    ).targets
    assert isinstance(targets, SparseTargets)
    assert targets.shape == rows.shape
    logits = np.random.default_rng(seed).standard_normal(rows.shape) * 3
    sparse = soft_loss_of(logits, targets, target_temperature)
    # -inf in a dense tensor makes the gradient NaN, so classes never drawn get a finite log p
    dense = soft_loss_of(logits, to_dense(targets).clamp(min=-1e5), target_temperature)
    assert not differs(sparse, dense)


def test_a_tail_forgotten_or_a_draw_counted_twice_would_be_noticed() -> None:
    rows = every_kind(50, 1, 2.0)[:2]
    logits = np.random.default_rng(0).standard_normal(rows.shape)
    topk, sampled = (round_trip(e, rows).targets for e in (TopK(5), Sampled(100)))
    assert isinstance(topk, SparseTargets)
    assert isinstance(sampled, SparseTargets)
    without_tail = SparseTargets(topk.ids, topk.log_probs, topk.rest - 100, topk.classes)
    dense = soft_loss_of(logits, to_dense(topk), 1.0)
    assert differs(soft_loss_of(logits, without_tail, 1.0), dense)
    log_probs = sampled.log_probs.clone()
    log_probs[log_probs.isneginf()] = -3
    counted_twice = SparseTargets(sampled.ids, log_probs, sampled.rest, sampled.classes)
    dense = soft_loss_of(logits, to_dense(sampled).clamp(min=-1e5), 1.0)
    assert differs(soft_loss_of(logits, counted_twice, 1.0), dense)


@few
@given(data=st.data(), target_temperature=st.sampled_from([1.0, 4.0]))
def test_the_loss_of_a_student_that_is_its_topk_targets_is_zero(
    data: st.DataObject, target_temperature: float
) -> None:
    rows = data.draw(batches(spreads=(0.1, 1, 3, 10)))
    targets = round_trip(
        data.draw(encodings("topk", rows.shape[-1])), rows, 1.0, target_temperature
    ).targets
    result = soft_loss_of(
        to_dense(targets).double().numpy() * target_temperature, targets, target_temperature
    )
    assert abs(result.loss) < 1e-5
    assert np.abs(result.gradient).max() < 1e-5


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
    result = soft_loss_of(np.zeros((2, 3)), trip.targets, 1.0)
    assert result.loss == pytest.approx((math.log(3) + math.log(1.5)) / 2, rel=1e-5)
    expected = (1 / 3 - shares) / 2
    np.testing.assert_allclose(result.gradient, expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_draws_is_on_average_that_of_the_distribution(temperature: float) -> None:
    # in a large batch of the same student and row, the mean loss averages the gradient over draws
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
    # a count that is off by t moves the gradient, (q - count / n) / T, by t / (n T)
    allowed = bias_allowed() / N / temperature + 1e-6
    mean_gradient = gradient(np.repeat(row, DRAWS, 0), Sampled(N))
    assert np.abs(mean_gradient - expected).max() < allowed
    cut = gradient(np.repeat(renormalised(row, N, 1.0), 2, 0).clip(-1e5), None)
    assert np.abs(cut - expected).max() > allowed  # the N most probable classes alone are biased


# encodings in headers and on the command line
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


KNOWN = r"; this softcache knows dense, quantized, topk, basis, sampled, packed, bernoulli$"


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
        ({"name": "dense", "k": 1}, r"; dense has no parameters$"),
        ({"name": "quantized", "bits": 4}, r"; quantized has no parameters$"),
        ({"name": "topk", "k": 1}, r"; topk has k, temperatures$"),
        (topk_json(ids=2), r"; topk has k, temperatures$"),
        ({"name": "basis", "wide": 4}, r"; basis has narrow, top, wide$"),
        ({"name": "sampled"}, r"; sampled has n$"),
        *(
            (topk_json(k=k), r"; expected k to be a whole number, 0 or more$")
            for k in (None, True, "3", 3.0, [3], -1, 1 << 31, 10**400)
        ),
        (topk_json(k=0), r"needs k of at least 1, and 1 to 16 ascending temperatures"),
        *(
            (topk_json(temperatures=t), r"; expected temperatures to be a list of numbers above 0")
            for t in (None, 4.0, "14", {"1": 4}, [1, "4"], [True], [[1.0]], [None])
        ),
        *(
            (
                topk_json(temperatures=t),
                r"needs k of at least 1, and 1 to 16 ascending temperatures",
            )
            for t in ([], [4, 1], [1, 1], list(range(1, 18)))
        ),
        *(
            (topk_json(temperatures=t), r"; expected temperatures to be a list of numbers above 0")
            for t in ([0, 1], [-1], [math.nan], [1, math.inf])
        ),
        (topk_json(temperatures=[1, 2e6]), "needs temperatures above 0, up to 1e6$"),
        (topk_json(temperatures=[1, 1e7]), "needs temperatures above 0, up to 1e6$"),
        *(
            (basis_json(**{n: -1}), rf"; expected {n} to be a whole number, 0 or more$")
            for n in ("wide", "narrow", "top")
        ),
        (basis_json(narrow=3), "needs an even narrow, top of at least 1, and some coefficients"),
        (basis_json(top=0), "needs an even narrow, top of at least 1, and some coefficients"),
        (
            basis_json(wide=0, narrow=0),
            "needs an even narrow, top of at least 1, and some coefficients",
        ),
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
        (lambda: TopK(0), r"TopK\(k=0, .* needs k of at least 1"),
        (lambda: TopK(-3), r"TopK\(k=-3, .* needs k of at least 1"),
        (lambda: TopK(3, ()), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (4.0, 1.0)), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (1.0, 1.0)), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, tuple(map(float, range(1, 18)))), "1 to 16 ascending temperatures"),
        (lambda: TopK(3, (0.0, 1.0)), "needs temperatures above 0"),
        (lambda: TopK(3, (1.0, math.inf)), "needs temperatures above 0"),
        (lambda: Basis(-1, 4, 1), r"Basis\(wide=-1, .* needs an even narrow, top of at least 1"),
        (lambda: Basis(4, -2, 1), "needs an even narrow"),
        (lambda: Basis(4, 3, 1), "needs an even narrow"),
        (lambda: Basis(4, 2, 0), "top of at least 1"),
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
        (Basis(11, 0, 1), "needs more than 10 classes; use dense"),
        (Basis(5, 6, 1), "needs more than 10 classes; use dense"),
        (Basis(1, 0, 11), "needs more than 10 classes; use dense"),
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
        ("topk:32", TopK(32, (1.0, 2.0, 3.0, 4.0, 8.0))),  # 3 is the temperature of the dump
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
