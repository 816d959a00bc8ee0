"""Is a cache what its digests say, and is it the one that was meant?"""

from __future__ import annotations

from pathlib import Path

from softcache.cache import Cache, open_cache
from softcache.cache.reader import verify as find_damage
from softcache.errors import FormatError
from softcache.progress import progress


def verify(path: Path, expect: str | None = None) -> str:
    """Check every byte; the message of success carries the content id.

    Raises:
        FormatError: bytes do not match their digests, or the content id is not the expected one.
    """
    cache = open_cache(path)
    check_damage(cache)
    content_id = cache.content_id()
    if expect is not None and content_id != expect.strip().lower():
        raise FormatError(
            f"{path} is intact, but it is another cache: its content id is {content_id}, expected "
            f"{expect}"
        )
    return f"{path}: intact, content id {content_id}"


def check_damage(cache: Cache) -> None:
    """Raise FormatError that names the damaged parts, if there are any."""
    header = cache.header
    total = header.views * header.samples * header.bytes_per_row
    with progress("verify", total, "bytes") as advance:
        damage = find_damage(cache, advance)
    if damage:
        more = f", and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise FormatError(
            f"{cache.path} is damaged: {'; '.join(map(str, damage[:5]))}{more}; get it again"
        )
