"""Rank and world size, read in one place; torchrun and accelerate launch set the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those on this host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes there are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
