"""Texts of other libraries, for messages of one line."""

from __future__ import annotations


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
