"""The built-in operations against pixel-by-pixel references, and augmentation specifications."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from softcache.data.augment import Augmentation, parse_augment, split_augment
from softcache.data.augmentations import Crop, Cutout, Flip, Jitter, Op, Shift
from softcache.errors import SettingsError
from tests.data.augment_cases import Array, images_of, pixels_of


# the operations
def shifted_one_by_one(images: Tensor, draws: npt.NDArray[np.float64], pixels: int) -> Tensor:
    """Shift as it is documented, pixel by pixel."""
    shifted = torch.zeros_like(images)
    for sample, image in enumerate(images):
        down, right = (int(draw * (2 * pixels + 1)) - pixels for draw in draws[sample])
        for channel in range(image.shape[0]):
            for y in range(image.shape[1]):
                for x in range(image.shape[2]):
                    from_y, from_x = y + down, x + right
                    if 0 <= from_y < image.shape[1] and 0 <= from_x < image.shape[2]:
                        shifted[sample, channel, y, x] = image[channel, from_y, from_x]
    return shifted


@pytest.mark.parametrize("pixels", [1, 2, 9])  # 9: larger than the image
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
    flipped = Flip()(images, np.array([[0.0], [0.4999], [0.5], [0.9999]]))
    expected = torch.stack([*(images[i, :, :, range(6, -1, -1)] for i in (0, 1)), *images[2:]])
    assert torch.equal(flipped, expected)


LAST = 1 - 2**-53  # the largest number below 1


def draws_of(count: int, op: Op) -> Array:
    """Random draws, except that the first three rows are the smallest, the largest and the middle draw."""
    draws = np.random.default_rng(0).random((count, op.draws))
    draws[0], draws[1], draws[2] = 0, LAST, 0.5
    return draws


def cropped(image: Array, draws: Array, least: float) -> Array:
    """Crop an image (C, H, W) as it is documented, pixel by pixel."""
    area = least + (1 - least) * draws[0]
    ratio = (3 / 4) ** (1 - 2 * draws[1])  # width to height
    height, width = image.shape[1:]
    wide, high = (min(math.sqrt(area * r), 1) for r in (ratio, 1 / ratio))  # fractions of the sides
    left, top = ((1 - part) * draw for part, draw in zip((wide, high), draws[2:], strict=True))
    output = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            # where the centre of the pixel lies in the image; beyond the outermost centres, the nearest one
            from_y = (top + high * (y + 0.5) / height) * height - 0.5
            from_x = (left + wide * (x + 0.5) / width) * width - 0.5
            from_y, from_x = min(max(from_y, 0), height - 1), min(max(from_x, 0), width - 1)
            y0, x0 = min(int(from_y), height - 2), min(int(from_x), width - 2)
            low, right = from_y - y0, from_x - x0
            upper = image[:, y0, x0] * (1 - right) + image[:, y0, x0 + 1] * right
            lower = image[:, y0 + 1, x0] * (1 - right) + image[:, y0 + 1, x0 + 1] * right
            output[:, y, x] = upper * (1 - low) + lower * low
    return output


def jittered(image: Array, draws: Array, strength: float) -> Array:
    """Scale brightness, contrast and saturation of an image (C, H, W)."""
    bright, contrast, saturation = 1 - strength + 2 * strength * draws
    image = np.clip(image * bright, 0, 1)
    image = np.clip(image.mean() * (1 - contrast) + image * contrast, 0, 1)
    grey = image.mean(0)
    output: Array = np.clip(grey * (1 - saturation) + image * saturation, 0, 1)
    return output


def cut_out(image: Array, draws: Array, size: int) -> Array:
    """Set a square around a pixel of an image (C, H, W) to zero; the pixel can be any one."""
    output = image.copy()
    y, x = (int(draw * length) for draw, length in zip(draws, image.shape[1:], strict=True))
    top, left = y - size // 2, x - size // 2
    output[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return output


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
def test_an_operation_is_what_it_is_documented_to_be(op: Op, channels: int) -> None:
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
    # the values of a ramp show where in the image each pixel comes from
    count, size = 2000, 64
    ramp = (torch.arange(size) + 0.5) / size
    images = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    crops = Crop(0.25)(images.expand(count, 2, size, size), draws_of(count, Crop(0.25)))
    inner = crops[:, :, 8:-8, 8:-8]  # pixels at the edge may be clipped
    step_x = inner[:, 0].diff(dim=-1).mean((1, 2)).double() * size
    step_y = inner[:, 1].diff(dim=-2).mean((1, 2)).double() * size
    area, ratio = step_x * step_y, step_x / step_y
    assert 0.25 - 1e-3 < float(area.min()) < 0.26
    assert float(area.max()) <= 1 + 1e-3
    assert 0.75 - 1e-3 < float(ratio.min()) < 0.76
    assert 1.32 < float(ratio.max()) < 4 / 3 + 1e-3
    assert float(crops.min()) > 0
    assert float(crops.max()) < 1


def test_the_middle_draws_of_jitter_change_nothing() -> None:
    images = pixels_of(3)
    assert torch.allclose(Jitter(0.9)(images, np.full((3, 3), 0.5)), images, atol=1e-6)


def test_jitter_stays_between_black_and_white() -> None:
    images = Jitter(1.0)(pixels_of(200), draws_of(200, Jitter(1.0)))
    assert float(images.min()) == 0
    assert float(images.max()) == 1


def test_the_square_of_a_cutout_may_lie_partly_outside_and_is_never_larger() -> None:
    count, size = 5000, 3
    images = Cutout(size)(torch.ones(count, 1, 5, 7), draws_of(count, Cutout(size)))
    areas = set((images == 0).sum((1, 2, 3)).tolist())
    assert areas == {4, 6, 9}  # a corner, an edge, inside


ALL_OPS = [Shift(1), Flip(), Crop(0.5), Jitter(0.5), Cutout(2)]


@pytest.mark.parametrize("op", ALL_OPS, ids=str)
def test_the_images_given_are_left_as_they_are(op: Op) -> None:
    images = pixels_of(8)
    augmented = op(images, np.random.default_rng(0).random((8, op.draws)))
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.float32
    assert not torch.equal(augmented, images)
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
        rf"augmentation '{part}' in '{spec}' is unknown; expected shift:PIXELS.* flip.*, with "
        r"FILE\.py:CALLABLE first and mixup last"
    )
    with pytest.raises(SettingsError, match=expected):
        parse_augment(spec, seed=0, total=1)


@pytest.mark.parametrize("digits", [10, 4400])
def test_sizes_beyond_any_image_are_refused(digits: int) -> None:
    # a forged header could ask for them
    spec = f"shift:{'9' * digits}"
    with pytest.raises(SettingsError, match="augmentation 'shift:9"):
        parse_augment(spec, seed=0, total=1)(images_of(1), None, 0, np.arange(1))


@pytest.mark.parametrize("spec", ["mixup,flip", "shift:1,mixup,flip", "mixup,mixup"])
def test_mixup_comes_last_and_once(spec: str) -> None:
    with pytest.raises(
        SettingsError, match=f"augmentation '{spec}': mixup must come last, and only once"
    ):
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
