"""Helpers shared by the tests of headers."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from softcache.cache import Cache, open_cache
from softcache.cache.header import PREAMBLE, parse_preamble, preamble
from softcache.errors import FormatError
from tests.cache.writer_cases import run_dump

JSON = dict[str, Any]
Place = tuple[str | int, ...]  # the path to a value in the header: ("arrays", 0, "name")


class _Gone:
    def __repr__(self) -> str:
        return "gone"  # names a test case alike in every process


GONE = _Gone()  # instead of a value: delete it


# a real cache, and ways to change it
@cache
def tiny_cache() -> bytes:
    """The bytes of a finished cache with two views of 30 samples, in blocks of 8."""
    with TemporaryDirectory() as folder:
        return run_dump(Path(folder) / "tiny.h5")


def header_of(raw: bytes) -> JSON:
    offset, length, _ = parse_preamble(raw, len(raw))
    fields: JSON = json.loads(raw[offset : offset + length])
    return fields


def with_text(raw: bytes, text: bytes) -> bytes:
    """The file with `text` as its header, and a matching preamble."""
    user_block = header_of(raw)["user_block"]
    room = user_block - PREAMBLE.size
    assert len(text) <= room
    return preamble(PREAMBLE.size, text) + text.ljust(room, b"\0") + raw[user_block:]


def with_fields(raw: bytes, fields: JSON) -> bytes:
    return with_text(raw, json.dumps(fields, sort_keys=True).encode("ascii"))


def with_values(raw: bytes, values: dict[Place, Any]) -> bytes:
    """The file with some values of its header replaced, added or deleted (GONE)."""
    fields = header_of(raw)
    for place, value in values.items():
        parent: Any = fields
        for step in place[:-1]:
            parent = parent[step]
        if value is GONE:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
    return with_fields(raw, fields)


def opened(raw: bytes, folder: Path) -> Cache:
    path = folder / "hostile.h5"
    path.write_bytes(raw)
    return open_cache(path)


def refused(raw: bytes, folder: Path, match: str) -> None:
    """Check that the file is refused, by name, with one short line that is safe to print."""
    with pytest.raises(FormatError, match=f"^{re.escape(str(folder))}/hostile.h5: .*{match}") as e:
        opened(raw, folder)
    message = str(e.value)
    assert message.isprintable(), f"content of the file reached the terminal: {message!r}"
    assert len(message) < 500 + len(str(folder))


# fields
WHOLE = "expected a whole number from "
