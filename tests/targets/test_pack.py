"""`packed`: the mean over draws is exact, no class is stored twice, and every bit survives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache.packed import Packed, packing
from softcache.errors import FormatError, SettingsError
from softcache.targets.decode import decode, to_dense
from softcache.targets.encode import make_encoder
from softcache.targets.pack import choose, encode_packed

CPU = torch.device("cpu")


def rows(classes: int, sharpness: float, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, classes, generator=generator)
    return torch.log_softmax(logits, -1)


def encoded(log_probs: Tensor, draws: Tensor, size: int) -> dict[str, Tensor]:
    return encode_packed(log_probs, draws, packing(size, log_probs.shape[1]))


def decoded(log_probs: Tensor, draws: Tensor, size: int) -> Tensor:
    """Probabilities (B, C) as a cache of `packed` gives them back."""
    stored, classes = encoded(log_probs, draws, size), log_probs.shape[1]
    targets = decode(Packed(size), stored, temperature=1.0, wanted=1.0, classes=classes)
    return to_dense(targets).exp()


def half(count: int) -> Tensor:
    return torch.full((count, 1), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("size", [4, 8, 12])
def test_the_mean_over_draws_is_the_distribution(sharpness: float, size: int) -> None:
    log_probs = rows(60, sharpness)
    points = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    mean = decoded(log_probs.expand(4000, -1), points, size).double().mean(0)
    exact = log_probs[0].exp().double()
    # evenly spread draws leave an error of about one draw in 4,000, and the codes one of 1 in 250
    assert (mean - exact).abs().max() < 0.004
    assert abs(float(mean.sum()) - 1) < 1e-5


def test_what_is_probable_is_kept_as_it_is() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.1, *[0.1 / 97] * 97]])
    draws = torch.tensor([[0.3]], dtype=torch.float64)
    places = packing(16, 100)
    choice = choose(probs.log(), draws, places)
    assert int(choice.kept) == 3
    assert choice.ids[0, :3].tolist() == [0, 1, 2]
    tau = 0.1 / places.drawn[3]
    assert choice.heights[0, :3].exp().tolist() == pytest.approx(
        [0.5 / tau, 0.3 / tau, 0.1 / tau], rel=1e-5
    )
    stored = decoded(probs.log(), draws, 16)[0]
    assert stored[:3].tolist() == pytest.approx([0.5, 0.3, 0.1], rel=0.01)
    assert int((stored > 0).sum()) == 3 + places.drawn[3]


@pytest.mark.must("F50")
@settings(max_examples=80, deadline=None)
@given(
    classes=st.sampled_from([12, 300, 4096, 5000, 70_000]),
    sharpness=st.floats(0, 40),
    size=st.integers(4, 80),
    draw=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_no_class_is_stored_twice(
    classes: int, sharpness: float, size: int, draw: float, seed: int
) -> None:
    size = {12: 3, 300: min(size, 60)}.get(classes, size)
    log_probs = rows(classes, sharpness, 3, seed)
    draws = torch.full((3, 1), draw, dtype=torch.float64)
    stored = {name: t.numpy() for name, t in encoded(log_probs, draws, size).items()}
    encoding, places = Packed(size), packing(size, classes)
    assert encoding.flaw(stored, classes) is None
    dense = encoding.decode(stored, 1.0, 1.0, classes)
    assert np.allclose(np.exp(dense).sum(-1), 1, atol=1e-5)
    kept = stored["packed"][:, 0]
    assert ((dense > -np.inf).sum(-1) == kept + places.drawn[kept]).all()
    targets = decode(
        encoding,
        {"packed": torch.from_numpy(stored["packed"])},
        temperature=1.0,
        wanted=1.0,
        classes=classes,
    )
    assert np.allclose(to_dense(targets).exp().numpy(), np.exp(dense), atol=1e-6)


@pytest.mark.parametrize(
    ("probs", "limit"),
    [
        ([1.0, *[0.0] * 20], 0.01),
        ([0.5, 0.5, *[0.0] * 19], 0.01),
        ([0.6, 0.3, 0.1, *[0.0] * 18], 0.61),  # one of the last two is drawn
        ([1 / 21] * 21, 1.4),
        ([1 - 1e-7, 1e-7, *[0.0] * 19], 0.01),
    ],
)
def test_extreme_rows(probs: list[float], limit: float) -> None:
    log_probs = torch.tensor([probs]).log().clamp(min=-200)
    dense = decoded(log_probs, torch.tensor([[0.9]], dtype=torch.float64), 5)
    assert int((dense > 0).sum()) >= 1
    assert float(dense.sum()) == pytest.approx(1, abs=1e-5)
    assert float((dense[0] - torch.tensor(probs)).abs().sum()) < limit


@pytest.mark.parametrize("classes", [10, 257, 4096, 50_000, 65_536, 152_064, 262_144, 1 << 24])
@pytest.mark.parametrize("size", [6, 26, 128, 512])
def test_a_row_never_takes_more_bits_than_it_has(classes: int, size: int) -> None:
    if classes == 10 or (classes == 257 and size > 26):
        with pytest.raises(SettingsError, match=rf"packed:{size} bytes per row hold all {classes}"):
            packing(size, classes)
        return
    places = packing(size, classes)
    ends = places.high_starts + places.high_bits
    assert (ends <= 8 * size).all()
    assert (ends[:-1] > 8 * size - 2 * places.id_bits).all()  # and leaves no room for another
    assert (places.drawn >= 1).all()
    assert places.drawn[-1] == 1
    assert len(places.drawn) <= 256


@pytest.mark.parametrize(
    ("size", "classes", "message"),
    [
        (0, 1000, r"packed:0 bytes per row; expected 1 to 512"),
        (513, 1000, r"packed:513 bytes per row; expected 1 to 512"),
        (
            2,
            152_064,
            r"packed:2 bytes per row are too few for 152,064 classes; expected at least 4",
        ),
        (20, 10, r"packed:20 bytes per row hold all 10 classes; use dense or quantized"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: int, classes: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Packed(size).arrays(classes)


def test_draws_follow_the_position_in_the_sample() -> None:
    encode = make_encoder(Packed(9), {}, temperature=1.0, seed=3, device=CPU)
    log_probs = rows(100, 1.0).expand(6, -1)
    samples, positions = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    together = encode(log_probs, 0, samples, positions)["packed"]
    assert len({tuple(row.tolist()) for row in together}) > 3
    for row in range(6):
        place = slice(row, row + 1)
        alone = encode(log_probs[place], 0, samples[place], positions[place])["packed"]
        assert torch.equal(alone[0], together[row])


FLAWS = [
    (0, 255, "more kept classes than fit"),
    (0, 0, "as many drawn classes as fit"),
    (-1, 255, "as many drawn classes as fit"),
]


@pytest.mark.must("F50")
@pytest.mark.parametrize(("byte", "value", "flaw"), FLAWS)
def test_forged_rows_are_found(byte: int, value: int, flaw: str) -> None:
    stored = encoded(rows(300, 2.0, 3), half(3), 17)
    arrays = {name: t.numpy().copy() for name, t in stored.items()}
    assert Packed(17).flaw(arrays, 300) is None
    arrays["packed"][1, byte] = value
    assert flaw in str(Packed(17).flaw(arrays, 300))
    with pytest.raises(FormatError, match=flaw):
        decode(
            Packed(17),
            {"packed": torch.from_numpy(arrays["packed"])},
            temperature=1.0,
            wanted=1.0,
            classes=300,
        )


@pytest.mark.must("F50")
def test_ids_twice_or_beyond_the_classes_and_other_temperatures_are_refused() -> None:
    stored = encoded(torch.tensor([[0.6, 0.3, *[0.1 / 298] * 298]]).log(), half(1), 17)
    arrays = {name: t.numpy().copy() for name, t in stored.items()}
    places = packing(17, 300)
    kept = int(arrays["packed"][0, 0])
    assert kept == 2
    for wanted in (0.5, 2.0):
        with pytest.raises(
            SettingsError, match=f"temperature {wanted:g} of a sampled cache made at 1"
        ):
            decode(Packed(17), stored, temperature=1.0, wanted=wanted, classes=300)
        with pytest.raises(SettingsError, match="cannot be re-tempered"):
            Packed(17).decode(arrays, 1.0, wanted, 300)

    def with_id(number: int) -> dict[str, np.ndarray]:
        bits = np.unpackbits(arrays["packed"], axis=-1, bitorder="little")
        start = int(places.id_starts[kept])
        bits[0, start : start + 9] = [number >> bit & 1 for bit in range(9)]
        return {"packed": np.packbits(bits, axis=-1, bitorder="little")}

    assert Packed(17).flaw(with_id(1), 300) == "class ids twice in a row"
    forged = with_id(511)
    tensors = {"packed": torch.from_numpy(forged["packed"])}
    assert Packed(17).flaw(forged, 300) == "class ids beyond the last class"
    with pytest.raises(FormatError, match="stores class id 511; expected 0 to 299"):
        decode(Packed(17), tensors, temperature=1.0, wanted=1.0, classes=300)
    with pytest.raises(FormatError, match="a stored class id is 511; expected 0 to 299"):
        Packed(17).decode(forged, 1.0, 1.0, 300)
