"""The fit of `basis`: what it finds in a teacher's rows, and what the rows then keep."""

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
from softcache.cache.encodings import BASIS_RANGE
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


def said(
    rows: int = ROWS,
    *,
    classes: int = CLASSES,
    width: int = WIDTH,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """What a teacher says whose last layer takes `width` numbers, (rows, classes)."""
    random = np.random.default_rng(7)
    weight, bias = random.standard_normal((width, classes)), random.standard_normal(classes)
    inputs = np.random.default_rng(seed).standard_normal((rows, width))
    logits = torch.from_numpy(inputs @ weight + bias)
    return torch.log_softmax(logits.float() / temperature, -1)


def kept(
    encoding: Encoding, shared: dict[str, Tensor], rows: Tensor, temperature: float, wanted: float
) -> float:
    """Mean KL(teacher ‖ decoded) at `wanted` of rows at `temperature`."""
    encode = make_encoder(encoding, shared, temperature=temperature, seed=0, device=CPU)
    stored = encode(rows, 0, np.arange(len(rows)))
    stored["ids"] = class_ids(stored["ids"], rows.shape[-1])
    targets = decode(
        encoding,
        stored | {name: tensor.float() for name, tensor in shared.items()},
        temperature=temperature,
        wanted=wanted,
        classes=rows.shape[-1],
    )
    exact = retemper(rows.double(), temperature, wanted)
    return float(divergence(exact, targets).mean())


def row_bytes(encoding: Encoding, classes: int) -> int:
    return sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        for array in encoding.arrays(classes)
        if array.axis == "rows"
    )


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
    found = len(fitted.directions)
    assert 1 <= found <= min(most, rows, classes)
    assert fitted.directions.shape == (found, classes)
    assert fitted.deviations.shape == (found,)
    assert gram_error(fitted.directions) < 1e-4
    deviations = fitted.deviations.tolist()
    assert deviations == sorted(deviations, reverse=True)
    assert all(math.isfinite(deviation) for deviation in deviations)


def test_that_check_notices_directions_that_are_not_orthogonal() -> None:
    directions = principal_directions(said(), 4).directions.clone()
    directions[1] = (directions[1] + 0.01 * directions[0]) / math.sqrt(1 + 1e-4)
    assert gram_error(directions) > 1e-4


def test_deviations_are_those_of_the_rows_along_each_direction() -> None:
    rows = said()
    fitted = principal_directions(rows, WIDTH)
    centred = rows - rows.mean(-1, keepdim=True) - fitted.mean
    along = (centred @ fitted.directions.T).square().mean(0).sqrt()
    np.testing.assert_allclose(fitted.deviations, along, rtol=1e-3)


def test_directions_do_not_see_a_constant_added_to_a_row() -> None:
    rows = said()
    moved = rows + torch.arange(len(rows))[:, None] % 8  # exact in float32, but for a last digit
    one, other = (principal_directions(given, 8) for given in (rows, moved))
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-2)
    np.testing.assert_allclose((one.directions * other.directions).sum(-1).abs(), 1, atol=1e-4)


@pytest.mark.parametrize("exact_side", [fit_basis.EXACT_SIDE, 0])
def test_a_fit_is_the_same_again_and_leaves_the_random_numbers_alone(
    exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", exact_side)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = principal_directions(said(), 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # another state
    other = principal_directions(said(), 8)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.deviations, other.deviations)


def test_the_randomized_fit_finds_what_the_exact_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = principal_directions(said(), 12)
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", 0)
    found = principal_directions(said(), 12)
    assert len(found.directions) == 12
    assert gram_error(found.directions) < 1e-4
    np.testing.assert_allclose(found.deviations, exact.deviations, rtol=1e-3)
    np.testing.assert_allclose(
        (found.directions @ exact.directions.T).square().sum(-1), 1, atol=1e-3
    )


@pytest.mark.parametrize("exact_side", [fit_basis.EXACT_SIDE, 0])
@pytest.mark.parametrize("width", [1, 5, WIDTH])
def test_no_more_directions_are_found_than_the_teachers_head_has(
    width: int, exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_basis, "EXACT_SIDE", exact_side)
    fitted = principal_directions(said(width=width), 64)
    # one more for the rounding of the mean to float16
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
    for wanted in TEMPERATURES:
        assert kept(encoding, shared, rows, 1.0, wanted) < 1e-4


def test_a_data_set_of_one_sample_can_be_dumped(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path
) -> None:
    # three quarters of one row are none: the split has to leave it to the fit
    arrays = np.load(data_file)
    np.savez(tmp_path / "one.npz", x=arrays["x_train"][:1], y=arrays["y_train"][:1])
    config = replace(
        dump_config, data=f"npz:{tmp_path / 'one.npz'}", eval_data=None, encoding="basis:2,1"
    )
    assert dump(config).complete


def test_classes_without_probability_do_not_drown_the_others() -> None:
    # as -inf they would make NaN of the fit, as -1e30 they would be all that it sees
    rows = said().clone()
    rows[::3, 5] = -math.inf
    rows[::5, 9] = -1e30
    fitted = principal_directions(rows, WIDTH + 4)
    assert fitted.directions.isfinite().all()
    assert float(fitted.deviations[0]) < BASIS_RANGE * math.sqrt(CLASSES)
    encoding = Basis(len(fitted.directions), 0, 8)
    assert kept(encoding, shared_arrays(encoding, fitted), rows, 1.0, 1.0) < 1e-2


# how bytes are spent


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 200), found=st.integers(1, 300), top=st.integers(1, 20))
def test_splits_spend_no_more_than_the_bytes_and_the_directions(
    size: int, found: int, top: int
) -> None:
    tried = list(splits(size, top, found))
    assert tried
    assert len(set(tried)) == len(tried) <= len(SPLITS)
    for encoding in tried:
        assert encoding.top == top
        assert encoding.wide + encoding.narrow // 2 <= size
        assert encoding.rank <= found
        # what is left over is what no direction is there for: at most the last, odd one
        assert encoding.wide + encoding.narrow // 2 == size or encoding.rank >= found - 1


def test_splits_go_from_4_bits_to_8() -> None:
    tried = list(splits(16, 4, 100))
    assert tried[0] == Basis(0, 32, 4)
    assert tried[-1] == Basis(16, 0, 4)


def test_a_row_takes_the_bytes_that_were_asked_for() -> None:
    for encoding in splits(16, 8, 100):
        assert row_bytes(encoding, 1000) == 16 + 4 + 8 * (2 + 1)
        assert row_bytes(encoding, 70_000) == 16 + 4 + 8 * (4 + 1)


def test_the_steps_of_the_directions_reach_their_deviations() -> None:
    fitted = principal_directions(said(), 10)
    shared = shared_arrays(Basis(4, 6, 2), fitted)
    assert shared["mean"].dtype == torch.float32  # its error would be in every row
    assert shared["directions"].dtype == torch.float16
    most = torch.tensor([127.0] * 4 + [7.0] * 6)
    np.testing.assert_allclose(shared["direction_steps"] * most, fitted.deviations, rtol=1e-5)


# what rows keep


@pytest.fixture(scope="module")
def fitted() -> Directions:
    return principal_directions(said(), WIDTH)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("wanted", TEMPERATURES)
def test_a_teacher_of_few_dimensions_is_kept_nearly_exactly(
    temperature: float, wanted: float
) -> None:
    encoding = Basis(WIDTH, 0, 4)
    shared = shared_arrays(
        encoding, principal_directions(said(temperature=temperature), encoding.rank)
    )
    fresh = said(seed=1, temperature=temperature)  # rows that the fit has not seen
    assert kept(encoding, shared, fresh, temperature, wanted) < 3e-4


def test_directions_of_another_teacher_would_not_do() -> None:
    encoding = Basis(WIDTH, 0, 4)
    other = said(classes=CLASSES, width=WIDTH)[:, torch.arange(CLASSES - 1, -1, -1)]
    shared = shared_arrays(encoding, principal_directions(other, encoding.rank))
    assert kept(encoding, shared, said(seed=1), 1.0, 4.0) > 0.1


def test_more_coefficients_and_more_bits_keep_more(fitted: Directions) -> None:
    rows = said(seed=1)

    def kl(wide: int, narrow: int) -> float:
        encoding = Basis(wide, narrow, 4)
        return kept(encoding, shared_arrays(encoding, fitted), rows, 1.0, 4.0)

    assert kl(16, 0) < kl(8, 8) < kl(8, 0) < kl(2, 0)
    assert kl(16, 0) < kl(0, 16) < kl(0, 8)


def test_entries_kept_exactly_mend_the_head(fitted: Directions) -> None:
    rows = said(seed=1)
    kl = []
    for top in (1, 4, 16):
        encoding = Basis(4, 0, top)
        kl.append(kept(encoding, shared_arrays(encoding, fitted), rows, 1.0, 1.0))
    assert kl == sorted(kl, reverse=True)
    assert kl[2] < kl[0] / 4


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_at_the_same_bytes_it_keeps_ten_times_more_than_topk(temperature: float) -> None:
    rows, fresh = (said(seed=seed, temperature=temperature) for seed in (0, 1))
    topk = TopK(16, TEMPERATURES)
    budget = row_bytes(topk, CLASSES)
    ours = Basis(WIDTH, 0, (budget - WIDTH - 4) // 3)
    assert row_bytes(ours, CLASSES) <= budget
    shared = shared_arrays(ours, principal_directions(rows, ours.rank))
    theirs = kept(topk, {}, fresh, temperature, 4.0)
    assert kept(ours, shared, fresh, temperature, 4.0) <= theirs / 10


def test_on_rows_of_full_rank_it_does_not() -> None:
    # so that the comparison is about the teacher, and not won by the way it is measured
    generator = torch.Generator().manual_seed(0)
    rows = torch.log_softmax(torch.randn(2 * ROWS, CLASSES, generator=generator) * 4, -1)
    topk, ours = TopK(16, TEMPERATURES), Basis(WIDTH, 0, 17)
    shared = shared_arrays(ours, principal_directions(rows[:ROWS], ours.rank))
    assert kept(ours, shared, rows[ROWS:], 1.0, 4.0) > kept(topk, {}, rows[ROWS:], 1.0, 4.0) / 10


def test_each_row_is_encoded_for_itself(fitted: Directions) -> None:
    encoding = Basis(8, 8, 4)
    encode = make_encoder(
        encoding, shared_arrays(encoding, fitted), temperature=1.0, seed=0, device=CPU
    )
    rows = said(40, seed=1)
    order: npt.NDArray[np.int64] = np.random.default_rng(0).permutation(40)
    whole = as_arrays(encode(rows, 0, np.arange(40)))
    shuffled = as_arrays(encode(rows[torch.from_numpy(order)], 3, order))
    for name, values in whole.items():
        # but for a last digit, on which a level may depend: a product of matrices sums as it likes
        assert (values[order] == shuffled[name]).mean() > 0.98
