"""A finished cache to a server, with a card beside it that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from softcache.cache import Cache, open_cache
from softcache.cache.verify import check_damage
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.files.describe import describe
from softcache.files.remote import (
    RemoteCache,
    file_system,
    is_url,
    open_remote,
    public_url,
    without_secrets,
)
from softcache.util.progress import progress

READ_ONLY = ("http", "https")

CARD = "README.md"

MARK = "library_name: softcache"


def push(path: Path, place: str, *, overwrite: bool = False) -> str:
    """Put a cache to a URL or path, `place/` or `place/NAME`, and its card into the same folder.

    The file is verified before, and its header and digests are read back from there after. A card that
    somebody wrote is left alone.

    Raises:
        SettingsError: files cannot be put there, or another file is there.
        FormatError: the cache is damaged or unfinished.
        RemoteError: the server does not take it, or gives back something else.
    """
    scheme = urlsplit(place).scheme if is_url(place) else "file"
    if scheme in READ_ONLY:
        raise SettingsError(
            f"{public_url(place)}: an HTTP server takes no files; expected a path, or a URL of s3, gs or hf"
        )
    cache = open_cache(path)
    if place.endswith("/") or (scheme == "file" and not is_url(place) and Path(place).is_dir()):
        place = f"{place.rstrip('/')}/{path.name}"
    shown = public_url(place)
    filesystem, target = file_system(place)
    try:
        there = filesystem.exists(target)
    except Exception as error:  # servers and libraries fail in many ways
        raise RemoteError(
            f"{shown} cannot be reached ({type(error).__name__}: {without_secrets(str(error))[:300]})"
        ) from None
    if there and not overwrite:
        if _content_id(place) == cache.content_id():
            return f"{shown} is there already, the same: content id {cache.content_id()}"
        raise SettingsError(
            f"{shown} is there already, and is another file; give another name, or --overwrite"
        )
    check_damage(cache)
    try:
        _put(filesystem, path, target, scheme)
        said = _put_card(filesystem, cache, target, shown)
    except Exception as error:  # as above
        raise RemoteError(
            f"{path} cannot be put to {shown} ({type(error).__name__}: "
            f"{without_secrets(str(error))[:300]}); mend that, then run the same command"
        ) from None
    back: RemoteCache = open_remote(place)
    if back.content_id != cache.content_id():
        raise RemoteError(
            f"{shown} has content id {back.content_id} after it was put there, {path} has "
            f"{cache.content_id()}; push it again with --overwrite"
        )
    return f"{shown}: {cache.header.file_bytes:,} bytes, content id {back.content_id}; {said}"


def cache_card(cache: Cache, shown: str, name: str) -> str:
    """Markdown that says of a cache what its header does, and how to use it."""
    header = cache.header
    facts = describe(cache, name)
    data = "" if header.embeds_inputs else f" --data {header.data}"
    return "\n".join(
        [
            "---",
            MARK,
            "tags: [knowledge-distillation, soft-labels]",
            "---",
            "",
            f"# Soft targets of {', '.join(teacher['name'] for teacher in header.teachers)} "
            f"on {header.data}",
            "",
            f"The class probabilities of a teacher for {header.samples:,} samples in {header.views:,} "
            f"view(s), softened at temperature {header.temperature:g}, in one HDF5 file.",
            "",
            *(f"    {line}" for line in facts.splitlines()),
            "",
            "To train a student from it, without the teacher:",
            "",
            f"    softcache pull {shown} -o {name} --expect {cache.content_id()}",
            f"    softcache train {name} --student cnn:16,32,64{data} --out run",
            "",
        ]
    )


def _put(filesystem: Any, path: Path, target: str, scheme: str) -> None:  # noqa: ANN401  # of fsspec
    from fsspec.callbacks import Callback

    with progress("push", path.stat().st_size, "bytes") as advance:

        class Counted(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                advance(inc)

        if scheme != "file":  # a server has the whole of it or nothing
            filesystem.put_file(str(path), target, callback=Counted())
            return
        begun = f"{target}.part"
        filesystem.makedirs(str(Path(target).parent), exist_ok=True)
        filesystem.put_file(str(path), begun, callback=Counted())
        filesystem.mv(begun, target)


def _put_card(filesystem: Any, cache: Cache, target: str, shown: str) -> str:  # noqa: ANN401
    folder, _, name = target.rpartition("/")
    place = f"{folder}/{CARD}"
    if filesystem.exists(place) and MARK not in filesystem.cat_file(place).decode(
        "utf-8", "replace"
    ):
        return f"its {CARD} is somebody's own and was left alone"
    filesystem.pipe_file(place, cache_card(cache, shown, name).encode())
    return f"{CARD} beside it"


def _content_id(place: str) -> str | None:
    try:
        return open_remote(place).content_id
    except (FormatError, RemoteError):
        return None
