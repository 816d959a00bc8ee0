"""URLs: what in them may be shown, since user, password and query may be secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

# also with a single slash, as pathlib writes a URL that was taken for a path
URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:https?|s3a?|gc?s|hf|ftp|file):/)[^\s'\"<>)\]]+")


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, and no path."""
    return "://" in str(location)


def public_url(location: str) -> str:
    """A URL without user, password, query and fragment; a path as it is."""
    if not is_url(location):
        return location
    chain, separator, url = location.rpartition("::")
    # fsspec chains URLs, as in simplecache::http://…; the :: of an IPv6 address comes after ://
    if separator and "://" not in chain:
        return f"{chain}::{public_url(url)}"
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def without_secrets(text: str) -> str:
    """A text in one line, with its URLs as public_url() returns them."""
    return URL.sub(lambda match: _public(match[0]), " ".join(text.split()))


def _public(url: str) -> str:
    scheme, _, rest = url.partition(":")
    try:
        return public_url(f"{scheme}://{rest.lstrip('/')}")
    except ValueError:  # such as an IPv6 address without its bracket
        return f"{scheme}://…"
