"""Balanced sampling: batches in which every class occurs about equally often."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.loader import ShuffledBatches
from softcache.errors import SettingsError


class BalancedBatches(ShuffledBatches):
    """As many samples per epoch as there are, drawn with replacement so that classes are equally likely.

    The draws depend on (seed, epoch) alone. Samples without a label keep their share.
    """

    def __init__(
        self,
        labels: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
        *arguments: Any,
    ) -> None:
        """Prepare the batches of epoch 0.

        Args:
            labels: (N,) labels of all samples, negative where unlabelled.
            batch_size: the number of samples in a batch of all processes together.
            seed: the seed of the draws.
            arguments: the other arguments of ShuffledBatches.

        Raises:
            SettingsError: no sample is labelled.
        """
        super().__init__(len(labels), batch_size, seed, *arguments)
        self.probabilities = balanced_probabilities(labels)

    def order(self) -> npt.NDArray[np.int64]:
        """The samples of the epoch (N,), in order."""
        random = np.random.default_rng([self.seed, self.epoch])
        return random.choice(self.samples, self.samples, p=self.probabilities)


def balanced_probabilities(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The probability of each sample (N,) to be drawn: equal sums for all classes that have labels.

    Samples without a label keep 1 / N each.

    Raises:
        SettingsError: no sample is labelled.
    """
    labelled = labels >= 0
    if not labelled.any():
        raise SettingsError(
            "--sampling balanced needs labels, but no training sample has one; leave it out, or give "
            "labelled data"
        )
    counts = np.bincount(labels[labelled])
    share = float(labelled.mean()) / int((counts > 0).sum())  # of each class
    probabilities = np.full(len(labels), 1 / len(labels))
    probabilities[labelled] = share / counts[labels[labelled]]
    return np.asarray(probabilities / probabilities.sum())
