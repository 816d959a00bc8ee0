"""The fit of `basis`: the directions it finds, and how well they preserve rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache import Basis, Encoding, TopK
from softcache.cache.encodings import BASIS_RANGE, row_bytes
from softcache.dump import fit_basis
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import divergence, retemper
from softcache.dump.fit_basis import SPLITS, Directions, principal_directions, shared_arrays, splits
from softcache.dump.loop import dump
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import as_arrays, make_encoder

CLASSES, WIDTH, ROWS = 128, 16, 320
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
CPU = torch.device("cpu")


def teacher_rows(
    rows: int = ROWS,
    *,
    classes: int = CLASSES,
    width: int = WIDTH,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (rows, classes) of a teacher whose last layer has `width` inputs."""
    random = np.random.default_rng(7)
    weight, bias = random.standard_normal((width, classes)), random.standard_normal(classes)
    inputs = np.random.default_rng(seed).standard_normal((rows, width))
    logits = torch.from_numpy(inputs @ weight + bias)
    return torch.log_softmax(logits.float() / temperature, -1)


def mean_kl(
    encoding: Encoding,
    shared: dict[str, Tensor],
    rows: Tensor,
    temperature: float,
    target_temperature: float,
) -> float:
    """Mean KL(teacher ‖ decoded) at `target_temperature`, of rows at `temperature`."""
    encode = make_encoder(encoding, shared, temperature=temperature, seed=0, device=CPU)
    stored = encode(rows, 0, np.arange(len(rows)))
    stored["ids"] = class_ids(stored["ids"], rows.shape[-1])
    targets = decode(
        encoding,
        stored | {name: tensor.float() for name, tensor in shared.items()},
        temperature=temperature,
        wanted=target_temperature,
        classes=rows.shape[-1],
    )
    exact = retemper(rows.double(), temperature, target_temperature)
    return float(divergence(exact, targets).mean())


# the fit


def gram_error(directions: Tensor) -> float:
    gram = directions.double() @ directions.double().T
    return float((gram - torch.eye(len(gram))).abs().max())


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    classes=st.integers(2, 60),
    rows=st.integers(1, 80),
    most=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
@example(classes=2, rows=1, most=8, spread=1.0)
def test_directions_are_orthonormal_centred_and_strongest_first(
    classes: int, rows: int, most: int, spread: float
) -> None:
    random = np.random.default_rng([classes, rows, most])
    logits = torch.from_numpy(random.standard_normal((rows, classes)) * spread).float()
    fitted = principal_directions(torch.log_softmax(logits, -1), most)
    count = len(fitted.directions)
    assert 1 <= count <= min(most, rows, classes)
    assert fitted.directions.shape == (count, classes)
    assert fitted.deviations.shape == (count,)
    assert gram_error(fitted.directions) < 1e-4
    deviations = fitted.deviations.tolist()
    assert deviations == sorted(deviations, reverse=True)
    assert all(math.isfinite(deviation) for deviation in deviations)


def test_that_check_notices_directions_that_are_not_orthogonal() -> None:
    directions = principal_directions(teacher_rows(), 4).directions.clone()
    directions[1] = (directions[1] + 0.01 * directions[0]) / math.sqrt(1 + 1e-4)
    assert gram_error(directions) > 1e-4


def test_deviations_are_those_of_the_rows_along_each_direction() -> None:
    rows = teacher_rows()
    fitted = principal_directions(rows, WIDTH)
    centred = rows - rows.mean(-1, keepdim=True) - fitted.mean
    along = (centred @ fitted.directions.T).square().mean(0).sqrt()
    np.testing.assert_allclose(fitted.deviations, along, rtol=1e-3)


def test_directions_do_not_see_a_constant_added_to_a_row() -> None:
    rows = teacher_rows()
    moved = (
        rows + torch.arange(len(rows))[:, None] % 8
    )  # exact in float32, except for the last digit
    one, other = (principal_directions(log_probs, 8) for log_probs in (rows, moved))
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-2)
    np.testing.assert_allclose((one.directions * other.directions).sum(-1).abs(), 1, atol=1e-4)


@pytest.mark.parametrize("exact_side", [fit_basis.EXACT_SIDE, 0])
def test_a_fit_is_the_same_again_and_leaves_the_random_numbers_alone(
    exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", exact_side)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = principal_directions(teacher_rows(), 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # changes the state
    other = principal_directions(teacher_rows(), 8)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.deviations, other.deviations)


def test_the_randomized_fit_finds_what_the_exact_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = principal_directions(teacher_rows(), 12)
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", 0)
    randomized = principal_directions(teacher_rows(), 12)
    assert len(randomized.directions) == 12
    assert gram_error(randomized.directions) < 1e-4
    np.testing.assert_allclose(randomized.deviations, exact.deviations, rtol=1e-3)
    np.testing.assert_allclose(
        (randomized.directions @ exact.directions.T).square().sum(-1), 1, atol=1e-3
    )


@pytest.mark.parametrize("exact_side", [fit_basis.EXACT_SIDE, 0])
@pytest.mark.parametrize("width", [1, 5, WIDTH])
def test_no_more_directions_are_found_than_the_teachers_head_has(
    width: int, exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", exact_side)
    fitted = principal_directions(teacher_rows(width=width), 64)
    # rounding the mean to float16 can add one more
    assert width <= len(fitted.directions) <= width + 1


def test_rows_of_full_rank_give_as_many_directions_as_are_wanted() -> None:
    rows = torch.log_softmax(torch.randn(200, 50, generator=torch.Generator().manual_seed(0)), -1)
    assert [len(principal_directions(rows, most).directions) for most in (1, 20, 49)] == [1, 20, 49]


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(10, 6),
        torch.arange(6.0).expand(10, 6),
        torch.tensor([0.0] + [-math.inf] * 5).expand(10, 6),
        torch.tensor([3.0, 1.0, 0.0, 0.0, -1.0, -9.0]).expand(1, 6),
    ],
    ids=["uniform", "constant", "one-hot", "one row"],
)
def test_rows_that_are_all_the_same_are_kept(logits: Tensor) -> None:
    rows = torch.log_softmax(logits, -1)
    fitted = principal_directions(rows, 8)
    assert fitted.directions.isfinite().all()
    encoding = Basis(1, 0, 2)
    shared = shared_arrays(encoding, fitted)
    assert all(tensor.isfinite().all() for tensor in shared.values())
    assert (shared["direction_steps"] > 0).all()
    for temperature in TEMPERATURES:
        assert mean_kl(encoding, shared, rows, 1.0, temperature) < 1e-4


def test_a_data_set_of_one_sample_can_be_dumped(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path
) -> None:
    # three quarters of one row are none: the split must still leave a row to the fit
    arrays = np.load(data_file)
    np.savez(tmp_path / "one.npz", x=arrays["x_train"][:1], y=arrays["y_train"][:1])
    config = replace(
        dump_config, data=f"npz:{tmp_path / 'one.npz'}", eval_data=None, encoding="basis:2,1"
    )
    assert dump(config).complete


def test_classes_without_probability_do_not_drown_the_others() -> None:
    # -inf would turn the fit into NaN, and -1e30 would outweigh everything else
    rows = teacher_rows().clone()
    rows[::3, 5] = -math.inf
    rows[::5, 9] = -1e30
    fitted = principal_directions(rows, WIDTH + 4)
    assert fitted.directions.isfinite().all()
    assert float(fitted.deviations[0]) < BASIS_RANGE * math.sqrt(CLASSES)
    encoding = Basis(len(fitted.directions), 0, 8)
    assert mean_kl(encoding, shared_arrays(encoding, fitted), rows, 1.0, 1.0) < 1e-2


# how bytes are spent


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 200), available=st.integers(1, 300), top=st.integers(1, 20))
def test_splits_spend_no_more_than_the_bytes_and_the_directions(
    size: int, available: int, top: int
) -> None:
    encodings = list(splits(size, top, available))
    assert encodings
    assert len(set(encodings)) == len(encodings) <= len(SPLITS)
    for encoding in encodings:
        assert encoding.top == top
        assert encoding.wide + encoding.narrow // 2 <= size
        assert encoding.rank <= available
        # bytes are left over only if the directions run out, apart from a last unpaired one
        assert encoding.wide + encoding.narrow // 2 == size or encoding.rank >= available - 1


def test_splits_go_from_4_bits_to_8() -> None:
    encodings = list(splits(16, 4, 100))
    assert encodings[0] == Basis(0, 32, 4)
    assert encodings[-1] == Basis(16, 0, 4)


def test_a_row_takes_the_bytes_that_were_asked_for() -> None:
    for encoding in splits(16, 8, 100):
        assert row_bytes(encoding, 1000) == 16 + 4 + 8 * (2 + 1)
        assert row_bytes(encoding, 70_000) == 16 + 4 + 8 * (4 + 1)


def test_the_steps_of_the_directions_reach_their_deviations() -> None:
    fitted = principal_directions(teacher_rows(), 10)
    shared = shared_arrays(Basis(4, 6, 2), fitted)
    assert shared["mean"].dtype == torch.float32  # a rounding error would be in every row
    assert shared["directions"].dtype == torch.float16
    max_levels = torch.tensor([127.0] * 4 + [7.0] * 6)
    np.testing.assert_allclose(shared["direction_steps"] * max_levels, fitted.deviations, rtol=1e-5)


# how well rows are preserved


@pytest.fixture(scope="module")
def fitted() -> Directions:
    return principal_directions(teacher_rows(), WIDTH)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("target_temperature", TEMPERATURES)
def test_a_teacher_of_few_dimensions_is_kept_nearly_exactly(
    temperature: float, target_temperature: float
) -> None:
    encoding = Basis(WIDTH, 0, 4)
    shared = shared_arrays(
        encoding, principal_directions(teacher_rows(temperature=temperature), encoding.rank)
    )
    fresh = teacher_rows(seed=1, temperature=temperature)  # rows that the fit has not seen
    assert mean_kl(encoding, shared, fresh, temperature, target_temperature) < 3e-4


def test_directions_of_another_teacher_would_not_do() -> None:
    encoding = Basis(WIDTH, 0, 4)
    other = teacher_rows(classes=CLASSES, width=WIDTH)[:, torch.arange(CLASSES - 1, -1, -1)]
    shared = shared_arrays(encoding, principal_directions(other, encoding.rank))
    assert mean_kl(encoding, shared, teacher_rows(seed=1), 1.0, 4.0) > 0.1


def test_more_coefficients_and_more_bits_keep_more(fitted: Directions) -> None:
    rows = teacher_rows(seed=1)

    def kl(wide: int, narrow: int) -> float:
        encoding = Basis(wide, narrow, 4)
        return mean_kl(encoding, shared_arrays(encoding, fitted), rows, 1.0, 4.0)

    assert kl(16, 0) < kl(8, 8) < kl(8, 0) < kl(2, 0)
    assert kl(16, 0) < kl(0, 16) < kl(0, 8)


def test_entries_kept_exactly_mend_the_head(fitted: Directions) -> None:
    rows = teacher_rows(seed=1)
    kl = []
    for top in (1, 4, 16):
        encoding = Basis(4, 0, top)
        kl.append(mean_kl(encoding, shared_arrays(encoding, fitted), rows, 1.0, 1.0))
    assert kl == sorted(kl, reverse=True)
    assert kl[2] < kl[0] / 4


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_at_the_same_bytes_it_keeps_ten_times_more_than_topk(temperature: float) -> None:
    rows, fresh = (teacher_rows(seed=seed, temperature=temperature) for seed in (0, 1))
    topk = TopK(16, TEMPERATURES)
    budget = row_bytes(topk, CLASSES)
    basis = Basis(WIDTH, 0, (budget - WIDTH - 4) // 3)
    assert row_bytes(basis, CLASSES) <= budget
    shared = shared_arrays(basis, principal_directions(rows, basis.rank))
    topk_kl = mean_kl(topk, {}, fresh, temperature, 4.0)
    assert mean_kl(basis, shared, fresh, temperature, 4.0) <= topk_kl / 10


def test_on_rows_of_full_rank_it_does_not() -> None:
    # so the comparison depends on the teacher, not on how it is measured
    generator = torch.Generator().manual_seed(0)
    rows = torch.log_softmax(torch.randn(2 * ROWS, CLASSES, generator=generator) * 4, -1)
    topk, basis = TopK(16, TEMPERATURES), Basis(WIDTH, 0, 17)
    shared = shared_arrays(basis, principal_directions(rows[:ROWS], basis.rank))
    assert (
        mean_kl(basis, shared, rows[ROWS:], 1.0, 4.0)
        > mean_kl(topk, {}, rows[ROWS:], 1.0, 4.0) / 10
    )


def test_each_row_is_encoded_for_itself(fitted: Directions) -> None:
    encoding = Basis(8, 8, 4)
    encode = make_encoder(
        encoding, shared_arrays(encoding, fitted), temperature=1.0, seed=0, device=CPU
    )
    rows = teacher_rows(40, seed=1)
    order: npt.NDArray[np.int64] = np.random.default_rng(0).permutation(40)
    whole = as_arrays(encode(rows, 0, np.arange(40)))
    shuffled = as_arrays(encode(rows[torch.from_numpy(order)], 3, order))
    for name, values in whole.items():
        # matrix products sum in any order, so a last digit can differ and change a level
        assert (values[order] == shuffled[name]).mean() > 0.98
