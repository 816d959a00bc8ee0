"""A cache that is cut short or written over while it is read: a message and an exit code, no silent row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import Cache, open_cache
from softcache.errors import FormatError
from softcache.targets.fetch import soft_targets

# the command reads the cache again and again; another thread changes the file after a moment
PROGRAM = """
import os, sys, threading, time
import click
from softcache.cli.commands import Commands
from softcache.cache import open_cache

@click.group(cls=Commands)
def main(): ...

@main.command()
def read():
    cache = open_cache(sys.argv[1])
    threading.Timer(0.2, os.truncate, (sys.argv[1], 4096)).start()
    for _ in range(1_000_000):
        cache.arrays["log_probs"].sum()

main(["read"])
"""


def test_a_cache_that_is_cut_short_ends_in_a_message(cache: Cache, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache.path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "Error: a cache was cut short or overwritten in place while it was being read (SIGBUS); write the "
        "new file under another name and rename it, then run the same command again: finished work is kept"
    ]


@pytest.mark.parametrize("change", ["written", "longer"])
def test_rows_of_a_file_that_was_written_to_are_refused(cache: Cache, change: str) -> None:
    read = soft_targets(open_cache(cache.path), 4.0, torch.device("cpu"))
    rows = np.arange(4)
    read(np.asarray(0), rows)
    with cache.path.open("r+b") as file:
        if change == "written":
            file.seek(cache.header.array("log_probs").offset)
            file.write(bytes(64))
            os.utime(cache.path, ns=(0, 12345))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"x")
    with pytest.raises(
        FormatError, match=r"was written to while it was being read \([\d,]+ bytes before"
    ):
        read(np.asarray(0), rows)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_file_that_was_replaced_is_still_read(cache: Cache, change: str) -> None:
    read = soft_targets(open_cache(cache.path), 4.0, torch.device("cpu"))
    rows = np.arange(4)
    before = read(np.asarray(0), rows)
    if change == "replaced":
        other = cache.path.with_name("other.h5")
        other.write_bytes(b"another file")
        other.replace(cache.path)
    else:
        cache.path.unlink()
    after = read(np.asarray(0), rows)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    assert torch.equal(before, after)
