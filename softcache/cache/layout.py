"""Which rows of a cache belong to which sample, and where in the sample each of them stands.

A sample has one row for each token, word, frame or pixel that counts. Positions are stored as runs of
adjacent ones, since a document has a handful of them, or a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softcache.errors import FormatError

Indices = npt.NDArray[np.int64]

MAX_POSITION = (1 << 40) - 1  # of a row in its sample

# names of the arrays, in the order of RowLayout
OFFSETS, RUN_ROWS, RUN_POSITIONS = LAYOUT_ARRAYS = "offsets", "run_rows", "run_positions"


@dataclass(frozen=True)
class RowLayout:
    """The rows of all samples, in the order of the samples, and within a sample by position.

    Attributes:
        offsets: (samples + 1,) the first row of each sample, and the number of all rows.
        run_rows: (runs,) the first row of each run of adjacent positions; every sample begins a new one.
        run_positions: (runs,) the position of that row within its sample, from 0.
    """

    offsets: Indices
    run_rows: Indices
    run_positions: Indices

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1

    @property
    def rows(self) -> int:
        """Number of rows of all samples."""
        return int(self.offsets[-1])

    def counts(self, samples: Indices) -> Indices:
        """The number of rows of some samples, (B,)."""
        counts: Indices = self.offsets[samples + 1] - self.offsets[samples]
        return counts

    def rows_of(self, samples: Indices) -> Indices:
        """The rows of some samples (B,), one sample after the other, (R,)."""
        counts = self.counts(samples)
        starts = self.offsets[samples] - (np.cumsum(counts) - counts)
        rows: Indices = np.repeat(starts, counts) + np.arange(counts.sum())
        return rows

    def samples_of(self, rows: Indices) -> Indices:
        """The sample that each row (R,) belongs to, (R,)."""
        return np.asarray(np.searchsorted(self.offsets, rows, "right") - 1, np.int64)

    def positions_of(self, rows: Indices) -> Indices:
        """The position of each row (R,) within its sample, (R,)."""
        run = np.searchsorted(self.run_rows, rows, "right") - 1
        positions: Indices = self.run_positions[run] + rows - self.run_rows[run]
        return positions

    def find(self, samples: Indices, positions: Indices) -> Indices:
        """The rows at positions (R,) of samples (R,), which have rows there."""
        first = np.searchsorted(self.run_rows, self.offsets[samples])
        found = np.empty(len(samples), np.int64)
        for sample in np.unique(samples):
            own = samples == sample
            runs = slice(
                int(first[own][0]), int(np.searchsorted(self.run_rows, self.offsets[sample + 1]))
            )
            starts = self.run_positions[runs]
            run = np.searchsorted(starts, positions[own], "right") - 1
            found[own] = self.run_rows[runs][run] + positions[own] - starts[run]
        return found

    def take(self, samples: Indices) -> RowLayout:
        """The layout of some samples (B,), in their order."""
        if len(samples) and (np.diff(samples) == 1).all():
            first, stop = self.offsets[samples[0]], self.offsets[samples[-1] + 1]
            low, high = np.searchsorted(self.run_rows, [first, stop])
            return RowLayout(
                self.offsets[samples[0] : samples[-1] + 2] - first,
                self.run_rows[low:high] - first,
                self.run_positions[low:high],
            )
        return layout_of(self.counts(samples), self.positions_of(self.rows_of(samples)))

    def arrays(self) -> dict[str, Indices]:
        """The arrays as a file stores them, by name."""
        return {
            OFFSETS: self.offsets,
            RUN_ROWS: self.run_rows,
            RUN_POSITIONS: self.run_positions,
        }

    def flaw(self, rows: int) -> str | None:
        """What is wrong with a layout that was read from a file, in a phrase; None if nothing is.

        Args:
            rows: the number of rows that it has to describe.
        """
        offsets, firsts, positions = self.offsets, self.run_rows, self.run_positions
        if not leads_to(offsets, rows):
            return "offsets that do not lead from 0 to the number of rows"
        # compared and not subtracted: a difference of forged numbers can overflow
        if (
            not len(firsts)
            or firsts[0] != 0
            or firsts[-1] >= rows
            or (firsts[1:] <= firsts[:-1]).any()
        ):
            return "runs of positions that do not begin in order"
        if positions.min() < 0 or positions.max() > MAX_POSITION:
            return "positions that are out of range"
        begins = np.unique(offsets[:-1][np.diff(offsets) > 0])
        at = np.minimum(np.searchsorted(firsts, begins), len(firsts) - 1)
        if (firsts[at] != begins).any():
            return "samples that begin within a run of positions"
        ends = positions[:-1] + np.diff(firsts)  # the position after each run but the last
        inside = ~np.isin(firsts[1:], begins)  # runs that go on with the sample of the run before
        if (positions[1:][inside] <= ends[inside]).any():
            return "positions that are not in order"
        return None


def leads_to(offsets: Indices, end: int) -> bool:
    """Whether offsets lead from 0 to `end` and never back."""
    return bool(offsets[0] == 0 and offsets[-1] == end and (offsets[1:] >= offsets[:-1]).all())


def flaw_of_tokens(
    layout: RowLayout, tokens: npt.NDArray[np.int32], offsets: Indices
) -> str | None:
    """What is wrong with embedded tokens that were read from a file, in a phrase; None if nothing is.

    Args:
        layout: a layout without a flaw.
        tokens: (tokens,) those of all samples.
        offsets: (samples + 1,) the first token of each sample, and the number of all tokens.
    """
    if not leads_to(offsets, len(tokens)):
        return f"offsets of its tokens that do not lead from 0 to {len(tokens)}"
    if len(tokens) and tokens.min() < 0:
        return "tokens with a number below 0"
    with_rows = np.diff(layout.offsets) > 0
    last = layout.positions_of(layout.offsets[1:][with_rows] - 1)  # of each sample with rows
    if (last >= np.diff(offsets)[with_rows]).any():
        return "rows that stand behind the last token of their sample"
    return None


def layout_of(counts: Indices, positions: Indices) -> RowLayout:
    """The layout of samples with `counts` (samples,) rows at `positions` (R,), ascending in each sample."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    begins = np.zeros(len(positions), np.bool_)
    begins[offsets[:-1][counts > 0]] = True
    if len(positions):
        begins[1:] |= np.diff(positions) != 1
    run_rows = np.flatnonzero(begins).astype(np.int64)
    return RowLayout(offsets, run_rows, np.asarray(positions, np.int64)[run_rows])


def even_layout(samples: int, positions: int) -> RowLayout:
    """The layout of samples that all have a row at each of the first `positions` positions."""
    offsets = np.arange(samples + 1, dtype=np.int64) * positions
    return RowLayout(offsets, offsets[:-1].copy(), np.zeros(samples, np.int64))


def concatenate_layouts(layouts: Sequence[RowLayout]) -> RowLayout:
    """The layout of several groups of samples, one after the other."""
    starts = np.cumsum([0, *(layout.rows for layout in layouts)])
    return RowLayout(
        np.concatenate(
            [[0], *(part.offsets[1:] + start for part, start in zip(layouts, starts, strict=False))]
        ).astype(np.int64),
        np.concatenate(
            [part.run_rows + start for part, start in zip(layouts, starts, strict=False)]
        ),
        np.concatenate([part.run_positions for part in layouts]),
    )


def read_layout(arrays: dict[str, npt.NDArray[np.int64]], rows: int, path: object) -> RowLayout:
    """The layout that the arrays of a file describe, checked, since it indexes memory.

    Raises:
        FormatError: it is not one of `rows` rows.
    """
    layout = RowLayout(*(np.array(arrays[name]) for name in LAYOUT_ARRAYS))
    _refuse(layout.flaw(rows), path)
    return layout


def check_tokens(
    layout: RowLayout, tokens: npt.NDArray[np.int32], offsets: Indices, path: object
) -> None:
    """Raise FormatError if the embedded tokens of a file are none; see flaw_of_tokens()."""
    _refuse(flaw_of_tokens(layout, tokens, offsets), path)


def _refuse(flaw: str | None, path: object) -> None:
    if flaw:
        raise FormatError(f"{path} has {flaw}: the file is damaged or forged, get it again")
