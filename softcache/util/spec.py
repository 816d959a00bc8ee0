"""Options behind a specification, written as in the query of a URL: `hf:vit?hidden_size=192`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from softcache.errors import SettingsError


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """What stands before the first `?`, and the options behind it.

    Raises:
        SettingsError: an option has no value, or stands there twice.
    """
    place, mark, query = spec.partition("?")
    if not mark:
        return spec, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise SettingsError(
            f"{spec!r}: options are written NAME=VALUE, with & between them, behind the ?"
        ) from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise SettingsError(f"{spec!r} has an option twice; give each once")
    return place, options


def check_options(options: Mapping[str, str], known: Collection[str], spec: str) -> None:
    """Raise SettingsError if there is an option that is not known."""
    odd = sorted(set(options) - set(known))
    if odd:
        expected = ", ".join(known) or "none"
        raise SettingsError(f"{spec!r}: unknown option {odd[0]!r}; expected {expected}")


def public_place(place: str) -> str:
    """A file or folder of this machine by its name alone, anything else (an id of a hub) as it is."""
    path = Path(place).expanduser()
    local = path.exists() or place.startswith(("/", ".", "~"))
    return path.resolve().name if local else place


def query_of(options: Mapping[str, str]) -> str:
    """Options as they are written behind a specification; the empty text if there are none."""
    query = "&".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"?{query}" if query else ""
