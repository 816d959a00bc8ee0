"""Merge shards and views of one dump into one file, copying the encoded rows unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache.allocate import Values, create
from softcache.cache.arrays import INPUT_OFFSETS, INPUTS
from softcache.cache.fields import JSON
from softcache.cache.header import Header
from softcache.cache.layout import LAYOUT_ARRAYS, check_tokens, concatenate_layouts
from softcache.cache.reader import ONCE, Cache, open_cache, partial_path, raw_bytes, shared_digest
from softcache.cache.summary import columns_field, pooled_fidelity, summarize
from softcache.cache.verify import Damage, block_damage, block_unit
from softcache.cache.writer import Writer
from softcache.errors import FormatError, SettingsError
from softcache.util.lock import exclusive
from softcache.util.log import inform

# header fields that determine the stored values: only caches that agree in all of them can be merged
SETTINGS = (
    "data", "data_samples", "classes", "positions", "teachers", "temperature", "precision",
    "encoding", "augment", "seed", "must_understand",
)  # fmt: skip

# shared arrays that describe the samples of a part, and not what all parts have in common
OF_SAMPLES = ("fingerprinted", "fingerprints", "keys", *LAYOUT_ARRAYS, INPUTS, INPUT_OFFSETS)
ROW_COUNTS = ("count", "tokens", "bytes")  # in a header's `rows`: sums over the samples

Advance = Callable[[int], None]


def _ignore(count: int) -> None:
    pass


def merge(parts: Sequence[Cache], out: Path, advance: Advance = _ignore) -> Cache:
    """Merge shards of samples, views, or both into one file.

    Run again after any stop, it continues where it stopped.

    Args:
        out: the merged file.
        advance: called with the number of rows done.

    Raises:
        SettingsError: the parts do not fit together; the message says which and why.
        FormatError: a part is damaged.
    """
    # the same file in whatever order the parts are given
    parts = sorted(parts, key=lambda part: (part.header.first_sample, part.header.first_view))
    if any(part.path.resolve() == out.resolve() for part in parts):
        raise SettingsError(f"{out} is one of the caches to merge; give another --out")
    header, shared = plan(parts)
    with exclusive(out):
        if out.exists():
            return _finished_merge(out, header, shared, parts)
        _open_unfinished(out, header, shared, parts[0].header.block_rows)
        with Writer(out) as writer:
            # view by view, so that a block across two shards is full before other views are compared with it
            for view in range(header.views):
                for part in parts:
                    copy_view(part, writer, view, advance)
            writer.commit()
            writer.finish(summarize(writer.cache) | columns_field(parts) | _fidelity(parts))
    return open_cache(out)


def _finished_merge(out: Path, header: Header, shared: Values, parts: Sequence[Cache]) -> Cache:
    """The cache at `out`, if it is the merged file of these parts.

    Raises:
        SettingsError: it is another file.
    """
    try:
        cache = open_cache(out)
        same = _is_of_merge(cache, header, shared) and all(_holds(cache, part) for part in parts)
    except FormatError:
        same = False
    if not same:
        raise SettingsError(
            f"{out} already exists, and is not these caches merged; give another --out, or remove it"
        )
    inform(f"{out} is already complete; nothing to do")
    return cache


def _holds(cache: Cache, part: Cache) -> bool:
    """Whether a cache has all rows of a part of it, byte for byte."""
    offset = row_offset(part, cache)
    view_offset = part.header.first_view - cache.header.first_view
    for block in range(part.header.blocks):
        cache_rows = part.header.block_range(block)
        inside = slice(cache_rows.start, cache_rows.stop)
        stored = slice(cache_rows.start + offset, cache_rows.stop + offset)
        for array in part.header.arrays:
            own, other = part.arrays[array.name], cache.arrays[array.name]
            if array.axis == "rows":
                own, other = own[:, inside], other[view_offset:, stored][: part.header.views]
            elif array.axis in ONCE:
                own, other = own[inside], other[stored]
            else:
                continue
            if raw_bytes(np.ascontiguousarray(own)) != raw_bytes(np.ascontiguousarray(other)):
                return False
    return True


def copy_view(part: Cache, writer: Writer, view: int, advance: Advance = _ignore) -> None:
    """Copy one view of a part into the writer's file, each block checked against its digest.

    Args:
        view: of the writer's file, where the first is 0; nothing is copied if the part lacks it.
        advance: called with the number of rows done.

    Raises:
        SettingsError: the file has other rows than the part already.
        FormatError: the part is damaged.
        DataError: the file has other samples than the part.
    """
    header, target = part.header, writer.header
    part_view = view + target.first_view - header.first_view
    if not 0 <= part_view < header.views:
        return
    offset = row_offset(part, writer.cache)
    missing = writer.missing(view)[offset : offset + header.row_count]
    for block in range(header.blocks):
        cache_rows = header.block_range(block)
        inside = slice(cache_rows.start, cache_rows.stop)
        if not missing[inside].any():
            _check_written(part, part_view, block, writer, view)
        else:
            _check_block(part, part_view, block)
            rows = {
                a.name: part.arrays[a.name][part_view, inside]
                for a in header.arrays
                if a.axis == "rows"
            }
            samples = {a.name: part.arrays[a.name][inside] for a in header.arrays if a.axis in ONCE}
            writer.write(view, cache_rows.start + offset, rows, samples)
        advance(len(cache_rows))


def row_offset(part: Cache, target: Cache) -> int:
    """The row of `target`, which holds the samples of `part` and others, at which those of `part` begin."""
    samples = part.header.first_sample - target.header.first_sample
    return samples if target.layout is None else int(target.layout.offsets[samples])


def plan(parts: Sequence[Cache]) -> tuple[Header, dict[str, npt.NDArray[Any]]]:
    """The header, without its layout, and the shared arrays of the merged file.

    Raises:
        SettingsError: the parts have different settings, or there is a gap or overlap between them.
        FormatError: the shared arrays of a part are damaged.
    """
    if len(parts) < 2:
        raise SettingsError(f"{len(parts)} cache to merge; give two or more")
    for part in parts:
        if shared_digest(part.arrays, part.header) != part.header.shared_digest:
            raise FormatError(
                f"{part.path} is damaged: the arrays shared by all rows; get it again"
            )
        _check_settings(parts[0], part)
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
        summary=columns_field(parts) or None,  # room is kept for it
        version=max(part.header.version for part in parts),
        rows=first.rows and _rows_of_shards([shard[0].header.rows or {} for shard in shards]),
    )
    shared = {a.name: shards[0][0].arrays[a.name] for a in first.arrays if a.axis == "shared"}
    shared |= {"fingerprinted": fingerprinted, "fingerprints": fingerprints}
    return header, shared | _samples_of_shards([shard[0] for shard in shards])


def _rows_of_shards(rows: Sequence[JSON]) -> JSON:
    """The field `rows` of the merged header: counts are sums, and left out if a shard does not know them."""
    facts = {name: fact for name, fact in rows[0].items() if name not in ROW_COUNTS}
    known = [name for name in ROW_COUNTS if all(name in shard for shard in rows)]
    return facts | {name: sum(shard[name] for shard in rows) for name in known}


def _samples_of_shards(parts: Sequence[Cache]) -> dict[str, npt.NDArray[Any]]:
    """The shared arrays that describe samples with many rows, of shards that follow each other."""
    layouts = []
    for part in parts:
        if part.layout is None:
            return {}
        layouts.append(part.layout)
        if part.header.embeds_inputs:
            check_tokens(part.layout, part.arrays[INPUTS], part.arrays[INPUT_OFFSETS], part.path)
    arrays: dict[str, npt.NDArray[Any]] = {**concatenate_layouts(layouts).arrays()}
    arrays["keys"] = np.concatenate([part.keys for part in parts])
    if parts[0].header.embeds_inputs:
        arrays[INPUTS] = np.concatenate([part.arrays[INPUTS] for part in parts])
        starts = np.cumsum([0, *(len(part.arrays[INPUTS]) for part in parts)])
        offsets = [
            part.arrays[INPUT_OFFSETS][1:] + start
            for part, start in zip(parts, starts, strict=False)
        ]
        arrays[INPUT_OFFSETS] = np.concatenate([[0], *offsets])
    return arrays


def _check_settings(first: Cache, other: Cache) -> None:
    """Raise SettingsError unless two parts agree in their settings and in what all rows share."""
    for name in SETTINGS:
        first_value, other_value = getattr(first.header, name), getattr(other.header, name)
        if first_value != other_value:
            raise SettingsError(
                f"{other.path} has {name} {_short(other_value)}, {first.path} has {_short(first_value)}; "
                "only parts of one dump can be merged"
            )
    for name in set(first.header.rows or {}) - set(ROW_COUNTS):
        stored, others = (first.header.rows or {})[name], (other.header.rows or {}).get(name)
        if stored != others:
            raise SettingsError(
                f"{other.path} has {name} {_short(others)}, {first.path} has {_short(stored)}; only parts of "
                "one dump can be merged"
            )
    for array in first.header.arrays:
        if (
            array.axis == "shared"
            and array.name not in OF_SAMPLES
            and not np.array_equal(first.arrays[array.name], other.arrays[array.name])
        ):
            raise SettingsError(
                f"{other.path} and {first.path} differ in {array.name}, which all rows share; dump "
                f"{other.path.name} again with --like {first.path.name}"
            )


def _shards(parts: Sequence[Cache]) -> list[list[Cache]]:
    """The parts, grouped into shards by their samples, in order; each shard is sorted by views.

    Raises:
        SettingsError: there is a gap or an overlap, or the shards have different views.
    """
    by_samples: dict[range, list[Cache]] = {}
    for part in sorted(parts, key=lambda p: (p.header.first_sample, p.header.first_view)):
        by_samples.setdefault(part.header.sample_range, []).append(part)
    shards = list(by_samples.values())
    for before, after in pairwise(shards):
        samples = before[0].header.sample_range, after[0].header.sample_range
        _check_adjacent(before[0], after[0], "samples", *samples)
    for shard in shards:
        for previous, part in pairwise(shard):
            _check_adjacent(
                previous, part, "views", previous.header.view_range, part.header.view_range
            )
        first_views, views = (
            range(s[0].header.view_range.start, s[-1].header.view_range.stop)
            for s in (shards[0], shard)
        )
        if views != first_views:
            raise SettingsError(
                f"{shard[0].path} and the other parts with its samples have views {_span(views)}, but "
                f"{shards[0][0].path} and the others with its samples have {_span(first_views)}; all shards "
                "need the same views"
            )
    return shards


def _check_adjacent(
    before: Cache, after: Cache, what: str, before_range: range, after_range: range
) -> None:
    """Raise SettingsError unless the samples or views of one part directly follow the other's."""
    if after_range.start == before_range.stop:
        return
    gap = range(before_range.stop, after_range.start)
    problem = f"{what} {_span(gap)} are missing" if gap else "these overlap"
    raise SettingsError(
        f"{before.path} has {what} {_span(before_range)}, {after.path} has {_span(after_range)}: {problem}; "
        "the parts must meet without gap or overlap"
    )


def _check_same_samples(shard: Sequence[Cache]) -> None:
    """Raise SettingsError unless all parts of a shard have the same samples."""
    for part in shard[1:]:
        layout = () if part.layout is None else LAYOUT_ARRAYS
        for name in (*layout, "keys", "labels", "fingerprinted"):
            expected, values = shard[0].arrays[name], part.arrays[name]
            if name in layout and len(expected) != len(values):
                raise SettingsError(_other_rows(part, shard[0]))
            if np.array_equal(expected, values):
                continue
            if name == "fingerprinted":
                raise SettingsError(
                    f"{part.path} and {shard[0].path} have fingerprints of different samples, as merged "
                    "shards do; merge the views of each shard first, then the shards"
                )
            differs = (expected != values).reshape(len(expected), -1).any(1)
            if name in layout:
                raise SettingsError(_other_rows(part, shard[0]))
            cache_row = int(np.flatnonzero(differs)[0])
            if part.layout is not None and name == "labels":
                cache_row = int(part.layout.samples_of(np.array([cache_row]))[0])
            for cache in (shard[0], part) if part.layout is None else ():
                _check_block(cache, None, cache_row // cache.header.block_rows)
            raise SettingsError(
                f"{part.path} and {shard[0].path} differ in the {name} of sample "
                f"{cache_row + part.header.first_sample}; they were dumped from different data"
            )


def _other_rows(part: Cache, first: Cache) -> str:
    return (
        f"{part.path} and {first.path} have other {part.header.unit}s of the same samples; they were dumped "
        "from different data"
    )


def _open_unfinished(out: Path, header: Header, shared: Values, part_block_rows: int) -> None:
    """Allocate the unfinished file, or check that an existing one was started by this merge.

    Args:
        part_block_rows: rows of a block of the parts; larger new blocks are multiples of it.
    """
    partial = partial_path(out)
    if not partial.exists():
        create(out, header, shared, part_block_rows, header.inputs_spec)
        return
    unfinished = open_cache(partial, unfinished=True)
    if not _is_of_merge(unfinished, header, shared):
        raise SettingsError(
            f"{partial} is in the way: it was started with other settings or parts; remove it"
        )


def _is_of_merge(cache: Cache, header: Header, shared: Values) -> bool:
    """Whether a cache, finished or not, has the settings and the shared arrays of a merge."""
    fields = (*SETTINGS, "views", "samples", "first_view", "first_sample")
    same = all(getattr(cache.header, name) == getattr(header, name) for name in fields)
    return same and all(np.array_equal(cache.arrays[name], shared[name]) for name in shared)


def _check_block(part: Cache, view: int | None, block: int) -> None:
    """Raise FormatError if a block is damaged, in its samples or in its rows of a view."""
    for checked_view in (None,) if view is None else (None, view):
        what = block_damage(part, checked_view, block)
        if what:
            damage = Damage(
                what, checked_view, part.header.block_range(block), unit=block_unit(part)
            )
            raise FormatError(
                f"{part.path} is damaged: {damage}; softcache verify {part.path.name} says what to do"
            )


def _check_written(part: Cache, part_view: int, block: int, writer: Writer, view: int) -> None:
    """Raise SettingsError if rows that are written already differ from those of an intact part."""
    cache_rows = part.header.block_range(block)
    offset = row_offset(part, writer.cache)
    inside = slice(cache_rows.start, cache_rows.stop)
    written = slice(cache_rows.start + offset, cache_rows.stop + offset)
    for array in part.header.arrays:
        values, stored = part.arrays[array.name], writer.cache.arrays[array.name]
        if array.axis == "rows":
            values, stored = values[part_view, inside], stored[view, written]
        elif array.axis in ONCE:
            values, stored = values[inside], stored[written]
        else:
            continue
        if raw_bytes(values) != raw_bytes(stored):
            if any(block_damage(part, checked_view, block) for checked_view in (None, part_view)):
                return  # it was copied while the part was still intact
            raise SettingsError(
                f"{partial_path(writer.path)} has other {array.name} of rows {written.start} to "
                f"{written.stop - 1} than {part.path}: it was started from another file; remove it"
            )


def _fidelity(parts: Sequence[Cache]) -> dict[str, Any]:
    pooled = pooled_fidelity(parts)
    return {"fidelity": pooled} if pooled else {}


def _span(numbers: range) -> str:
    return f"{numbers.start} to {numbers.stop - 1}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
