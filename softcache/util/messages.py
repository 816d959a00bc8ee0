"""Error texts of other libraries, shortened for one-line messages."""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """The text of an error on one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
