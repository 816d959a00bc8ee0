"""Classes drawn at random: the mean over draws is exact, none is drawn twice, ids survive their packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache.draws import Distinct, id_bits, packed_bytes, unpacked
from softcache.errors import FormatError, SettingsError
from softcache.targets.decode import decode, to_dense
from softcache.targets.draw import draw_distinct, encode_distinct, pack, systematic, unpack
from softcache.targets.encode import make_encoder

CPU = torch.device("cpu")


def rows(classes: int, sharpness: float, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, classes, generator=generator)
    return torch.log_softmax(logits, -1)


def decoded(log_probs: Tensor, draws: Tensor, n: int) -> Tensor:
    """Probabilities (B, C) as a cache of `distinct` gives them back."""
    stored = encode_distinct(log_probs, draws, n)
    classes = log_probs.shape[1]
    targets = decode(Distinct(n), stored, temperature=1.0, wanted=1.0, classes=classes)
    return to_dense(targets).exp()


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("n", [2, 8, 30])
def test_the_mean_over_draws_is_the_distribution(sharpness: float, n: int) -> None:
    log_probs = rows(60, sharpness)
    points = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    mean = decoded(log_probs.expand(4000, -1), points, n).double().mean(0)
    exact = log_probs[0].exp().double()
    # evenly spread draws leave an error of about one draw in 4,000, and the codes one of 1 in 500
    assert (mean - exact).abs().max() < 0.004
    assert abs(float(mean.sum()) - 1) < 1e-5


def test_what_is_probable_is_kept_as_it_is() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.1, *[0.1 / 97] * 97]])
    ids, kept, tau = draw_distinct(probs.log(), torch.tensor([[0.3]], dtype=torch.float64), 6)
    assert int(kept[0]) == 3
    assert ids[0, :3].tolist() == [0, 1, 2]
    assert float(tau[0]) == pytest.approx(0.1 / 3, rel=1e-5)
    stored = decoded(probs.log(), torch.tensor([[0.3]], dtype=torch.float64), 6)[0]
    assert stored[:3].tolist() == pytest.approx([0.5, 0.3, 0.1], rel=0.01)
    assert int((stored > 0).sum()) == 6


@pytest.mark.must("F50")
@settings(max_examples=60, deadline=None)
@given(
    classes=st.sampled_from([12, 300, 5000, 70_000]),
    sharpness=st.floats(0, 40),
    n=st.integers(2, 11),
    draw=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_no_class_is_stored_twice(
    classes: int, sharpness: float, n: int, draw: float, seed: int
) -> None:
    log_probs = rows(classes, sharpness, 3, seed)
    draws = torch.full((3, 1), draw, dtype=torch.float64)
    stored = {name: t.numpy() for name, t in encode_distinct(log_probs, draws, n).items()}
    encoding = Distinct(n)
    assert encoding.flaw(stored, classes) is None
    dense = encoding.decode(stored, 1.0, 1.0, classes)
    assert np.allclose(np.exp(dense).sum(-1), 1, atol=1e-5)
    assert ((dense > -np.inf).sum(-1) == n).all()


@pytest.mark.parametrize(
    "probs",
    [
        [1.0, *[0.0] * 20],
        [0.5, 0.5, *[0.0] * 19],
        [1 / 21] * 21,
        [1 - 1e-7, 1e-7, *[0.0] * 19],
    ],
)
def test_extreme_rows(probs: list[float]) -> None:
    log_probs = torch.tensor([probs]).log().clamp(min=-200)
    dense = decoded(log_probs, torch.tensor([[0.9]], dtype=torch.float64), 5)
    assert int((dense > 0).sum()) >= 1
    assert float(dense.sum()) == pytest.approx(1, abs=1e-5)
    assert float((dense[0] - torch.tensor(probs)).abs().sum()) < 1.7


@pytest.mark.parametrize("classes", [2, 3, 256, 257, 50_000, 65_536, 152_064, 1 << 24])
@pytest.mark.parametrize("n", [1, 7, 12])
def test_ids_survive_their_packing(classes: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, classes, (50, n), generator=generator)
    ids[0], ids[1] = 0, classes - 1
    packed = pack(ids, classes)
    assert packed.shape == (50, packed_bytes(n, classes))
    assert torch.equal(unpack(packed, n, classes), ids)
    assert np.array_equal(unpacked(packed.numpy(), n, classes), ids.numpy())
    assert id_bits(classes) == math.ceil(math.log2(classes))


@pytest.mark.parametrize("classes", [4097, 10_000, 152_064])
def test_blocks_find_the_classes_of_the_whole_sum(classes: int) -> None:
    probs = rows(classes, 2.0, 8).exp()
    points = (torch.arange(50, dtype=torch.float64) + 0.37) / 50
    found = systematic(probs, points.expand(8, -1))
    cumulative = probs.double().cumsum(-1)
    exact = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    # a point at the edge between two classes may fall on either side
    assert (found != exact).double().mean() < 0.01
    before = cumulative.gather(1, (found - 1).clamp(min=0)) * (found > 0)
    assert (before <= points * cumulative[:, -1:] + 1e-6).all()
    assert (cumulative.gather(1, found) >= points * cumulative[:, -1:] - 1e-6).all()


def test_draws_follow_the_position_in_the_sample() -> None:
    encode = make_encoder(Distinct(4), {}, temperature=1.0, seed=3, device=CPU)
    log_probs = rows(100, 1.0).expand(6, -1)
    samples, positions = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    together = encode(log_probs, 0, samples, positions)["packed"]
    assert len({tuple(row.tolist()) for row in together}) > 3
    for row in range(6):
        place = slice(row, row + 1)
        alone = encode(log_probs[place], 0, samples[place], positions[place])["packed"]
        assert torch.equal(alone[0], together[row])


@pytest.mark.must("F50")
@pytest.mark.parametrize(
    ("array", "value", "flaw"),
    [
        ("packed", 255, "class ids beyond the last class"),
        ("packed", 0, "class ids twice in a row"),
        ("codes", 7, "rows without a drawn class"),
        ("ranges", 0, "ranges that are not finite and positive"),
        ("ranges", np.nan, "ranges that are not finite and positive"),
    ],
)
def test_forged_rows_are_found(array: str, value: float, flaw: str) -> None:
    draws = torch.full((3, 1), 0.5, dtype=torch.float64)
    stored = {name: t.numpy() for name, t in encode_distinct(rows(300, 2.0, 3), draws, 5).items()}
    assert Distinct(5).flaw(stored, 300) is None
    stored[array][1] = value
    assert Distinct(5).flaw(stored, 300) == flaw


@pytest.mark.must("F50")
def test_ids_beyond_the_classes_and_other_temperatures_are_refused() -> None:
    draws = torch.full((1, 1), 0.5, dtype=torch.float64)
    stored = encode_distinct(rows(300, 2.0), draws, 5)
    arrays = {name: t.numpy() for name, t in stored.items()}
    for wanted in (0.5, 2.0):
        with pytest.raises(
            SettingsError, match=f"temperature {wanted:g} of a sampled cache made at 1"
        ):
            decode(Distinct(5), stored, temperature=1.0, wanted=wanted, classes=300)
        with pytest.raises(SettingsError, match="cannot be re-tempered"):
            Distinct(5).decode(arrays, 1.0, wanted, 300)
    stored["packed"][:] = arrays["packed"][:] = 255
    with pytest.raises(FormatError, match="stores class id 511; expected 0 to 299"):
        decode(Distinct(5), stored, temperature=1.0, wanted=1.0, classes=300)
    with pytest.raises(FormatError, match="a stored class id is 511; expected 0 to 299"):
        Distinct(5).decode(arrays, 1.0, 1.0, 300)
