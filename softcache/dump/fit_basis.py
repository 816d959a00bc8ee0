"""Fit the directions of the `basis` encoding to a teacher's own log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcache.cache import Basis
from softcache.cache.encodings import BASIS_RANGE

EXACT_SIDE = 2048  # up to this side an exact decomposition takes no longer than a second or two

SPLITS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # shares of a row's coefficient bytes for 8-bit ones

NEGLIGIBLE = 1e-5  # of the largest deviation: a direction below it holds float noise


@dataclass(frozen=True)
class Directions:
    """Principal directions of centred log-probabilities, the strongest first."""

    mean: Tensor  # (C,)
    directions: Tensor  # (m, C), orthonormal
    deviations: Tensor  # (m,), standard deviation of the rows along each


def principal_directions(log_probs: Tensor, most: int) -> Directions:
    """Principal components of rows that are centred each, and then together.

    Log-probabilities are logits but for a constant of the row, so the row's mean is taken off.

    Args:
        log_probs: (n, C) float32.
        most: how many directions are wanted; fewer come where the rows span fewer.
    """
    rows = torch.maximum(log_probs, log_probs.amax(-1, keepdim=True) - BASIS_RANGE)
    rows = rows - rows.mean(-1, keepdim=True)
    mean = rows.mean(0)
    rows = rows - mean
    if min(rows.shape) <= EXACT_SIDE:
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    else:
        # the draws of the randomized method must not depend on what ran before
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(0)
            wanted = min(most + 10, *rows.shape)
            _, sizes, columns = torch.svd_lowrank(rows, q=wanted, niter=4)
            directions = columns.T
    strong = int((sizes > NEGLIGIBLE * sizes[0]).sum()) if float(sizes[0]) > 0 else 1
    keep = max(1, min(most, strong))
    return Directions(mean, directions[:keep], sizes[:keep] / len(rows) ** 0.5)


def splits(coefficient_bytes: int, top: int, found: int) -> Iterable[Basis]:
    """Ways to spend a row's bytes of coefficients on 8-bit and 4-bit ones, of `found` directions."""
    seen = set()
    for share in SPLITS:
        wide = min(round(share * coefficient_bytes), found)
        narrow = min(2 * (coefficient_bytes - wide), (found - wide) // 2 * 2)
        if wide + narrow and (wide, narrow) not in seen:
            seen.add((wide, narrow))
            yield Basis(wide, narrow, top)


def shared_arrays(encoding: Basis, fitted: Directions) -> dict[str, Tensor]:
    """What the file keeps of the fit.

    A direction's step is its deviation over its largest level, so that all coefficients of a row
    reach their ends together and one step of the row scales them all.
    """
    most = torch.tensor([127.0] * encoding.wide + [7.0] * encoding.narrow)
    deviations = fitted.deviations[: encoding.rank].cpu().clamp(min=1e-12)
    return {
        "mean": fitted.mean.cpu().float(),
        "directions": fitted.directions[: encoding.rank].cpu().half(),
        "direction_steps": (deviations / most).float(),
    }
