"""What a model does with images before its first layer, as a module: size, crop, normalization.

Batched, on the model's own device, and part of what is exported. Every student and teacher does its own,
on the same view of the same raw image.
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

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # as Pillow counts them

# steps of a processor that are not known here: what they would do must not be left out in silence
KNOWN_STEPS = {
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_flip_channel_order",
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What is done, in this order; None: nothing."""

    resize: int | tuple[int, int] | None = None  # the shorter side, or height and width
    interpolation: str = "bilinear"  # of MODES, antialiased
    crop: tuple[int, int] | None = None  # of the centre, height and width
    round_crop: bool = (
        False  # half a pixel to the even one, as torchvision; else down, as transformers
    )
    scale: float = 1.0  # of values in [0, 1]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip_channels: bool = False  # BGR


class Preprocess(nn.Module):
    """Images (B, C, H, W) float in [0, 1] as a model wants them; no weights."""

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
                f"inputs {tuple(images.shape)} of {images.dtype} are no images; expected floats "
                "(samples, channels, height, width)"
            )
        if images.shape[1] == 1 and self.channels > 1:  # grey as grey colours
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
    """Images (B, C, H, W) with antialiasing; of a single size, the shorter side comes to it."""
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short, long = min(height, width), max(height, width)
        other = int(size * long / short)
        size = (size, other) if height <= width else (other, size)
    if size == (height, width):
        return images
    mode = MODES[interpolation]
    smooth = interpolation != "nearest"
    found = functional.interpolate(images, size=size, mode=mode, antialias=smooth)
    return found.clamp(0, 1) if interpolation == "bicubic" else found  # which overshoots


def center_crop(images: Tensor, size: tuple[int, int], *, rounded: bool = False) -> Tensor:
    """The middle of images (B, C, H, W), with zeros around it where they are smaller."""
    height, width = images.shape[-2:]
    more = max(size[0] - height, 0), max(size[1] - width, 0)
    if any(more):
        top, left = -(-more[0] // 2), -(-more[1] // 2)
        images = functional.pad(images, (left, more[1] - left, top, more[0] - top))
        height, width = images.shape[-2:]
    halves = (height - size[0]) / 2, (width - size[1]) / 2
    top, left = (round(half) if rounded else int(half) for half in halves)
    return images[..., top : top + size[0], left : left + size[1]]


def steps_of_processor(settings: Mapping[str, Any], who: str) -> Steps:
    """The steps of an image processor of transformers, from its settings.

    Raises:
        ModelError: it does something that is not known here.
    """
    active = {name for name, value in settings.items() if name.startswith("do_") and value}
    odd = sorted(active - KNOWN_STEPS)
    odd += [name for name in ("rescale_offset", "include_top") if settings.get(name)]
    if odd:
        raise ModelError(
            f"{who}: its image processor does {', '.join(odd)}, which softcache does not; wrap the model in "
            "a FILE.py:CALLABLE that does it"
        )
    crop = _sides(settings.get("crop_size"), who) if "do_center_crop" in active else None
    size = settings.get("size")
    share = settings.get("crop_pct")
    resized: int | tuple[int, int] | None = None
    if "do_resize" in active:
        resized = _size(size, who)
        if share and isinstance(resized, int):  # ConvNext's: large ones as they are, others cut
            whole = (resized, resized)
            resized, crop = (int(resized / share), whole) if resized < 384 else (whole, crop)
    rescale = settings.get("rescale_factor", 1 / 255) if "do_rescale" in active else 1.0
    normalized = "do_normalize" in active
    return Steps(
        resize=resized,
        interpolation=_interpolation(settings.get("resample", 2), who),
        crop=(crop, crop) if isinstance(crop, int) else crop,
        scale=_one_if_close(255 * float(rescale)),
        mean=_channels(settings["image_mean"]) if normalized else (),
        std=_channels(settings["image_std"]) if normalized else (),
        flip_channels="do_flip_channel_order" in active,
    )


def steps_of_timm(settings: Mapping[str, Any], who: str) -> Steps:
    """The steps of timm's data config for evaluation, from resolve_model_data_config().

    Raises:
        ModelError: it asks for something that is not known here.
    """
    height, width = settings["input_size"][-2:]
    share, mode = float(settings.get("crop_pct") or 1), settings.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ModelError(f"{who}: crop mode {mode!r}; wrap the model in a FILE.py:CALLABLE")
    resized: int | tuple[int, int] = (int(height / share), int(width / share))
    if mode == "center" and height == width:
        resized = int(height / share)
    return Steps(
        resize=resized,
        interpolation=_interpolation(settings.get("interpolation") or "bilinear", who),
        crop=(height, width),
        round_crop=True,
        mean=_channels(settings["mean"]),
        std=_channels(settings["std"]),
    )


def _one_if_close(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _channels(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (float(values),)  # type: ignore[arg-type]


def _interpolation(name: object, who: str) -> str:
    found = RESAMPLING.get(int(name)) if isinstance(name, int) else str(name)
    if found not in MODES:
        raise ModelError(
            f"{who}: interpolation {name!r}; softcache knows {', '.join(MODES)}: wrap the model in a "
            "FILE.py:CALLABLE"
        )
    return found


def _sides(size: object, who: str) -> tuple[int, int]:
    found = _size(size, who)
    return (found, found) if isinstance(found, int) else found


def _size(size: Any, who: str) -> int | tuple[int, int]:  # noqa: ANN401  # JSON
    """What is written as 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, int):
        return size
    known = {name: value for name, value in dict(size or {}).items() if value is not None}
    if set(known) == {"height", "width"}:
        return int(known["height"]), int(known["width"])
    if set(known) == {"shortest_edge"}:
        return int(known["shortest_edge"])
    raise ModelError(f"{who}: size {known} of its image processor; wrap it in a FILE.py:CALLABLE")
