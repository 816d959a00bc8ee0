"""Every byte of a cache against its digest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softcache.cache.header import PREAMBLE, parse_preamble
from softcache.cache.reader import PARTIAL, Cache, hdf5_digest, shared_digest
from softcache.errors import FormatError
from softcache.util.progress import progress


@dataclass(frozen=True)
class Damage:
    """A part of the file whose bytes do not match their digest."""

    what: str
    view: int | None = None
    samples: range | None = None
    missing: bool = False  # not there, rather than wrong

    def __str__(self) -> str:
        if self.samples is None:
            return self.what
        place = f"samples {self.samples.start} to {self.samples.stop - 1}"
        return f"{self.what} of {place}" + ("" if self.view is None else f" in view {self.view}")


def find_damage(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Check every byte of the file against its digest; `advance` counts bytes as they are done."""
    header, damage = cache.header, []
    with cache.path.open("rb") as file:
        raw = file.read(header.user_block)
        offset, length, _ = parse_preamble(raw, header.file_bytes)
        # a dump may have been killed before it cleared the header it began with; it will yet
        named = not cache.path.name.endswith(PARTIAL)
        if named and (offset != PREAMBLE.size or raw[offset + length :].strip(b"\0")):
            damage.append(Damage("the user block behind the header"))
        if hdf5_digest(file.fileno(), header) != header.hdf5_digest:
            damage.append(Damage("the HDF5 structure"))
    if shared_digest(cache.arrays, header) != header.shared_digest:
        damage.append(Damage("the arrays shared by all rows"))
    for view in (None, *range(header.views)):
        digests = cache.arrays["sample_digests"] if view is None else cache.arrays["digests"][view]
        for first, last in _runs(digests == 0):
            samples = range(header.block_range(first).start, header.block_range(last).stop)
            damage.append(Damage("missing: the block", view, samples, missing=True))
        for block in map(int, np.flatnonzero(digests)):
            what = block_damage(cache, view, block)
            if what:
                damage.append(Damage(what, view, header.block_range(block)))
            if view is not None:
                advance(len(header.block_range(block)) * header.bytes_per_row)
    return damage


def block_damage(cache: Cache, view: int | None, block: int) -> str | None:
    """What is wrong with a block of rows of a view, or with one of labels and keys (None)."""
    if view is None:
        good = cache.sample_digest(block) == cache.arrays["sample_digests"][block]
        return None if good else _sample_arrays(cache)
    if cache.block_digest(view, block) != cache.arrays["digests"][view, block]:
        return "soft targets"
    ids, samples = cache.arrays.get("ids"), cache.header.block_range(block)
    if ids is not None and ids[view, samples.start : samples.stop].max() >= cache.header.classes:
        return "class ids beyond the last class"
    return None


def _sample_arrays(cache: Cache) -> str:
    return "labels, keys and inputs" if cache.header.embeds_inputs else "labels and keys"


def _runs(wanted: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last place of each run of True: millions of blocks may be missing."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def check_damage(cache: Cache) -> None:
    """Raise FormatError that names the damaged parts, if there are any."""
    damage = damage_with_progress(cache)
    if damage:
        advice = (
            "softcache repair marks these blocks as missing, and the same softcache dump fills them"
            if all(part.samples for part in damage)
            else "get it again"
        )
        raise FormatError(f"{cache.path} is damaged: {damage_list(damage)}; {advice}")


def damage_with_progress(cache: Cache) -> list[Damage]:
    header = cache.header
    total = header.views * header.samples * header.bytes_per_row
    with progress("verify", total, "bytes") as advance:
        return find_damage(cache, advance)


def damage_list(damage: Sequence[Damage], most: int = 5) -> str:
    more = f", and {len(damage) - most} more" if len(damage) > most else ""
    return "; ".join(map(str, damage[:most])) + more
