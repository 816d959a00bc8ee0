"""Verify a cache against its digests and an expected content id, and repair damaged blocks."""

from __future__ import annotations

from pathlib import Path

from softcache.cache import open_cache
from softcache.cache.reader import PARTIAL, partial_path
from softcache.cache.verify import check_damage, damage_list, damage_with_progress
from softcache.cache.writer import mark_missing
from softcache.errors import FormatError
from softcache.util.lock import exclusive


def verify_cache(path: Path, expect: str | None = None) -> str:
    """Check every byte of a cache.

    Args:
        path: the cache.
        expect: the content id that it must have, in any case.

    Returns:
        A line with the content id.

    Raises:
        FormatError: bytes do not match their digests, or the content id is not the expected one.
    """
    cache = open_cache(path, unfinished=True)
    if cache.header.summary is None:
        cache = open_cache(path)  # raises an error that says how many blocks are missing
    check_damage(cache)
    content_id = cache.content_id()
    if expect is not None and content_id != expect.strip().lower():
        raise FormatError(
            f"{path} is intact, but it is another cache: its content id is {content_id}, expected "
            f"{expect}; check where you got the file and the id"
        )
    return f"{path}: intact, content id {content_id}"


def repair_cache(path: Path) -> str:
    """Mark damaged blocks as missing and rename the file to FILE.partial, so that a dump can fill them.

    Args:
        path: a finished cache, or an unfinished FILE.partial.

    Returns:
        A line that says what was marked, and what to do next.

    Raises:
        FormatError: there is damage outside the blocks of rows, which a dump cannot fill, or FILE.partial
            already exists.
    """
    final = path.with_name(path.name.removesuffix(PARTIAL))
    with exclusive(final):
        return _repair(path)


def _repair(path: Path) -> str:
    """Repair a file whose lock is held; see repair_cache()."""
    cache = open_cache(path, unfinished=True)
    damage = damage_with_progress(cache)
    if cache.header.summary is None:
        damage = [part for part in damage if not part.missing]
    irreparable = [part for part in damage if part.samples is None]
    if irreparable:
        raise FormatError(
            f"{path} cannot be repaired, since not only blocks of rows are damaged: "
            f"{damage_list(irreparable)}; get the file again, or dump it again with --overwrite"
        )
    if not damage:
        return f"{path}: nothing to repair"
    partial = path if path.name.endswith(PARTIAL) else partial_path(path)
    if partial != path:
        if partial.exists():
            raise FormatError(
                f"{partial} is in the way: another dump has started it; finish that dump, or remove it"
            )
        path.replace(partial)
    block_rows = cache.header.block_rows
    blocks = [
        (part.view, block)
        for part in damage
        if part.samples
        for block in range(part.samples.start // block_rows, -(-part.samples.stop // block_rows))
    ]
    mark_missing(partial, blocks)
    return (
        f"{partial}: {len(blocks)} of {cache.header.blocks * (cache.header.views + 1)} blocks marked as "
        f"missing ({damage_list(damage)}); the softcache dump that made it fills them again"
    )
