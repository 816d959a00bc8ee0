"""Image preprocessing as a module: resize, crop and normalize, before a model's first layer.

It is batched, runs on the model's own device, and is part of what is exported. Every student and
teacher prepares the same view of the same raw image in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softcache.errors import ModelError

MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
# a processor with any other step is refused: leaving the step out would silently change its images
KNOWN_STEPS = {
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_flip_channel_order",
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Preprocessing steps, in the order in which they are applied.

    Attributes:
        resize: target length of the shorter side, or height and width; None to keep the size.
        interpolation: a key of MODES; bilinear and bicubic are antialiased.
        crop: height and width of the center crop; None for no crop.
        round_crop: whether a crop offset of half a pixel is rounded to even, as in torchvision, or
            down, as in transformers.
        scale: factor for values in [0, 1].
        mean: mean of each channel, or empty for no normalization.
        std: standard deviation of each channel.
        flip_channels: whether RGB becomes BGR.
    """

    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop: tuple[int, int] | None = None
    round_crop: bool = False
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip_channels: bool = False


class Preprocess(nn.Module):
    """Prepares images (B, C, H, W), floats in [0, 1], for a model; has no weights.

    Args:
        channels: number of channels that the model takes; grey images are repeated to that many.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, steps: Steps, channels: int = 3) -> None:
        super().__init__()
        self.steps, self.channels = steps, channels
        for name, values in (("mean", steps.mean), ("std", steps.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        steps = self.steps
        if images.ndim != 4 or images.is_floating_point() is False:
            raise ValueError(
                f"inputs {tuple(images.shape)} of {images.dtype} are not images; expected floats "
                "(samples, channels, height, width)"
            )
        if images.shape[1] == 1 and self.channels > 1:
            images = images.expand(-1, self.channels, -1, -1)
        if steps.resize is not None:
            images = resize(images, steps.resize, steps.interpolation)
        if steps.crop is not None:
            images = center_crop(images, steps.crop, rounded=steps.round_crop)
        if steps.scale != 1.0:
            images = images * steps.scale
        if steps.mean:
            images = (images - self.mean) / self.std
        return images.flip(1) if steps.flip_channels else images


def resize(images: Tensor, size: int | tuple[int, int], interpolation: str) -> Tensor:
    """Resize images (B, C, H, W), antialiased unless `interpolation` is nearest.

    Args:
        size: length of the shorter side, which keeps the aspect ratio, or height and width.
        interpolation: a key of MODES.
    """
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short, long = min(height, width), max(height, width)
        longer = int(size * long / short)
        size = (size, longer) if height <= width else (longer, size)
    if size == (height, width):
        return images
    mode = MODES[interpolation]
    antialias = interpolation != "nearest"
    resized = functional.interpolate(images, size=size, mode=mode, antialias=antialias)
    return resized.clamp(0, 1) if interpolation == "bicubic" else resized  # bicubic overshoots


def center_crop(images: Tensor, size: tuple[int, int], *, rounded: bool = False) -> Tensor:
    """Crop the center of images (B, C, H, W), with zeros around images that are smaller.

    Args:
        size: height and width of the crop.
        rounded: round an offset of half a pixel to even instead of down.
    """
    height, width = images.shape[-2:]
    padding = max(size[0] - height, 0), max(size[1] - width, 0)
    if any(padding):
        top, left = -(-padding[0] // 2), -(-padding[1] // 2)
        images = functional.pad(images, (left, padding[1] - left, top, padding[0] - top))
        height, width = images.shape[-2:]
    offsets = (height - size[0]) / 2, (width - size[1]) / 2
    top, left = (round(offset) if rounded else int(offset) for offset in offsets)
    return images[..., top : top + size[0], left : left + size[1]]


def steps_of_processor(settings: Mapping[str, Any], what: str) -> Steps:
    """The steps of a transformers image processor.

    Args:
        settings: the processor's to_dict().
        what: name of the model in messages.

    Raises:
        ModelError: the processor does something that softcache does not support.
    """
    active = {name for name, value in settings.items() if name.startswith("do_") and value}
    unsupported = sorted(active - KNOWN_STEPS)
    unsupported += [name for name in ("rescale_offset", "include_top") if settings.get(name)]
    if unsupported:
        raise ModelError(
            f"{what}: its image processor uses {', '.join(unsupported)}, which softcache does not support; "
            "wrap the model in a FILE.py:CALLABLE that does it"
        )
    crop = _sides(settings.get("crop_size"), what) if "do_center_crop" in active else None
    size = settings.get("size")
    fraction = settings.get("crop_pct")
    resized: int | tuple[int, int] | None = None
    if "do_resize" in active:
        resized = _size(size, what)
        # ConvNeXt resizes and crops below 384 pixels, and squashes from there on
        if fraction and isinstance(resized, int):
            square = (resized, resized)
            resized, crop = (int(resized / fraction), square) if resized < 384 else (square, crop)
    rescale = settings.get("rescale_factor", 1 / 255) if "do_rescale" in active else 1.0
    normalized = "do_normalize" in active
    return Steps(
        resize=resized,
        interpolation=_interpolation(settings.get("resample", 2), what),
        crop=(crop, crop) if isinstance(crop, int) else crop,
        scale=_one_if_close(255 * float(rescale)),
        mean=_channels(settings["image_mean"]) if normalized else (),
        std=_channels(settings["image_std"]) if normalized else (),
        flip_channels="do_flip_channel_order" in active,
    )


def steps_of_timm(settings: Mapping[str, Any], what: str) -> Steps:
    """The evaluation steps of a timm model.

    Args:
        settings: the data config that resolve_model_data_config() returns.
        what: name of the model in messages.

    Raises:
        ModelError: the config needs something that softcache does not support.
    """
    height, width = settings["input_size"][-2:]
    fraction = float(settings.get("crop_pct") or 1)
    mode = settings.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ModelError(
            f"{what}: crop mode {mode!r}; expected center or squash, or wrap the model in a FILE.py:CALLABLE"
        )
    resized: int | tuple[int, int] = (int(height / fraction), int(width / fraction))
    if mode == "center" and height == width:
        resized = int(height / fraction)
    return Steps(
        resize=resized,
        interpolation=_interpolation(settings.get("interpolation") or "bilinear", what),
        crop=(height, width),
        round_crop=True,
        mean=_channels(settings["mean"]),
        std=_channels(settings["std"]),
    )


def _one_if_close(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _channels(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (float(values),)  # type: ignore[arg-type]


def _interpolation(resample: object, what: str) -> str:
    """The key of MODES for Pillow's number or timm's name."""
    name = RESAMPLING.get(int(resample)) if isinstance(resample, int) else str(resample)
    if name not in MODES:
        raise ModelError(
            f"{what}: interpolation {resample!r}; expected {', '.join(MODES)}, or wrap the model in a "
            "FILE.py:CALLABLE"
        )
    return name


def _sides(size: object, what: str) -> tuple[int, int]:
    parsed = _size(size, what)
    return (parsed, parsed) if isinstance(parsed, int) else parsed


def _size(size: Any, what: str) -> int | tuple[int, int]:  # noqa: ANN401  # JSON
    """Parse 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, int):
        return size
    sides = {name: value for name, value in dict(size or {}).items() if value is not None}
    if set(sides) == {"height", "width"}:
        return int(sides["height"]), int(sides["width"])
    if set(sides) == {"shortest_edge"}:
        return int(sides["shortest_edge"])
    raise ModelError(
        f"{what}: size {sides} of its image processor; expected height and width, or shortest_edge; wrap "
        "the model in a FILE.py:CALLABLE"
    )
