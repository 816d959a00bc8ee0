"""Counter-based random numbers: a pure function of their coordinates, without a state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Draws = npt.NDArray[np.float64]  # (B, n) uniform in [0, 1)


def uniform(
    seed: int,
    view: int | npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    *,
    stream: int | npt.NDArray[np.int64],
    draws: int,
) -> Draws:
    """Uniform random numbers in [0, 1) that depend only on their coordinates.

    The coordinates are mixed in one after another with the finalizer of SplitMix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16).

    Args:
        seed: the first coordinate.
        view: one number for all samples, or (B,) one for each.
        samples: (B,) numbers of the samples.
        stream: separates the draws of different purposes; one number for all samples, or (B,) one for each.
        draws: how many numbers each sample gets.

    Returns:
        (B, draws) float64.
    """
    state = np.zeros((len(samples), draws), np.uint64)
    views = np.broadcast_to(view, len(samples))[:, None]
    streams = np.broadcast_to(stream, len(samples))[:, None]
    coordinates = (seed, views, samples.astype(np.uint64)[:, None], streams, np.arange(draws))
    for coordinate in coordinates:
        state = _mix(state + np.asarray(coordinate).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
