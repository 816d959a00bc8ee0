"""Rank and world size, from the environment that torchrun and accelerate launch set."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process among all processes, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among the processes on this host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes on all hosts."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
