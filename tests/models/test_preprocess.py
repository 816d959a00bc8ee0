"""Image preprocessing against that of transformers and timm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.errors import ModelError
from softcache.models.preprocess import (
    Preprocess,
    Steps,
    center_crop,
    steps_of_processor,
    steps_of_timm,
)

# Pillow rounds to integers from 0 to 255 when it resizes, once for each axis
ROUNDING = 2.5 / 255


def smooth(height: int, width: int, channels: int = 3) -> Tensor:
    """An image (C, H, W) uint8 without sharp edges."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / (9 + c)) * torch.cos(y / (13 - c)) for c in range(channels)]
    return (127 + 90 * torch.stack(waves)).byte()


def processors() -> dict[str, Any]:
    """Image processors of transformers, by a name for the test case."""
    from transformers import CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor

    return {
        "vit": ViTImageProcessor(size={"height": 32, "width": 48}),
        "vit bicubic": ViTImageProcessor(size={"height": 64, "width": 64}, resample=3),
        "clip": CLIPImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
        ),
        "clip, odd size": CLIPImageProcessor(
            size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}
        ),
        "clip, large crop": CLIPImageProcessor(
            size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}
        ),
        "convnext": ConvNextImageProcessor(size={"shortest_edge": 28}, crop_pct=0.875),
        "convnext 384": ConvNextImageProcessor(size={"shortest_edge": 384}),
        "no rescale": ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
        "nothing": ViTImageProcessor(do_resize=False, do_normalize=False),
    }


@pytest.mark.parametrize(
    "name",
    ["vit", "vit bicubic", "clip", "clip, odd size", "clip, large crop", "convnext", "convnext 384",
     "no rescale", "nothing"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(50, 71), (64, 64)])
def test_an_image_comes_out_as_of_the_librarys_own_processor(
    name: str, size: tuple[int, int]
) -> None:
    processor = processors()[name]
    image = smooth(*size)
    expected = processor(image.permute(1, 2, 0).numpy(), return_tensors="np")["pixel_values"][0]
    steps = steps_of_processor(processor.to_dict(), "model x")
    prepared = Preprocess(steps)(image[None].float() / 255)[0].numpy()
    assert prepared.shape == expected.shape
    scale = steps.scale / min(steps.std or (1.0,))
    assert np.abs(prepared - expected).max() <= ROUNDING * scale


def test_another_interpolation_would_be_noticed() -> None:
    steps = steps_of_processor(processors()["vit bicubic"].to_dict(), "model x")
    image = torch.rand(1, 3, 90, 90, generator=torch.Generator().manual_seed(0))
    other = Preprocess(Steps(**(vars(steps) | {"interpolation": "bilinear"})))
    assert (Preprocess(steps)(image) - other(image)).abs().max() > 4 * ROUNDING


def test_grey_images_are_grey_colours_to_a_model_of_colours() -> None:
    grey = torch.rand(2, 1, 8, 8)
    prepared = Preprocess(Steps(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)))(grey)
    assert prepared.shape == (2, 3, 8, 8)
    torch.testing.assert_close(prepared[:, 2], grey[:, 0] - 0.3)
    assert Preprocess(Steps(mean=(0.5,), std=(0.5,)), 1)(grey).shape == (2, 1, 8, 8)


def test_channels_are_flipped_where_the_model_wants_it() -> None:
    image = torch.rand(1, 3, 4, 4)
    settings = {"do_flip_channel_order": True, "do_rescale": True}
    prepared = Preprocess(steps_of_processor(settings, "x"))(image)
    assert torch.equal(prepared, image.flip(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_pad": True},
            "its image processor uses do_pad, which softcache does not support; wrap",
        ),
        ({"do_thumbnail": True, "do_resize": False}, "uses do_thumbnail"),
        ({"rescale_offset": True, "do_rescale": True}, "uses rescale_offset"),
        (
            {"do_resize": True, "size": {"longest_edge": 3}},
            r"size \{'longest_edge': 3\} of its image processor; expected height and width",
        ),
        (
            {"do_resize": True, "size": 9, "resample": 5},
            "interpolation 5; expected bilinear",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"model x: .*{message}"):
        steps_of_processor(settings, "model x")


def test_what_is_no_image_is_refused() -> None:
    for inputs in (torch.zeros(2, 5), torch.zeros(1, 3, 4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="are not images; expected floats"):
            Preprocess(Steps())(inputs)


def test_timms_config_is_followed() -> None:
    config = {
        "input_size": (3, 24, 24), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
    }  # fmt: skip
    steps = steps_of_timm(config, "x")
    assert (steps.resize, steps.crop, steps.interpolation) == (26, (24, 24), "bicubic")
    squashed = steps_of_timm(config | {"crop_mode": "squash", "crop_pct": 1.0}, "x")
    assert squashed.resize == (24, 24)
    for changes, message in (
        (
            {"crop_mode": "border"},
            "x: crop mode 'border'; expected center or squash, or wrap the model",
        ),
        ({"interpolation": "lanczos"}, "x: interpolation 'lanczos'; expected bilinear"),
    ):
        with pytest.raises(ModelError, match=message):
            steps_of_timm(config | changes, "x")


@pytest.mark.parametrize(("rounded", "first"), [(False, 15), (True, 16)])
def test_half_a_pixel_goes_to_the_side_the_library_takes(rounded: bool, first: int) -> None:
    image = torch.arange(255.0).expand(1, 1, 255, 255)
    assert center_crop(image, (224, 224), rounded=rounded)[0, 0, 0, 0] == first
