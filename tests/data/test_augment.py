"""Built-in augmentation: it depends on (seed, view, sample) and on nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

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
    split_augment,
)
from softcache.data.augmentations import Crop, Cutout, Flip, Jitter, Op, Shift
from softcache.errors import SettingsError
from softcache.types import Views
from softcache.util.counter_rng import uniform

Array = npt.NDArray[np.float64]

# Of each statistical check below: how often it would fail if the numbers were truly random. The
# numbers never change, so that each either always passes or never does.
FALSE_ALARM = 1e-6


def images_of(samples: int, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    """Images in which no two pixels are equal, and none is zero."""
    count = samples * channels * height * width
    return torch.arange(1.0, count + 1).reshape(samples, channels, height, width)


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


# the operations


def shifted_one_by_one(images: Tensor, draws: npt.NDArray[np.float64], pixels: int) -> Tensor:
    """Shift as its words say it, pixel by pixel."""
    found = torch.zeros_like(images)
    for sample, image in enumerate(images):
        down, right = (int(draw * (2 * pixels + 1)) - pixels for draw in draws[sample])
        for channel in range(image.shape[0]):
            for y in range(image.shape[1]):
                for x in range(image.shape[2]):
                    from_y, from_x = y + down, x + right
                    if 0 <= from_y < image.shape[1] and 0 <= from_x < image.shape[2]:
                        found[sample, channel, y, x] = image[channel, from_y, from_x]
    return found


@pytest.mark.parametrize("pixels", [1, 2, 9])  # 9: beyond the image on all sides
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_moves_every_sample_by_its_own_draws(pixels: int, channels: int) -> None:
    images = images_of(20, channels)
    draws = np.random.default_rng(pixels).random((20, 2))
    draws[:4] = np.array([[0, 0], [0, LAST], [LAST, 0], [LAST, LAST]])
    assert torch.equal(Shift(pixels)(images, draws), shifted_one_by_one(images, draws, pixels))


def test_the_middle_draw_leaves_the_image_where_it_is() -> None:
    images = images_of(3)
    assert torch.equal(Shift(2)(images, np.full((3, 2), 0.5)), images)


def test_flip_mirrors_left_to_right_below_one_half() -> None:
    images = images_of(4)
    found = Flip()(images, np.array([[0.0], [0.4999], [0.5], [0.9999]]))
    expected = torch.stack([*(images[i, :, :, range(6, -1, -1)] for i in (0, 1)), *images[2:]])
    assert torch.equal(found, expected)


LAST = 1 - 2**-53  # the largest number below 1


def draws_of(count: int, op: Op) -> Array:
    """Draws of which the first rows are the least, the largest and the middle ones."""
    draws = np.random.default_rng(0).random((count, op.draws))
    draws[0], draws[1], draws[2] = 0, LAST, 0.5
    return draws


def pixels_of(samples: int, channels: int = 3, height: int = 5, width: int = 7) -> Tensor:
    """Images of random values in [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(samples, channels, height, width, generator=generator)


def cropped(image: Array, draws: Array, least: float) -> Array:
    """Crop as its words say it, pixel by pixel, of an image (C, H, W)."""
    area = least + (1 - least) * draws[0]
    ratio = (3 / 4) ** (1 - 2 * draws[1])  # width to height
    height, width = image.shape[1:]
    wide, high = (min(math.sqrt(area * r), 1) for r in (ratio, 1 / ratio))  # parts of the sides
    left, top = ((1 - part) * draw for part, draw in zip((wide, high), draws[2:], strict=True))
    found = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            # the centre of the pixel, in pixels of the image; outside of their centres the nearest
            at_y = (top + high * (y + 0.5) / height) * height - 0.5
            at_x = (left + wide * (x + 0.5) / width) * width - 0.5
            at_y, at_x = min(max(at_y, 0), height - 1), min(max(at_x, 0), width - 1)
            y0, x0 = min(int(at_y), height - 2), min(int(at_x), width - 2)
            low, right = at_y - y0, at_x - x0
            upper = image[:, y0, x0] * (1 - right) + image[:, y0, x0 + 1] * right
            lower = image[:, y0 + 1, x0] * (1 - right) + image[:, y0 + 1, x0 + 1] * right
            found[:, y, x] = upper * (1 - low) + lower * low
    return found


def jittered(image: Array, draws: Array, strength: float) -> Array:
    """Brightness, contrast, saturation, of an image (C, H, W)."""
    bright, contrast, saturation = 1 - strength + 2 * strength * draws
    image = np.clip(image * bright, 0, 1)
    image = np.clip(image.mean() * (1 - contrast) + image * contrast, 0, 1)
    grey = image.mean(0)
    found: Array = np.clip(grey * (1 - saturation) + image * saturation, 0, 1)
    return found


def cut_out(image: Array, draws: Array, size: int) -> Array:
    """A square of zeros around a pixel drawn from the whole image, of an image (C, H, W)."""
    found = image.copy()
    y, x = (int(draw * length) for draw, length in zip(draws, image.shape[1:], strict=True))
    top, left = y - size // 2, x - size // 2
    found[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return found


REFERENCES: dict[Op, Callable[[Array, Array], Array]] = {
    Crop(0.08): lambda image, draws: cropped(image, draws, 0.08),
    Crop(0.7): lambda image, draws: cropped(image, draws, 0.7),
    Jitter(0.4): lambda image, draws: jittered(image, draws, 0.4),
    Jitter(1.0): lambda image, draws: jittered(image, draws, 1.0),
    Cutout(1): lambda image, draws: cut_out(image, draws, 1),
    Cutout(2): lambda image, draws: cut_out(image, draws, 2),
    Cutout(3): lambda image, draws: cut_out(image, draws, 3),
    Cutout(20): lambda image, draws: cut_out(image, draws, 20),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("op", REFERENCES, ids=str)
def test_an_operation_is_what_its_words_say(op: Op, channels: int) -> None:
    images, draws = pixels_of(30, channels), draws_of(30, op)
    expected = [
        REFERENCES[op](image, draw)
        for image, draw in zip(images.double().numpy(), draws, strict=True)
    ]
    np.testing.assert_allclose(op(images, draws), np.stack(expected), atol=2e-5)


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    images, draws = pixels_of(4), draws_of(4, Crop(1))
    draws[:, 1] = 0.5  # as wide as high
    np.testing.assert_allclose(Crop(1)(images, draws), images, atol=1e-6)


def test_a_crop_has_the_area_and_the_sides_it_may_have_and_stays_inside() -> None:
    # a ramp tells where in the image each pixel comes from
    count, size = 2000, 64
    ramp = (torch.arange(size) + 0.5) / size
    images = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    found = Crop(0.25)(images.expand(count, 2, size, size), draws_of(count, Crop(0.25)))
    inner = found[:, :, 8:-8, 8:-8]  # what lies at the edge may have been clipped
    step_x = inner[:, 0].diff(dim=-1).mean((1, 2)).double() * size
    step_y = inner[:, 1].diff(dim=-2).mean((1, 2)).double() * size
    area, ratio = step_x * step_y, step_x / step_y
    assert 0.25 - 1e-3 < float(area.min()) < 0.26
    assert float(area.max()) <= 1 + 1e-3
    assert 0.75 - 1e-3 < float(ratio.min()) < 0.76
    assert 1.32 < float(ratio.max()) < 4 / 3 + 1e-3
    assert float(found.min()) > 0
    assert float(found.max()) < 1


def test_the_middle_draws_of_jitter_change_nothing() -> None:
    images = pixels_of(3)
    assert torch.allclose(Jitter(0.9)(images, np.full((3, 3), 0.5)), images, atol=1e-6)


def test_jitter_stays_between_black_and_white() -> None:
    found = Jitter(1.0)(pixels_of(200), draws_of(200, Jitter(1.0)))
    assert float(found.min()) == 0
    assert float(found.max()) == 1


def test_the_square_of_a_cutout_may_lie_partly_outside_and_is_never_larger() -> None:
    count, size = 5000, 3
    found = Cutout(size)(torch.ones(count, 1, 5, 7), draws_of(count, Cutout(size)))
    areas = set((found == 0).sum((1, 2, 3)).tolist())
    assert areas == {4, 6, 9}  # a corner, an edge, inside


ALL_OPS = [Shift(1), Flip(), Crop(0.5), Jitter(0.5), Cutout(2)]


@pytest.mark.parametrize("op", ALL_OPS, ids=str)
def test_the_images_given_are_left_as_they_are(op: Op) -> None:
    images = pixels_of(8)
    found = op(images, np.random.default_rng(0).random((8, op.draws)))
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert not torch.equal(found, images)
    assert torch.equal(images, pixels_of(8))


# specifications


@pytest.mark.parametrize(
    ("spec", "ops"),
    [
        (None, ()),
        ("", ()),
        ("shift:2", (Shift(2),)),
        ("flip", (Flip(),)),
        ("shift:2,flip", (Shift(2), Flip())),
        ("flip,shift:13", (Flip(), Shift(13))),
        ("crop:0.25", (Crop(0.25),)),
        ("crop:.25", (Crop(0.25),)),
        ("crop:1", (Crop(1.0),)),
        ("jitter:0.4,cutout:8", (Jitter(0.4), Cutout(8))),
    ],
)
def test_a_specification_lists_the_operations_in_order(
    spec: str | None, ops: tuple[Op, ...]
) -> None:
    assert parse_augment(spec, seed=3, total=9) == Augmentation(spec, 3, 9, None, ops)
    mixed = f"{spec},mixup" if spec else "mixup"
    assert parse_augment(mixed, seed=3, total=9) == Augmentation(mixed, 3, 9, None, ops, mixup=True)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("shift", "shift"),
        ("shift:", "shift:"),
        ("shift:0", "shift:0"),
        ("shift:-1", "shift:-1"),
        ("shift:1.5", "shift:1.5"),
        ("shift:two", "shift:two"),
        ("flip:1", "flip:1"),
        ("flip,rotate:3", "rotate:3"),
        ("shift:1;flip", "shift:1;flip"),
        ("Flip", "Flip"),
        ("flip, shift:1", " shift:1"),
        ("crop", "crop"),
        ("crop:0", "crop:0"),
        ("crop:0.0", "crop:0.0"),
        ("crop:1.1", "crop:1.1"),
        ("crop:-0.5", "crop:-0.5"),
        ("crop:nan", "crop:nan"),
        ("jitter:2", "jitter:2"),
        ("jitter", "jitter"),
        ("cutout:0.5", "cutout:0.5"),
        ("cutout", "cutout"),
        ("mixup:0.2", "mixup:0.2"),
        (",", ""),
        ("flip,", ""),
        (",flip", ""),
        ("flip,,shift:1", ""),
        (",mixup", ""),
        ("flip,aug.py:make", "aug.py:make"),
    ],
)
def test_a_part_that_is_no_operation_is_named(spec: str, part: str) -> None:
    expected = (
        rf"augmentation '{part}' in '{spec}' is unknown; expected shift:PIXELS.* flip.*; before "
        r"them FILE\.py:CALLABLE, after them mixup"
    )
    with pytest.raises(SettingsError, match=expected):
        parse_augment(spec, seed=0, total=1)


@pytest.mark.parametrize("digits", [10, 4400])
def test_sizes_beyond_any_image_are_refused(digits: int) -> None:
    # a forged header may ask for them
    spec = f"shift:{'9' * digits}"
    with pytest.raises(SettingsError, match="augmentation 'shift:9"):
        parse_augment(spec, seed=0, total=1)(images_of(1), None, 0, np.arange(1))


@pytest.mark.parametrize("spec", ["mixup,flip", "shift:1,mixup,flip", "mixup,mixup"])
def test_mixup_comes_last_and_once(spec: str) -> None:
    with pytest.raises(SettingsError, match=f"augmentation '{spec}': mixup comes last, once"):
        parse_augment(spec, seed=0, total=1)


@pytest.mark.parametrize(
    ("spec", "public"),
    [
        (None, None),
        ("", None),
        ("shift:2,flip", "shift:2,flip"),
        ("crop:0.25,mixup", "crop:0.25,mixup"),
        ("/srv/me/aug.py:make", "aug.py:make"),
        ("../me/aug.py:make,flip,mixup", "aug.py:make,flip,mixup"),
        ("/a.py:b/aug.py:make", "aug.py:make"),
        ("aug.py:make", "aug.py:make"),
    ],
)
def test_what_is_written_into_a_file_names_no_folder(spec: str | None, public: str | None) -> None:
    assert split_augment(spec).public_name == public


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
    partners, shares = MIXUP.partners(1, ALL), MIXUP.shares(1, ALL)
    assert partners is not None
    for batch in (ALL[::-1], ALL[7:9], ALL[30:31]):
        found = MIXUP.partners(1, batch)
        assert found is not None
        assert found.tolist() == partners[batch].tolist()
        assert MIXUP.shares(1, batch).tolist() == shares[batch].tolist()


@pytest.mark.parametrize(("seed", "view"), [(6, 1), (5, 2)])
def test_another_seed_or_view_has_other_partners_and_shares(seed: int, view: int) -> None:
    other = parse_augment("mixup", seed=seed, total=40)
    partners, others = MIXUP.partners(1, ALL), other.partners(view, ALL)
    assert partners is not None
    assert others is not None
    assert (partners == others).sum() < 10  # 1 of 40 is so by chance
    assert not (MIXUP.shares(1, ALL) == other.shares(view, ALL)).any()


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
    partners, shares = mixup.partners(0, samples), mixup.shares(0, samples)
    assert partners is not None
    assert is_uniform(shares)
    assert is_uniform((shares - partners / COUNT) % 1)


def test_without_mixup_there_are_no_partners_and_shares_are_zero() -> None:
    augmentation = parse_augment("flip", seed=5, total=40)
    assert augmentation.partners(1, ALL) is None
    assert augmentation.shares(1, ALL).tolist() == [0] * 40


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_mixup_is_the_weighted_mean_with_the_partner(shape: tuple[int, ...]) -> None:
    own, partners = torch.zeros(40, *shape), torch.ones(40, *shape)
    found = MIXUP(own, partners, 1, ALL).flatten(1)
    expected = torch.from_numpy(MIXUP.shares(1, ALL)).float()
    torch.testing.assert_close(found, expected[:, None].expand_as(found))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_at_share_zero_the_sample_is_itself_and_at_one_its_partner(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = np.full(40, share)
    monkeypatch.setattr(Augmentation, "shares", lambda self, view, samples: fixed)
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
    share = torch.from_numpy(parse_augment("mixup", seed=5, total=40).shares(1, samples)).float()[
        :, None, None, None
    ]
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
