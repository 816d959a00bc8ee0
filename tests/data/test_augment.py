"""Built-in augmentation: views depend on (seed, view, sample id) and on nothing else."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from softcache.data.augment import (
    EXTRA_STREAM,
    PARTNER_OPS_STREAM,
    PARTNER_STREAM,
    PARTNER_TRANSFORM_STREAM,
    PARTNER_WEIGHT_STREAM,
    ROTATION_STREAM,
    TRANSFORM_STREAM,
    Augmentation,
    parse_augment,
)
from softcache.data.augmentations import Shift
from softcache.errors import SettingsError
from softcache.types import Views
from softcache.util.counter_rng import uniform
from tests.data.augment_cases import Array, images_of, pixels_of

# The probability that a statistical check below fails on truly random numbers. Our numbers never change, so
# a check either always passes or never does.
FALSE_ALARM = 1e-6


def is_uniform(values: Array) -> bool:
    """Is the largest distance from the uniform distribution within what chance allows?

    P(distance > e) <= 2 exp(-2 n e²) for any n: Massart, "The tight constant in the
    Dvoretzky-Kiefer-Wolfowitz inequality", 1990.
    """
    count = len(values)
    steps = np.arange(count + 1) / count
    ordered = np.sort(values)
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return bool(distance <= math.sqrt(math.log(2 / FALSE_ALARM) / (2 * count)))


def is_share(hits: int, count: int, share: float, looks: int = 1) -> bool:
    """Is the fraction of hits within what chance allows? Hoeffding 1963, for `looks` such checks."""
    return abs(hits / count - share) <= math.sqrt(math.log(2 * looks / FALSE_ALARM) / (2 * count))


# replay
ALL = np.arange(40)
SPECS = ["shift:2,flip", "crop:0.3", "jitter:0.5", "cutout:3", "crop:0.3,flip,jitter:0.5,mixup"]


def view_of(
    samples: npt.NDArray[np.int64],
    spec: str = "shift:2,flip",
    *,
    sample_ids: npt.NDArray[np.int64] | None = None,
    seed: int = 5,
    view: Views = 1,
) -> Tensor:
    """Some of 40 samples in a view, with partners if the specification has mixup.

    Args:
        sample_ids: the ids of the samples in the draws; by default `samples`.
    """
    augmentation = parse_augment(spec, seed=seed, total=40)
    images = pixels_of(40)
    sample_ids = samples if sample_ids is None else sample_ids
    partners = augmentation.partners(view, sample_ids)
    partner_images = None if partners is None else images[partners]
    return augmentation(images[samples], partner_images, view, sample_ids)


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_is_the_same_each_time(spec: str) -> None:
    assert torch.equal(view_of(ALL, spec), view_of(ALL, spec))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("spec", SPECS)
def test_a_view_does_not_depend_on_the_batch_size(spec: str, batch_size: int) -> None:
    batches = np.split(ALL, range(batch_size, len(ALL), batch_size))
    images = torch.cat([view_of(batch, spec) for batch in batches])
    # the sums over pixels in jitter can round differently in another batch
    torch.testing.assert_close(images, view_of(ALL, spec), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_does_not_depend_on_order_or_company(spec: str) -> None:
    order = np.random.default_rng(0).permutation(40)[:25]
    expected = view_of(ALL, spec)[order]
    torch.testing.assert_close(view_of(order, spec), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_draw_from_the_batch_would_be_noticed(spec: str) -> None:
    # what a generator with a state would do: the n-th sample of the batch gets the n-th number
    order = np.random.default_rng(0).permutation(40)[:25]
    by_position = view_of(order, spec, sample_ids=np.arange(25))
    assert not torch.allclose(by_position, view_of(ALL, spec)[order], atol=0.01)


@pytest.mark.parametrize("spec", SPECS)
def test_each_sample_of_a_batch_may_have_a_view_of_its_own(spec: str) -> None:
    views = np.random.default_rng(0).integers(0, 4, len(ALL))
    each = torch.stack([view_of(ALL, spec, view=view) for view in range(4)])
    images = view_of(ALL, spec, view=views)
    torch.testing.assert_close(images, each[views, ALL], rtol=0, atol=1e-6)
    assert not torch.allclose(images, each[(views + 1) % 4, ALL], atol=0.01)
    # one view for the whole batch, in either form
    for same_view in (np.full(len(ALL), 2), np.array(2)):
        assert torch.equal(view_of(ALL, spec, view=same_view), each[2])


@pytest.mark.parametrize(("seed", "view"), [(6, 1), (5, 2), (1, 5)])
def test_another_seed_or_view_gives_other_images(seed: int, view: int) -> None:
    same = (view_of(ALL) == view_of(ALL, seed=seed, view=view)).flatten(1).all(1)
    # 25 shifts times 2 flips: a sample comes out the same by chance once in 50
    assert int(same.sum()) < 10


def test_the_same_operation_twice_draws_twice() -> None:
    images = images_of(200, 1, 9, 9)
    once = parse_augment("flip", seed=0, total=200)(images, None, 0, np.arange(200))
    twice = parse_augment("flip,flip", seed=0, total=200)(images, None, 0, np.arange(200))
    mirrored = (once != images).flatten(1).any(1)
    restored = (twice == images).flatten(1).all(1)
    assert 0 < int((mirrored & restored).sum()) < int(mirrored.sum())


def test_without_operations_inputs_of_any_shape_pass() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert parse_augment(None, seed=0, total=2)(rows, None, 0, np.arange(2)) is rows


@pytest.mark.parametrize("shape", [(3,), (3, 4), (1, 2, 3, 4)])
def test_inputs_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    augmentation = parse_augment("shift:2,flip", seed=0, total=2)
    expected = (
        rf"shape \({shape[0]},.* are not images .* --augment shift:2,flip takes; leave it out"
    )
    with pytest.raises(SettingsError, match=expected):
        augmentation(torch.zeros(2, *shape), None, 0, np.arange(2))


# mixup
MIXUP = parse_augment("mixup", seed=5, total=40)


def test_partners_and_weights_are_those_of_the_sample_in_any_batch() -> None:
    partners, weights = MIXUP.partners(1, ALL), MIXUP.partner_weights(1, ALL)
    assert partners is not None
    for batch in (ALL[::-1], ALL[7:9], ALL[30:31]):
        batch_partners = MIXUP.partners(1, batch)
        assert batch_partners is not None
        assert batch_partners.tolist() == partners[batch].tolist()
        assert MIXUP.partner_weights(1, batch).tolist() == weights[batch].tolist()


@pytest.mark.parametrize(("seed", "view"), [(6, 1), (5, 2)])
def test_another_seed_or_view_has_other_partners_and_weights(seed: int, view: int) -> None:
    other = parse_augment("mixup", seed=seed, total=40)
    partners, others = MIXUP.partners(1, ALL), other.partners(view, ALL)
    assert partners is not None
    assert others is not None
    assert (partners == others).sum() < 10  # 1 in 40 is equal by chance
    assert not (MIXUP.partner_weights(1, ALL) == other.partner_weights(view, ALL)).any()


@pytest.mark.parametrize("total", [1, 2, 7])
def test_every_sample_of_the_data_may_be_a_partner_and_no_other(total: int) -> None:
    count = 20_000
    partners = parse_augment("mixup", seed=0, total=total).partners(0, np.arange(count))
    assert partners is not None
    assert partners.dtype == np.int64
    hits = np.bincount(partners)
    assert len(hits) == total
    assert all(is_share(int(n), count, 1 / total, looks=total) for n in hits)


def test_partner_weights_are_uniform_and_independent_of_the_partner() -> None:
    samples = np.arange(COUNT)
    mixup = parse_augment("mixup", seed=0, total=COUNT)
    partners, weights = mixup.partners(0, samples), mixup.partner_weights(0, samples)
    assert partners is not None
    assert is_uniform(weights)
    assert is_uniform((weights - partners / COUNT) % 1)


def test_without_mixup_there_are_no_partners_and_weights_are_zero() -> None:
    augmentation = parse_augment("flip", seed=5, total=40)
    assert augmentation.partners(1, ALL) is None
    assert augmentation.partner_weights(1, ALL).tolist() == [0] * 40


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_mixup_is_the_weighted_mean_with_the_partner(shape: tuple[int, ...]) -> None:
    inputs, partners = torch.zeros(40, *shape), torch.ones(40, *shape)
    mixed = MIXUP(inputs, partners, 1, ALL).flatten(1)
    weights = torch.from_numpy(MIXUP.partner_weights(1, ALL)).float()
    torch.testing.assert_close(mixed, weights[:, None].expand_as(mixed))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_weight_zero_the_sample_is_itself_and_at_one_its_partner(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = np.full(40, weight)
    monkeypatch.setattr(Augmentation, "partner_weights", lambda self, view, sample_ids: fixed)
    inputs, partners = images_of(80)[:40], images_of(80)[40:]
    assert torch.equal(MIXUP(inputs, partners, 1, ALL), partners if weight else inputs)


def test_whole_numbers_cannot_be_mixed() -> None:
    token_ids = torch.arange(80).reshape(40, 2)
    expected = r"inputs are torch\.int64, integers of unknown meaning; --augment mixup takes uint8"
    with pytest.raises(SettingsError, match=expected):
        MIXUP(token_ids, token_ids, 1, ALL)


@pytest.mark.parametrize("spec", ["shift:2", "flip", "crop:0.3", "jitter:0.5", "cutout:3"])
def test_a_sample_and_its_partner_are_augmented_by_draws_of_their_own(spec: str) -> None:
    # with the same draws for both, an image mixed with itself would be the same as without mixup
    images, samples = pixels_of(40), ALL
    alone = parse_augment(spec, seed=5, total=40)(images, None, 1, samples)
    mixed = parse_augment(f"{spec},mixup", seed=5, total=40)(images, images, 1, samples)
    same = (alone - mixed).abs().flatten(1).amax(1) < 1e-6
    assert int(same.sum()) < (35 if spec == "flip" else 20)
    # the sample's own draws are those without mixup, so the rest of the mixture is the partner alone
    weights = torch.from_numpy(
        parse_augment("mixup", seed=5, total=40).partner_weights(1, samples)
    ).float()[:, None, None, None]
    partner = (mixed - (1 - weights) * alone) / weights
    op = parse_augment(spec, seed=5, total=40).ops[0]
    draws = uniform(5, 1, samples, stream=PARTNER_OPS_STREAM, draws=op.draws)
    clear = weights.flatten() > 0.05  # dividing by less would amplify float noise
    torch.testing.assert_close(partner[clear], op(images, draws)[clear], rtol=0, atol=1e-4)


def test_all_streams_of_a_sample_give_numbers_of_their_own() -> None:
    # a specification has at most 4096 characters, so its operations never reach the next stream
    assert PARTNER_OPS_STREAM > 4096
    streams = [*range(6), *range(PARTNER_OPS_STREAM, PARTNER_OPS_STREAM + 6)]
    streams += [PARTNER_STREAM, PARTNER_WEIGHT_STREAM, TRANSFORM_STREAM, PARTNER_TRANSFORM_STREAM]
    streams += [EXTRA_STREAM, ROTATION_STREAM]
    assert len(set(streams)) == 18
    samples = np.arange(COUNT)
    values = [uniform(0, 0, samples, stream=stream, draws=1)[:, 0] for stream in streams]
    for number, first in enumerate(values):
        for second in values[:number]:
            assert is_uniform((first - second) % 1)


# the hash
def test_known_numbers_stay_the_same() -> None:
    # views are replayed from these numbers: another hash would need another format version
    draws = uniform(7, 1, np.array([0, 1, 2**40]), stream=1, draws=2)
    state = 0
    for coordinate in (7, 1, 2**40, 1, 1):
        state = split_mix((state + coordinate) % 2**64)
    assert draws[2, 1] == (state >> 11) / 2**53
    assert draws[0].tolist() == [0.12442570016674237, 0.7995126608250445]


def split_mix(z: int) -> int:
    """The next number of SplitMix64 from the state z, in Python integers."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_reference_is_split_mix() -> None:
    # the first numbers of the published generator with seed 0, whose state grows by a constant
    assert [split_mix(n * 0x9E3779B97F4A7C15 % 2**64) for n in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


# randomness
COUNT = 50_000


@functools.cache
def draws_along(coordinate: str) -> npt.NDArray[np.float64]:
    """Random numbers along one coordinate, which counts up while all others stay fixed."""
    sample = np.array([3])
    if coordinate == "sample":
        return uniform(0, 0, np.arange(COUNT), stream=0, draws=1).reshape(-1)
    if coordinate == "draw":
        return uniform(0, 0, sample, stream=0, draws=COUNT).reshape(-1)
    values = np.empty(3000)  # fewer, since each takes a call of its own
    for n in range(len(values)):
        c = {"seed": 0, "view": 0, "stream": 0} | {coordinate: n}
        values[n] = uniform(c["seed"], c["view"], sample, stream=c["stream"], draws=1)[0, 0]
    return values


@pytest.mark.parametrize("coordinate", ["sample", "draw", "seed", "view", "stream"])
def test_numbers_are_uniform_along_every_coordinate(coordinate: str) -> None:
    assert is_uniform(draws_along(coordinate))


@pytest.mark.parametrize("coordinate", ["sample", "draw", "seed", "view", "stream"])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_tell_nothing_of_each_other(coordinate: str, lag: int) -> None:
    # the difference of two independent uniform numbers is uniform, mod 1
    values = draws_along(coordinate)
    assert is_uniform((values[lag:] - values[:-lag]) % 1)


def test_numbers_of_the_same_samples_for_two_purposes_are_independent() -> None:
    samples = np.arange(COUNT)
    first = uniform(0, 0, samples, stream=0, draws=2)
    others = [
        first[:, 1],
        uniform(0, 0, samples, stream=1, draws=1)[:, 0],
        uniform(0, 1, samples, stream=0, draws=1)[:, 0],
        uniform(1, 0, samples, stream=0, draws=1)[:, 0],
    ]
    assert all(is_uniform((first[:, 0] - other) % 1) for other in others)


def test_skewed_or_dependent_numbers_would_be_noticed() -> None:
    values = draws_along("sample")
    assert not is_uniform(values**1.1)
    assert not is_uniform(values * 0.98)
    dependent = (values + 0.1 * np.roll(values, 1)) % 1
    assert is_uniform(dependent)  # its distribution is uniform: only the difference shows it
    assert not is_uniform((values - dependent) % 1)


def test_exchanged_coordinates_give_other_numbers() -> None:
    numbers = {
        float(uniform(seed, view, np.array([sample]), stream=stream, draws=1)[0, 0])
        for seed in range(4)
        for view in range(4)
        for sample in range(4)
        for stream in range(4)
    }
    assert len(numbers) == 4**4


def test_coordinates_as_large_as_the_format_allows() -> None:
    draws = uniform(2**63 - 1, 2**47, np.array([2**48 - 1]), stream=9, draws=3)
    assert ((draws >= 0) & (draws < 1)).all()


def test_every_shift_is_as_likely_as_any_other() -> None:
    count, pixels = 20_000, 2
    draws = uniform(0, 0, np.arange(count), stream=0, draws=2)
    dot = torch.zeros(count, 1, 5, 5)
    dot[:, 0, 2, 2] = 1
    counts = Shift(pixels)(dot, draws).sum(0).flatten()  # where the dot in the middle moved to
    assert int(counts.sum()) == count  # it never leaves the image
    assert all(is_share(int(hits), count, 1 / 25, looks=25) for hits in counts)
    assert not is_share(int(counts[0]), count, 1 / 16)  # as with shifts to one side only


def test_half_of_the_images_are_mirrored() -> None:
    count = 20_000
    images = torch.tensor([1.0, 2.0]).expand(count, 1, 1, 2)
    augmented = parse_augment("flip", seed=0, total=count)(images, None, 0, np.arange(count))
    mirrored = int((augmented[:, 0, 0, 0] == 2).sum())
    assert is_share(mirrored, count, 1 / 2)
    assert not is_share(mirrored, count, 0.46)
