"""Texts from elsewhere, made fit for where they are shown: a message of one line, a Markdown page."""

from __future__ import annotations

import re

from softcache.errors import printable


def one_line(error: Exception) -> str:
    """The text of an error on one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def as_markdown(text: str) -> str:
    """A text that may hold any characters, for a line of Markdown that shows it as it is."""
    plain = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]()<>#|~$&!])", r"\\\1", plain)
