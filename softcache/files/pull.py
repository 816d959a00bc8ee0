"""Fetch a cache from a server or a disk, whole or in part, and check each block as it arrives.

The file is allocated first and then filled. A whole pull is a byte-for-byte copy; a partial one is a valid
cache of the requested views and samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, Header, open_cache
from softcache.cache.allocate import clone, create
from softcache.cache.arrays import INPUT_OFFSETS, INPUTS
from softcache.cache.layout import RowLayout, check_tokens, read_layout
from softcache.cache.reader import ONCE, digest_of, partial_path
from softcache.cache.summary import summarize
from softcache.cache.writer import Writer
from softcache.errors import FormatError, Interrupted, SettingsError
from softcache.files.remote import PART, RemoteCache, in_parallel, open_remote
from softcache.util.lock import exclusive
from softcache.util.log import inform
from softcache.util.progress import progress

SOURCE = ".source"  # suffix of the file that says what an unfinished pull is fetching

Range = tuple[int, int]  # first and count

Arrays = dict[str, npt.NDArray[Any]]


class Piece(NamedTuple):
    """A run of blocks of one view that are fetched together."""

    view: int  # index in the remote cache
    first: int  # first block
    stop: int  # one past the last block
    with_samples: bool  # fetch labels and keys too


@dataclass(frozen=True)
class Part:
    """The views and samples of a remote cache to fetch, and the rows of these; all counted from 0."""

    views: range
    samples: range
    rows: range


def pull(
    source: str,
    out: Path,
    *,
    views: Range | None = None,
    samples: Range | None = None,
    expect: str | None = None,
    overwrite: bool = False,
) -> Cache:
    """Fetch a cache, or some of its views and samples. A pull that was stopped continues where it was.

    Args:
        source: a path or a URL.
        out: the file to write.
        views: first view and number of views, counted as in the dump; all by default.
        samples: first sample and number of samples, counted in the whole data set; all by default.
        expect: the content id that the cache must have.
        overwrite: replace another file, or a pull that was started with other options.

    Returns:
        The finished cache, open.

    Raises:
        SettingsError: the cache does not have these views or samples, or `out` is another file.
        RemoteError: the server does not return what it should.
        FormatError: a block does not match its digest, or the cache has changed since the pull started.
        Interrupted: the user stopped the pull.
    """
    remote = open_remote(source)
    if expect is not None and remote.content_id != expect.strip().lower():
        raise FormatError(
            f"{remote.file.shown} has content id {remote.content_id}; expected {expect}: this is another "
            "cache, check the URL and the id"
        )
    part = select_part(remote, views, samples)
    with exclusive(out):
        return pull_into(out, remote, part, overwrite=overwrite)


def pull_into(out: Path, remote: RemoteCache, part: Part, *, overwrite: bool) -> Cache:
    """Fetch a part of a cache into a file whose lock is held; see pull()."""
    if out.exists() and not overwrite:
        return existing_copy(remote, part, out)
    new = overwrite or not partial_path(out).exists()
    if new:
        # before the whole file is reserved: its size is only what the header claims
        header = remote.header
        fetch_piece(remote, Piece(part.views.start, *_first_block(header, part), True))
    try:
        try:
            open_unfinished_pull(remote, part, out, overwrite=overwrite)
        finally:
            if not partial_path(out).exists():
                _source_file(out).unlink(missing_ok=True)
        with Writer(out) as writer:
            fetch_missing(writer, remote, part)
            finish_pull(writer, remote, part)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {partial_path(out)} is kept: the same command continues"
        ) from None
    _source_file(out).unlink(missing_ok=True)
    return open_cache(out)


def _first_block(header: Header, part: Part) -> tuple[int, int]:
    block = part.rows.start // header.block_rows
    return block, block + 1


def select_part(remote: RemoteCache, views: Range | None, samples: Range | None) -> Part:
    """The part of a remote cache that the requested ranges cover; None requests everything.

    Raises:
        SettingsError: the cache does not have all of it.
    """
    header = remote.header
    selected = []
    for what, requested, available in (
        ("views", views, header.view_range),
        ("samples", samples, header.sample_range),
    ):
        start, length = requested or (available.start, len(available))
        if not available.start <= start < start + length <= available.stop:
            raise SettingsError(
                f"{what} {start} to {start + length - 1} of {remote.file.shown}; it has "
                f"{available.start} to {available.stop - 1}"
            )
        selected.append(range(start - available.start, start - available.start + length))
    rows = selected[1]
    if header.rows is not None and len(rows) == header.samples:
        rows = range(header.row_count)
    elif header.rows is not None:
        layout = layout_of_remote(remote, remote.shared())
        rows = range(int(layout.offsets[rows.start]), int(layout.offsets[rows.stop]))
        if not rows:
            raise SettingsError(
                f"the samples asked for of {remote.file.shown} have no {header.unit}s; request others"
            )
    return Part(selected[0], selected[1], rows)


def layout_of_remote(remote: RemoteCache, shared: Arrays) -> RowLayout:
    """Which rows belong to which sample of a remote cache with many rows a sample."""
    return read_layout(shared, remote.header.row_count, remote.file.shown)


def is_whole(header: Header, part: Part) -> bool:
    """Whether the part is the whole cache."""
    return len(part.views) == header.views and len(part.samples) == header.samples


def existing_copy(remote: RemoteCache, part: Part, out: Path) -> Cache:
    """Open `out`, which exists, if it is a copy of the whole remote cache.

    Raises:
        SettingsError: it is another file, or only a part was requested.
    """
    if is_whole(remote.header, part):
        try:
            cache = open_cache(out)
            if cache.content_id() == remote.content_id:
                return cache
        except FormatError:
            pass
    raise SettingsError(
        f"{out} already exists, and is not a copy of {remote.file.shown} as it is now; give another -o, "
        "or --overwrite"
    )


def open_unfinished_pull(remote: RemoteCache, part: Part, out: Path, *, overwrite: bool) -> None:
    """Allocate the unfinished file, or check that an existing one was started by this pull.

    Raises:
        SettingsError: another pull or a dump started it, or the part has no fingerprints.
        FormatError: the remote cache is damaged, or was written by a newer softcache.
    """
    partial, source_file = partial_path(out), _source_file(out)
    pulling = f"{remote.content_id} {part.views} {part.samples}"
    if overwrite:
        partial.unlink(missing_ok=True)
    if partial.exists():
        started = source_file.read_text(encoding="utf-8") if source_file.is_file() else ""
        if started == pulling:
            inform(f"resuming {partial}")
            return
        why = f"it was not started by a pull of {remote.file.shown}"
        if started:
            old_id = started.split()[0]
            why = f"the pull of {remote.file.shown} was started with another part of it"
            if old_id != remote.content_id:
                why = (
                    f"the pull of {remote.file.shown} was started when its content id was {old_id}, "
                    f"now it is {remote.content_id}"
                )
        raise SettingsError(f"{partial} is in the way: {why}; remove it, or pull with --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    shared = remote.shared()
    if is_whole(remote.header, part):
        if remote.header.to_bytes() != remote.header_bytes:
            raise FormatError(
                f"{remote.file.shown} has the header of a newer softcache, which cannot be copied exactly; "
                "update softcache"
            )
        structure = remote.structure()
        source_file.write_text(pulling, encoding="utf-8")
        try:
            clone(out, remote.header, shared, structure)
        except FormatError as error:
            raise FormatError(
                f"{remote.file.shown}: {error}; its server returns wrong bytes, verify it there"
            ) from None
        return
    header, shared_of_part = part_header(remote, part, shared)
    source_file.write_text(pulling, encoding="utf-8")
    create(out, header, shared_of_part, remote.header.block_rows, remote.header.inputs_spec)


def part_header(remote: RemoteCache, part: Part, shared: Arrays) -> tuple[Header, Arrays]:
    """The header of a part, without its layout, and the arrays that its rows share.

    Raises:
        SettingsError: no sample of the part has fingerprints.
    """
    whole, samples = remote.header, part.samples
    rows = shared["fingerprinted"]
    kept = (rows >= samples.start) & (rows < samples.stop)
    if not kept.any():
        nearest_row = min(
            rows.tolist(), key=lambda row: min(abs(row - samples.start), abs(row - samples.stop))
        )
        raise SettingsError(
            f"none of samples {samples.start + whole.first_sample} to "
            f"{samples.stop + whole.first_sample - 1} has fingerprints in the cache, and training needs "
            "them to check that views are replayed exactly; request a range with sample "
            f"{nearest_row + whole.first_sample}"
        )
    own = samples_of_part(remote, part, shared)
    header = dataclasses.replace(
        whole,
        views=len(part.views),
        samples=len(samples),
        first_view=whole.first_view + part.views.start,
        first_sample=whole.first_sample + samples.start,
        # room is kept for what stays
        summary={n: v for n, v in (whole.summary or {}).items() if n == "columns"} or None,
        rows=whole.rows and row_facts(whole.rows, len(part.rows), own.get(INPUTS)),
    )
    return header, shared | {
        "fingerprinted": rows[kept] - samples.start,
        "fingerprints": shared["fingerprints"][part.views.start : part.views.stop, kept],
        **own,
    }


def samples_of_part(remote: RemoteCache, part: Part, shared: Arrays) -> Arrays:
    """The shared arrays that describe the samples of a part, if they have many rows; else empty."""
    if remote.header.rows is None:
        return {}
    samples = slice(part.samples.start, part.samples.stop)
    whole = layout_of_remote(remote, shared)
    layout = whole.take(np.arange(samples.start, samples.stop))
    arrays: Arrays = {**layout.arrays(), "keys": shared["keys"][samples]}
    if remote.header.embeds_inputs:
        check_tokens(whole, shared[INPUTS], shared[INPUT_OFFSETS], remote.file.shown)
        offsets = shared[INPUT_OFFSETS][samples.start : samples.stop + 1]
        arrays[INPUTS] = shared[INPUTS][offsets[0] : offsets[-1]]
        arrays[INPUT_OFFSETS] = offsets - offsets[0]
    return arrays


def row_facts(facts: dict[str, Any], count: int, tokens: npt.NDArray[Any] | None) -> dict[str, Any]:
    """A header's `rows` for fewer of them; what was counted in all samples alone is left out.

    Args:
        tokens: the embedded tokens of the part, if they are embedded.
    """
    kept = {name: value for name, value in facts.items() if name not in ("tokens", "bytes")}
    return kept | {"count": count} | ({} if tokens is None else {"tokens": len(tokens)})


def fetch_missing(writer: Writer, remote: RemoteCache, part: Part) -> None:
    """Fetch the missing blocks, a few pieces in parallel, and write those that match their digests."""
    header = remote.header
    missing_pieces = list(pieces(writer, remote, part))
    missing_bytes = sum(piece_bytes(header, piece) for piece in missing_pieces)
    row_bytes = len(part.views) * len(part.rows) * header.bytes_per_row
    total, done = max(row_bytes, missing_bytes), max(row_bytes - missing_bytes, 0)
    with progress("pull", total, "bytes", done) as advance:
        fetched = in_parallel(lambda piece: fetch_piece(remote, piece), missing_pieces)
        for piece, (row_arrays, sample_arrays) in zip(missing_pieces, fetched, strict=True):
            first = header.block_range(piece.first).start
            last = header.block_range(piece.stop - 1).stop
            start, stop = max(first, part.rows.start), min(last, part.rows.stop)
            inside = slice(start - first, stop - first)
            cache_row = start - part.rows.start
            samples = {
                name: sample_arrays[name][inside]
                if name in sample_arrays
                else writer.cache.arrays[name][cache_row : cache_row + stop - start]
                for name in (a.name for a in header.arrays if a.axis in ONCE)
            }
            writer.write(
                piece.view - part.views.start,
                cache_row,
                {name: values[inside] for name, values in row_arrays.items()},
                samples,
            )
            advance(piece_bytes(header, piece))


def pieces(writer: Writer, remote: RemoteCache, part: Part) -> Iterator[Piece]:
    """Runs of blocks with missing rows, about PART bytes each."""
    header = remote.header
    first = part.rows.start // header.block_rows
    end = -(-part.rows.stop // header.block_rows)
    for view in part.views:
        missing = writer.missing(view - part.views.start)
        with_samples = view == part.views.start
        max_blocks = max(1, PART // piece_bytes(header, Piece(view, 0, 1, with_samples)))
        block = first
        while block < end:
            stop = block
            while stop < min(end, block + max_blocks) and _has_missing(missing, header, stop, part):
                stop += 1
            if stop > block:
                yield Piece(view, block, stop, with_samples)
            block = max(stop, block + 1)


def _has_missing(missing: npt.NDArray[np.bool_], header: Header, block: int, part: Part) -> bool:
    rows = header.block_range(block)
    offset = part.rows.start
    return bool(missing[max(0, rows.start - offset) : max(0, rows.stop - offset)].any())


def piece_bytes(header: Header, piece: Piece) -> int:
    """Bytes that fetch_piece() reads."""
    rows = header.block_range(piece.stop - 1).stop - header.block_range(piece.first).start
    axes = ("rows", *ONCE) if piece.with_samples else ("rows",)
    return rows * sum(array.row_bytes for array in header.arrays if array.axis in axes)


def fetch_piece(remote: RemoteCache, piece: Piece) -> tuple[Arrays, Arrays]:
    """Fetch a piece and check each of its blocks.

    Returns:
        The arrays of rows, and the arrays of samples if the piece asks for them.

    Raises:
        RemoteError: the server does not return them.
        FormatError: a block does not match its digest.
    """
    header = remote.header
    start, stop = header.block_range(piece.first).start, header.block_range(piece.stop - 1).stop
    row_arrays, sample_arrays = {}, {}
    for array in header.arrays:
        if array.axis == "rows":
            offset = array.offset + (piece.view * header.row_count + start) * array.row_bytes
            raw = remote.file.read(offset, (stop - start) * array.row_bytes)
            row_arrays[array.name] = np.frombuffer(raw, array.dtype).reshape(
                stop - start, *array.shape[2:]
            )
        elif array.axis in ONCE and piece.with_samples:
            raw = remote.file.read_long(
                array.offset + start * array.row_bytes, (stop - start) * array.row_bytes
            )
            sample_arrays[array.name] = np.frombuffer(raw, array.dtype).reshape(
                stop - start, *array.shape[1:]
            )
    unit, shared_by_views = (
        ("sample", "labels and keys") if header.rows is None else ("row", "labels")
    )
    for block in range(piece.first, piece.stop):
        rows = header.block_range(block)
        inside = slice(rows.start - start, rows.stop - start)
        for arrays, digests, what in (
            (row_arrays, remote.digests[piece.view], f"soft targets in view {piece.view}"),
            (sample_arrays, remote.sample_digests, shared_by_views),
        ):
            if arrays and digest_of(values[inside] for values in arrays.values()) != digests[block]:
                raise FormatError(
                    f"{remote.file.shown}: the {what} of {unit}s {rows.start} to {rows.stop - 1} do "
                    "not match their digest: the file has changed since the pull started, is damaged, or its "
                    "server returns wrong bytes; try again, or run softcache verify where the file is"
                )
    return row_arrays, sample_arrays


def finish_pull(writer: Writer, remote: RemoteCache, part: Part) -> None:
    """Write the final header: a whole cache keeps its summary, a part is summarised from its rows.

    Raises:
        FormatError: the copy of a whole cache has another content id.
    """
    header = remote.header
    if is_whole(header, part):
        writer.finish(dict(header.summary or {}))
        content_id = open_cache(writer.path).content_id()
        if content_id != remote.content_id:
            raise FormatError(
                f"{writer.path} has content id {content_id}, {remote.file.shown} has {remote.content_id}; "
                "pull it again with --overwrite"
            )
        return
    writer.commit()
    kept = {n: v for n, v in (header.summary or {}).items() if n in ("fidelity", "columns")}
    writer.finish(summarize(writer.cache) | kept)


def size_of(remote: RemoteCache, part: Part) -> int:
    """About how many bytes a pull of the part fetches."""
    header = remote.header
    if is_whole(header, part):
        return header.file_bytes
    rows = len(part.views) * len(part.rows) * header.bytes_per_row
    once = sum(a.row_bytes for a in header.arrays if a.axis in ONCE) * len(part.rows)
    return rows + once + sum(a.nbytes for a in header.arrays if a.axis == "shared")


def _source_file(out: Path) -> Path:
    partial = partial_path(out)
    return partial.with_name(f"{partial.name}{SOURCE}")
