"""Fit the directions of the `basis` encoding to a teacher's own log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcache.cache import Basis
from softcache.cache.encodings import BASIS_RANGE

EXACT_SIDE = 2048  # up to this side, an exact decomposition takes no more than a second or two
SPLITS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # shares of the coefficient bytes for 8-bit ones
NEGLIGIBLE = 1e-5  # of the largest deviation: weaker directions are float noise


@dataclass(frozen=True)
class Directions:
    """Principal directions of centred log-probabilities, strongest first."""

    mean: Tensor  # (C,)
    directions: Tensor  # (m, C), orthonormal
    deviations: Tensor  # (m,), standard deviation of the rows along each direction


def principal_directions(log_probs: Tensor, max_directions: int) -> Directions:
    """Principal components of rows, each of which is first centred on its own mean.

    Log-probabilities equal logits up to a constant per row, so the mean of the row carries no
    information.

    Args:
        log_probs: (n, C) float32.
        max_directions: how many directions to return at most; fewer if the rows span fewer.
    """
    rows = torch.maximum(log_probs, log_probs.amax(-1, keepdim=True) - BASIS_RANGE)
    rows = rows - rows.mean(-1, keepdim=True)
    mean = rows.mean(0)
    rows = rows - mean
    if min(rows.shape) <= EXACT_SIDE:
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    else:
        # seeded, so that the randomized method does not depend on what ran before
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(0)
            oversampled = min(max_directions + 10, *rows.shape)
            _, sizes, columns = torch.svd_lowrank(rows, q=oversampled, niter=4)
            directions = columns.T
    strong = int((sizes > NEGLIGIBLE * sizes[0]).sum()) if float(sizes[0]) > 0 else 1
    keep = max(1, min(max_directions, strong))
    return Directions(mean, directions[:keep], sizes[:keep] / len(rows) ** 0.5)


def splits(coefficient_bytes: int, top: int, available: int) -> Iterable[Basis]:
    """Ways to divide the coefficient bytes of a row between 8-bit and 4-bit coefficients.

    Args:
        top: how many corrected classes each row has.
        available: how many directions were fitted; an encoding never uses more.
    """
    seen = set()
    for share in SPLITS:
        wide = min(round(share * coefficient_bytes), available)
        narrow = min(2 * (coefficient_bytes - wide), (available - wide) // 2 * 2)
        if wide + narrow and (wide, narrow) not in seen:
            seen.add((wide, narrow))
            yield Basis(wide, narrow, top)


def shared_arrays(encoding: Basis, fitted: Directions) -> dict[str, Tensor]:
    """The arrays of the fit that the file stores once for all rows.

    The step of a direction is its deviation divided by its largest level. The coefficients of a
    row then saturate together, and a single step per row scales them all.

    Returns:
        mean (C,) float32, directions (r, C) float16 and direction_steps (r,) float32, on the CPU.
    """
    max_levels = torch.tensor([127.0] * encoding.wide + [7.0] * encoding.narrow)
    deviations = fitted.deviations[: encoding.rank].cpu().clamp(min=1e-12)
    return {
        "mean": fitted.mean.cpu().float(),
        "directions": fitted.directions[: encoding.rank].cpu().half(),
        "direction_steps": (deviations / max_levels).float(),
    }
