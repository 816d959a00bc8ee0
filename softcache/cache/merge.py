"""Shards and views of one dump, put together in one file; and the copying of rows as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache.allocate import Values, create
from softcache.cache.header import Header
from softcache.cache.reader import Cache, open_cache, partial_path, raw_bytes, shared_digest
from softcache.cache.summary import pooled_fidelity, summarize
from softcache.cache.verify import Damage, block_damage
from softcache.cache.writer import Writer
from softcache.errors import FormatError, SettingsError

# what decides the values of a cache: only caches that agree in it can become one
SETTINGS = (
    "data", "data_samples", "classes", "positions", "teachers", "temperature", "precision",
    "encoding", "augment", "seed", "must_understand",
)  # fmt: skip

Advance = Callable[[int], None]


def _nothing(count: int) -> None:
    pass


def merge(parts: Sequence[Cache], out: Path, advance: Advance = _nothing) -> Cache:
    """Put shards of samples, views, or both into one file `out`; `advance` counts rows.

    A merge that was stopped goes on where it stopped.

    Raises:
        SettingsError: the parts do not fit; the message names which and why.
        FormatError: rows of a part do not match their digest.
    """
    # the order in which they were named must not show in the file
    parts = sorted(parts, key=lambda part: (part.header.first_sample, part.header.first_view))
    if any(part.path.resolve() == out.resolve() for part in parts):
        raise SettingsError(f"{out} is itself to be merged; give another --out")
    if out.exists():
        raise SettingsError(f"{out} is there already; give another --out, or remove it")
    header, shared = plan(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    _begin(out, header, shared, parts[0].header.block_rows)
    with Writer(out) as writer:
        # view by view: a block at the border of two shards is whole before the next view's is compared
        for view in range(header.views):
            for part in parts:
                copy_view(part, writer, view, advance)
        writer.commit()
        writer.finish(summarize(writer.cache) | _fidelity(parts))
    return open_cache(out)


def copy_view(part: Cache, writer: Writer, view: int, advance: Advance = _nothing) -> None:
    """Copy one view's blocks of a part into the writer's file, each checked against its digest.

    Args:
        view: of the writer's file, where the first is 0; a part that has it not is passed over.

    Raises:
        FormatError: the part is damaged.
        DataError: its samples are not those that the file has.
    """
    mine, whole = part.header, writer.header
    own = view + whole.first_view - mine.first_view
    if not 0 <= own < mine.views:
        return
    offset = mine.first_sample - whole.first_sample
    missing = writer.missing(view)[offset : offset + mine.samples]
    for block in range(mine.blocks):
        samples = mine.block_range(block)
        place = slice(samples.start, samples.stop)
        if not missing[place].any():
            _check_there(part, own, block, writer, view)
        else:
            _check_block(part, own, block)
            rows = {
                a.name: part.arrays[a.name][own, place] for a in mine.arrays if a.axis == "rows"
            }
            known = {a.name: part.arrays[a.name][place] for a in mine.arrays if a.axis == "samples"}
            writer.write(view, samples.start + offset, rows, known)
        advance(len(samples))


def plan(parts: Sequence[Cache]) -> tuple[Header, dict[str, npt.NDArray[Any]]]:
    """The header but for its layout, and the shared arrays, of the file that the parts make.

    Raises:
        SettingsError: the parts were not dumped alike, or leave a gap, or overlap.
    """
    if len(parts) < 2:
        raise SettingsError(f"{len(parts)} cache to merge; give two or more")
    for part in parts:
        if shared_digest(part.arrays, part.header) != part.header.shared_digest:
            raise FormatError(
                f"{part.path} is damaged: the arrays shared by all rows; get it again"
            )
        _check_alike(parts[0], part)
    shards = _shards(parts)
    for shard in shards:
        _check_same_samples(shard)
    first = shards[0][0].header
    fingerprinted = np.concatenate(
        [
            shard[0].arrays["fingerprinted"] + shard[0].header.first_sample - first.first_sample
            for shard in shards
        ]
    )
    fingerprints = np.concatenate(
        [np.concatenate([part.arrays["fingerprints"] for part in shard]) for shard in shards], 1
    )  # (views, F, FINGERPRINT)
    header = dataclasses.replace(
        first,
        views=sum(part.header.views for part in shards[0]),
        samples=sum(shard[0].header.samples for shard in shards),
        evaluation=next((p.header.evaluation for p in parts if p.header.evaluation), None),
        summary=None,
        version=max(part.header.version for part in parts),
    )
    shared = {a.name: shards[0][0].arrays[a.name] for a in first.arrays if a.axis == "shared"}
    return header, shared | {"fingerprinted": fingerprinted, "fingerprints": fingerprints}


def _check_alike(first: Cache, other: Cache) -> None:
    for name in SETTINGS:
        mine, theirs = getattr(first.header, name), getattr(other.header, name)
        if mine != theirs:
            raise SettingsError(
                f"{other.path} has {name} {_short(theirs)}, {first.path} has {_short(mine)}; only parts of "
                "one dump can be merged"
            )
    own = {"fingerprinted", "fingerprints"}
    for array in first.header.arrays:
        if array.axis == "shared" and array.name not in own:
            mine, theirs = first.arrays[array.name], other.arrays[array.name]
            if not np.array_equal(mine, theirs):
                raise SettingsError(
                    f"{other.path} and {first.path} differ in {array.name}, which all rows share: dump "
                    f"the one again with --like {first.path.name}"
                )


def _shards(parts: Sequence[Cache]) -> list[list[Cache]]:
    """Parts by their samples, then by their views; each shard has the same views, without a gap."""
    by_samples: dict[range, list[Cache]] = {}
    for part in sorted(parts, key=lambda p: (p.header.first_sample, p.header.first_view)):
        by_samples.setdefault(part.header.sample_range, []).append(part)
    shards = list(by_samples.values())
    for before, after in pairwise(shards):
        _check_adjacent(
            before[0],
            after[0],
            "samples",
            before[0].header.sample_range,
            after[0].header.sample_range,
        )
    for shard in shards:
        for one, two in pairwise(shard):
            _check_adjacent(one, two, "views", one.header.view_range, two.header.view_range)
        views = [
            range(s[0].header.view_range.start, s[-1].header.view_range.stop)
            for s in (shards[0], shard)
        ]
        if views[0] != views[1]:
            raise SettingsError(
                f"{shard[0].path} and those of its samples have views {_named(views[1])}, "
                f"{shards[0][0].path} and those of its own {_named(views[0])}; all need the same"
            )
    return shards


def _check_adjacent(one: Cache, two: Cache, what: str, before: range, after: range) -> None:
    if after.start == before.stop:
        return
    lacking = range(before.stop, after.start)
    how = f"{what} {_named(lacking)} are missing" if lacking else "these overlap"
    raise SettingsError(
        f"{one.path} has {what} {_named(before)}, {two.path} has {_named(after)}: {how}; the parts must "
        "meet without gap or overlap"
    )


def _check_same_samples(shard: Sequence[Cache]) -> None:
    for part in shard[1:]:
        for name in ("keys", "labels", "fingerprinted"):
            mine, theirs = shard[0].arrays[name], part.arrays[name]
            if np.array_equal(mine, theirs):
                continue
            if name == "fingerprinted":
                raise SettingsError(
                    f"{part.path} and {shard[0].path} keep fingerprints of other samples, as shards that "
                    "were merged do; merge the views of each shard first, then the shards"
                )
            at = int(np.flatnonzero((mine != theirs).reshape(len(mine), -1).any(1))[0])
            for one in (shard[0], part):
                _check_block(one, None, at // one.header.block_rows)
            raise SettingsError(
                f"{part.path} and {shard[0].path} differ in the {name} of sample "
                f"{at + part.header.first_sample}; they were dumped from other data"
            )


def _begin(out: Path, header: Header, shared: Values, unit: int) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun by this merge.

    Args:
        unit: rows of a block of the parts, of which new blocks are made up where they are larger.
    """
    partial = partial_path(out)
    if not partial.exists():
        create(out, header, shared, unit, header.inputs_spec)
        return
    begun = open_cache(partial, unfinished=True)
    fields = (*SETTINGS, "views", "samples", "first_view", "first_sample")
    same = all(getattr(begun.header, name) == getattr(header, name) for name in fields)
    if not same or any(not np.array_equal(begun.arrays[name], shared[name]) for name in shared):
        raise SettingsError(f"{partial} is in the way: it was begun by something else; remove it")


def _check_block(part: Cache, view: int | None, block: int) -> None:
    """Raise FormatError if labels and keys of a block are damaged, or its rows of a view."""
    for at in (None,) if view is None else (None, view):
        what = block_damage(part, at, block)
        if what:
            damage = Damage(what, at, part.header.block_range(block))
            raise FormatError(
                f"{part.path} is damaged: {damage}; softcache verify {part.path.name} says what to do"
            )


def _check_there(part: Cache, own: int, block: int, writer: Writer, view: int) -> None:
    """Raise SettingsError if rows that were there before are not those of the part."""
    samples = part.header.block_range(block)
    offset = part.header.first_sample - writer.header.first_sample
    place = slice(samples.start, samples.stop)
    there = slice(samples.start + offset, samples.stop + offset)
    for array in part.header.arrays:
        if array.axis == "rows":
            pair = part.arrays[array.name][own, place], writer.cache.arrays[array.name][view, there]
        elif array.axis == "samples":
            pair = part.arrays[array.name][place], writer.cache.arrays[array.name][there]
        else:
            continue
        if raw_bytes(pair[0]) != raw_bytes(pair[1]):
            if any(block_damage(part, at, block) for at in (None, own)):
                return  # it was copied while the part was whole
            raise SettingsError(
                f"{partial_path(writer.path)} holds other {array.name} of samples {there.start} to "
                f"{there.stop - 1} than {part.path}: it was begun from another file; remove it"
            )


def _fidelity(parts: Sequence[Cache]) -> dict[str, Any]:
    pooled = pooled_fidelity(parts)
    return {"fidelity": pooled} if pooled else {}


def _named(numbers: range) -> str:
    return f"{numbers.start} to {numbers.stop - 1}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
