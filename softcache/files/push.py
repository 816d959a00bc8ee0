"""Upload a finished cache to a server, with a card that describes it."""

from __future__ import annotations

import os
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from softcache.cache import Cache, open_cache
from softcache.cache.verify import check_damage
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.files.describe import describe
from softcache.files.remote import RemoteCache, file_system, open_remote
from softcache.util.lock import exclusive
from softcache.util.messages import as_markdown
from softcache.util.progress import progress
from softcache.util.urls import is_url, public_url, without_secrets

READ_ONLY = ("http", "https")  # schemes

CARD = "README.md"

MARK = "library_name: softcache"  # a card without this line is not ours to replace


def push(path: Path, destination: str, *, overwrite: bool = False) -> str:
    """Upload a cache, and its card into the same folder.

    The cache is verified first; afterwards its header and digests are read back. A card that somebody
    else wrote is kept.

    Args:
        path: the cache.
        destination: a URL or path: FOLDER/ or FOLDER/NAME.
        overwrite: replace another file at the destination.

    Returns:
        A line that says what was uploaded.

    Raises:
        SettingsError: files cannot be uploaded there, or the destination is another file.
        FormatError: the cache is damaged or unfinished.
        RemoteError: the upload fails, or what is read back is not this cache.
    """
    scheme = urlsplit(destination).scheme if is_url(destination) else "file"
    if scheme in READ_ONLY:
        raise SettingsError(
            f"{public_url(destination)}: an HTTP server does not accept uploads; expected a path, or a URL "
            "with s3, gs or hf"
        )
    cache = open_cache(path)
    is_local_folder = scheme == "file" and not is_url(destination) and Path(destination).is_dir()
    if destination.endswith("/") or is_local_folder:
        destination = f"{destination.rstrip('/')}/{path.name}"
    filesystem, target = file_system(destination)
    with exclusive(Path(target)) if scheme == "file" else nullcontext():
        return _push_to(destination, filesystem, target, cache, scheme, overwrite=overwrite)


def _push_to(
    destination: str,
    filesystem: Any,  # noqa: ANN401  # an fsspec.AbstractFileSystem
    target: str,
    cache: Cache,
    scheme: str,
    *,
    overwrite: bool,
) -> str:
    """Copy a cache to a place whose lock is held, if it is on a disk; see push()."""
    path, shown = cache.path, public_url(destination)
    try:
        exists = filesystem.exists(target)
    except Exception as error:  # servers and libraries fail in many ways
        raise RemoteError(
            f"{shown} cannot be reached ({type(error).__name__}: {without_secrets(str(error))[:300]}); "
            "check the URL and your credentials"
        ) from None
    if exists and not overwrite:
        if _content_id(destination) == cache.content_id():
            return f"{shown} already holds this cache: content id {cache.content_id()}"
        raise SettingsError(
            f"{shown} already exists, and is another file; give another name, or --overwrite"
        )
    check_damage(cache)
    try:
        _upload(filesystem, path, target, scheme)
        card_note = _upload_card(filesystem, cache, target, shown)
    except Exception as error:  # as above
        raise RemoteError(
            f"{path} cannot be uploaded to {shown} ({type(error).__name__}: "
            f"{without_secrets(str(error))[:300]}); fix that, then run the same command"
        ) from None
    uploaded: RemoteCache = open_remote(destination)
    if uploaded.content_id != cache.content_id():
        raise RemoteError(
            f"{shown} has content id {uploaded.content_id} after the upload, {path} has "
            f"{cache.content_id()}; push it again with --overwrite"
        )
    return (
        f"{shown}: {cache.header.file_bytes:,} bytes, content id {uploaded.content_id}; {card_note}"
    )


def cache_card(cache: Cache, shown: str, name: str) -> str:
    """A Markdown card: what the cache holds, and how to train from it.

    Args:
        cache: the cache that is uploaded.
        shown: its URL, without secrets.
        name: its file name.
    """
    header = cache.header
    data = [] if header.embeds_inputs else ["--data", header.data]
    pull = ["softcache", "pull", shown, "-o", name, "--expect", cache.content_id()]
    train = ["softcache", "train", name, "--student", "cnn:16,32,64", *data, "--out", "run"]
    teachers = ", ".join(teacher["name"] for teacher in header.teachers)
    return "\n".join(
        [
            "---",
            MARK,
            "tags: [knowledge-distillation, soft-labels]",
            "---",
            "",
            f"# Soft targets of {as_markdown(teachers)} on {as_markdown(header.data)}",
            "",
            f"The class probabilities of a teacher for {header.samples:,} samples in {header.views:,} "
            f"view(s), softened at temperature {header.temperature:g}, in one HDF5 file.",
            "",
            *(f"    {line}" for line in describe(cache, name).splitlines()),
            "",
            "To train a student from it, without the teacher:",
            "",
            f"    {shlex.join(pull)}",
            f"    {shlex.join(train)}",
            "",
        ]
    )


def _upload(filesystem: Any, path: Path, target: str, scheme: str) -> None:  # noqa: ANN401
    from fsspec.callbacks import Callback

    with progress("push", path.stat().st_size, "bytes") as advance:

        class ProgressCallback(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                advance(inc)

        if scheme != "file":  # an object store makes the file visible only when it is complete
            filesystem.put_file(str(path), target, callback=ProgressCallback())
            return
        unfinished = f"{target}.{os.getpid()}.part"  # two may push at once
        filesystem.makedirs(str(Path(target).parent), exist_ok=True)
        try:
            filesystem.put_file(str(path), unfinished, callback=ProgressCallback())
            filesystem.mv(unfinished, target)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise


def _upload_card(filesystem: Any, cache: Cache, target: str, shown: str) -> str:  # noqa: ANN401
    """Write the card unless somebody else's is in its place; returns a note on what was done."""
    folder, _, name = target.rpartition("/")
    card = f"{folder}/{CARD}"
    if filesystem.exists(card) and MARK not in filesystem.cat_file(card).decode("utf-8", "replace"):
        return f"the {CARD} there is not a softcache card and was kept"
    filesystem.pipe_file(card, cache_card(cache, shown, name).encode())
    return f"with {CARD}"


def _content_id(location: str) -> str | None:
    """The content id of a finished cache; None if there is no such cache."""
    try:
        return open_remote(location).content_id
    except (FormatError, RemoteError):
        return None
