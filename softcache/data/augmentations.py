"""The built-in augmentations, on batches of images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.util.counter_rng import Draws


class Op(Protocol):
    """One augmentation of a batch of float images."""

    draws: int  # random numbers that it needs for each sample

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment images (B, C, H, W) by draws (B, self.draws), uniform in [0, 1)."""


@dataclass(frozen=True)
class Shift:
    """Shift the image by up to `pixels` whole pixels in each direction, padding with zeros."""

    pixels: int
    draws = 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        span, device = 2 * self.pixels + 1, images.device
        offsets = torch.from_numpy((draws * span).astype(np.int64)).to(device)  # (B, 2) in 0..2p
        padded = torch.nn.functional.pad(images, [self.pixels] * 4)
        rows = offsets[:, 0, None] + torch.arange(height, device=device)  # (B, H)
        columns = offsets[:, 1, None] + torch.arange(width, device=device)  # (B, W)
        batch = torch.arange(len(images), device=device)
        moved = padded.movedim(1, -1)[batch[:, None, None], rows[:, :, None], columns[:, None]]
        return moved.movedim(-1, 1)  # (B, C, H, W)


@dataclass(frozen=True)
class Flip:
    """Mirror the image left to right with probability 1/2."""

    draws = 1

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        mirrored = torch.from_numpy(draws[:, 0] < 0.5).to(images.device)
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class Crop:
    """Random resized crop, bilinear, resized to the size of the image.

    The area is uniform from `area` to 1 of the image, the aspect ratio log-uniform from 3/4 to 4/3, the
    position uniform: Szegedy et al., "Going deeper with convolutions" (arXiv 1409.4842), section 6.
    """

    area: float
    draws = 4

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return self.sampled(images, draws, mode="bilinear")

    def sampled(self, images: Tensor, draws: Draws, mode: str) -> Tensor:
        """The crops of images (B, C, H, W), `bilinear`, or `nearest` for values that are not to be mixed."""
        area = self.area + (1 - self.area) * draws[:, 0]
        ratio = np.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
        sides = np.minimum(
            np.sqrt(area[:, None] * np.stack([ratio, 1 / ratio], -1)), 1
        )  # (B, 2) x, y
        centres = (1 - sides) * (2 * draws[:, 2:] - 1)  # (B, 2) x, y; -1 and 1 are the edges
        matrix = np.zeros((len(draws), 2, 3), np.float32)
        matrix[:, [0, 1], [0, 1]], matrix[:, :, 2] = sides, centres
        grid = torch.nn.functional.affine_grid(
            torch.from_numpy(matrix).to(images.device), list(images.shape), align_corners=False
        )
        return torch.nn.functional.grid_sample(
            images, grid, mode=mode, padding_mode="reflection", align_corners=False
        )


@dataclass(frozen=True)
class Jitter:
    """Scale brightness, contrast and saturation, in this order, by 1 - strength to 1 + strength."""

    strength: float
    draws = 3

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        factors = torch.from_numpy(1 + self.strength * (2 * draws - 1)).to(images)
        bright, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
        images = (images * bright).clamp(0, 1)
        images = (images - (mean := images.mean((1, 2, 3), keepdim=True))) * contrast + mean
        images = images.clamp(0, 1)
        grey = images.mean(1, keepdim=True)
        return ((images - grey) * saturation + grey).clamp(0, 1)


@dataclass(frozen=True)
class Cutout:
    """Set a square of `size` by `size` pixels to 0: DeVries and Taylor (arXiv 1708.04552).

    The centre is anywhere in the image, so part of the square can lie outside it.
    """

    size: int
    draws = 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        centres = torch.from_numpy((draws * [height, width]).astype(np.int64)).to(images.device)
        corners = centres - self.size // 2  # (B, 2) top, left
        rows, columns = (
            (torch.arange(length, device=images.device) - corners[:, axis, None])
            for axis, length in enumerate((height, width))
        )
        inside = ((rows >= 0) & (rows < self.size))[:, :, None]
        inside = inside & ((columns >= 0) & (columns < self.size))[:, None]
        return images.masked_fill(inside[:, None], 0)


@dataclass(frozen=True)
class OpKind:
    """An entry in the table of operations: how it is written, what it does and how it is made."""

    form: str
    meaning: str
    make: Callable[[str], Op | None]  # from the text after the colon; None if that is invalid


OPERATIONS = {
    "shift": OpKind(
        "shift:PIXELS",
        "moves the image by up to PIXELS in each direction",
        lambda size: Shift(_pixels(size)) if _pixels(size) else None,
    ),
    "flip": OpKind(
        "flip",
        "mirrors the image left to right with probability 1/2",
        lambda size: None if size else Flip(),
    ),
    "crop": OpKind(
        "crop:AREA",
        "random resized crop of at least this share of the image, above 0 to 1",
        lambda size: Crop(_share(size)) if _share(size) else None,
    ),
    "jitter": OpKind(
        "jitter:STRENGTH",
        "scales brightness, contrast and saturation by 1 - STRENGTH to 1 + STRENGTH",
        lambda size: Jitter(_share(size)) if _share(size) else None,
    ),
    "cutout": OpKind(
        "cutout:PIXELS",
        "blanks a square of PIXELS by PIXELS",
        lambda size: Cutout(_pixels(size)) if _pixels(size) else None,
    ),
}


def parse_op(part: str, spec: str) -> Op:
    """Make the operation that `part` of the augmentation `spec` describes.

    Raises:
        SettingsError: the operation is unknown, or its size is out of range.
    """
    name, _, size = part.partition(":")
    op = OPERATIONS[name].make(size) if name in OPERATIONS else None
    if op is None:
        listed = ", ".join(kind.form for kind in OPERATIONS.values())
        raise SettingsError(
            f"augmentation {part!r} in {spec!r} is unknown; expected {listed}, separated by commas, "
            "with FILE.py:CALLABLE first and mixup last if needed"
        )
    return op


def _pixels(size: str) -> int:
    return int(size) if re.fullmatch(r"[0-9]{1,5}", size) else 0


def _share(size: str) -> float:
    return float(size) if re.fullmatch(r"0?\.\d+|1(\.0*)?", size) else 0.0
