"""Is a cache what its digests say, and is it the one that was meant?"""

from __future__ import annotations

from pathlib import Path

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.cache.verify import check_damage, damage_list, damage_with_progress
from softcache.cache.writer import mark_missing
from softcache.errors import FormatError


def verify_cache(path: Path, expect: str | None = None) -> str:
    """Check every byte; the message of success carries the content id.

    Raises:
        FormatError: bytes do not match their digests, or the content id is not the expected one.
    """
    cache = open_cache(path, unfinished=True)
    if cache.header.summary is None:
        cache = open_cache(path)  # says how far it is
    check_damage(cache)
    content_id = cache.content_id()
    if expect is not None and content_id != expect.strip().lower():
        raise FormatError(
            f"{path} is intact, but it is another cache: its content id is {content_id}, expected "
            f"{expect}"
        )
    return f"{path}: intact, content id {content_id}"


def repair_cache(path: Path) -> str:
    """Mark damaged blocks as missing, and name the file FILE.partial, so that a dump goes on.

    Raises:
        FormatError: the damage is not in blocks of rows, so that no dump can mend it.
    """
    cache = open_cache(path, unfinished=True)
    damage = damage_with_progress(cache)
    if cache.header.summary is None:
        damage = [part for part in damage if not part.missing]
    lost = [part for part in damage if part.samples is None]
    if lost:
        raise FormatError(
            f"{path} cannot be repaired: {damage_list(lost)} belongs to no block of rows; get it again, "
            "or dump it anew with --overwrite"
        )
    if not damage:
        return f"{path}: nothing to repair"
    partial = path if path.name.endswith(".partial") else partial_path(path)
    if partial != path:
        if partial.exists():
            raise FormatError(f"{partial} is in the way: a dump has begun it; finish or remove it")
        path.replace(partial)
    per_block = cache.header.block_rows
    blocks = [
        (part.view, block)
        for part in damage
        if part.samples
        for block in range(part.samples.start // per_block, -(-part.samples.stop // per_block))
    ]
    mark_missing(partial, blocks)
    return (
        f"{partial}: {len(blocks)} of {cache.header.blocks * (cache.header.views + 1)} blocks marked as "
        f"missing ({damage_list(damage)}); the softcache dump that made it fills them again"
    )
