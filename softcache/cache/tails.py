"""The mass of the classes that `topk` does not keep, at any temperature."""

from __future__ import annotations

from collections.abc import Sequence


def tail_weights(
    temperatures: Sequence[float], requested_temperature: float
) -> tuple[int | None, int | None, float]:
    """Weights that interpolate the log-odds of the tail between the stored temperatures.

    The log-odds are linear in 1 / T between neighbours, and extrapolated below the lowest
    temperature. At infinite temperature all classes are equal: the log-odds are log((C - k) / k).

    Args:
        temperatures: those that the tails are stored at, ascending.

    Returns:
        Indices (low, high) into `temperatures`, None for infinite temperature, and the share of
        high: log-odds = (1 - share) · tails[low] + share · tails[high].
    """
    inverse = [0.0, *(1 / t for t in reversed(temperatures))]  # ascending
    indices: list[int | None] = [None, *reversed(range(len(temperatures)))]
    x = 1 / requested_temperature
    above = next((i for i, value in enumerate(inverse) if i and value >= x), len(inverse) - 1)
    share = (x - inverse[above - 1]) / (inverse[above] - inverse[above - 1])
    return indices[above - 1], indices[above], share
