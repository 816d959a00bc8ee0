"""The built-in augmentations, batched on tensors."""

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

    draws: int  # random numbers it needs for a sample

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augmented images (B, C, H, W) from images (B, C, H, W) and draws (B, self.draws)."""


@dataclass(frozen=True)
class Shift:
    """Move the image by up to `pixels` each way, in whole pixels; what comes in is zero."""

    pixels: int
    draws = 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        span, device = 2 * self.pixels + 1, images.device
        offsets = torch.from_numpy((draws * span).astype(np.int64)).to(device)  # (B, 2) in 0..2p
        padded = torch.nn.functional.pad(images, [self.pixels] * 4)
        rows = offsets[:, 0, None] + torch.arange(height, device=device)  # (B, H)
        columns = offsets[:, 1, None] + torch.arange(width, device=device)  # (B, W)
        samples = torch.arange(len(images), device=device)
        moved = padded.movedim(1, -1)[samples[:, None, None], rows[:, :, None], columns[:, None]]
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
    """A random part of the image at the image's own size: random resized crop.

    Area uniform from `area` to 1 of the image, ratio of sides log-uniform from 3/4 to 4/3, place
    uniform, bilinear: Szegedy et al., "Going deeper with convolutions" (arXiv 1409.4842), section 6.
    """

    area: float
    draws = 4

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        area = self.area + (1 - self.area) * draws[:, 0]
        ratio = np.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
        sides = np.minimum(
            np.sqrt(area[:, None] * np.stack([ratio, 1 / ratio], -1)), 1
        )  # (B, 2) x, y
        centres = (1 - sides) * (2 * draws[:, 2:] - 1)  # in -1..1 from edge to edge
        matrix = np.zeros((len(draws), 2, 3), np.float32)
        matrix[:, [0, 1], [0, 1]], matrix[:, :, 2] = sides, centres
        grid = torch.nn.functional.affine_grid(
            torch.from_numpy(matrix).to(images.device), list(images.shape), align_corners=False
        )
        return torch.nn.functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )


@dataclass(frozen=True)
class Jitter:
    """Brightness, contrast and saturation times 1 - strength to 1 + strength, in this order."""

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
    """A square of `size` pixels becomes 0: DeVries and Taylor (arXiv 1708.04552).

    Its centre is anywhere in the image, so that a part of it may lie outside.
    """

    size: int
    draws = 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        centres = torch.from_numpy((draws * [height, width]).astype(np.int64)).to(images.device)
        low = centres - self.size // 2  # (B, 2)
        rows, columns = (
            (torch.arange(length, device=images.device) - low[:, axis, None])
            for axis, length in enumerate((height, width))
        )
        inside = ((rows >= 0) & (rows < self.size))[:, :, None]
        inside = inside & ((columns >= 0) & (columns < self.size))[:, None]
        return images.masked_fill(inside[:, None], 0)


@dataclass(frozen=True)
class OpKind:
    """An entry in the table of operations: how it is written, what it does, and how it is made."""

    form: str
    meaning: str
    make: Callable[[str], Op | None]  # from what stands behind the colon; None if that is invalid


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
    """The operation that `part` of an augmentation names.

    Raises:
        SettingsError: there is no such operation, or its size is out of range.
    """
    name, _, size = part.partition(":")
    op = OPERATIONS[name].make(size) if name in OPERATIONS else None
    if op is None:
        listed = ", ".join(kind.form for kind in OPERATIONS.values())
        raise SettingsError(
            f"augmentation {part!r} in {spec!r} is unknown; expected {listed}, separated by commas; "
            "before them FILE.py:CALLABLE, after them mixup"
        )
    return op


def _pixels(size: str) -> int:
    return int(size) if re.fullmatch(r"[0-9]{1,5}", size) else 0


def _share(size: str) -> float:
    return float(size) if re.fullmatch(r"0?\.\d+|1(\.0*)?", size) else 0.0
