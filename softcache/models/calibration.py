"""Confidence against accuracy: a reliability diagram, and the expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15  # of confidence

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: mean confidence, accuracy and number of samples of each bin, (bins,)."""

    confidence: Floats
    accuracy: Floats
    samples: Floats

    @property
    def error(self) -> float:
        """The expected calibration error (ECE): mean of |accuracy - confidence| over the samples.

        Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599), equation 3.
        """
        share = self.samples / max(1.0, self.samples.sum())
        return float((share * np.abs(self.accuracy - self.confidence)).sum())


def calibration_of(confidence: Floats, correct: Floats, bins: int = BINS) -> Calibration:
    """The same from confidences (N,) and from 1 for correct predictions, 0 for others (N,)."""
    bin_of = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    samples = np.bincount(bin_of, minlength=bins).astype(np.float64)
    divisor = np.maximum(samples, 1)
    return Calibration(
        np.bincount(bin_of, confidence, bins) / divisor,
        np.bincount(bin_of, correct, bins) / divisor,
        samples,
    )
