"""Check every byte of a cache against its digest, and every row for values that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softcache.cache.arrays import INPUT_OFFSETS, INPUTS
from softcache.cache.encodings import LABEL_SETS
from softcache.cache.header import PREAMBLE, parse_preamble
from softcache.cache.layout import LAYOUT_ARRAYS, RowLayout, flaw_of_tokens
from softcache.cache.reader import PARTIAL, Cache, hdf5_digest, shared_digest
from softcache.errors import FormatError
from softcache.util.progress import progress


@dataclass(frozen=True)
class Damage:
    """A part of the file that is missing, or that does not match its digest."""

    what: str
    view: int | None = None
    samples: range | None = None  # of rows; of samples, where each has one
    missing: bool = False  # never written, rather than wrong
    unit: str = "sample"  # what there are `samples` of

    def __str__(self) -> str:
        if self.samples is None:
            return self.what
        view = "" if self.view is None else f" in view {self.view}"
        return f"{self.what} of {self.unit}s {self.samples.start} to {self.samples.stop - 1}{view}"


def find_damage(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Check every byte of the file against its digest.

    Args:
        advance: called with the number of bytes of soft targets done.
    """
    header, damage, unit = cache.header, [], block_unit(cache)
    with cache.path.open("rb") as file:
        raw = file.read(header.user_block)
        offset, length, _ = parse_preamble(raw, header.file_bytes)
        # an interrupted dump has not cleared its initial header yet, but will
        finished = not cache.path.name.endswith(PARTIAL)
        if finished and (offset != PREAMBLE.size or raw[offset + length :].strip(b"\0")):
            damage.append(Damage("the user block behind the header"))
        if hdf5_digest(file.fileno(), header) != header.hdf5_digest:
            damage.append(Damage("the HDF5 structure"))
    if shared_digest(cache.arrays, header) != header.shared_digest:
        damage.append(Damage("the arrays shared by all rows"))
    elif header.rows is not None:
        layout = RowLayout(*(cache.arrays[name] for name in LAYOUT_ARRAYS))
        flaw = layout.flaw(header.row_count)
        if not flaw and header.embeds_inputs:
            flaw = flaw_of_tokens(layout, cache.arrays[INPUTS], cache.arrays[INPUT_OFFSETS])
        damage += [Damage(flaw)] if flaw else []
    for view in (None, *range(header.views)):
        digests = cache.arrays["sample_digests"] if view is None else cache.arrays["digests"][view]
        for first, last in _runs(digests == 0):
            samples = range(header.block_range(first).start, header.block_range(last).stop)
            damage.append(Damage("missing: the block", view, samples, missing=True, unit=unit))
        for block in map(int, np.flatnonzero(digests)):
            what = block_damage(cache, view, block)
            if what:
                damage.append(Damage(what, view, header.block_range(block), unit=unit))
            if view is not None:
                advance(len(header.block_range(block)) * header.bytes_per_row)
    return damage


def block_unit(cache: Cache) -> str:
    """What a block is a range of, for messages."""
    return "sample" if cache.header.rows is None else "row"


def block_damage(cache: Cache, view: int | None, block: int) -> str | None:
    """What is wrong with a block of rows, or of samples if `view` is None; None if it is intact.

    Its digest is checked, and that its values are possible: those of a file may have been forged with it.
    """
    header, rows = cache.header, cache.header.block_range(block)
    if view is None:
        if cache.sample_digest(block) != cache.arrays["sample_digests"][block]:
            return _sample_arrays(cache)
        labels = cache.labels[rows.start : rows.stop]
        if header.multi_label:
            spare = -header.classes % 8  # bits beyond the last class
            sets = cache.arrays[LABEL_SETS][rows.start : rows.stop]
            if _outside(labels, 1) or (sets[:, -1] & ((1 << spare) - 1)).any():
                return "sets of labels with other than the classes"
            return None
        return "labels that are no classes" if _outside(labels, header.classes) else None
    if cache.block_digest(view, block) != cache.arrays["digests"][view, block]:
        return "soft targets"
    stored = {
        a.name: cache.arrays[a.name][view, rows.start : rows.stop]
        if a.axis == "rows"
        else cache.arrays[a.name]
        for a in header.arrays
        if a.axis in ("rows", "shared")
    }
    return header.encoding.flaw(stored, header.classes)


def _outside(labels: npt.NDArray[np.int64], classes: int) -> bool:
    """Whether a label is neither a class nor -1, which stands for none."""
    return bool(labels.size and (labels.min() < -1 or labels.max() >= classes))


def _sample_arrays(cache: Cache) -> str:
    if cache.header.rows is not None:
        return "labels"
    return "labels, keys and inputs" if cache.header.embeds_inputs else "labels and keys"


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of each run of True; vectorized, since millions of blocks can be missing."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [
        (int(first), int(stop) - 1) for first, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


def check_damage(cache: Cache) -> None:
    """Raise FormatError if anything is damaged; it names the parts and says what to do."""
    damage = damage_with_progress(cache)
    if damage:
        advice = (
            "softcache repair marks these blocks as missing, and the same softcache dump fills them"
            if all(part.samples for part in damage)
            else "get it again"
        )
        raise FormatError(f"{cache.path} is damaged: {damage_list(damage)}; {advice}")


def damage_with_progress(cache: Cache) -> list[Damage]:
    """find_damage() with a progress bar."""
    header = cache.header
    total = header.views * header.row_count * header.bytes_per_row
    with progress("verify", total, "bytes") as advance:
        return find_damage(cache, advance)


def damage_list(damage: Sequence[Damage], most: int = 5) -> str:
    """The first `most` of the damaged parts in one line, and how many more there are."""
    more = f", and {len(damage) - most} more" if len(damage) > most else ""
    return "; ".join(map(str, damage[:most])) + more
