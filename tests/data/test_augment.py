"""Built-in augmentation: it depends on (seed, view, sample) and on nothing else (2)."""

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
    ROTATION_STREAM,
    SHARE_STREAM,
    TRANSFORM_STREAM,
    Augmentation,
    parse_augment,
)
from softcache.data.augmentations import Shift
from softcache.errors import SettingsError
from softcache.types import Views
from softcache.util.counter_rng import uniform
from tests.data.augment_cases import Array, images_of, pixels_of

# Of each statistical check below: how often it would fail if the numbers were truly random. The
# numbers never change, so that each either always passes or never does.
FALSE_ALARM = 1e-6


def is_uniform(values: Array) -> bool:
    """Is the greatest distance from the uniform distribution within what chance allows?

    P(distance > e) <= 2 exp(-2 n e²) for any n: Massart, "The tight constant in the
    Dvoretzky-Kiefer-Wolfowitz inequality", 1990.
    """
    count = len(values)
    steps = np.arange(count + 1) / count
    ordered = np.sort(values)
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return bool(distance <= math.sqrt(math.log(2 / FALSE_ALARM) / (2 * count)))


def is_share(hits: int, count: int, share: float, looks: int = 1) -> bool:
    """Is the share of hits within what chance allows? Hoeffding 1963, for `looks` such questions."""
    return abs(hits / count - share) <= math.sqrt(math.log(2 * looks / FALSE_ALARM) / (2 * count))


# replay
ALL = np.arange(40)


SPECS = ["shift:2,flip", "crop:0.3", "jitter:0.5", "cutout:3", "crop:0.3,flip,jitter:0.5,mixup"]


def view_of(
    samples: npt.NDArray[np.int64],
    spec: str = "shift:2,flip",
    *,
    numbers: npt.NDArray[np.int64] | None = None,
    seed: int = 5,
    view: Views = 1,
) -> Tensor:
    """Samples of 40 in a view, with partners if the specification has mixup.

    Args:
        numbers: of the samples in the draws, if they are not to be their own.
    """
    augmentation = parse_augment(spec, seed=seed, total=40)
    images = pixels_of(40)
    numbers = samples if numbers is None else numbers
    partners = augmentation.partners(view, numbers)
    mixed = None if partners is None else images[partners]
    return augmentation(images[samples], mixed, view, numbers)


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_is_the_same_each_time(spec: str) -> None:
    assert torch.equal(view_of(ALL, spec), view_of(ALL, spec))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("spec", SPECS)
def test_a_view_does_not_depend_on_the_batch_size(spec: str, batch_size: int) -> None:
    batches = np.split(ALL, range(batch_size, len(ALL), batch_size))
    found = torch.cat([view_of(batch, spec) for batch in batches])
    # sums over pixels, as jitter takes them, may round otherwise in another batch
    torch.testing.assert_close(found, view_of(ALL, spec), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_does_not_depend_on_order_or_company(spec: str) -> None:
    order = np.random.default_rng(0).permutation(40)[:25]
    expected = view_of(ALL, spec)[order]
    torch.testing.assert_close(view_of(order, spec), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_draw_from_the_batch_would_be_noticed(spec: str) -> None:
    # what a generator with a state would do: the n-th of the batch gets the n-th number
    order = np.random.default_rng(0).permutation(40)[:25]
    by_place = view_of(order, spec, numbers=np.arange(25))
    assert not torch.allclose(by_place, view_of(ALL, spec)[order], atol=0.01)


@pytest.mark.parametrize("spec", SPECS)
def test_each_sample_of_a_batch_may_have_a_view_of_its_own(spec: str) -> None:
    views = np.random.default_rng(0).integers(0, 4, len(ALL))
    each = torch.stack([view_of(ALL, spec, view=view) for view in range(4)])
    found = view_of(ALL, spec, view=views)
    torch.testing.assert_close(found, each[views, ALL], rtol=0, atol=1e-6)
    assert not torch.allclose(found, each[(views + 1) % 4, ALL], atol=0.01)
    # one view for all, in whatever form
    for one in (np.full(len(ALL), 2), np.array(2)):
        assert torch.equal(view_of(ALL, spec, view=one), each[2])


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


def test_partners_and_shares_are_those_of_the_sample_in_any_batch() -> None:
    partners, shares = MIXUP.partners(1, ALL), MIXUP.partner_weights(1, ALL)
    assert partners is not None
    for batch in (ALL[::-1], ALL[7:9], ALL[30:31]):
        found = MIXUP.partners(1, batch)
        assert found is not None
        assert found.tolist() == partners[batch].tolist()
        assert MIXUP.partner_weights(1, batch).tolist() == shares[batch].tolist()


@pytest.mark.parametrize(("seed", "view"), [(6, 1), (5, 2)])
def test_another_seed_or_view_has_other_partners_and_shares(seed: int, view: int) -> None:
    other = parse_augment("mixup", seed=seed, total=40)
    partners, others = MIXUP.partners(1, ALL), other.partners(view, ALL)
    assert partners is not None
    assert others is not None
    assert (partners == others).sum() < 10  # 1 of 40 is so by chance
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


def test_shares_are_uniform_and_tell_nothing_of_the_partner() -> None:
    samples = np.arange(COUNT)
    mixup = parse_augment("mixup", seed=0, total=COUNT)
    partners, shares = mixup.partners(0, samples), mixup.partner_weights(0, samples)
    assert partners is not None
    assert is_uniform(shares)
    assert is_uniform((shares - partners / COUNT) % 1)


def test_without_mixup_there_are_no_partners_and_shares_are_zero() -> None:
    augmentation = parse_augment("flip", seed=5, total=40)
    assert augmentation.partners(1, ALL) is None
    assert augmentation.partner_weights(1, ALL).tolist() == [0] * 40


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_mixup_is_the_weighted_mean_with_the_partner(shape: tuple[int, ...]) -> None:
    own, partners = torch.zeros(40, *shape), torch.ones(40, *shape)
    found = MIXUP(own, partners, 1, ALL).flatten(1)
    expected = torch.from_numpy(MIXUP.partner_weights(1, ALL)).float()
    torch.testing.assert_close(found, expected[:, None].expand_as(found))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_at_share_zero_the_sample_is_itself_and_at_one_its_partner(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = np.full(40, share)
    monkeypatch.setattr(Augmentation, "partner_weights", lambda self, view, samples: fixed)
    own, partners = images_of(80)[:40], images_of(80)[40:]
    assert torch.equal(MIXUP(own, partners, 1, ALL), partners if share else own)


def test_whole_numbers_cannot_be_mixed() -> None:
    ids = torch.arange(80).reshape(40, 2)  # of tokens, say
    with pytest.raises(SettingsError, match="mixup"):
        MIXUP(ids, ids, 1, ALL)


@pytest.mark.parametrize("spec", ["shift:2", "flip", "crop:0.3", "jitter:0.5", "cutout:3"])
def test_a_sample_and_its_partner_are_augmented_by_draws_of_their_own(spec: str) -> None:
    # mixed with itself, an image would come out as without mixup, were the draws the same
    images, samples = pixels_of(40), ALL
    alone = parse_augment(spec, seed=5, total=40)(images, None, 1, samples)
    mixed = parse_augment(f"{spec},mixup", seed=5, total=40)(images, images, 1, samples)
    same = (alone - mixed).abs().flatten(1).amax(1) < 1e-6
    assert int(same.sum()) < (35 if spec == "flip" else 20)
    # and the sample's own draws are those without mixup: what is left is the partner's, alone
    share = torch.from_numpy(
        parse_augment("mixup", seed=5, total=40).partner_weights(1, samples)
    ).float()[:, None, None, None]
    partner = (mixed - (1 - share) * alone) / share
    op = parse_augment(spec, seed=5, total=40).ops[0]
    draws = uniform(5, 1, samples, stream=PARTNER_OPS_STREAM, draws=op.draws)
    clear = share.flatten() > 0.05  # dividing by less would blow up float noise
    torch.testing.assert_close(partner[clear], op(images, draws)[clear], rtol=0, atol=1e-4)


def test_all_streams_of_a_sample_give_numbers_of_their_own() -> None:
    # operations of a specification, which is at most 4096 characters, never reach the next stream
    assert PARTNER_OPS_STREAM > 4096
    streams = [*range(6), *range(PARTNER_OPS_STREAM, PARTNER_OPS_STREAM + 6)]
    streams += [PARTNER_STREAM, SHARE_STREAM, TRANSFORM_STREAM, PARTNER_TRANSFORM_STREAM]
    streams += [EXTRA_STREAM, ROTATION_STREAM]
    assert len(set(streams)) == 18
    samples = np.arange(COUNT)
    values = [uniform(0, 0, samples, stream=stream, draws=1)[:, 0] for stream in streams]
    for at, one in enumerate(values):
        for other in values[:at]:
            assert is_uniform((one - other) % 1)


# the hash
def test_known_numbers_stay_the_same() -> None:
    # a cache replays its views by them: another hash would need another format version
    found = uniform(7, 1, np.array([0, 1, 2**40]), stream=1, draws=2)
    state = 0
    for coordinate in (7, 1, 2**40, 1, 1):
        state = split_mix((state + coordinate) % 2**64)
    assert found[2, 1] == (state >> 11) / 2**53
    assert found[0].tolist() == [0.12442570016674237, 0.7995126608250445]


def split_mix(z: int) -> int:
    """SplitMix64's next number from the state z, in Python's whole numbers."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_reference_is_split_mix() -> None:
    # first numbers of the published generator from seed 0; its state grows by a constant
    assert [split_mix(n * 0x9E3779B97F4A7C15 % 2**64) for n in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


# how random they are
COUNT = 50_000


@functools.cache
def draws_along(coordinate: str) -> npt.NDArray[np.float64]:
    """Numbers whose coordinates differ in one only, which counts up."""
    one = np.array([3])
    if coordinate == "sample":
        return uniform(0, 0, np.arange(COUNT), stream=0, draws=1).reshape(-1)
    if coordinate == "draw":
        return uniform(0, 0, one, stream=0, draws=COUNT).reshape(-1)
    found = np.empty(3000)  # fewer, as each takes a call of its own
    for n in range(len(found)):
        at = {"seed": 0, "view": 0, "stream": 0} | {coordinate: n}
        found[n] = uniform(at["seed"], at["view"], one, stream=at["stream"], draws=1)[0, 0]
    return found


@pytest.mark.parametrize("coordinate", ["sample", "draw", "seed", "view", "stream"])
def test_numbers_are_uniform_along_every_coordinate(coordinate: str) -> None:
    assert is_uniform(draws_along(coordinate))


@pytest.mark.parametrize("coordinate", ["sample", "draw", "seed", "view", "stream"])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_tell_nothing_of_each_other(coordinate: str, lag: int) -> None:
    # the difference of two independent uniform numbers is uniform, mod 1
    values = draws_along(coordinate)
    assert is_uniform((values[lag:] - values[:-lag]) % 1)


def test_numbers_of_the_same_samples_in_two_places_are_independent() -> None:
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
    assert is_uniform(dependent)  # on its own it is, so that only the difference tells
    assert not is_uniform((values - dependent) % 1)


def test_exchanged_coordinates_give_other_numbers() -> None:
    found = {
        float(uniform(seed, view, np.array([sample]), stream=stream, draws=1)[0, 0])
        for seed in range(4)
        for view in range(4)
        for sample in range(4)
        for stream in range(4)
    }
    assert len(found) == 4**4


def test_coordinates_as_large_as_the_format_allows() -> None:
    found = uniform(2**63 - 1, 2**47, np.array([2**48 - 1]), stream=9, draws=3)
    assert ((found >= 0) & (found < 1)).all()


def test_every_shift_is_as_likely_as_any_other() -> None:
    count, pixels = 20_000, 2
    draws = uniform(0, 0, np.arange(count), stream=0, draws=2)
    dot = torch.zeros(count, 1, 5, 5)
    dot[:, 0, 2, 2] = 1
    places = Shift(pixels)(dot, draws).sum(0).flatten()  # where the dot of the middle came to
    assert int(places.sum()) == count  # it never leaves the image
    assert all(is_share(int(hits), count, 1 / 25, looks=25) for hits in places)
    assert not is_share(int(places[0]), count, 1 / 16)  # shifts of one side only


def test_half_of_the_images_are_mirrored() -> None:
    count = 20_000
    images = torch.tensor([1.0, 2.0]).expand(count, 1, 1, 2)
    found = parse_augment("flip", seed=0, total=count)(images, None, 0, np.arange(count))
    mirrored = int((found[:, 0, 0, 0] == 2).sum())
    assert is_share(mirrored, count, 1 / 2)
    assert not is_share(mirrored, count, 0.46)
