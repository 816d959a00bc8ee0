"""Augmentation that can be replayed: a pure function of (seed, view, sample).

The random numbers of a sample are hashed from its coordinates, not drawn from a generator with a
state, so that a view is the same on any machine, in any order and for any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache.header import FINGERPRINT
from softcache.errors import SettingsError

Draws = npt.NDArray[np.float64]  # (B, n) uniform in [0, 1)


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


def parse_augment(spec: str | None) -> tuple[Op, ...]:
    """The operations of a specification such as `shift:2,flip`; none for None or "".

    Raises:
        SettingsError: an unknown name, or a size that is no whole number from 1 up.
    """
    return tuple(_parse_op(part, spec or "") for part in (spec or "").split(",") if part)


def _parse_op(part: str, spec: str) -> Op:
    name, _, size = part.partition(":")
    if name == "shift" and size.isdecimal() and int(size) > 0:
        return Shift(int(size))
    if name == "flip" and not size:
        return Flip()
    raise SettingsError(
        f"augmentation {part!r} in {spec!r} is unknown; expected shift:PIXELS or flip, "
        "separated by commas"
    )


def augment(
    images: Tensor, ops: Sequence[Op], *, seed: int, view: int, samples: npt.NDArray[np.int64]
) -> Tensor:
    """Apply `ops` in turn, each with draws of its own.

    Args:
        images: (B, C, H, W) float.
        samples: (B,) the numbers of the samples in the data set.

    Raises:
        SettingsError: the inputs are not images.
    """
    if ops and images.ndim != 4:
        raise SettingsError(
            f"inputs of shape {tuple(images.shape[1:])} are not images (channels, height, width), "
            "which is what --augment takes; leave it out"
        )
    for place, op in enumerate(ops):
        images = op(images, uniform(seed, view, samples, stream=place, draws=op.draws))
    return images


def fingerprint(inputs: Tensor) -> npt.NDArray[np.float32]:
    """Projections on fixed random signs of inputs (F, *shape), (F, FINGERPRINT); see FORMAT.md."""
    rows = inputs.cpu().double().flatten(1).numpy()  # (F, n)
    places = np.arange(rows.shape[1])
    signs = [uniform(0, j, places, stream=0, draws=1)[:, 0] < 0.5 for j in range(FINGERPRINT)]
    projected = rows @ np.where(np.stack(signs, -1), 1.0, -1.0) / np.sqrt(rows.shape[1])
    return np.asarray(projected, np.float32)


def uniform(
    seed: int, view: int, samples: npt.NDArray[np.int64], *, stream: int, draws: int
) -> Draws:
    """Random numbers in [0, 1) that depend on their coordinates alone, (B, draws).

    The coordinates go one after the other through the finalizer of SplitMix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16).
    """
    state = np.zeros((len(samples), draws), np.uint64)
    coordinates = (seed, view, samples.astype(np.uint64)[:, None], stream, np.arange(draws))
    for coordinate in coordinates:
        state = _mix(state + np.asarray(coordinate).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
