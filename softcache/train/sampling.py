"""Which samples are in which batch: balanced by class, or of so many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.loader import ShuffledBatches
from softcache.errors import SettingsError

SORTED = 50  # batches, among which samples are sorted by length


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


class RowBatches(ShuffledBatches):
    """Every sample once per epoch, in batches of about as many tokens, whose rows count equally.

    In an epoch, samples are shuffled, sorted by length among about SORTED batches, and divided where the sum
    of their tokens reaches each multiple; the batches then come in random order. So every epoch has the same
    number of batches, and little is padded.
    """

    def __init__(
        self,
        counts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64] | None,
        batch_tokens: int | None,
        batch_size: int,
        seed: int,
        *arguments: Any,
    ) -> None:
        """Prepare the batches of epoch 0.

        Args:
            counts: (N,) the number of rows of each sample.
            lengths: (N,) the number of tokens of each; None for batches of so many samples.
            batch_tokens: the tokens of a batch of all processes together, if lengths are given.
            batch_size: the samples of a batch otherwise.
            seed: the seed of the order.
            arguments: the other arguments of ShuffledBatches.

        Raises:
            SettingsError: a sample is longer than a batch.
        """
        super().__init__(len(counts), batch_size, seed, *arguments)
        self.counts, self.lengths = counts, lengths
        self.batches = math.ceil(len(counts) / batch_size)
        self.drop_last = False
        if lengths is not None and batch_tokens:
            longest = int(lengths.max())
            if longest * self.processes > batch_tokens:
                raise SettingsError(
                    f"--batch-tokens is {batch_tokens:,}, and a sample has {longest:,} tokens; expected room "
                    f"for one in each of {self.processes} process(es): raise it, or cut samples with ?length="
                )
            self.batches = max(1, int(lengths.sum()) // batch_tokens)

    def __len__(self) -> int:
        return self.batches

    def divided(self) -> list[npt.NDArray[np.int64]]:
        """The samples of each batch of the epoch, in order."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.samples)
        if self.lengths is None:
            return [
                order[start : start + self.batch_size]
                for start in range(0, self.samples, self.batch_size)
            ]
        lengths = self.lengths[order]
        size = lengths.sum() / self.batches
        window = ((np.cumsum(lengths) - lengths) // (SORTED * size)).astype(np.int64)
        order = order[np.lexsort((lengths, window))]
        lengths = self.lengths[order]
        middle = np.cumsum(lengths) - lengths / 2
        edges = np.searchsorted(middle, np.arange(1, self.batches) * size)
        batches = np.split(order, edges)
        return [batches[number] for number in random.permutation(self.batches)]

    def weights(self) -> Iterator[float]:
        """Loss weights of this process, by batch: the mean over processes is then the mean over rows."""
        for batch in self.divided()[self.first :]:
            rows = int(self.counts[batch].sum())
            own = int(self.counts[self._share(batch)].sum())
            yield own * self.processes / max(1, rows)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.divided()[self.first :]:
            yield self.request(self._share(batch), self.epoch)

    def _share(self, batch: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The samples of a batch for this process; at least one, or it would wait for no gradient."""
        share = batch[self.process :: self.processes]
        return share if len(share) else batch[:1]


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
