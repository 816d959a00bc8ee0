"""The local copy of a cache that is trained from a URL: pulled once, checked whenever it is used again."""

from __future__ import annotations

import os
from pathlib import Path

from softcache.cache import open_cache
from softcache.errors import FormatError, SoftcacheError
from softcache.files.pull import pull_into, select_part, size_of
from softcache.files.remote import open_remote
from softcache.util.files import replace_file
from softcache.util.lock import exclusive
from softcache.util.log import inform
from softcache.util.urls import is_url

CONTENT_ID = ".content-id"  # suffix of the file that says what was pulled


def cache_folder() -> Path:
    """The folder for caches that are trained from a URL: $XDG_CACHE_HOME/softcache or ~/.cache/softcache."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "softcache"


def local_copy(source: str | Path, *, most_views: int | None = None) -> Path:
    """The local file of a cache: a path as it is, a URL as a copy in cache_folder(), pulled if necessary.

    Args:
        source: a path or a URL.
        most_views: how many views are needed at most; the first ones are pulled.

    Raises:
        SoftcacheError: the cache cannot be pulled.
    """
    if not is_url(source):
        return Path(source)
    remote = open_remote(str(source))
    header = remote.header
    few = most_views is not None and most_views < header.views
    views = (header.first_view, most_views) if few and most_views else None
    part = select_part(remote, views, None)
    folder = cache_folder() / remote.content_id[:32]
    whole = folder / "whole" / remote.file.name
    if _is_copy(whole, remote.content_id):
        return whole
    out = folder / f"views-0-{len(part.views)}" / remote.file.name if few else whole
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # all processes of a training run need the same file: one pulls it, the others wait for it
        with exclusive(out, wait=True):
            id_file = out.with_name(f"{out.name}{CONTENT_ID}")
            known_id = id_file.read_text("ascii", "replace").strip() if id_file.is_file() else ""
            if not _is_copy(out, known_id if few else remote.content_id):
                if out.exists():
                    inform(f"{out} is not the copy that was pulled; it is pulled again")
                inform(
                    f"pulling {remote.file.shown}: {size_of(remote, part):,} bytes into {out.parent}"
                )
                cache = pull_into(out, remote, part, overwrite=out.exists())
                replace_file(id_file, lambda path: path.write_text(cache.content_id(), "ascii"))
    except OSError as error:
        raise SoftcacheError(
            f"cannot pull {remote.file.shown} into {out.parent} ({error.strerror}); set XDG_CACHE_HOME to a "
            "folder with room, or use softcache pull"
        ) from error
    return out


def _is_copy(path: Path, content_id: str) -> bool:
    """Whether a file is a cache with this content id."""
    try:
        return open_cache(path).content_id() == content_id
    except FormatError:
        return False
