"""Notes about how samples are read, each logged once in a process."""

from __future__ import annotations

from functools import cache

from softcache.util.log import inform


@cache
def inform_once(text: str) -> None:
    """Log a finding, unless this process has logged the same text before."""
    inform(text)
