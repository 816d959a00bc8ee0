"""A cache from elsewhere, whole or in part: allocate, then fill, each block checked as it lands.

A whole pull is the same file to the byte; a part is a valid cache of the views and samples asked for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, Header, open_cache
from softcache.cache.allocate import clone, create
from softcache.cache.reader import digest_of, partial_path
from softcache.cache.summary import summarize
from softcache.cache.writer import Writer
from softcache.errors import FormatError, Interrupted, SettingsError, SoftcacheError
from softcache.files.remote import PART, RemoteCache, in_parallel, is_url, open_remote
from softcache.util.log import inform
from softcache.util.progress import progress

SOURCE = ".source"  # behind the name of an unfinished pull: the content id of what is pulled

Range = tuple[int, int]  # first, and how many

Arrays = dict[str, npt.NDArray[Any]]


class Piece(NamedTuple):
    """Blocks of one view that are read together."""

    view: int  # of the remote cache
    first: int  # block
    stop: int
    with_samples: bool  # also labels and keys


@dataclass(frozen=True)
class Part:
    """What of a cache is wanted: numbers of its own views and rows."""

    views: range
    samples: range


def pull(
    place: str,
    out: Path,
    *,
    views: Range | None = None,
    samples: Range | None = None,
    expect: str | None = None,
    overwrite: bool = False,
) -> Cache:
    """Fetch a cache, or some of its views and samples, into `out`; stopped, it goes on where it was.

    Args:
        place: a path or a URL.
        views: first and how many, as the cache counts them.
        samples: the same, of the data set.
        expect: the content id that it must have.

    Raises:
        SettingsError: there are no such views or samples, or `out` is something else.
        RemoteError: the server does not give what it should.
        FormatError: a block does not match its digest, or the cache has changed since the pull was begun.
    """
    remote = open_remote(place)
    if expect is not None and remote.content_id != expect.strip().lower():
        raise FormatError(
            f"{remote.file.shown} has content id {remote.content_id}; expected {expect}: it is another cache"
        )
    part = select_part(remote, views, samples)
    if out.exists() and not overwrite:
        return already_there(remote, part, out)
    try:
        open_unfinished_pull(remote, part, out, overwrite=overwrite)
        with Writer(out) as writer:
            fetch_missing(writer, remote, part)
            finish_pull(writer, remote, part)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {partial_path(out)} is kept: the same command goes on"
        ) from None
    _source(out).unlink(missing_ok=True)
    return open_cache(out)


def select_part(remote: RemoteCache, views: Range | None, samples: Range | None) -> Part:
    """The part of a cache that is asked for.

    Raises:
        SettingsError: the cache has not all of it.
    """
    header = remote.header
    chosen = []
    for what, asked, there in (
        ("views", views, header.view_range),
        ("samples", samples, header.sample_range),
    ):
        start, length = asked or (there.start, len(there))
        if not there.start <= start < start + length <= there.stop:
            raise SettingsError(
                f"{what} {start} to {start + length - 1} of {remote.file.shown}; it has {there.start} to "
                f"{there.stop - 1}"
            )
        chosen.append(range(start - there.start, start - there.start + length))
    return Part(*chosen)


def is_whole(header: Header, part: Part) -> bool:
    return len(part.views) == header.views and len(part.samples) == header.samples


def already_there(remote: RemoteCache, part: Part, out: Path) -> Cache:
    """The cache that `out` is already, if it is what would be pulled.

    Raises:
        SettingsError: it is something else.
    """
    if is_whole(remote.header, part):
        try:
            there = open_cache(out)
            if there.content_id() == remote.content_id:
                return there
        except FormatError:
            pass
    raise SettingsError(
        f"{out} is there already, and is not {remote.file.shown} as it is now; give another -o, or "
        "--overwrite"
    )


def open_unfinished_pull(remote: RemoteCache, part: Part, out: Path, *, overwrite: bool) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun by this pull."""
    partial, source = partial_path(out), _source(out)
    wanted = f"{remote.content_id} {part.views} {part.samples}"
    if overwrite:
        partial.unlink(missing_ok=True)
    if partial.exists():
        begun = source.read_text(encoding="utf-8") if source.is_file() else ""
        if begun == wanted:
            inform(f"going on with {partial}")
            return
        why = "was begun by something else"
        if begun:
            why = "was begun with another part of it"
            if begun.split()[0] != remote.content_id:
                why = f"was begun when its content id was {begun.split()[0]}, now it is {remote.content_id}"
        raise SettingsError(
            f"{partial} is in the way: the pull of {remote.file.shown} {why}; remove it, or pull with "
            "--overwrite"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    shared = remote.shared()
    if is_whole(remote.header, part):
        if remote.header.to_bytes() != remote.header_bytes:
            raise FormatError(
                f"{remote.file.shown} has a header of a newer softcache, which cannot be copied exactly; "
                "update softcache"
            )
        structure = remote.structure()
        source.write_text(wanted, encoding="utf-8")
        try:
            clone(out, remote.header, shared, structure)
        except FormatError as error:
            raise FormatError(
                f"{remote.file.shown}: {error}; its server gives wrong bytes"
            ) from None
        return
    header, own = part_header(remote, part, shared)
    source.write_text(wanted, encoding="utf-8")
    create(out, header, own, remote.header.block_rows, remote.header.inputs_spec)


def part_header(remote: RemoteCache, part: Part, shared: Arrays) -> tuple[Header, Arrays]:
    """The header but for its layout, and the shared arrays, of a part.

    Raises:
        SettingsError: it has no sample with fingerprints.
    """
    whole, samples = remote.header, part.samples
    rows = shared["fingerprinted"]
    kept = (rows >= samples.start) & (rows < samples.stop)
    if not kept.any():
        near = min(
            rows.tolist(), key=lambda row: min(abs(row - samples.start), abs(row - samples.stop))
        )
        raise SettingsError(
            f"none of samples {samples.start + whole.first_sample} to "
            f"{samples.stop + whole.first_sample - 1} has fingerprints in the cache, without which no "
            "training could tell whether a view is replayed; ask for a range with sample "
            f"{near + whole.first_sample}"
        )
    header = dataclasses.replace(
        whole,
        views=len(part.views),
        samples=len(samples),
        first_view=whole.first_view + part.views.start,
        first_sample=whole.first_sample + samples.start,
        summary=None,
    )
    return header, shared | {
        "fingerprinted": rows[kept] - samples.start,
        "fingerprints": shared["fingerprints"][part.views.start : part.views.stop, kept],
    }


def fetch_missing(writer: Writer, remote: RemoteCache, part: Part) -> None:
    """Fetch what is missing, a few pieces at a time, and write each block that matches its digest."""
    header = remote.header
    wanted = list(pieces(writer, remote, part))
    total = sum(piece_bytes(header, piece) for piece in wanted)
    whole = len(part.views) * len(part.samples) * header.bytes_per_row
    with progress("pull", max(whole, total), "bytes", max(whole - total, 0)) as advance:
        for piece, (rows, known) in zip(
            wanted, in_parallel(lambda piece: fetch_piece(remote, piece), wanted), strict=True
        ):
            first = header.block_range(piece.first).start
            last = header.block_range(piece.stop - 1).stop
            start, stop = max(first, part.samples.start), min(last, part.samples.stop)
            inside = slice(start - first, stop - first)
            place = start - part.samples.start
            samples = {
                name: known[name][inside]
                if name in known
                else writer.cache.arrays[name][place : place + stop - start]
                for name in (a.name for a in header.arrays if a.axis == "samples")
            }
            writer.write(
                piece.view - part.views.start,
                place,
                {name: values[inside] for name, values in rows.items()},
                samples,
            )
            advance(piece_bytes(header, piece))


def pieces(writer: Writer, remote: RemoteCache, part: Part) -> Iterator[Piece]:
    """Runs of blocks that hold missing rows, about PART bytes each."""
    header = remote.header
    first = part.samples.start // header.block_rows
    end = -(-part.samples.stop // header.block_rows)
    for view in part.views:
        missing = writer.missing(view - part.views.start)
        with_samples = view == part.views.start
        together = max(1, PART // piece_bytes(header, Piece(view, 0, 1, with_samples)))
        block = first
        while block < end:
            stop = block
            while stop < min(end, block + together) and _lacks(missing, header, stop, part):
                stop += 1
            if stop > block:
                yield Piece(view, block, stop, with_samples)
            block = max(stop, block + 1)


def _lacks(missing: npt.NDArray[np.bool_], header: Header, block: int, part: Part) -> bool:
    rows = header.block_range(block)
    offset = part.samples.start
    return bool(missing[max(0, rows.start - offset) : max(0, rows.stop - offset)].any())


def piece_bytes(header: Header, piece: Piece) -> int:
    rows = header.block_range(piece.stop - 1).stop - header.block_range(piece.first).start
    axes = ("rows", "samples") if piece.with_samples else ("rows",)
    return rows * sum(array.row_bytes for array in header.arrays if array.axis in axes)


def fetch_piece(remote: RemoteCache, piece: Piece) -> tuple[Arrays, Arrays]:
    """The rows of a piece, and labels and keys if they are wanted, each block checked.

    Raises:
        RemoteError: the server does not give them.
        FormatError: they are not what their digests say.
    """
    header = remote.header
    start, stop = header.block_range(piece.first).start, header.block_range(piece.stop - 1).stop
    rows, known = {}, {}
    for array in header.arrays:
        if array.axis == "rows":
            offset = array.offset + (piece.view * header.samples + start) * array.row_bytes
            raw = remote.file.read(offset, (stop - start) * array.row_bytes)
            rows[array.name] = np.frombuffer(raw, array.dtype).reshape(
                stop - start, *array.shape[2:]
            )
        elif array.axis == "samples" and piece.with_samples:
            raw = remote.file.read_long(
                array.offset + start * array.row_bytes, (stop - start) * array.row_bytes
            )
            known[array.name] = np.frombuffer(raw, array.dtype).reshape(
                stop - start, *array.shape[1:]
            )
    for block in range(piece.first, piece.stop):
        samples = header.block_range(block)
        inside = slice(samples.start - start, samples.stop - start)
        for arrays, digests, what in (
            (rows, remote.digests[piece.view], f"soft targets in view {piece.view}"),
            (known, remote.sample_digests, "labels and keys"),
        ):
            if arrays and digest_of(values[inside] for values in arrays.values()) != digests[block]:
                raise FormatError(
                    f"{remote.file.shown}: the {what} of samples {samples.start} to {samples.stop - 1} do "
                    "not match their digest: it has changed since the pull began, is damaged, or its server "
                    "gives wrong bytes; try again, and softcache verify it where it is"
                )
    return rows, known


def finish_pull(writer: Writer, remote: RemoteCache, part: Part) -> None:
    """Write the header's end: of a whole cache its own, of a part what its rows come to."""
    header = remote.header
    if is_whole(header, part):
        writer.finish(dict(header.summary or {}))
        found = open_cache(writer.path).content_id()
        if found != remote.content_id:
            raise FormatError(
                f"{writer.path} has content id {found}, {remote.file.shown} has {remote.content_id}; pull it "
                "again with --overwrite"
            )
        return
    writer.commit()
    fidelity = (header.summary or {}).get("fidelity")
    writer.finish(summarize(writer.cache) | ({"fidelity": fidelity} if fidelity else {}))


def size_of(remote: RemoteCache, part: Part) -> int:
    """Bytes that a pull of a part fetches, about."""
    header = remote.header
    if is_whole(header, part):
        return header.file_bytes
    rows = len(part.views) * len(part.samples) * header.bytes_per_row
    samples = sum(a.row_bytes for a in header.arrays if a.axis == "samples") * len(part.samples)
    return rows + samples + sum(a.nbytes for a in header.arrays if a.axis == "shared")


def cache_folder() -> Path:
    """Where what is trained from a URL is kept: $XDG_CACHE_HOME/softcache, by default ~/.cache/softcache."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "softcache"


def local_copy(place: str | Path, *, most_views: int | None = None) -> Path:
    """A path as it is; of a URL, the file in the cache folder, which is pulled first if it is not there.

    Args:
        most_views: only so many of its first views are needed.

    Raises:
        SoftcacheError: it cannot be pulled.
    """
    if not is_url(place):
        return Path(place)
    remote = open_remote(str(place))
    header = remote.header
    few = most_views is not None and most_views < header.views
    views = (header.first_view, most_views) if few and most_views else None
    part = select_part(remote, views, None)
    folder = cache_folder() / remote.content_id[:32]
    whole = folder / "whole" / remote.file.name
    if whole.exists():
        return whole
    out = folder / f"views-0-{len(part.views)}" / remote.file.name if few else whole
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # processes of one training ask for the same file: one pulls, the others wait and find it
        with (out.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                inform(
                    f"pulling {remote.file.shown}: {size_of(remote, part):,} bytes into {out.parent}"
                )
                pull(str(place), out, views=views, expect=remote.content_id)
    except OSError as error:
        raise SoftcacheError(
            f"cannot pull {remote.file.shown} into {out.parent} ({error.strerror}); set XDG_CACHE_HOME to a "
            "folder with room, or use softcache pull"
        ) from error
    return out


def _source(out: Path) -> Path:
    partial = partial_path(out)
    return partial.with_name(f"{partial.name}{SOURCE}")
