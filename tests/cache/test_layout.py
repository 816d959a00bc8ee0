"""Which rows belong to which sample: against a naive list of (sample, position), and every flaw found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcache.cache.layout import (
    LAYOUT_ARRAYS,
    MAX_POSITION,
    RowLayout,
    check_tokens,
    concatenate_layouts,
    even_layout,
    flaw_of_tokens,
    layout_of,
    read_layout,
)
from softcache.errors import FormatError

Positions = list[list[int]]  # of each sample, ascending

SAMPLES = st.lists(
    st.sets(st.integers(0, 12), max_size=8).map(sorted), min_size=1, max_size=8
).filter(any)


def built(samples: Positions) -> RowLayout:
    counts = np.array([len(positions) for positions in samples], np.int64)
    return layout_of(counts, np.array([p for sample in samples for p in sample], np.int64))


def naive(samples: Positions) -> list[tuple[int, int]]:
    """(sample, position) of each row."""
    return [(number, p) for number, positions in enumerate(samples) for p in positions]


def same(one: RowLayout, other: RowLayout) -> bool:
    return all(np.array_equal(one.arrays()[name], other.arrays()[name]) for name in LAYOUT_ARRAYS)


def ints(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


@settings(deadline=None, max_examples=200)
@given(SAMPLES)
def test_rows_samples_and_positions_are_those_of_a_list(samples: Positions) -> None:
    layout, rows = built(samples), naive(samples)
    every_row, every_sample = np.arange(len(rows)), np.arange(len(samples))
    assert (layout.samples, layout.rows) == (len(samples), len(rows))
    assert layout.samples_of(every_row).tolist() == [sample for sample, _ in rows]
    assert layout.positions_of(every_row).tolist() == [position for _, position in rows]
    assert layout.counts(every_sample).tolist() == [len(positions) for positions in samples]
    assert layout.rows_of(every_sample).tolist() == every_row.tolist()
    assert layout.flaw(len(rows)) is None


@settings(deadline=None, max_examples=200)
@given(SAMPLES, st.data())
def test_some_samples_in_any_order_have_the_rows_that_they_had(
    samples: Positions, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=10))
    layout, rows = built(samples), naive(samples)
    taken = layout.take(np.array(chosen, np.int64))
    assert same(taken, built([samples[number] for number in chosen]))
    own = layout.rows_of(np.array(chosen, np.int64)).tolist()
    assert [rows[row] for row in own] == [(n, p) for n in chosen for p in samples[n]]


@settings(deadline=None, max_examples=100)
@given(SAMPLES, st.data())
def test_adjacent_samples_are_taken_as_any_others(samples: Positions, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(samples)))
    stop = data.draw(st.integers(first, len(samples)))
    assert same(built(samples).take(np.arange(first, stop)), built(samples[first:stop]))


@settings(deadline=None, max_examples=100)
@given(st.lists(SAMPLES, min_size=1, max_size=4))
def test_groups_of_samples_are_joined(groups: list[Positions]) -> None:
    joined = concatenate_layouts([built(group) for group in groups])
    assert same(joined, built([sample for group in groups for sample in group]))


@pytest.mark.parametrize(("samples", "positions"), [(1, 1), (3, 4), (5, 1)])
def test_samples_that_all_have_a_row_at_each_position(samples: int, positions: int) -> None:
    even = even_layout(samples, positions)
    assert same(even, built([list(range(positions))] * samples))


def test_a_document_costs_one_run_whatever_its_length() -> None:
    assert len(built([list(range(1000)), list(range(5, 900))]).run_rows) == 2


def test_a_layout_without_rows_is_one() -> None:
    layout = built([[], []])
    assert (layout.samples, layout.rows) == (2, 0)
    assert layout.take(ints(1)).rows == 0


# flaws
# samples with rows at positions 0 1 2 | none | 3 4 7 | 0
GOOD = RowLayout(ints(0, 3, 3, 6, 7), ints(0, 3, 5, 6), ints(0, 3, 7, 0))
FAR = np.iinfo(np.int64).max
TO_ROWS = "offsets that do not lead from 0 to the number of rows"
RUNS = "runs of positions that do not begin in order"
RANGE = "positions that are out of range"
WITHIN = "samples that begin within a run of positions"
ORDER = "positions that are not in order"

FLAWS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "offsets from 1": ("offsets", (1, 3, 3, 6, 7), TO_ROWS),
    "offsets from below 0": ("offsets", (-1, 3, 3, 6, 7), TO_ROWS),
    "offsets to a row too few": ("offsets", (0, 3, 3, 6, 6), TO_ROWS),
    "offsets to a row too many": ("offsets", (0, 3, 3, 6, 8), TO_ROWS),
    "offsets that go back": ("offsets", (0, 3, 2, 6, 7), TO_ROWS),
    "offsets that go beyond and back": ("offsets", (0, 9, 3, 6, 7), TO_ROWS),
    "offsets whose difference overflows": ("offsets", (0, FAR, -2, 6, 7), TO_ROWS),
    "runs from 1": ("run_rows", (1, 3, 5, 6), RUNS),
    "runs twice": ("run_rows", (0, 3, 3, 6), RUNS),
    "runs that go back": ("run_rows", (0, 5, 3, 6), RUNS),
    "runs beyond the rows": ("run_rows", (0, 3, 6, 7), RUNS),
    "runs below 0": ("run_rows", (0, -3, 5, 6), RUNS),
    "runs whose difference overflows": ("run_rows", (0, FAR, -2, 6), RUNS),
    "positions below 0": ("run_positions", (0, 3, 7, -1), RANGE),
    "positions too large": ("run_positions", (0, 3, 7, MAX_POSITION + 1), RANGE),
    "positions far too large": ("run_positions", (0, 3, 7, FAR), RANGE),
    "a sample without a run": ("run_rows", (0, 2, 5, 6), WITHIN),
    "a sample of runs of two": ("offsets", (0, 3, 3, 5, 7), ORDER),
    "a position twice": ("run_positions", (0, 3, 4, 0), ORDER),
    "positions that go back": ("run_positions", (0, 3, 1, 0), ORDER),
    "positions that should be one run": ("run_positions", (0, 3, 5, 0), ORDER),
}


@pytest.mark.must("F27")
@pytest.mark.parametrize("name", FLAWS)
def test_every_flaw_is_found(name: str) -> None:
    array, values, flaw = FLAWS[name]
    assert GOOD.flaw(7) is None
    layout = replace(GOOD, **{array: ints(*values)})
    assert layout.flaw(7) == flaw
    with pytest.raises(FormatError, match=f"^c.h5 has {flaw}: the file is damaged or forged, get"):
        read_layout(layout.arrays(), 7, "c.h5")


def test_every_phrase_has_a_case() -> None:
    assert {flaw for _, _, flaw in FLAWS.values()} == {TO_ROWS, RUNS, RANGE, WITHIN, ORDER}


@settings(deadline=None, max_examples=500)
@given(SAMPLES, st.data())
def test_what_has_no_flaw_indexes_only_what_is_there(
    samples: Positions, data: st.DataObject
) -> None:
    layout = built(samples)
    values = {name: values.copy() for name, values in layout.arrays().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        array = values[data.draw(st.sampled_from(LAYOUT_ARRAYS))]
        number = st.integers(-3, 12) | st.sampled_from([FAR, -FAR - 1, -FAR, 1 << 40, -2])
        array[data.draw(st.integers(0, len(array) - 1))] = data.draw(number)
    changed, rows = RowLayout(**values), layout.rows
    if changed.flaw(rows) is not None:
        return
    every_row = np.arange(rows)
    pairs = list(zip(changed.samples_of(every_row), changed.positions_of(every_row), strict=True))
    assert pairs == sorted(set(pairs)), "rows in order, each once"
    assert all(0 <= sample < changed.samples and position >= 0 for sample, position in pairs)
    assert changed.rows_of(np.arange(changed.samples)).tolist() == every_row.tolist()


# embedded tokens
TOKENS = np.arange(14, dtype=np.int32)
STARTS = ints(0, 4, 5, 13, 14)  # four samples, of 4, 1, 8 and 1 tokens


@pytest.mark.must("F28")
@pytest.mark.parametrize(
    ("tokens", "offsets", "flaw"),
    [
        (TOKENS, STARTS, None),
        (TOKENS, ints(0, 3, 3, 13, 14), None),
        (TOKENS, ints(1, 4, 5, 13, 14), "offsets of its tokens that do not lead from 0 to 14"),
        (TOKENS, ints(0, 4, 5, 13, 15), "offsets of its tokens that do not lead from 0 to 14"),
        (TOKENS, ints(0, 4, 2, 13, 14), "offsets of its tokens that do not lead from 0 to 14"),
        (TOKENS, ints(0, FAR, -2, 13, 14), "offsets of its tokens that do not lead from 0 to 14"),
        (TOKENS - 1, STARTS, "tokens with a number below 0"),
        (TOKENS, ints(0, 2, 5, 13, 14), "rows that stand behind the last token of their sample"),
        (TOKENS, ints(0, 4, 6, 13, 14), "rows that stand behind the last token of their sample"),
    ],
)
def test_embedded_tokens_have_their_own_flaws(
    tokens: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], flaw: str | None
) -> None:
    assert flaw_of_tokens(GOOD, tokens, offsets) == flaw
    if flaw:
        with pytest.raises(FormatError, match=f"^c.h5 has {flaw}: the file is damaged or forged"):
            check_tokens(GOOD, tokens, offsets, "c.h5")
    else:
        check_tokens(GOOD, tokens, offsets, "c.h5")
